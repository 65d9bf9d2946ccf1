// Uses the threads of the OpenMP that torch has loaded into the process, because a second pool would
// compete for the same cores. Nothing links to OpenMP: its entry point is looked up when first
// needed. If there is none, plain threads are started.

#include "parallel.h"

#include <dlfcn.h>
#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <exception>
#include <thread>
#include <vector>

namespace {

// The entry point that GNU's, LLVM's and Intel's OpenMP all have.
using Fork = void (*)(void (*)(void*), void*, unsigned threads, unsigned flags);

// A forked child has none of its parent's threads, and OpenMP would wait for them forever.
std::atomic<bool> is_forked_child{false};

// Registered when the library is loaded, because the first use may be after a fork.
const int registered = pthread_atfork(nullptr, nullptr, [] { is_forked_child = true; });

Fork openmp() {
  static const Fork found = reinterpret_cast<Fork>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  return found;
}

struct Job {
  void (*work)(void*, int);
  void* context;
  int pieces;
  std::atomic<int> next{0};
  std::atomic<bool> has_failed{false};
  std::exception_ptr failure;  // of the piece that failed first

  // No exception may leave it, because a thread that one leaves ends the process.
  void run() noexcept {
    for (int piece; (piece = next.fetch_add(1, std::memory_order_relaxed)) < pieces;) {
      try {
        work(context, piece);
      } catch (...) {
        if (!has_failed.exchange(true)) failure = std::current_exception();
        next.store(pieces, std::memory_order_relaxed);  // nobody takes another piece
      }
    }
  }
};

// Runs the job on up to `threads` plain threads, this one among them: fewer if the system has none.
void run_on_threads(Job& job, int threads) {
  std::vector<std::thread> others;
  try {
    others.reserve(threads - 1);
    for (int t = 1; t < threads; ++t) others.emplace_back([&job] { job.run(); });
  } catch (const std::exception&) {
  }
  job.run();
  for (std::thread& thread : others) thread.join();
}

// Whether the system has room for so many threads. OpenMP ends the process if it has not.
bool can_start(int threads) {
  // OpenMP keeps a pool for each thread that calls it.
  thread_local int started = 1;
  if (threads <= started) return true;
  std::vector<std::thread> trial;
  std::atomic<bool> go{false};
  bool all = true;
  try {
    trial.reserve(threads - 1);
    for (int t = 1; t < threads; ++t)
      trial.emplace_back([&go] {
        while (!go) std::this_thread::yield();
      });
  } catch (const std::exception&) {
    all = false;
  }
  go = true;
  for (std::thread& thread : trial) thread.join();
  if (all) started = threads;
  return all;
}

}  // namespace

void after_fork() { is_forked_child = true; }

void parallel(int threads, int pieces, void (*work)(void*, int), void* context) {
  Job job{work, context, pieces};
  threads = std::min(threads, pieces);
  const Fork fork = openmp();
  if (threads <= 1 || is_forked_child || registered != 0)
    job.run();
  else if (fork == nullptr)
    run_on_threads(job, threads);
  else if (can_start(threads))
    fork([](void* job) { static_cast<Job*>(job)->run(); }, &job, threads, 0);
  else
    job.run();
  if (job.failure) std::rethrow_exception(job.failure);
}

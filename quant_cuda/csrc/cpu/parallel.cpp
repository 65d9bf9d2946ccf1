// Uses the threads of the OpenMP that torch has loaded into the process, because a second pool would
// compete for the same cores. Nothing links to OpenMP: its entry point is looked up when first
// needed. If there is none, plain threads are started.

#include "parallel.h"

#include <dlfcn.h>
#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <thread>
#include <vector>

namespace {

// The entry point that GNU's, LLVM's and Intel's OpenMP all have.
using Fork = void (*)(void (*)(void*), void*, unsigned threads, unsigned flags);

// A forked child has none of its parent's threads, and OpenMP would wait for them forever.
std::atomic<bool> is_forked_child{false};

Fork openmp() {
  static const Fork found = [] {
    pthread_atfork(nullptr, nullptr, [] { is_forked_child = true; });
    return reinterpret_cast<Fork>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  }();
  return found;
}

struct Job {
  void (*work)(void*, int);
  void* context;
  int pieces;
  std::atomic<int> next{0};

  void run() {
    for (int piece; (piece = next.fetch_add(1, std::memory_order_relaxed)) < pieces;)
      work(context, piece);
  }
};

}  // namespace

void parallel(int threads, int pieces, void (*work)(void*, int), void* context) {
  Job job{work, context, pieces};
  threads = std::min(threads, pieces);
  const Fork fork = openmp();
  if (threads <= 1 || is_forked_child) return job.run();
  if (fork != nullptr)
    return fork([](void* job) { static_cast<Job*>(job)->run(); }, &job, threads, 0);
  std::vector<std::thread> others;
  for (int t = 1; t < threads; ++t) others.emplace_back([&job] { job.run(); });
  job.run();
  for (std::thread& thread : others) thread.join();
}

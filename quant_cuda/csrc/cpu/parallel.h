// Runs one piece of work on several threads.
#pragma once

// Calls work(context, 0..pieces-1), each once, on up to `threads` threads; returns when all are done.
// If a piece throws, those that nobody has begun are left out, and the exception is thrown here.
void parallel(int threads, int pieces, void (*work)(void* context, int piece), void* context);

// Work runs on the calling thread alone from here on, as in a child that was forked after loading.
void after_fork();

template <typename Work>
void parallel_for(int threads, int pieces, const Work& work) {
  parallel(
      threads, pieces,
      [](void* context, int piece) { (*static_cast<const Work*>(context))(piece); },
      const_cast<Work*>(&work));
}

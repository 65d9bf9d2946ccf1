// Runs one piece of work on several threads.
#pragma once

// Calls work(context, 0..pieces-1), each once, on up to `threads` threads; returns when all are done.
void parallel(int threads, int pieces, void (*work)(void* context, int piece), void* context);

template <typename Work>
void parallel_for(int threads, int pieces, const Work& work) {
  parallel(
      threads, pieces,
      [](void* context, int piece) { (*static_cast<const Work*>(context))(piece); },
      const_cast<Work*>(&work));
}

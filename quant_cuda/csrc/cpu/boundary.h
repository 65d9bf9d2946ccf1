// Exceptions end at the C entry points, because ctypes cannot pass them on.
//
// Included by portable files alone.
#pragma once

#include <exception>
#include <new>

enum { DONE, NO_MEMORY, FAILED };

// Keeps the text for quant_cuda_error, for this thread.
void keep_error(const char* text) noexcept;

// Calls work() and returns DONE, or what it threw as a code; quant_cuda/cpu/library.py raises it.
template <typename Work>
int guarded(const Work& work) noexcept {
  try {
    work();
    return DONE;
  } catch (const std::bad_alloc&) {
    return NO_MEMORY;
  } catch (const std::exception& error) {
    keep_error(error.what());
  } catch (...) {
    keep_error("unknown error");
  }
  return FAILED;
}

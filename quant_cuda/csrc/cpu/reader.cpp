// Reads bytes and does nothing else: the limit that a matmul of one row is measured against.

#include <algorithm>
#include <atomic>
#include <cstdint>

#include "boundary.h"
#include "parallel.h"

#pragma GCC visibility push(default)
extern "C" {

// The exclusive or of the 64-bit words of `bytes` bytes, a multiple of 64, to *result. Returns a code
// of boundary.h.
int quant_cuda_read(const uint64_t* data, int64_t bytes, int threads, uint64_t* result) {
  constexpr int64_t PIECE = 1 << 16;
  std::atomic<uint64_t> all{0};
  const int pieces = static_cast<int>((bytes + PIECE - 1) / PIECE);
  const auto read = [&](int piece) {
    const int64_t from = piece * PIECE / 8, to = std::min((piece + 1) * PIECE, bytes) / 8;
    uint64_t mixed[8] = {};
    for (int64_t i = from; i < to; i += 8) {
      __builtin_prefetch(data + i + 256);
      for (int j = 0; j < 8; ++j) mixed[j] ^= data[i + j];
    }
    uint64_t own = 0;
    for (const uint64_t word : mixed) own ^= word;
    all.fetch_xor(own, std::memory_order_relaxed);
  };
  const int code = guarded([&] { parallel_for(threads, pieces, read); });
  *result = all;
  return code;
}

}
#pragma GCC visibility pop

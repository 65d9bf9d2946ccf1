// Where the integers of a packed weight are, for nvcc and for the host's compiler.
//
// There are two layouts: the bit stream of docs/format.md, which quant_cuda/packing.py defines, and
// the tiles that the GPU kernels read, which quant_cuda/cuda/layout.py makes.
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef __CUDACC__
#define HOST_DEVICE __host__ __device__ __forceinline__
#else
#define HOST_DEVICE inline
#endif

namespace layout {

// Value k of a column in the stream. `words`: the column's first word; `stride`: words from one of
// its words to the next.
template <int BITS>
HOST_DEVICE uint32_t stream_value(const uint32_t* words, size_t stride, int k) {
  const int bit = k * BITS, shift = bit % 32;
  const uint32_t* word = words + static_cast<size_t>(bit / 32) * stride;
  uint32_t value = word[0] >> shift;
  if (shift + BITS > 32) value |= word[stride] << (32 - shift);  // 3-bit values may straddle
  return value & ((1u << BITS) - 1);
}

// Tiles, for 4 and 8 bits. A tile is 16 columns (outputs); it is cut along the inputs into blocks
// of 1 KiB. In a block, lane 4 * g + t of a warp owns 16 bytes of column g and 16 bytes of column
// g + 8: its inputs are 8 * t .. 8 * t + 7 of every run of 32 inputs, so that a warp's 16-byte loads
// are whole cache lines and what it loads is the A operand of mma.m16n8k16, with the 32 inputs of
// a run taken in the order 8 * t + {0, 1, 2, 3} then 8 * t + {4, 5, 6, 7} over t = 0..3.
constexpr int TILE = 16;
constexpr int RUN = 32;
constexpr int LANES = 32;
constexpr int BLOCK_WORDS = 256;

// Inputs in a block: 128 for 4 bits, 64 for 8.
template <int BITS>
constexpr int block_inputs = BLOCK_WORDS * 32 / BITS / TILE;

template <int BITS>
HOST_DEVICE int block_count(int inputs) {
  return (inputs + block_inputs<BITS> - 1) / block_inputs<BITS>;
}

// The shift of value e of a lane's 8 inputs in its word. 4-bit values 2 * p and 2 * p + 1 are 16 bits
// apart, so that one mask extracts both of a pair. 8-bit values fill two words in order.
template <int BITS>
HOST_DEVICE int field_shift(int e) {
  return BITS == 4 ? 16 * (e % 2) + 4 * (e / 2) : 8 * (e % 4);
}

struct Place {
  size_t word;
  int shift;
};

// The place of the integer of (input, column), in a weight of `blocks` blocks a tile.
template <int BITS>
HOST_DEVICE Place place(int input, int column, int blocks) {
  constexpr int per_run = BITS / 4;  // words of a lane in a run
  const int block = input / block_inputs<BITS>, run = input % block_inputs<BITS> / RUN;
  const int t = input % RUN / 8, e = input % 8;
  const int half = column % TILE / 8, g = column % 8;
  const size_t first = (static_cast<size_t>(column / TILE) * blocks + block) * BLOCK_WORDS;
  const int word = run * per_run + e * BITS / 32;
  return {first + (half * LANES + 4 * g + t) * 4 + word, field_shift<BITS>(e)};
}

}  // namespace layout

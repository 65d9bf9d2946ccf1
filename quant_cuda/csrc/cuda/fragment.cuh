// Makes the A operand of the tensor cores from packed words. Columns of the weight are the operand's
// rows; activations are the B operand, so that up to eight rows of them fill it.
#pragma once

#include "common.cuh"

// An entry of the table, one for each column: the scale as float16 in the lower half,
// the zero point, 0..256, in the upper.
struct Grid {
  uint32_t entry;

  __device__ float scale() const {
    return __half2float(__ushort_as_half(static_cast<uint16_t>(entry)));
  }
  __device__ uint32_t zero() const { return entry >> 16; }
};

// Converts integers of a word to exact differences q - zero, in pairs of T.
//
// An integer that is OR-ed into the mantissa below the exponent of 2**m counts in units of the last
// bit, so that one subtraction leaves q - zero: 0x6400 is 1024 in float16, 0x4300 is 128 in bfloat16
// (which has room for 4-bit integers only), 0x4B000000 is 2**23 in float32.
template <int BITS, typename T>
struct Expander;

template <>
struct Expander<4, half_t> {
  uint32_t below, below16;

  __device__ explicit Expander(uint32_t zero)
      : below(0x64006400u + zero * 0x00010001u), below16(0xD400D400u + zero * 0x00100010u) {}

  // Pairs 2 * s and 2 * s + 1 of a word, s 0 or 1. A value in bits 4..7 counts sixteenfold, from
  // 1024 on: it is divided by 16, less 64 and the zero point.
  __device__ void operator()(uint32_t word, uint32_t& first, uint32_t& second) const {
    first = half2_sub(and_or<0x000F000Fu, 0x64006400u>(word), below);
    second = half2_fma(and_or<0x00F000F0u, 0x64006400u>(word), 0x2C002C00u, below16);
  }
};

template <>
struct Expander<4, bfloat_t> {
  uint32_t below;

  // -(128 + zero): bfloat16 subtracts by a fused multiply-add with one.
  __device__ explicit Expander(uint32_t zero) : below(0xC300C300u + zero * 0x00010001u) {}

  __device__ void operator()(uint32_t word, uint32_t& first, uint32_t& second) const {
    first = bfloat2_fma(and_or<0x000F000Fu, 0x43004300u>(word), 0x3F803F80u, below);
    second = bfloat2_fma(and_or<0x000F000Fu, 0x43004300u>(word >> 4), 0x3F803F80u, below);
  }
};

template <>
struct Expander<8, half_t> {
  uint32_t below;

  __device__ explicit Expander(uint32_t zero) : below(0x64006400u + zero * 0x00010001u) {}

  __device__ void operator()(uint32_t word, uint32_t& first, uint32_t& second) const {
    first = half2_sub(pick_bytes<0x4140u>(word, 0x64646464u), below);
    second = half2_sub(pick_bytes<0x4342u>(word, 0x64646464u), below);
  }
};

template <>
struct Expander<8, bfloat_t> {
  float below;

  __device__ explicit Expander(uint32_t zero) : below(8388608.0f + static_cast<float>(zero)) {}

  __device__ void operator()(uint32_t word, uint32_t& first, uint32_t& second) const {
    first = bfloat2_of(number<0x7440u>(word), number<0x7441u>(word));
    second = bfloat2_of(number<0x7442u>(word), number<0x7443u>(word));
  }

  template <uint32_t SELECT>
  __device__ float number(uint32_t word) const {
    return __uint_as_float(pick_bytes<SELECT>(word, 0x4B000000u)) - below;
  }
};

// A lane's words of 16 columns of one block: of column lane / 4 and of column lane / 4 + 8.
struct Piece {
  uint32_t words[2][4];

  // `tile` is the first word of the block.
  __device__ void load(const uint32_t* block, int lane) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint4 v = load_once(reinterpret_cast<const uint4*>(block) + half * 32 + lane);
      words[half][0] = v.x;
      words[half][1] = v.y;
      words[half][2] = v.z;
      words[half][3] = v.w;
    }
  }

  // `mine`: this lane's 16 bytes of the first column; those of the other are 32 lanes further.
  __device__ void take(const uint4* mine) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint4 v = mine[half * 32];
      words[half][0] = v.x;
      words[half][1] = v.y;
      words[half][2] = v.z;
      words[half][3] = v.w;
    }
  }
};

// The two A operands of one run of 32 inputs, for its first and its last 16.
template <int BITS, typename T>
__device__ __forceinline__ void expand_run(const Piece& piece, int run,
                                           const Expander<BITS, T> (&expand)[2],
                                           uint32_t (&a)[2][4]) {
#pragma unroll
  for (int half = 0; half < 2; ++half)
#pragma unroll
    for (int step = 0; step < 2; ++step) {
      const uint32_t word = BITS == 4 ? piece.words[half][run] >> (8 * step)
                                      : piece.words[half][(2 * run + step) % 4];
      expand[half](word, a[step][half], a[step][2 + half]);
    }
}

// The dequantized values of a pair of exact differences, each rounded once.
__device__ __forceinline__ uint32_t scale_pair(uint32_t pair, const Grid& grid, half_t) {
  return half2_mul(pair, pick_bytes<0x1010u>(grid.entry, 0));
}

__device__ __forceinline__ uint32_t scale_pair(uint32_t pair, const Grid& grid, bfloat_t) {
  const float scale = grid.scale();
  return bfloat2_of(__fmul_rn(__uint_as_float(pair << 16), scale),
                    __fmul_rn(__uint_as_float(pair & 0xFFFF0000u), scale));
}

// d += scale * s for the rows of an accumulator, which are columns lane / 4 and lane / 4 + 8.
__device__ __forceinline__ void add_scaled(float (&d)[4], const float (&s)[4], const Grid (&grid)[2]) {
  d[0] = __fmaf_rn(grid[0].scale(), s[0], d[0]);
  d[1] = __fmaf_rn(grid[0].scale(), s[1], d[1]);
  d[2] = __fmaf_rn(grid[1].scale(), s[2], d[2]);
  d[3] = __fmaf_rn(grid[1].scale(), s[3], d[3]);
}

// A word whose lowest pair, in the order of `Expander`, is inputs 2t and 2t + 1 of these eight.
template <int BITS>
__device__ __forceinline__ uint32_t pair_of(const uint32_t (&eight)[4], int run, int t) {
  if (BITS == 4) return eight[run] >> (4 * t);
  return pick_bytes(eight[2 * run % 4], eight[(2 * run + 1) % 4], 2 * t | (2 * t + 1) << 4);
}

// All words of a lane's two columns of a block in shared memory, those of the four lanes that have them:
// (column, lane, word). For x in its natural order.
struct WholeTile {
  uint32_t words[2][4][4];

  __device__ void load(const char* block, int g) {
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int eight = 0; eight < 4; ++eight) {
        const uint4 v = reinterpret_cast<const uint4*>(block)[half * layout::LANES + 4 * g + eight];
        words[half][eight][0] = v.x;
        words[half][eight][1] = v.y;
        words[half][eight][2] = v.z;
        words[half][eight][3] = v.w;
      }
  }

  // The dequantized values of a run of 32 inputs as A operands, for its first and its last 16.
  template <int BITS, typename T>
  __device__ void expand(int run, int t, const Grid (&grid)[2], uint32_t (&a)[2][4]) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const Expander<BITS, T> expander(grid[half].zero());
#pragma unroll
      for (int eight = 0; eight < 4; ++eight) {
        uint32_t pair, unused;
        expander(pair_of<BITS>(words[half][eight], run, t), pair, unused);
        a[eight / 2][half + eight % 2 * 2] = scale_pair(pair, grid[half], T());
      }
    }
  }
};

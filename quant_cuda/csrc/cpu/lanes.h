// Vectors over the outputs of a layer, for the solver, which takes a tile of outputs at a time.
// Outputs are independent, so a tile stays in cache from the first column to the last.
//
// Included by files that are compiled once for each instruction set.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace {

#if defined(__AVX512F__)
constexpr int WIDTH = 16;
#elif defined(__AVX__)
constexpr int WIDTH = 8;
#else
constexpr int WIDTH = 4;
#endif
constexpr int LANES = 32;
constexpr int PARTS = LANES / WIDTH;
// The sums of STRIP rows by PAIR vectors, with their operands, fill 16 registers.
constexpr int STRIP = 6;
constexpr int PAIR = 2;
constexpr float HALF_SMALLEST = 5.9604644775390625e-08f;
constexpr float HALF_NORMAL = 6.103515625e-05f;
constexpr float HALF_MAX = 65504.0f;

typedef float vec __attribute__((vector_size(WIDTH * sizeof(float)), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(WIDTH * sizeof(int32_t)), aligned(4), may_alias));
typedef uint8_t bytes __attribute__((vector_size(WIDTH), aligned(1), may_alias));

// One number for each output of a tile.
struct Row {
  vec part[PARTS];
};

inline vec fill(float x) {
  vec v;
  for (int i = 0; i < WIDTH; ++i) v[i] = x;
  return v;
}

inline vec least(vec a, vec b) { return a < b ? a : b; }
inline vec greatest(vec a, vec b) { return a > b ? a : b; }

// The nearest integer, ties to even. Beyond 2**22 it may be off by a few; callers clamp it anyway.
inline vec nearest(vec x) {
  const vec magic = fill(12582912.0f);
  return (x + magic) - magic;
}

// A scale rounded as checkpoints store it: float16, positive, finite. Adding 1.5 * 2**13 times its power of
// two leaves eleven bits, the last one even in a tie; below 2**-14 the bits end at 2**-24.
inline vec stored(vec scale) {
  scale = least(greatest(scale, fill(HALF_SMALLEST)), fill(HALF_MAX));
  const vec power = (vec)((ivec)scale & 0x7f800000);
  const vec magic = greatest(power, fill(HALF_NORMAL)) * 12288.0f;
  return (scale + magic) - magic;
}

// Adds to sum[r], for ROWS rows of a, the products a[r][j] * e[j] over j < count.
template <int ROWS>
inline void accumulate(vec (&sum)[ROWS][PAIR], const float* a, size_t stride, const Row* e, int first,
                       int count) {
  for (int j = 0; j < count; ++j)
    for (int r = 0; r < ROWS; ++r)
      for (int p = 0; p < PAIR; ++p) sum[r][p] += a[r * stride + j] * e[j].part[first + p];
}

// Contiguous copies of the square blocks along the diagonal of a matrix: rows of a large matrix that
// are used together would evict each other from the cache.
struct DiagonalBlocks {
  std::vector<float> numbers;
  std::vector<size_t> place;  // by a block's first column

  // matrix: (inputs, inputs); block j..end(j) for each j with end(j) > j.
  template <typename End>
  DiagonalBlocks(const float* matrix, int inputs, bool transposed, const End& end) : place(inputs) {
    const size_t n = inputs;
    for (size_t j = 0; j < n; ++j) {
      const size_t stop = end(j) > static_cast<int>(j) ? end(j) : j;
      place[j] = numbers.size();
      for (size_t row = j; row < stop; ++row)
        for (size_t k = j; k < stop; ++k)
          numbers.push_back(transposed ? matrix[k * n + row] : matrix[row * n + k]);
    }
  }

  const float* at(int j) const { return numbers.data() + place[j]; }
};

}  // namespace

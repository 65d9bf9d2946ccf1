// Activations: rows of x converted for the kernels, and results converted to x's type.
//
// Included by files that are compiled once for each instruction set.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__F16C__)
#include <immintrin.h>
#endif

#include "product_args.h"
#include "tiles.h"

namespace {

constexpr int MAX_LENGTH = MAX_RUN * UNIT;

// Rows of x in the order in which the kernels read them: by run, by row, (by digit, lowest first,)
// by input.
struct Activations {
  int rows = 0;
  std::vector<int8_t> digits;
  std::vector<float> numbers;
  std::vector<float> scale;  // (runs, rows): of the fixed-point numbers
  std::vector<float> sums;   // (runs, rows, digits): of each digit over the run
};

inline float as_float(const void* x, int kind, size_t i) {
  if (kind == FLOAT32) return static_cast<const float*>(x)[i];
  const uint16_t half = static_cast<const uint16_t*>(x)[i];
  if (kind == FLOAT16) return half_to_float(half);
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// Rounds to nearest, ties to even; GCC has _Float16 in C++ for x86 from version 12 on only.
inline uint16_t to_half(float value) {
#if defined(__F16C__)
  return static_cast<uint16_t>(_cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT));
#else
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const uint32_t sign = bits >> 16 & 0x8000;
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00 | (bits >> 13 & 0x3ff));
  if (bits >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);  // rounds to infinity
  if (bits >= 0x38800000) {
    const uint32_t rounded = bits + 0xfff + (bits >> 13 & 1);
    return static_cast<uint16_t>(sign | ((rounded - 0x38000000) >> 13));
  }
  // Below 2**-14 the bits end at 2**-24: adding 1/2 leaves those in the last places.
  float magnitude;
  std::memcpy(&magnitude, &bits, 4);
  magnitude += 0.5f;
  std::memcpy(&bits, &magnitude, 4);
  return static_cast<uint16_t>(sign | (bits - 0x3f000000));
#endif
}

inline void store(void* y, int kind, size_t i, float value) {
  if (kind == FLOAT32) {
    static_cast<float*>(y)[i] = value;
  } else if (kind == FLOAT16) {
    static_cast<uint16_t*>(y)[i] = to_half(value);
  } else {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    // Rounds to nearest, ties to even; NaN stays NaN.
    const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    static_cast<uint16_t*>(y)[i] = static_cast<uint16_t>(value == value ? rounded : 0x7fc0);
  }
}

// The largest magnitude, compared as bits, which have the same order; NaN is above infinity.
inline uint32_t largest(const float* x, int count) {
  uint32_t most = 0;
  for (int i = 0; i < count; ++i) {
    uint32_t bits;
    std::memcpy(&bits, x + i, 4);
    most = std::max(most, bits & 0x7fffffff);
  }
  return most;
}

constexpr float largest_fixed(int digits) { return digits == 1 ? 127 : 32512; }

// The scale of this run's fixed-point integers; NaN if x has a NaN or an infinity in the run.
inline float fixed_scale(const float* x, int count, int digits) {
  const uint32_t most = largest(x, count);
  if (most >= 0x7f800000) return __builtin_nanf("");
  float magnitude;
  std::memcpy(&magnitude, &most, 4);
  return std::max(magnitude, 1e-30f) / largest_fixed(digits);
}

inline void to_integers(const float* x, int count, float scale, int32_t* integers) {
  const float inverse = 1 / scale;
  if (scale != scale) {
    std::fill(integers, integers + count, 0);
    return;
  }
  for (int i = 0; i < count; ++i)
    integers[i] = static_cast<int32_t>(__builtin_rintf(x[i] * inverse));
}

// Converts row `row` of a chunk; `line` has room for inputs + 1 floats.
void lay_out(const ProductArgs& args, const Plan& plan, size_t from, int row, bool fixed, float* line,
             Activations& to) {
  const size_t first = from * plan.inputs;
  if (args.kind == FLOAT32)
    std::memcpy(line, static_cast<const float*>(args.x) + first, sizeof(float) * plan.inputs);
  else
    for (int i = 0; i < plan.inputs; ++i) line[i] = as_float(args.x, args.kind, first + i);
  line[plan.inputs] = 0;  // read for places of the plan without an input
  float x[MAX_LENGTH];
  int32_t integers[MAX_LENGTH];
  for (int run = 0; run < plan.runs; ++run) {
    const int32_t* order = plan.order + UNIT * plan.start[run];
    const int length = UNIT * (plan.start[run + 1] - plan.start[run]);
    for (int i = 0; i < length; ++i) x[i] = line[order[i]];
    const size_t at = static_cast<size_t>(UNIT) * plan.start[run] * to.rows +
                      static_cast<size_t>(row) * length;
    if (!fixed && args.digits != 1) {
      std::copy(x, x + length, to.numbers.begin() + at);
      continue;
    }
    const float scale = fixed_scale(x, length, args.digits);
    to_integers(x, length, scale, integers);
    if (!fixed) {
      for (int i = 0; i < length; ++i)
        to.numbers[at + i] = static_cast<float>(integers[i]) * scale;
      continue;
    }
    const size_t entry = static_cast<size_t>(run) * to.rows + row;
    to.scale[entry] = scale;
    for (int d = 0; d < args.digits; ++d) {
      int8_t* digits = to.digits.data() + at * args.digits + d * length;
      int32_t sum = 0;
      for (int i = 0; i < length; ++i) {
        const int8_t low = static_cast<int8_t>(integers[i]);
        digits[i] = low;
        sum += low;
        integers[i] = (integers[i] - low) >> 8;
      }
      to.sums[entry * args.digits + d] = static_cast<float>(sum);
    }
  }
}

}  // namespace

// CUDA's types of numbers and its roundings, on the host; a part of cuda_emulation.h.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

inline float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

struct half_t {
  uint16_t bits;
};

struct bfloat_t {
  uint16_t bits;
};

// Every float16 as a float: hosts without an instruction for it are slow.
inline const std::vector<float> half_values = [] {
  std::vector<float> values(1 << 16);
  for (uint32_t bits = 0; bits < values.size(); ++bits) {
    const uint16_t half = static_cast<uint16_t>(bits);
    _Float16 x;
    std::memcpy(&x, &half, 2);
    values[bits] = static_cast<float>(x);
  }
  return values;
}();

inline float __half2float(half_t h) { return half_values[h.bits]; }

inline half_t __float2half_rn(float f) {
  const _Float16 x = static_cast<_Float16>(f);
  half_t h;
  std::memcpy(&h.bits, &x, 2);
  return h;
}

inline float __bfloat162float(bfloat_t b) { return float_of(static_cast<uint32_t>(b.bits) << 16); }

inline bfloat_t __float2bfloat16_rn(float f) {
  const uint32_t bits = bits_of(f);
  if (f != f) return {0x7FFF};
  return {static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16)};
}

inline half_t __ushort_as_half(uint16_t bits) { return {bits}; }

inline float __fmul_rn(float a, float b) {
  volatile float c = a * b;
  return c;
}
inline float __fadd_rn(float a, float b) {
  volatile float c = a + b;
  return c;
}
inline float __fsub_rn(float a, float b) {
  volatile float c = a - b;
  return c;
}
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float rsqrtf(float x) { return 1 / std::sqrt(x); }
inline uint32_t __float_as_uint(float x) { return bits_of(x); }
inline float __uint_as_float(uint32_t x) { return float_of(x); }

// The arguments of a matmul; called by quant_cuda/cpu/product.py.
#pragma once

#include <cstdint>

enum Kind { FLOAT32, BFLOAT16, FLOAT16 };

struct ProductArgs {
  const void* x;         // (rows, inputs), of `kind`
  const uint8_t* data;   // the weight, see tiles.h
  const int32_t* plan;
  const float* bias;     // (outputs,), or null
  void* y;               // (rows, outputs), of `kind`, written
  int64_t rows;
  int kind;
  int digits;            // bytes of an activation that is rounded to fixed point: 1 or 2
  int threads;
};

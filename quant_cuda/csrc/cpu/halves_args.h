// The arguments of a matmul with a float16 or bfloat16 weight.
#pragma once

#include <cstdint>

struct HalvesArgs {
  const float* x;          // (rows, inputs)
  const uint16_t* weight;  // (outputs, inputs), of `kind`
  float* y;                // (rows, outputs), written
  int64_t rows, inputs, outputs;
  int kind;                // BFLOAT16 or FLOAT16 of product_args.h
  int threads;
};

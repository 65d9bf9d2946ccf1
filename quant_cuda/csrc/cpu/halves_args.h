// What a product with a weight of 16-bit floats reads and writes.
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

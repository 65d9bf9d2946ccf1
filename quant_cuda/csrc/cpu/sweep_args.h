// What a sweep reads and writes; quant_cuda/native.py has the same record for ctypes.
#pragma once

#include <cstdint>

struct SweepArgs {
  const float* w;         // (inputs, outputs), columns of W in solving order
  const float* H;         // (inputs, inputs), undamped, in solving order
  const float* Ut;        // (inputs, inputs), U transposed: U^T U = (H + damp)^-1
  const int32_t* labels;  // (inputs,), group of each column
  const int32_t* run_end; // (inputs,), where a group starts the position of its end, else 0
  const int32_t* blocks;  // (block_count + 1,), column blocks that respect the groups
  const float* factors;   // (factor_count,), shares of the range to try; none for min/max
  float* scales;          // (groups, outputs), read if is_static, else written
  float* zeros;           // (groups, outputs), likewise
  uint8_t* q;             // (inputs, outputs), written
  int32_t inputs, outputs, groups, block_count, factor_count;
  int32_t bits, sym, is_static, threads;
};

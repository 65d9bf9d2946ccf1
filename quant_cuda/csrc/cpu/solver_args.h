// The arguments of the sweep and of the refinement; quant_cuda/cpu/solver.py has the same records for
// ctypes.
#pragma once

#include <cstdint>

struct SweepArgs {
  const float* w;         // (inputs, outputs), columns of W in solving order
  const float* H;         // (inputs, inputs), damped, in solving order
  const float* Ut;        // (inputs, inputs), U transposed: U^T U = H^-1
  const int32_t* labels;  // (inputs,), group of each column
  const int32_t* run_end; // (inputs,): at a group's first column the group's end, else 0
  const int32_t* blocks;  // (block_count + 1,), column blocks that respect the groups
  const float* factors;   // (factor_count,), shares of the range to try; none for min/max
  float* scales;          // (groups, outputs), read if is_static, else written
  float* zeros;           // (groups, outputs), likewise
  uint8_t* q;             // (inputs, outputs), written
  int32_t inputs, outputs, groups, block_count, factor_count;
  int32_t bits, sym, is_static, threads;
};

struct RefineArgs {
  const float* w;         // (inputs, outputs), columns of W group by group
  const float* H;         // (inputs, inputs), positive definite, in the same order
  const int32_t* ends;    // (groups + 1,), 0 and the end of each group
  const int32_t* labels;  // (groups,), the row of each in scales and zeros
  float* scales;          // (groups, outputs), of either sign, read and written
  const float* zeros;     // (groups, outputs)
  uint8_t* q;             // (inputs, outputs), read and written
  int32_t inputs, outputs, groups;
  int32_t bits, rounds, threads;
};

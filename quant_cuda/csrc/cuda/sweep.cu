// The column sweep of gptq/solver/sweep.py for one block of at most 128 columns: searches each group's
// grid, rounds, and propagates each column's error to the rest of the block. The caller propagates the
// block's errors to all later columns by a matmul.
//
// A thread block owns 32 outputs; the weights of the block are in shared memory, an output a lane,
// and the eight warps share the columns. It rounds as the torch sweep does in float32, products and
// differences separately, so that with min/max grids (or static ones) all results are the same bits.
// The losses of a search are summed in another order than in a matmul.

#include "common.cuh"

namespace {

constexpr int LANES = 32;
constexpr int PARTS = 8;
constexpr int BLOCK = 128;
constexpr int ROWS = 4;  // rows of H at a time, so that errors are loaded once
constexpr float HALF_SMALLEST = 5.9604644775390625e-08f;
constexpr float HALF_MAX = 65504.0f;

struct Sweep {
  const float* w;          // (inputs, outputs), columns of W in solving order
  const float* H;          // (inputs, inputs), undamped, in solving order
  const float* U;          // (inputs, inputs), U^T U = (H + damp)^-1
  const int32_t* labels;   // (inputs,), group of each column
  const int32_t* run_end;  // (inputs,): the end of a group whose grid is searched, at its first column; else 0
  const float* factors;    // (factor_count,), shares of the range to try, see cpu/solver.py; none for 1
  float* scales;           // (groups, outputs), written if the grid is searched, else read
  float* zeros;            // (groups, outputs), likewise
  uint8_t* q;              // (inputs, outputs)
  float* errors;           // (stop - start, outputs), divided by the diagonal of U
  int inputs, outputs, start, stop, factor_count, bits, sym;
};

struct Grid {
  float scale, zero;
};

using Tile = float[BLOCK][LANES];

// A scale rounded as checkpoints store it: float16, positive, finite.
__device__ float stored(float scale) {
  return __half2float(__float2half_rn(fminf(fmaxf(scale, HALF_SMALLEST), HALF_MAX)));
}

__device__ Grid make_grid(float low, float high, float factor, const Sweep& s) {
  const float maxq = static_cast<float>((1 << s.bits) - 1);
  const float a = __fmul_rn(low, fabsf(factor)), b = __fmul_rn(high, fabsf(factor));
  if (s.sym) {
    const float scale = stored(__fdiv_rn(__fmul_rn(2.0f, fmaxf(-a, b)), maxq));
    return {factor < 0 ? -scale : scale, static_cast<float>(1 << (s.bits - 1))};
  }
  const float scale = stored(__fdiv_rn(__fsub_rn(b, a), maxq));
  const float zero = rintf(__fdiv_rn(-a, scale));
  if (zero < 1.0f) return {stored(__fdiv_rn(b, maxq - 1.0f)), 1.0f};
  return {scale, fminf(zero, maxq)};
}

// The nearest step of the grid, in units of its scale, from its zero point.
__device__ float nearest(float w, const Grid& grid, float maxq) {
  return fminf(fmaxf(rintf(__fdiv_rn(w, grid.scale)), -grid.zero), maxq - grid.zero);
}

// This part's share of error^T H error, from the lower half of H. `error`: `size` rows.
__device__ __forceinline__ float share_of_loss(const Tile& error, const float* H, int stride, int size, int lane,
                               int part) {
  float loss = 0;
  for (int first = ROWS * part; first < size; first += ROWS * PARTS) {
    float sum[ROWS] = {};
    for (int j = 0; j < first; ++j) {
      const float e = error[j][lane];
#pragma unroll
      for (int r = 0; r < ROWS; ++r)
        if (first + r < size)
          sum[r] = __fmaf_rn(H[static_cast<size_t>(first + r) * stride + j], e, sum[r]);
    }
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      const int i = first + r;
      if (i >= size) break;
      const float* row = H + static_cast<size_t>(i) * stride;
      for (int j = first; j < i; ++j) sum[r] = __fmaf_rn(row[j], error[j][lane], sum[r]);
      const float e = error[i][lane];
      loss = __fmaf_rn(e, __fmaf_rn(row[i], e, 2.0f * sum[r]), loss);
    }
  }
  return loss;
}

// Loss of a grid on columns from..from+size of the block; every part of an output gets it.
__device__ __forceinline__ float loss_of(const Tile& w, Tile& error, float (&shares)[PARTS][LANES], const Sweep& s,
                         const Grid& grid, int from, int size, int lane, int part) {
  const float maxq = static_cast<float>((1 << s.bits) - 1);
  for (int i = part; i < size; i += PARTS) {
    const float number = w[from + i][lane];
    error[i][lane] = __fsub_rn(__fmul_rn(nearest(number, grid, maxq), grid.scale), number);
  }
  __syncthreads();
  const size_t at = s.start + from;
  shares[part][lane] =
      share_of_loss(error, s.H + at * s.inputs + at, s.inputs, size, lane, part);
  __syncthreads();
  float loss = 0;
  for (int p = 0; p < PARTS; ++p) loss += shares[p][lane];
  return loss;
}

__device__ __forceinline__ Grid find_grid(const Tile& w, Tile& error, float (&shares)[PARTS][LANES],
                          const Sweep& s, int from, int size, int lane, int part) {
  const float maxq = static_cast<float>((1 << s.bits) - 1);
  float low = 0, high = 0;
  for (int i = 0; i < size; ++i) {
    low = fminf(low, w[from + i][lane]);
    high = fmaxf(high, w[from + i][lane]);
  }
  if (low == 0.0f && high == 0.0f) {
    low = -1.0f;
    high = 1.0f;
  }
  Grid best = make_grid(low, high, 1.0f, s);
  float best_loss = __uint_as_float(0x7F800000u);
  for (int k = 0; k < s.factor_count; ++k) {
    const Grid grid = make_grid(low, high, s.factors[k], s);
    const float loss = loss_of(w, error, shares, s, grid, from, size, lane, part);
    if (loss < best_loss) {
      best = grid;
      best_loss = loss;
    }
  }
  if (s.sym || s.factor_count == 0) return best;
  const float found = best.zero;
  for (int step = -1; step <= 1; step += 2) {
    const Grid grid = {best.scale, fminf(fmaxf(found + static_cast<float>(step), 1.0f), maxq)};
    const float loss = loss_of(w, error, shares, s, grid, from, size, lane, part);
    if (loss < best_loss) {
      best = grid;
      best_loss = loss;
    }
  }
  return best;
}

__global__ void __launch_bounds__(PARTS * LANES, 1)
    sweep_block(Sweep s) {
  SHARED(float, w, [BLOCK][LANES]);
  SHARED(float, error, [BLOCK][LANES]);
  SHARED(float, shares, [PARTS][LANES]);
  const int lane = threadIdx.x % LANES, part = threadIdx.x / LANES;
  const int output = blockIdx.x * LANES + lane, size = s.stop - s.start;
  const bool real = output < s.outputs;
  const float maxq = static_cast<float>((1 << s.bits) - 1);
  for (int i = part; i < size; i += PARTS)
    w[i][lane] = real ? s.w[static_cast<size_t>(s.start + i) * s.outputs + output] : 0.0f;
  __syncthreads();

  for (int i = 0; i < size; ++i) {
    const int j = s.start + i, end = s.run_end[j];
    const size_t stored_at = static_cast<size_t>(s.labels[j]) * s.outputs + output;
    Grid grid = {1.0f, 1.0f};
    if (end > 0) {
      grid = find_grid(w, error, shares, s, i, end - j, lane, part);
      __syncthreads();  // no part writes scales before all have read and searched
      if (real && part == 0) {
        s.scales[stored_at] = grid.scale;
        s.zeros[stored_at] = grid.zero;
      }
      __syncthreads();
    } else if (real) {
      grid = {s.scales[stored_at], s.zeros[stored_at]};
    }
    const float* row = s.U + static_cast<size_t>(j) * s.inputs + s.start;
    const float step = nearest(w[i][lane], grid, maxq);
    const float e = __fdiv_rn(__fsub_rn(w[i][lane], __fmul_rn(step, grid.scale)), row[i]);
    if (real && part == 0) {
      s.q[static_cast<size_t>(j) * s.outputs + output] = static_cast<uint8_t>(step + grid.zero);
      s.errors[static_cast<size_t>(i) * s.outputs + output] = e;
    }
    for (int k = i + 1 + part; k < size; k += PARTS)
      w[k][lane] = __fsub_rn(w[k][lane], __fmul_rn(row[k], e));
    __syncthreads();
  }
}

}  // namespace

// Columns start..stop, at most 128 of them. Groups whose grid is searched are within them; the
// scales and zeros of the others are arguments. w is not changed; see Sweep for the rest.
EXPORT int quant_cuda_sweep_block(const float* w, const float* H, const float* U, const void* labels,
                                  const void* run_end, const float* factors, float* scales,
                                  float* zeros, void* q, float* errors, int inputs, int outputs,
                                  int start, int stop, int factor_count, int bits, int sym,
                                  cudaStream_t stream) {
  if (start < 0 || stop <= start || stop - start > BLOCK || stop > inputs || outputs < 1)
    return cudaErrorInvalidValue;
  const Sweep s = {w,
                   H,
                   U,
                   static_cast<const int32_t*>(labels),
                   static_cast<const int32_t*>(run_end),
                   factors,
                   scales,
                   zeros,
                   static_cast<uint8_t*>(q),
                   errors,
                   inputs,
                   outputs,
                   start,
                   stop,
                   factor_count,
                   bits,
                   sym};
  LAUNCH(sweep_block, dim3(ceil_div(outputs, LANES)), PARTS * LANES, 0, stream, s);
  return cudaGetLastError();
}

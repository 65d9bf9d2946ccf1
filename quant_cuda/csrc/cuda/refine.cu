// One group's turn in gptq/solver/refine.py: sets each of its integers to its optimum with all others
// fixed, and then its scale. The caller updates the gradient of all columns by a matmul with H.
//
// A thread block owns 32 outputs, an output a lane, and its eight warps share the columns, as in
// sweep.cu. Multiplications and additions are rounded separately where torch's are; the sums for the
// scale are in another order.

#include "common.cuh"

namespace {

constexpr int LANES = 32;
constexpr int PARTS = 8;
constexpr int GROUP = 128;
constexpr int ROWS = 4;  // rows of H at a time, so that steps are loaded once
constexpr float HALF_SMALLEST = 5.9604644775390625e-08f;
constexpr float HALF_MAX = 65504.0f;

struct Refine {
  const float* H;         // (inputs, inputs), positive definite
  const float* gradient;  // (inputs, outputs), H (w - dequantized q)
  const float* zeros;     // (outputs,), of this group
  float* scales;          // (outputs,), exact in float16, of either sign; replaced
  uint8_t* q;             // (inputs, outputs); the group's are replaced
  float* change;          // (stop - start, outputs), written: of the dequantized values
  int inputs, outputs, start, stop, bits;
};

using Tile = float[GROUP][LANES];
using Shares = float[PARTS][LANES];

// The sum over all parts of this lane; every part gets it.
__device__ float sum_of(Shares& shares, float mine, int lane, int part) {
  __syncthreads();
  shares[part][lane] = mine;
  __syncthreads();
  float sum = 0;
  for (int p = 0; p < PARTS; ++p) sum += shares[p][lane];
  return sum;
}

// The optimal float16 scale for a group's steps, with the old one's sign. slope, curvature: of the
// objective as a function of the scale, at the old one.
__device__ float best_scale(float old, float slope, float curvature) {
  const float by = curvature > 0 ? __fdiv_rn(slope, curvature) : 0.0f;
  const float size = old > 0 ? __fadd_rn(old, by) : -__fadd_rn(old, by);
  const float stored = __half2float(__float2half_rn(fminf(fmaxf(size, HALF_SMALLEST), HALF_MAX)));
  const float found = old > 0 ? stored : -stored;
  // Rounding to float16 can overshoot; the old scale is kept then.
  const float change = __fsub_rn(found, old);
  return change * (2.0f * slope - change * curvature) > 0 ? found : old;
}

__global__ void __launch_bounds__(PARTS * LANES)
    refine_group(Refine r) {
  SHARED(float, left, [GROUP][LANES]);   // the gradient as integers change
  SHARED(float, steps, [GROUP][LANES]);  // q - zero
  SHARED(float, shares, [PARTS][LANES]);
  const int lane = threadIdx.x % LANES, part = threadIdx.x / LANES;
  const int output = blockIdx.x * LANES + lane, size = r.stop - r.start;
  const bool real = output < r.outputs;
  const float zero = real ? r.zeros[output] : 0.0f, scale = real ? r.scales[output] : 1.0f;
  const float high = static_cast<float>((1 << r.bits) - 1) - zero;
  const size_t stride = r.inputs, first = static_cast<size_t>(r.start) * r.outputs + output;
  const float* H = r.H + static_cast<size_t>(r.start) * stride + r.start;
  const auto at = [&](int j) { return first + static_cast<size_t>(j) * r.outputs; };
  const auto before = [&](int j) { return real ? static_cast<float>(r.q[at(j)]) - zero : 0.0f; };
  for (int j = part; j < size; j += PARTS) {
    left[j][lane] = real ? r.gradient[at(j)] : 0.0f;
    steps[j][lane] = before(j);
  }
  __syncthreads();

  float best = 0;
  for (int j = 0; j < size; ++j) {
    // All parts must have read the step before this one before one of them replaces it.
    if (j > 0 && part == 0) steps[j - 1][lane] = best;
    const float* row = H + static_cast<size_t>(j) * stride;
    const float step = steps[j][lane];
    best = rintf(__fadd_rn(step, __fdiv_rn(left[j][lane], __fmul_rn(row[j], scale))));
    best = fminf(fmaxf(best, -zero), high);
    const float moved = __fmul_rn(__fsub_rn(best, step), scale);
    // Only later integers need the gradient.
    for (int k = j + 1 + part; k < size; k += PARTS)
      left[k][lane] = __fsub_rn(left[k][lane], __fmul_rn(row[k], moved));
    __syncthreads();
  }
  if (part == 0) steps[size - 1][lane] = best;
  __syncthreads();

  float curvature = 0, slope = 0;
  for (int j = ROWS * part; j < size; j += ROWS * PARTS) {
    const int rows = size - j < ROWS ? size - j : ROWS;
    float effect[ROWS] = {};  // of the group's steps: H steps
    for (int k = 0; k < size; ++k) {
      const float step = steps[k][lane];
#pragma unroll
      for (int i = 0; i < ROWS; ++i)
        if (i < rows) effect[i] = __fmaf_rn(H[(j + i) * stride + k], step, effect[i]);
    }
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
      if (i >= rows) break;
      const float step = steps[j + i][lane];
      const float moved = __fmul_rn(__fsub_rn(step, before(j + i)), scale);
      curvature = __fmaf_rn(step, effect[i], curvature);
      slope = __fmaf_rn(step, real ? r.gradient[at(j + i)] : 0.0f, slope);
      slope = __fmaf_rn(-moved, effect[i], slope);
    }
  }
  curvature = sum_of(shares, curvature, lane, part);
  slope = sum_of(shares, slope, lane, part);
  if (!real) return;
  const float found = best_scale(scale, slope, curvature);
  for (int j = part; j < size; j += PARTS) {
    const float step = steps[j][lane];
    r.change[static_cast<size_t>(j) * r.outputs + output] =
        __fsub_rn(__fmul_rn(step, found), __fmul_rn(before(j), scale));
    r.q[at(j)] = static_cast<uint8_t>(step + zero);
  }
  if (part == 0) r.scales[output] = found;
}

}  // namespace

// Columns start..stop, one group of at most 128; see Refine for the rest. `scales` and `zeros` are
// the group's own rows.
EXPORT int quant_cuda_refine_group(const float* H, const float* gradient, const float* zeros,
                                   float* scales, void* q, float* change, int inputs, int outputs,
                                   int start, int stop, int bits, cudaStream_t stream) {
  if (start < 0 || stop <= start || stop - start > GROUP || stop > inputs || outputs < 1)
    return cudaErrorInvalidValue;
  const Refine r = {H,      gradient, zeros, scales, static_cast<uint8_t*>(q),
                    change, inputs,   outputs, start, stop, bits};
  LAUNCH(refine_group, dim3(ceil_div(outputs, LANES)), PARTS * LANES, 0, stream, r);
  return cudaGetLastError();
}

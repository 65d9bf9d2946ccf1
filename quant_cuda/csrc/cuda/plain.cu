// Multiplies and dequantizes straight from the layout of docs/format.md: 2, 3, 4 and 8 bits, any
// groups, any order of inputs. A thread owns a column.

#include "common.cuh"

namespace {

constexpr int THREADS = 128;
constexpr int ROWS = 8;
constexpr int PERIOD = 32;  // inputs that fill BITS whole words

struct Weight {
  const uint32_t* qweight;  // (inputs * bits / 32, outputs)
  const float* scales;      // (groups, outputs)
  const float* zeros;       // (groups, outputs)
  const int32_t* g_idx;     // (inputs,), or NULL for input / group_size
  int inputs, outputs, group_size;

  __device__ int group(int input) const { return g_idx ? g_idx[input] : input / group_size; }
};

// Calls `use(input, dequantized value)` for the inputs of one period of a column.
template <int BITS, typename Use>
__device__ void for_period(const Weight& weight, int column, int period, Use use) {
  const size_t stride = weight.outputs;
  const int word_rows = (weight.inputs * BITS + 31) / 32;
  uint32_t words[BITS];
#pragma unroll
  for (int i = 0; i < BITS; ++i) {
    const int row = period * BITS + i;
    words[i] = row < word_rows ? weight.qweight[row * stride + column] : 0;
  }
  int known = -1;
  float scale = 0, zero = 0;
#pragma unroll
  for (int e = 0; e < PERIOD; ++e) {
    const int input = period * PERIOD + e;
    if (input >= weight.inputs) break;
    const int group = weight.group(input);
    if (group != known) {
      known = group;
      scale = weight.scales[group * stride + column];
      zero = weight.zeros[group * stride + column];
    }
    const float q = static_cast<float>(layout::stream_value<BITS>(words, 1, e));
    use(input, __fmul_rn(scale, q - zero));
  }
}

// y: (gridDim.y, rows, outputs), partial sums that are to be added.
template <int BITS>
__global__ void __launch_bounds__(THREADS, 1)
    plain_multiply(const float* __restrict__ x, Weight weight, float* __restrict__ y, int rows) {
  const int column = blockIdx.x * THREADS + threadIdx.x, first = blockIdx.z * ROWS;
  if (column >= weight.outputs) return;
  const int periods = (weight.inputs + PERIOD - 1) / PERIOD;
  float sum[ROWS] = {};
  for (int period = blockIdx.y; period < periods; period += gridDim.y)
    for_period<BITS>(weight, column, period, [&](int input, float number) {
#pragma unroll
      for (int r = 0; r < ROWS; ++r)
        if (first + r < rows)
          sum[r] = __fmaf_rn(x[static_cast<size_t>(first + r) * weight.inputs + input], number,
                             sum[r]);
    });
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    if (first + r >= rows) break;
    const size_t row = static_cast<size_t>(blockIdx.y) * rows + first + r;
    y[row * weight.outputs + column] = sum[r];
  }
}

// dense: (inputs, outputs).
template <int BITS, typename T>
__global__ void __launch_bounds__(THREADS)
    plain_dequantize(Weight weight, T* __restrict__ dense) {
  const int column = blockIdx.x * THREADS + threadIdx.x;
  if (column >= weight.outputs) return;
  for_period<BITS>(weight, column, blockIdx.y, [&](int input, float number) {
    dense[static_cast<size_t>(input) * weight.outputs + column] = from_float<T>(number);
  });
}

template <int BITS>
void launch_multiply(const float* x, const Weight& weight, float* y, int rows, int splits,
                     cudaStream_t stream) {
  const dim3 grid(ceil_div(weight.outputs, THREADS), splits, ceil_div(rows, ROWS));
  const auto kernel = plain_multiply<BITS>;
  LAUNCH(kernel, grid, THREADS, 0, stream, x, weight, y, rows);
}

template <int BITS, typename T>
void launch_dequantize(const Weight& weight, void* dense, cudaStream_t stream) {
  const dim3 grid(ceil_div(weight.outputs, THREADS), ceil_div(weight.inputs, PERIOD));
  const auto kernel = plain_dequantize<BITS, T>;
  LAUNCH(kernel, grid, THREADS, 0, stream, weight, static_cast<T*>(dense));
}


template <int BITS>
int launch_dequantize(int type, const Weight& weight, void* dense, cudaStream_t stream) {
  switch (type) {
    case HALF: launch_dequantize<BITS, half_t>(weight, dense, stream); break;
    case BFLOAT: launch_dequantize<BITS, bfloat_t>(weight, dense, stream); break;
    case FLOAT: launch_dequantize<BITS, float>(weight, dense, stream); break;
    default: return cudaErrorInvalidValue;
  }
  return cudaGetLastError();
}

}  // namespace

// x: float32 (rows, inputs). qweight: (inputs * bits / 32, outputs). scales, zeros: float32
// (groups, outputs). g_idx: int32 (inputs,) or NULL. y: float32 (splits, rows, outputs), whose sum
// over the splits is the product.
EXPORT int quant_cuda_plain_multiply(int bits, const float* x, const void* qweight,
                                     const float* scales, const float* zeros, const void* g_idx,
                                     float* y, int rows, int inputs, int outputs, int group_size,
                                     int splits, cudaStream_t stream) {
  const Weight weight = {static_cast<const uint32_t*>(qweight), scales, zeros,
                         static_cast<const int32_t*>(g_idx), inputs, outputs, group_size};
  if (rows < 1 || group_size < 1 || splits < 1) return cudaErrorInvalidValue;
  switch (bits) {
    case 2: launch_multiply<2>(x, weight, y, rows, splits, stream); break;
    case 3: launch_multiply<3>(x, weight, y, rows, splits, stream); break;
    case 4: launch_multiply<4>(x, weight, y, rows, splits, stream); break;
    case 8: launch_multiply<8>(x, weight, y, rows, splits, stream); break;
    default: return cudaErrorInvalidValue;
  }
  return cudaGetLastError();
}

// dense: of `type` (inputs, outputs).
EXPORT int quant_cuda_plain_dequantize(int bits, int type, const void* qweight, const float* scales,
                                       const float* zeros, const void* g_idx, void* dense,
                                       int inputs, int outputs, int group_size,
                                       cudaStream_t stream) {
  const Weight weight = {static_cast<const uint32_t*>(qweight), scales, zeros,
                         static_cast<const int32_t*>(g_idx), inputs, outputs, group_size};
  if (group_size < 1) return cudaErrorInvalidValue;
  switch (bits) {
    case 2: return launch_dequantize<2>(type, weight, dense, stream);
    case 3: return launch_dequantize<3>(type, weight, dense, stream);
    case 4: return launch_dequantize<4>(type, weight, dense, stream);
    case 8: return launch_dequantize<8>(type, weight, dense, stream);
    default: return cudaErrorInvalidValue;
  }
}

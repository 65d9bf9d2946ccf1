// y = x W for up to 32 rows of x, by multiply_columns of gemv.cuh.
//
// If the columns are too few to fill the GPU, several thread blocks share the inputs and leave
// partial sums, which a second kernel adds in order. Nothing is added atomically: results do not
// vary from run to run.

#include "gemv.cuh"

namespace {

constexpr int MOST_ROWS = 32;

// bias: (outputs,) or NULL. y: (rows, outputs); or partial: (gridDim.y, rows, outputs), without the
// bias, if not NULL. The rest as in gemv.cuh.
template <int BITS, typename T, bool FINE, int EIGHTS>
__global__ void __launch_bounds__(WARPS * 32, EIGHTS == 4 ? 1 : 2)
    gemv(const T* __restrict__ x, const uint32_t* __restrict__ words,
         const Grid* __restrict__ table, const float* __restrict__ bias, T* __restrict__ y,
         float* __restrict__ partial, int rows, int inputs, int outputs, int columns, int shift) {
  const auto write = [&](int row, int column, float total) {
    const size_t at = static_cast<size_t>(row) * outputs + column;
    if (partial)
      partial[static_cast<size_t>(blockIdx.y) * rows * outputs + at] = total;
    else
      y[at] = from_float<T>(bias ? total + bias[column] : total);
  };
  multiply_columns<BITS, T, FINE, EIGHTS>(x, words, table, rows, inputs, outputs, columns, shift,
                                          blockIdx.x, [] {}, write);
}

template <int BITS, typename T, int EIGHTS>
void launch(const void* x, const void* words, const void* table, const float* bias, void* y,
            float* partial, int rows, int inputs, int outputs, int columns, int shift, int splits,
            cudaStream_t stream) {
  const auto kernel = (1 << shift) < layout::block_inputs<BITS> ? gemv<BITS, T, true, EIGHTS>
                                                                : gemv<BITS, T, false, EIGHTS>;
  LAUNCH(kernel, dim3(columns / COLUMNS, splits), WARPS * 32, 0, stream, static_cast<const T*>(x),
         static_cast<const uint32_t*>(words), static_cast<const Grid*>(table), bias,
         static_cast<T*>(y), partial, rows, inputs, outputs, columns, shift);
}

template <int BITS, typename T, typename... Rest>
void launch_rows(const void* x, const void* words, const void* table, const float* bias, void* y,
                 float* partial, int rows, Rest... rest) {
  const auto run = rows <= 8 ? launch<BITS, T, 1> : rows <= 16 ? launch<BITS, T, 2> : launch<BITS, T, 4>;
  run(x, words, table, bias, y, partial, rows, rest...);
}

template <int BITS, typename... Rest>
void launch_type(int type, Rest... rest) {
  type == HALF ? launch_rows<BITS, half_t>(rest...) : launch_rows<BITS, bfloat_t>(rest...);
}

}  // namespace

// x: float16 or bfloat16 (rows, inputs), rows 1..32, inputs a multiple of 8, 16-byte aligned.
// words: (columns / 16, blocks, 256). table: (units, columns), a row for each 2**shift inputs.
// columns: outputs rounded up to a multiple of 32.
// bias: float32 (outputs,) or NULL. y: x's type (rows, outputs); or, for splits > 1, partial:
// float32 (splits, rows, outputs), to which quant_cuda_add_partials adds the bias.
EXPORT int quant_cuda_gemv(int bits, int type, const void* x, const void* words, const void* table,
                           const float* bias, void* y, float* partial, int rows, int inputs, int outputs, int columns,
                           int shift, int splits, cudaStream_t stream) {
  if ((bits != 4 && bits != 8) || (type != HALF && type != BFLOAT) || rows < 1 || rows > MOST_ROWS ||
      inputs < 8 || inputs % 8 || columns % COLUMNS || shift < 5 || (splits > 1) != (partial != nullptr))
    return cudaErrorInvalidValue;
  const auto run = [&](auto launch) {
    launch(type, x, words, table, bias, y, partial, rows, inputs, outputs, columns, shift, splits,
           stream);
  };
  bits == 4 ? run([](auto... a) { launch_type<4>(a...); }) : run([](auto... a) { launch_type<8>(a...); });
  return cudaGetLastError();
}

// Dequantizes the whole weight, for a dense matmul, and adds partial sums.

#include "fragment.cuh"

namespace {

constexpr int WARPS = 4;
constexpr int THREADS = 256;

// Writes the first `count` of eight neighbours of a row.
template <typename T>
struct alignas(16) Eight {
  T values[8];
};

template <typename T>
__device__ void store(T* to, const Eight<T>& from, int count, bool aligned) {
  if (aligned && count >= 8) {
    const uint4* words = reinterpret_cast<const uint4*>(from.values);
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(from) / 16); ++i)
      reinterpret_cast<uint4*>(to)[i] = words[i];
    return;
  }
  for (int e = 0; e < 8 && e < count; ++e) to[e] = from.values[e];
}

// dense: (outputs, inputs), each scale * (q - zero) in float32 and rounded once. A warp takes one
// block of inputs of one tile.
template <int BITS, typename T>
__global__ void __launch_bounds__(WARPS * 32)
    dequantize(const uint32_t* __restrict__ words, const Grid* __restrict__ table,
               T* __restrict__ dense, int inputs, int outputs, int columns, int shift) {
  constexpr int BLOCK = layout::block_inputs<BITS>;
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int blocks = layout::block_count<BITS>(inputs);
  const int block = blockIdx.y * WARPS + threadIdx.x / 32, tile = blockIdx.x;
  if (block >= blocks) return;
  Piece piece;
  piece.load(words + (static_cast<size_t>(tile) * blocks + block) * layout::BLOCK_WORDS, lane);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int column = tile * layout::TILE + half * 8 + g;
    if (column >= outputs) return;
#pragma unroll
    for (int run = 0; run < BLOCK / layout::RUN; ++run) {
      const int input = block * BLOCK + run * layout::RUN + 8 * t;
      if (input >= inputs) break;
      const Grid grid = table[static_cast<size_t>(input >> shift) * columns + column];
      Eight<T> numbers;
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        const uint32_t word = piece.words[half][run * (BITS / 4) + e * BITS / 32];
        const int q = word >> layout::field_shift<BITS>(e) & ((1 << BITS) - 1);
        const float step = static_cast<float>(q - static_cast<int>(grid.zero()));
        numbers.values[e] = from_float<T>(__fmul_rn(grid.scale(), step));
      }
      store(dense + static_cast<size_t>(column) * inputs + input, numbers, inputs - input,
            inputs % 8 == 0);
    }
  }
}

// y[i] = bias + the sum over s of partial[s, i], in the order of s. bias: (outputs,) or NULL.
template <typename T>
__global__ void __launch_bounds__(THREADS)
    add_partials(const float* __restrict__ partial, const float* __restrict__ bias,
                 T* __restrict__ y, int splits, int count, int outputs) {
  const int i = blockIdx.x * THREADS + threadIdx.x;
  if (i >= count) return;
  float sum = 0;
  for (int s = 0; s < splits; ++s) sum += partial[static_cast<size_t>(s) * count + i];
  y[i] = from_float<T>(bias ? sum + bias[i % outputs] : sum);
}

template <int BITS, typename T>
void launch(const void* words, const void* table, void* dense, int inputs, int outputs, int columns,
            int shift, cudaStream_t stream) {
  const dim3 grid(ceil_div(outputs, layout::TILE), ceil_div(layout::block_count<BITS>(inputs), WARPS));
  const auto kernel = dequantize<BITS, T>;
  LAUNCH(kernel, grid, WARPS * 32, 0, stream, static_cast<const uint32_t*>(words),
         static_cast<const Grid*>(table), static_cast<T*>(dense), inputs, outputs, columns, shift);
}

template <typename T>
void launch_sum(const float* partial, const float* bias, void* y, int splits, int count,
                int outputs, cudaStream_t stream) {
  const auto kernel = add_partials<T>;
  LAUNCH(kernel, ceil_div(count, THREADS), THREADS, 0, stream, partial, bias, static_cast<T*>(y),
         splits, count, outputs);
}

}  // namespace

// words and table as for quant_cuda_gemv; dense: of `type` (outputs, inputs), 16-byte aligned.
EXPORT int quant_cuda_dequantize(int bits, int type, const void* words, const void* table,
                                 void* dense, int inputs, int outputs, int columns, int shift,
                                 cudaStream_t stream) {
  if ((bits != 4 && bits != 8) || type < HALF || type > FLOAT || shift < 5)
    return cudaErrorInvalidValue;
  const auto run = bits == 4 ? (type == HALF     ? launch<4, half_t>
                                : type == BFLOAT ? launch<4, bfloat_t>
                                                 : launch<4, float>)
                             : (type == HALF     ? launch<8, half_t>
                                : type == BFLOAT ? launch<8, bfloat_t>
                                                 : launch<8, float>);
  run(words, table, dense, inputs, outputs, columns, shift, stream);
  return cudaGetLastError();
}

// partial: float32 (splits, count / outputs, outputs); bias: float32 (outputs,) or NULL; y: of `type`
// (count / outputs, outputs).
EXPORT int quant_cuda_add_partials(int type, const float* partial, const float* bias, void* y,
                                   int splits, int count, int outputs, cudaStream_t stream) {
  if (type < HALF || type > FLOAT) return cudaErrorInvalidValue;
  const auto run = type == HALF     ? launch_sum<half_t>
                   : type == BFLOAT ? launch_sum<bfloat_t>
                                    : launch_sum<float>;
  run(partial, bias, y, splits, count, outputs, stream);
  return cudaGetLastError();
}

// The message of an error code that any function here returned.
EXPORT const char* quant_cuda_error(int code) {
  return cudaGetErrorString(static_cast<cudaError_t>(code));
}

// setup.py defines it: the digest of the sources that the library was built from, see
// quant_cuda/sources.py.
#ifndef QUANT_CUDA_SOURCES
#define QUANT_CUDA_SOURCES unknown
#endif
#define TEXT_OF(name) #name
#define VALUE_OF(name) TEXT_OF(name)
EXPORT const char* quant_cuda_sources() { return VALUE_OF(QUANT_CUDA_SOURCES); }

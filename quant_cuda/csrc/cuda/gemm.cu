// y = x W for more rows of x than gemv.cu takes, up to a few hundred.
//
// A thread block computes 128 columns for up to 64 rows. Its warps are four along the columns
// by two along the inputs, so that no integer is extracted twice. Weights go from
// global memory straight into registers, a block of inputs ahead; x is staged in shared memory by
// asynchronous copies. A deep pipeline stages weights too: each lane copies what it will read itself,
// so that more bytes are under way than there are registers for. Sums of the two halves, and of thread blocks that share the inputs, are
// added in a fixed order.

#include "fragment.cuh"

namespace {

constexpr int WARPS_N = 4;
constexpr int WARPS_K = 2;
constexpr int THREADS = WARPS_N * WARPS_K * 32;
constexpr int TILES = 2;
constexpr int WARP_COLUMNS = TILES * layout::TILE;
constexpr int COLUMNS = WARPS_N * WARP_COLUMNS;
constexpr int SHALLOW = 3;  // stages of a pipeline that holds weights in registers
constexpr int AHEAD = 2;  // blocks of weights that a warp has in registers
constexpr int PAD = 4;

// In units of 16 bytes.
template <int BITS, int ROWS, int STAGES, bool DEEP>
struct Sizes {
  static constexpr int CHUNKS = layout::block_inputs<BITS> / 8;  // 16 bytes each, of a row
  static constexpr int X = ROWS * WARPS_K * CHUNKS;
  static constexpr int WARP_WORDS = TILES * layout::BLOCK_WORDS / 4;
  static constexpr int STAGE = X + (DEEP ? WARPS_N * WARPS_K * WARP_WORDS : 0);
  static constexpr int SUMS = ROWS * (COLUMNS + PAD) / 4;
  static constexpr int BYTES = 16 * (STAGES * STAGE > SUMS ? STAGES * STAGE : SUMS);
};

// The shared copy of x in a stage: (half of the inputs, row, chunk). Chunks of odd rows are permuted,
// so that eight lanes that read four chunks of two rows have no bank conflict.
template <typename Size, int ROWS>
__device__ __forceinline__ int chunk_at(int half, int row, int chunk) {
  return (half * ROWS + row) * Size::CHUNKS + (chunk ^ (row % 2 * 4));
}

template <int BITS, typename T, typename Size, int ROWS>
__device__ __forceinline__ void stage_x(uint4* stage, const T* x, int first_row, int rows,
                                        int inputs, int first_block) {
  for (int i = threadIdx.x; i < Size::X; i += THREADS) {
    const int chunk = i % Size::CHUNKS, row = i / Size::CHUNKS % ROWS, half = i / Size::CHUNKS / ROWS;
    const int k = (first_block + half) * layout::block_inputs<BITS> + 8 * chunk;
    const bool valid = first_row + row < rows && k < inputs;
    const size_t at = valid ? static_cast<size_t>(first_row + row) * inputs + k : 0;
    copy_async(&stage[chunk_at<Size, ROWS>(half, row, chunk)], x + at, valid);
  }
}

// sum[tile][n] += x W for one block of inputs, rows 8 * n .. 8 * n + 7 of the staged x.
template <int BITS, typename T, typename Size, int ROWS>
__device__ __forceinline__ void multiply(const uint4* stage, int half,
                                         const Piece (&pieces)[TILES], const Grid* table,
                                         int block, int inputs, int columns, int shift, int column,
                                         float (&sum)[TILES][ROWS / 8][4]) {
  constexpr int BLOCK = layout::block_inputs<BITS>;
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
  for (int run = 0; run < BLOCK / layout::RUN; ++run) {
    const int k = block * BLOCK + run * layout::RUN;
    if (k >= inputs) break;
    uint4 b[ROWS / 8];
#pragma unroll
    for (int n = 0; n < ROWS / 8; ++n)
      b[n] = stage[chunk_at<Size, ROWS>(half, 8 * n + g, 4 * run + t)];
    const Grid* row = table + static_cast<size_t>(k >> shift) * columns + column + g;
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
      const Grid grid[2] = {row[tile * layout::TILE], row[tile * layout::TILE + 8]};
      const Expander<BITS, T> expand[2] = {Expander<BITS, T>(grid[0].zero()),
                                           Expander<BITS, T>(grid[1].zero())};
      uint32_t a[2][4];
      expand_run<BITS, T>(pieces[tile], run, expand, a);
#pragma unroll
      for (int n = 0; n < ROWS / 8; ++n) {
        float part[4] = {};
        mma(part, a[0], b[n].x, b[n].y, T());
        mma(part, a[1], b[n].z, b[n].w, T());
        add_scaled(sum[tile][n], part, grid);
      }
    }
  }
}

// x: (rows, inputs). words: (tiles, blocks, 256). table: (units, columns), one row for each
// 2**shift inputs. bias: (outputs,) or NULL. y: (rows, outputs); or partial: (gridDim.z, rows,
// outputs), without the bias, if not NULL.
// Thread blocks: (rows / ROWS, columns / COLUMNS, splits of the inputs).
template <int BITS, typename T, int ROWS, int STAGES, bool DEEP>
__global__ void __launch_bounds__(THREADS, DEEP ? 1 : 0)
    gemm(const T* __restrict__ x, const uint32_t* __restrict__ words,
         const Grid* __restrict__ table, const float* __restrict__ bias, T* __restrict__ y,
         float* __restrict__ partial, int rows, int inputs, int outputs, int columns, int shift) {
  using Size = Sizes<BITS, ROWS, STAGES, DEEP>;
  DYNAMIC_SHARED(uint4, shared);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int warp_n = warp % WARPS_N, half = warp / WARPS_N;
  const int first_row = blockIdx.x * ROWS;
  const int column = blockIdx.y * COLUMNS + warp_n * WARP_COLUMNS;
  const bool has_columns = column < columns;
  const int blocks = layout::block_count<BITS>(inputs);
  const int first_block = blockIdx.z * WARPS_K, stride = WARPS_K * gridDim.z;
  const int steps = (blocks + stride - 1) / stride;

  const auto load = [&](Piece(&pieces)[TILES], int step) {
    const int block = first_block + step * stride + half;
    if (!has_columns || block >= blocks) return;
#pragma unroll
    for (int i = 0; i < TILES; ++i) {
      const size_t at = static_cast<size_t>(column / layout::TILE + i) * blocks + block;
      pieces[i].load(words + at * layout::BLOCK_WORDS, lane);
    }
  };
  // Where this lane's words of a tile are in a stage: those of column g, 32 further those of g + 8.
  const auto words_at = [&](int step, int tile) {
    return shared + step % STAGES * Size::STAGE + Size::X + warp * Size::WARP_WORDS +
           tile * layout::BLOCK_WORDS / 4 + lane;
  };
  const auto stage = [&](int step) {
    const int block = first_block + step * stride + half;
    if (step < steps)
      stage_x<BITS, T, Size, ROWS>(shared + step % STAGES * Size::STAGE, x, first_row, rows, inputs,
                                   first_block + step * stride);
    if (DEEP && step < steps && has_columns && block < blocks) {
#pragma unroll
      for (int i = 0; i < TILES; ++i) {
        const size_t at = static_cast<size_t>(column / layout::TILE + i) * blocks + block;
        const uint4* from = reinterpret_cast<const uint4*>(words + at * layout::BLOCK_WORDS) + lane;
        copy_async(words_at(step, i), from, true);
        copy_async(words_at(step, i) + 32, from + 32, true);
      }
    }
    copy_commit();
  };

  Piece pieces[DEEP ? 1 : AHEAD][TILES];
  if (!DEEP) {
#pragma unroll
    for (int i = 0; i < AHEAD; ++i) load(pieces[DEEP ? 0 : i], i);
  }
  for (int i = 0; i < STAGES - 1; ++i) stage(i);

  float sum[TILES][ROWS / 8][4] = {};
  for (int base = 0; base < steps; base += AHEAD) {
#pragma unroll
    for (int i = 0; i < AHEAD; ++i) {
      const int step = base + i;
      if (step >= steps) break;
      copy_wait<STAGES - 2>();
      __syncthreads();  // this stage is complete, and the one before it is free
      stage(step + STAGES - 1);
      const int block = first_block + step * stride + half;
      Piece(&now)[TILES] = pieces[DEEP ? 0 : i];
      if (has_columns && block < blocks) {
        if (DEEP) {
#pragma unroll
          for (int tile = 0; tile < TILES; ++tile) now[tile].take(words_at(step, tile));
        }
        multiply<BITS, T, Size, ROWS>(shared + step % STAGES * Size::STAGE, half, now, table, block,
                                      inputs, columns, shift, column, sum);
      }
      if (!DEEP) load(now, step + AHEAD);
    }
  }

  copy_wait<0>();
  float* sums = reinterpret_cast<float*>(shared);
  for (int h = WARPS_K - 1; h >= 0; --h) {
    __syncthreads();
    if (half != h) continue;
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
      for (int n = 0; n < ROWS / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float& to = sums[(8 * n + 2 * t + i % 2) * (COLUMNS + PAD) + warp_n * WARP_COLUMNS +
                           tile * layout::TILE + g + 8 * (i / 2)];
          to = h == WARPS_K - 1 ? sum[tile][n][i] : to + sum[tile][n][i];
        }
  }
  __syncthreads();

  for (int i = threadIdx.x; i < ROWS * COLUMNS; i += THREADS) {
    const int row = first_row + i / COLUMNS, at_column = blockIdx.y * COLUMNS + i % COLUMNS;
    if (row >= rows || at_column >= outputs) continue;
    const float total = sums[i / COLUMNS * (COLUMNS + PAD) + i % COLUMNS];
    const size_t at = static_cast<size_t>(row) * outputs + at_column;
    if (partial)
      partial[static_cast<size_t>(blockIdx.z) * rows * outputs + at] = total;
    else
      y[at] = from_float<T>(bias ? total + bias[at_column] : total);
  }
}

template <int BITS, typename T, int ROWS, int STAGES = SHALLOW, bool DEEP = false>
int launch(const void* x, const void* words, const void* table, const float* bias, void* y,
           float* partial, int rows, int inputs, int outputs, int columns, int shift, int splits, cudaStream_t stream) {
  constexpr int bytes = Sizes<BITS, ROWS, STAGES, DEEP>::BYTES;
  const auto kernel = gemm<BITS, T, ROWS, STAGES, DEEP>;
  if (bytes > 48 * 1024) {
    const cudaError_t code =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (code != cudaSuccess) return code;
  }
  LAUNCH(kernel, dim3(ceil_div(rows, ROWS), ceil_div(columns, COLUMNS), splits), THREADS, bytes,
         stream, static_cast<const T*>(x), static_cast<const uint32_t*>(words),
         static_cast<const Grid*>(table), bias, static_cast<T*>(y), partial, rows, inputs, outputs,
         columns, shift);
  return cudaGetLastError();
}

// Of a deep pipeline if stages are given: quant_cuda/cuda/variants.py has the same list.
template <int BITS, typename T, typename... Rest>
int launch_rows(int row_tile, int stages, Rest... rest) {
  switch (stages * 1000 + row_tile) {
    case 4016: return launch<BITS, T, 16, 4, true>(rest...);
    case 3032: return launch<BITS, T, 32, 3, true>(rest...);
    case 4032: return launch<BITS, T, 32, 4, true>(rest...);
    case 3064: return launch<BITS, T, 64, 3, true>(rest...);
    case 16: return launch<BITS, T, 16>(rest...);
    case 32: return launch<BITS, T, 32>(rest...);
    case 64: return launch<BITS, T, 64>(rest...);
    default: return cudaErrorInvalidValue;
  }
}

template <typename... Rest>
int launch_type(int bits, int type, Rest... rest) {
  if (bits == 4 && type == HALF) return launch_rows<4, half_t>(rest...);
  if (bits == 4 && type == BFLOAT) return launch_rows<4, bfloat_t>(rest...);
  if (bits == 8 && type == HALF) return launch_rows<8, half_t>(rest...);
  if (bits == 8 && type == BFLOAT) return launch_rows<8, bfloat_t>(rest...);
  return cudaErrorInvalidValue;
}

}  // namespace

// As quant_cuda_gemv, for any number of rows; a thread block takes row_tile of them: 16, 32, 64.
// stages: of a deep pipeline, see launch_rows; 0 for one that holds weights in registers.
EXPORT int quant_cuda_gemm_deep(int bits, int type, const void* x, const void* words,
                                const void* table, const float* bias, void* y, float* partial,
                                int rows, int inputs, int outputs, int columns, int shift,
                                int splits, int row_tile, int stages, cudaStream_t stream) {
  if (rows < 1 || inputs < 8 || inputs % 8 || columns % WARP_COLUMNS || shift < 5 ||
      (splits > 1) != (partial != nullptr))
    return cudaErrorInvalidValue;
  return launch_type(bits, type, row_tile, stages, x, words, table, bias, y, partial, rows, inputs, outputs,
                     columns, shift, splits, stream);
}

EXPORT int quant_cuda_gemm(int bits, int type, const void* x, const void* words, const void* table,
                           const float* bias, void* y, float* partial, int rows, int inputs,
                           int outputs, int columns, int shift, int splits, int row_tile,
                           cudaStream_t stream) {
  return quant_cuda_gemm_deep(bits, type, x, words, table, bias, y, partial, rows, inputs, outputs,
                              columns, shift, splits, row_tile, 0, stream);
}

// y = x W for up to 32 rows of x. Reading W is the limit, so each byte is read once, straight into
// registers. The tensor cores take eight rows at a time.
//
// A thread block computes 32 columns; its warps take blocks of inputs in turn, several loads ahead
// of use, and their sums are added in shared memory in a fixed order. If the columns are too few to
// fill the GPU, several thread blocks share the inputs and leave partial sums, which a
// second kernel adds in order. Nothing is added atomically: results do not vary from run to run.

#include "fragment.cuh"

namespace {

constexpr int WARPS = 8;
// Blocks of inputs that a warp loads ahead; with more rows of x there are registers for one less.
template <int EIGHTS>
constexpr int ahead = EIGHTS == 1 ? 3 : 2;
constexpr int TILES = 2;
constexpr int COLUMNS = TILES * layout::TILE;
constexpr int MOST_ROWS = 32;

// A warp's part of a block of inputs, 32 columns wide.
template <bool FINE>
struct Stage {
  Piece pieces[TILES];
  Grid grids[TILES][2];  // of the block's one group; not read if FINE

  template <int BITS>
  __device__ void load(const uint32_t* words, const Grid* table, int block, int blocks, int columns,
                       int shift, int lane) {
    const int first = blockIdx.x * TILES;
#pragma unroll
    for (int i = 0; i < TILES; ++i) {
      const size_t at = static_cast<size_t>(first + i) * blocks + block;
      pieces[i].load(words + at * layout::BLOCK_WORDS, lane);
      if (!FINE) read_grids(table, block * layout::block_inputs<BITS>, columns, shift, lane, i);
    }
  }

  __device__ void read_grids(const Grid* table, int input, int columns, int shift, int lane, int i) {
    const Grid* row = table + static_cast<size_t>(input >> shift) * columns;
    const int column = (blockIdx.x * TILES + i) * layout::TILE + lane / 4;
    grids[i][0] = row[column];
    grids[i][1] = row[column + 8];
  }
};

// x: (rows, inputs), rows at most 8 * EIGHTS. words: (tiles, blocks, 256). table: (units, columns), one row
// for each 2**shift inputs; FINE if that is fewer than a block. bias: (outputs,) or NULL.
// y: (rows, outputs); or partial: (gridDim.y, rows, outputs), without the bias, if not NULL.
template <int BITS, typename T, bool FINE, int EIGHTS>
__global__ void __launch_bounds__(WARPS * 32, EIGHTS == 4 ? 1 : 2)
    gemv(const T* __restrict__ x, const uint32_t* __restrict__ words,
         const Grid* __restrict__ table, const float* __restrict__ bias, T* __restrict__ y,
         float* __restrict__ partial, int rows, int inputs, int outputs, int columns, int shift) {
  constexpr int BLOCK = layout::block_inputs<BITS>;
  constexpr int RUNS = BLOCK / layout::RUN;
  constexpr int ROWS = 8 * EIGHTS, AHEAD = ahead<EIGHTS>;
  SHARED(float, sums, [WARPS][ROWS][COLUMNS + 1]);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int blocks = layout::block_count<BITS>(inputs);
  const int stride = WARPS * gridDim.y;
  // Rows past the last read the first row; their results are not written.
  int my_x[EIGHTS];
#pragma unroll
  for (int n = 0; n < EIGHTS; ++n) my_x[n] = (8 * n + g < rows ? 8 * n + g : 0) * inputs + 8 * t;

  Stage<FINE> stages[AHEAD];
  const int start = blockIdx.y * WARPS + warp;
#pragma unroll
  for (int i = 0; i < AHEAD; ++i)
    if (start + i * stride < blocks)
      stages[i].template load<BITS>(words, table, start + i * stride, blocks, columns, shift, lane);

  float sum[TILES][EIGHTS][4] = {};
  for (int base = start; base < blocks; base += AHEAD * stride) {
#pragma unroll
    for (int i = 0; i < AHEAD; ++i) {
      const int block = base + i * stride;
      if (block >= blocks) break;
      Stage<FINE>& stage = stages[i];
      uint4 b[EIGHTS][RUNS];
#pragma unroll
      for (int n = 0; n < EIGHTS; ++n)
#pragma unroll
        for (int run = 0; run < RUNS; ++run) {
          const int k = block * BLOCK + run * layout::RUN;
          b[n][run] = k + 8 * t < inputs ? *reinterpret_cast<const uint4*>(x + my_x[n] + k)
                                         : make_uint4(0, 0, 0, 0);
        }
#pragma unroll
      for (int tile = 0; tile < TILES; ++tile) {
        float part[EIGHTS][4] = {};
#pragma unroll
        for (int run = 0; run < RUNS; ++run) {
          if (FINE && block * BLOCK + run * layout::RUN >= inputs) break;
          if (FINE)
            stage.read_grids(table, block * BLOCK + run * layout::RUN, columns, shift, lane, tile);
          const Grid(&grid)[2] = stage.grids[tile];
          const Expander<BITS, T> expand[2] = {Expander<BITS, T>(grid[0].zero()),
                                               Expander<BITS, T>(grid[1].zero())};
          uint32_t a[2][4];
          expand_run<BITS, T>(stage.pieces[tile], run, expand, a);
#pragma unroll
          for (int n = 0; n < EIGHTS; ++n) {
            mma(part[n], a[0], b[n][run].x, b[n][run].y, T());
            mma(part[n], a[1], b[n][run].z, b[n][run].w, T());
            if (FINE || run == RUNS - 1) add_scaled(sum[tile][n], part[n], grid);
            if (FINE) part[n][0] = part[n][1] = part[n][2] = part[n][3] = 0;
          }
        }
      }
      const int next = block + AHEAD * stride;
      if (next < blocks)
        stage.template load<BITS>(words, table, next, blocks, columns, shift, lane);
    }
  }

#pragma unroll
  for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
    for (int n = 0; n < EIGHTS; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        sums[warp][8 * n + 2 * t + i % 2][tile * layout::TILE + g + 8 * (i / 2)] = sum[tile][n][i];
  __syncthreads();

  static_assert(WARPS * 32 == 8 * COLUMNS, "a thread for each result of eight rows");
  const int in_tile = threadIdx.x % COLUMNS, column = blockIdx.x * COLUMNS + in_tile;
  if (column >= outputs) return;
  for (int row = threadIdx.x / COLUMNS; row < ROWS && row < rows; row += 8) {
    float total = 0;
#pragma unroll
    for (int w = 0; w < WARPS; ++w) total += sums[w][row][in_tile];
    const size_t at = static_cast<size_t>(row) * outputs + column;
    if (partial)
      partial[static_cast<size_t>(blockIdx.y) * rows * outputs + at] = total;
    else
      y[at] = from_float<T>(bias ? total + bias[column] : total);
  }
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

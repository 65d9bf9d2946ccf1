// The core of gemv.cu, which decode.cu shares: a thread block multiplies up to 32 rows of x by 32
// columns of a weight. Reading W is the limit, so each byte is read once, straight into registers.
// The tensor cores take eight rows at a time.
//
// A thread block's warps take blocks of inputs in turn, several loads ahead of use, and their sums
// are added in shared memory in a fixed order.
#pragma once

#include "fragment.cuh"

namespace {

constexpr int WARPS = 8;
// Blocks of inputs that a warp loads ahead; with more rows of x there are registers for one less.
template <int EIGHTS>
constexpr int ahead = EIGHTS == 1 ? 3 : 2;
constexpr int TILES = 2;
constexpr int COLUMNS = TILES * layout::TILE;

// A warp's part of a block of inputs, 32 columns wide.
template <bool FINE>
struct Stage {
  Piece pieces[TILES];
  Grid grids[TILES][2];  // of the block's one group; not read if FINE

  // first: of the thread block's tiles.
  template <int BITS>
  __device__ void load(const uint32_t* words, const Grid* table, int first, int block, int blocks,
                       int columns, int shift, int lane) {
#pragma unroll
    for (int i = 0; i < TILES; ++i) {
      const size_t at = static_cast<size_t>(first + i) * blocks + block;
      pieces[i].load(words + at * layout::BLOCK_WORDS, lane);
      if (!FINE)
        read_grids(table, first, block * layout::block_inputs<BITS>, columns, shift, lane, i);
    }
  }

  __device__ void read_grids(const Grid* table, int first, int input, int columns, int shift,
                             int lane, int i) {
    const Grid* row = table + static_cast<size_t>(input >> shift) * columns;
    const int column = (first + i) * layout::TILE + lane / 4;
    grids[i][0] = row[column];
    grids[i][1] = row[column + 8];
  }
};

// Calls write(row, column, sum) for each row of x and column of the thread block's 32; and `begin` once
// after the first loads of weights, before x is read.
//
// x: (rows, inputs), rows at most 8 * EIGHTS. words: (tiles, blocks, 256). table: (units, columns),
// one row for each 2**shift inputs; FINE if that is fewer than a block. gridDim.y thread blocks
// share the inputs. All threads of the thread block call it.
template <int BITS, typename T, bool FINE, int EIGHTS, typename Begin, typename Write>
__device__ __forceinline__ void multiply_columns(const T* x,
                                                 const uint32_t* __restrict__ words,
                                                 const Grid* __restrict__ table, int rows,
                                                 int inputs, int outputs, int columns, int shift,
                                                 int column_block, Begin begin, Write write) {
  constexpr int BLOCK = layout::block_inputs<BITS>;
  constexpr int RUNS = BLOCK / layout::RUN;
  constexpr int ROWS = 8 * EIGHTS, AHEAD = ahead<EIGHTS>;
  SHARED(float, sums, [WARPS][ROWS][COLUMNS + 1]);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int first = column_block * TILES, blocks = layout::block_count<BITS>(inputs);
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
      stages[i].template load<BITS>(words, table, first, start + i * stride, blocks, columns, shift,
                                    lane);
  begin();

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
            stage.read_grids(table, first, block * BLOCK + run * layout::RUN, columns, shift, lane, tile);
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
        stage.template load<BITS>(words, table, first, next, blocks, columns, shift, lane);
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
  const int in_tile = threadIdx.x % COLUMNS, column = column_block * COLUMNS + in_tile;
  if (column >= outputs) return;
  for (int row = threadIdx.x / COLUMNS; row < ROWS && row < rows; row += 8) {
    float total = 0;
#pragma unroll
    for (int w = 0; w < WARPS; ++w) total += sums[w][row][in_tile];
    write(row, column, total);
  }
}

}  // namespace

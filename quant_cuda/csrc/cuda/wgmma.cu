// y = x W for some hundreds of rows of x and more, on GPUs of compute capability 9.0, by the matrix
// instructions of a whole warpgroup, which only they have.
//
// A thread block computes 128 or 256 columns for 128 rows. One warpgroup copies x to shared memory,
// the two others multiply. Integers go from global memory straight into registers and are dequantized
// to the values that dequantize.cu would write, bit for bit; they are the A operand, and x is the B
// operand. Lanes hold inputs 8t .. 8t+7 of every 32 (see layout.h), so x has to be in the same order:
// stmatrix writes the eight inputs that a lane has loaded in that order.
//
// Barriers in shared memory pass stages between the warpgroups. Thread blocks that share the
// inputs leave partial sums, which quant_cuda_add_partials adds in order.

#include "fragment.cuh"

namespace {

constexpr int ROWS = WGMMA_ROWS;
constexpr int GROUP = 128;   // threads of a warpgroup
constexpr int WORKERS = 2;   // warpgroups that multiply
constexpr int THREADS = (1 + WORKERS) * GROUP;
constexpr int WARPS = GROUP / 32;
constexpr int BATCH = 4;     // loads of x that a lane has in flight, in two batches
constexpr int PITCH = 20;    // of a row of sums; lanes of a warp have no bank conflict
// A warpgroup can only get registers that another released, or it waits forever. A thread block
// starts with the most for each thread that 65536 registers allow, in multiples of eight.
constexpr int BRINGER_REGISTERS = 56, WORKER_REGISTERS = 224;
static_assert(BRINGER_REGISTERS + WORKERS * WORKER_REGISTERS <=
              (1 + WORKERS) * (65536 / THREADS / 8 * 8));

// A stage is one block of inputs of x: (chunk of eight inputs, row), 16 bytes each.
template <int BITS>
struct Sizes {
  static constexpr int BLOCK = layout::block_inputs<BITS>;
  static constexpr int RUNS = BLOCK / layout::RUN;
  static constexpr int STAGES = 512 / BLOCK;
  static constexpr int STAGE = BLOCK / 8 * ROWS;
  static constexpr int SUMS = WORKERS * WARPS * ROWS * PITCH;
  static constexpr int BYTES = STAGES * STAGE * 16 + SUMS * 4 + 2 * STAGES * 8;
};

// The work of a thread block: blocks first, first + stride, ...
struct Work {
  int rows, inputs, columns, shift, first_row, first, stride, blocks;

  __device__ int steps() const { return (blocks - first + stride - 1) / stride; }
  __device__ int block(int step) const { return first + step * stride; }
};

// The first warpgroup: copies x to shared memory, each stage as soon as it is free.
template <int BITS, typename T>
__device__ __forceinline__ void bring(uint4* shared, barrier_t* full, barrier_t* empty,
                                      const T* x, const Work& work) {
  using Size = Sizes<BITS>;
  constexpr int BATCHES = Size::RUNS, EIGHTS = BATCH;  // of rows, a warp
  static_assert(WARPS * 8 * EIGHTS == ROWS);
  const int lane = threadIdx.x % 32, first = threadIdx.x / 32 * 8 * EIGHTS;
  const int count = work.steps() * BATCHES;

  const auto load = [&](uint4(&values)[BATCH], int batch) {
    const int k = work.block(batch / BATCHES) * Size::BLOCK +
                  batch % BATCHES * layout::RUN + lane % 4 * 8;
#pragma unroll
    for (int i = 0; i < BATCH; ++i) {
      const int row = work.first_row + first + i * 8 + lane / 4;
      const bool there = row < work.rows && k < work.inputs;
      const T* from = x + static_cast<size_t>(row) * work.inputs + k;
      values[i] = there ? *reinterpret_cast<const uint4*>(from) : make_uint4(0, 0, 0, 0);
    }
  };

  uint4 now[BATCH], next[BATCH];
  if (count > 0) load(now, 0);
  for (int batch = 0; batch < count; ++batch) {
    if (batch + 1 < count) load(next, batch + 1);
    const int step = batch / BATCHES, stage = step % Size::STAGES, part = batch % BATCHES;
    if (part == 0 && step >= Size::STAGES)
      barrier_wait(&empty[stage], (step / Size::STAGES + 1) % 2);
#pragma unroll
    for (int i = 0; i < BATCH; ++i) {
      // Lane 8j + r has the address of row r of matrix j.
      const int chunk = part * 4 + lane / 8;
      const int row = first + i * 8 + lane % 8;
      store_matrices(&shared[stage * Size::STAGE + chunk * ROWS + row], now[i]);
    }
    if (part == BATCHES - 1) {
      fence_async();
      __syncwarp();
      if (lane == 0) barrier_arrive(&full[stage]);
    }
#pragma unroll
    for (int i = 0; i < BATCH; ++i) now[i] = next[i];
  }
}

// The weights that a lane of a worker reads: 16 columns for each of TILES products.
template <int BITS, int TILES>
struct Weight {
  const uint32_t* words;
  const Grid* table;
  int first_tile, lane;

  __device__ bool has(int i, const Work& work) const {
    return (first_tile + WARPS * i) * layout::TILE < work.columns;
  }

  __device__ void load(Piece (&pieces)[TILES], int block, const Work& work) const {
#pragma unroll
    for (int i = 0; i < TILES; ++i) {
      if (!has(i, work)) continue;
      const size_t at = static_cast<size_t>(first_tile + WARPS * i) * work.blocks + block;
      pieces[i].load(words + at * layout::BLOCK_WORDS, lane);
    }
  }

  // Scales are zero for columns and inputs past the last.
  __device__ void load(Grid (&grids)[TILES][2], int input, const Work& work) const {
#pragma unroll
    for (int i = 0; i < TILES; ++i) {
      const bool there = has(i, work) && input < work.inputs;
      const Grid* row = table + static_cast<size_t>(input >> work.shift) * work.columns +
                        (first_tile + WARPS * i) * layout::TILE + lane / 4;
      grids[i][0] = there ? row[0] : Grid{0};
      grids[i][1] = there ? row[8] : Grid{0};
    }
  }
};

// The dequantized values of one run of 32 inputs as A operands, for its first and its last 16.
template <int BITS, typename T>
__device__ __forceinline__ void scaled_run(const Piece& piece, int run, const Grid (&grid)[2],
                                           uint32_t (&a)[2][4]) {
  const Expander<BITS, T> expand[2] = {Expander<BITS, T>(grid[0].zero()),
                                       Expander<BITS, T>(grid[1].zero())};
  expand_run<BITS, T>(piece, run, expand, a);
#pragma unroll
  for (int step = 0; step < 2; ++step)
#pragma unroll
    for (int i = 0; i < 4; ++i) a[step][i] = scale_pair(a[step][i], grid[i % 2], T());
}

// The other warpgroups: sum[i] += W x for each of TILES products of 64 columns.
template <int BITS, typename T, int TILES>
__device__ __forceinline__ void multiply(const uint4* shared, barrier_t* full, barrier_t* empty,
                                         const Weight<BITS, TILES>& weight, const Work& work,
                                         float (&sum)[TILES][ROWS / 2]) {
  using Size = Sizes<BITS>;
  const int steps = work.steps();
  Piece next[TILES] = {};
  Grid grids[2][TILES][2];  // of this run and the next
  if (steps > 0) {
    weight.load(next, work.block(0), work);
#pragma unroll
    for (int run = 0; run < 2; ++run)
      weight.load(grids[run], work.block(0) * Size::BLOCK + run * layout::RUN, work);
  }
  for (int step = 0; step < steps; ++step) {
    Piece pieces[TILES];
#pragma unroll
    for (int i = 0; i < TILES; ++i) pieces[i] = next[i];
    if (step + 1 < steps) weight.load(next, work.block(step + 1), work);
    const int stage = step % Size::STAGES;
    barrier_wait(&full[stage], step / Size::STAGES % 2);
#pragma unroll
    for (int run = 0; run < Size::RUNS; ++run) {
      uint32_t a[TILES][2][4];
#pragma unroll
      for (int i = 0; i < TILES; ++i)
        scaled_run<BITS, T>(pieces[i], run, grids[run % 2][i], a[i]);
      const int ahead = run + 2, later = ahead / Size::RUNS;
      weight.load(grids[run % 2],
                  work.block(step + later) * Size::BLOCK + ahead % Size::RUNS * layout::RUN, work);
      wgmma_fence();
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint4* x = shared + stage * Size::STAGE + (4 * run + 2 * half) * ROWS;
        const uint64_t b = matrix_descriptor(x, ROWS * 16, 8 * 16);
#pragma unroll
        for (int i = 0; i < TILES; ++i) wgmma(sum[i], a[i][half], b, step > 0 || run > 0 || half > 0, T());
      }
      wgmma_commit();
      wgmma_wait<1>();
      // All runs before this one have been read, and with them the stage before this one.
      if (run == 0 && step > 0 && threadIdx.x % 32 == 0)
        barrier_arrive(&empty[(step - 1) % Size::STAGES]);
    }
  }
  wgmma_wait<0>();
#pragma unroll
  for (int i = 0; i < TILES; ++i) wgmma_settle(sum[i]);
}

// x: (rows, inputs). words: (tiles, blocks, 256). table: (units, columns), one row for each
// 2**shift inputs. bias: (outputs,) or NULL. y: (rows, outputs); or partial: (gridDim.z, rows,
// outputs), without the bias, if not NULL.
// Thread blocks: (rows / ROWS, columns / (WORKERS * TILES * 64), splits of the inputs).
template <int BITS, typename T, int TILES>
__global__ void __launch_bounds__(THREADS, 1)
    wgmma_gemm(const T* __restrict__ x, const uint32_t* __restrict__ words,
               const Grid* __restrict__ table, const float* __restrict__ bias, T* __restrict__ y,
               float* __restrict__ partial, int rows, int inputs, int outputs, int columns,
               int shift) {
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using Size = Sizes<BITS>;
  DYNAMIC_SHARED(uint4, shared);
  float* sums = reinterpret_cast<float*>(shared + Size::STAGES * Size::STAGE);
  barrier_t* full = reinterpret_cast<barrier_t*>(sums + Size::SUMS);
  barrier_t* empty = full + Size::STAGES;
  const Work work = {rows,
                     inputs,
                     columns,
                     shift,
                     static_cast<int>(blockIdx.x) * ROWS,
                     static_cast<int>(blockIdx.z),
                     static_cast<int>(gridDim.z),
                     layout::block_count<BITS>(inputs)};
  if (threadIdx.x < Size::STAGES) {
    barrier_start(&full[threadIdx.x], WARPS);
    barrier_start(&empty[threadIdx.x], WORKERS * WARPS);
  }
  __syncthreads();

  if (threadIdx.x < GROUP) {
    lower_registers<BRINGER_REGISTERS>();
    bring<BITS, T>(shared, full, empty, x, work);
  } else {
    raise_registers<WORKER_REGISTERS>();
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int worker = threadIdx.x / GROUP - 1, warp = threadIdx.x % GROUP / 32;
    const int first_tile = (blockIdx.y * WORKERS + worker) * TILES * WARPS + warp;
    const Weight<BITS, TILES> weight = {words, table, first_tile, lane};
    float sum[TILES][ROWS / 2];
    multiply<BITS, T, TILES>(shared, full, empty, weight, work, sum);

    float* mine = sums + (worker * WARPS + warp) * ROWS * PITCH;
#pragma unroll
    for (int i = 0; i < TILES; ++i) {
      __syncwarp();
#pragma unroll
      for (int j = 0; j < ROWS / 2; ++j)
        mine[(j / 4 * 8 + 2 * t + j % 2) * PITCH + g + j % 4 / 2 * 8] = sum[i][j];
      __syncwarp();
      const int column = (first_tile + WARPS * i) * layout::TILE + lane % layout::TILE;
      if (column >= outputs) continue;
      const float extra = bias ? bias[column] : 0.0f;
      for (int r = lane / layout::TILE; r < ROWS && work.first_row + r < rows; r += 2) {
        const float total = mine[r * PITCH + lane % layout::TILE];
        const size_t at = static_cast<size_t>(work.first_row + r) * outputs + column;
        if (partial)
          partial[static_cast<size_t>(blockIdx.z) * rows * outputs + at] = total;
        else
          y[at] = from_float<T>(total + extra);
      }
    }
  }
#endif
}

template <int BITS, typename T, int TILES>
int launch(const void* x, const void* words, const void* table, const float* bias, void* y,
           float* partial, int rows, int inputs, int outputs, int columns, int shift, int splits,
           cudaStream_t stream) {
  // Each thread block needs inputs, or its sums would never be written.
  if (splits < 1 || splits > layout::block_count<BITS>(inputs)) return cudaErrorInvalidValue;
  constexpr int bytes = Sizes<BITS>::BYTES;
  const auto kernel = wgmma_gemm<BITS, T, TILES>;
  const cudaError_t code =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (code != cudaSuccess) return code;
  const dim3 grid(ceil_div(rows, ROWS), ceil_div(columns, WORKERS * TILES * 64), splits);
  LAUNCH(kernel, grid, THREADS, bytes, stream, static_cast<const T*>(x),
         static_cast<const uint32_t*>(words), static_cast<const Grid*>(table), bias,
         static_cast<T*>(y), partial, rows, inputs, outputs, columns, shift);
  return cudaGetLastError();
}

template <int BITS, typename T, typename... Rest>
int launch_tiles(int tile, Rest... rest) {
  switch (tile) {
    case 128: return launch<BITS, T, 1>(rest...);
    case 256: return launch<BITS, T, 2>(rest...);
    default: return cudaErrorInvalidValue;
  }
}

template <typename... Rest>
int launch_type(int bits, int type, Rest... rest) {
  if (bits == 4 && type == HALF) return launch_tiles<4, half_t>(rest...);
  if (bits == 4 && type == BFLOAT) return launch_tiles<4, bfloat_t>(rest...);
  if (bits == 8 && type == HALF) return launch_tiles<8, half_t>(rest...);
  if (bits == 8 && type == BFLOAT) return launch_tiles<8, bfloat_t>(rest...);
  return cudaErrorInvalidValue;
}

}  // namespace

// As quant_cuda_gemv, for any number of rows; a thread block takes column_tile columns: 128, 256.
// For GPUs of compute capability 9.0, in a library that was built for sm_90a.
EXPORT int quant_cuda_wgmma(int bits, int type, const void* x, const void* words,
                            const void* table, const float* bias, void* y, float* partial,
                            int rows, int inputs, int outputs, int columns, int shift, int splits,
                            int column_tile, cudaStream_t stream) {
  if (rows < 1 || inputs < 8 || inputs % 8 || columns % layout::TILE || shift < 5 ||
      (splits > 1) != (partial != nullptr))
    return cudaErrorInvalidValue;
  return launch_type(bits, type, column_tile, x, words, table, bias, y, partial, rows, inputs,
                     outputs, columns, shift, splits, stream);
}

// Whether the library was built with it.
EXPORT int quant_cuda_has_wgmma() {
#if defined(QUANT_CUDA_SM90A) || !defined(__CUDACC__)
  return 1;
#else
  return 0;
#endif
}

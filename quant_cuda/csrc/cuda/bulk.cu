// y = x W on GPUs of compute capability 9.0.
//
// The copy engine brings all that a thread block reads: blocks of packed weights and rows of their table
// by bulk copies, x by boxes of a tensor map, into a ring of stages in shared memory. One warp starts the
// copies; warpgroups take integers out of shared memory, dequantize them in registers to the values that
// dequantize.cu would write, bit for bit, and multiply: the weight is the A operand, x the B operand.
//
// x lies in its natural order, so that in a product of 16 inputs lane 4g + t needs inputs 2t, 2t + 1 of
// two neighbouring eights, for columns g and g + 8. In a tile (see layout.h) a lane's 16 bytes are whole
// eights: each lane reads those of its four neighbours too, which is one access for all four, and takes
// its pair of each.
//
// Pairs of thread blocks beside each other along the columns may share x: each brings half of its rows to
// both, and a stage is free once both have read it.
//
// Thread blocks that share the inputs are a cluster. Each leaves its sums in its shared memory, and all of
// them add up a part of the results, in the order of the thread blocks.

#include "fragment.cuh"

// For other GPUs the kernel has no body, and some functions no caller.
#pragma nv_diag_suppress 177

namespace {

constexpr int GROUP = 128;       // threads of a warpgroup
constexpr int BOX_INPUTS = 64;   // of x, in one box of its map
constexpr int BOX_PITCH = 128;   // bytes of a row of a box
constexpr int MOST_SPLITS = 8;   // thread blocks of a cluster, on every GPU
constexpr int ALIGNMENT = 1024;  // of boxes in shared memory
// Where sums need more than the 168 registers that 9 to 12 warps have each, the warps that multiply get
// those of a whole warpgroup, of which one warp starts copies. See wgmma.cu.
constexpr int BRINGER_REGISTERS = 40, WORKER_REGISTERS = 232;
static_assert(BRINGER_REGISTERS + 2 * WORKER_REGISTERS <= 3 * 168);

// A thread block takes ROWS rows of x and COLUMNS columns: TILES products of 64 columns for each of
// WORKERS warpgroups. Sizes are in bytes.
template <int BITS, int ROWS, int WORKERS, int TILES>
struct Sizes {
  static constexpr bool MOVES_REGISTERS = WORKERS * TILES == 4 && ROWS >= 96;
  static constexpr int WORKING = WORKERS * GROUP;
  static constexpr int THREADS = WORKING + (MOVES_REGISTERS ? GROUP : 32);
  static constexpr int COLUMNS = WORKERS * TILES * 64;
  static constexpr int BLOCK = layout::block_inputs<BITS>;
  static constexpr int BOXES = BLOCK / BOX_INPUTS;
  static constexpr int BOX = ROWS * BOX_PITCH;
  static constexpr int WORDS = COLUMNS / layout::TILE * layout::BLOCK_WORDS * 4;
  static constexpr int PITCH = COLUMNS + 4;  // of a row of sums; lanes of a warp have no bank conflict
  static constexpr int SUMS = ROWS * PITCH * 4;
  static_assert(BOX % ALIGNMENT == 0 && WORDS % ALIGNMENT == 0);

  // Rows of the table that serve one block of inputs.
  HOST_DEVICE static int table_rows(int shift) { return 1 << shift < BLOCK ? BLOCK >> shift : 1; }

  HOST_DEVICE static int stage(int shift) {
    const int table = table_rows(shift) * COLUMNS * 4;
    return BOXES * BOX + WORDS + (table + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
  }

  // The ring, which the sums use later.
  HOST_DEVICE static int ring(int shift, int stages) {
    return stages * stage(shift) > SUMS ? stages * stage(shift) : SUMS;
  }

  HOST_DEVICE static int bytes(int shift, int stages) {
    return ALIGNMENT + ring(shift, stages) + (2 * stages + 1) * static_cast<int>(sizeof(barrier_t));
  }
};

// The work of a thread block: blocks of inputs first .. last - 1. Of a pair, the lower's rank in the
// cluster, and whether this is the upper.
struct Work {
  int inputs, columns, shift, first_row, first_tile, first, last, lower, upper;
};

// A ring's stage, and the parity of the phase of its barriers.
struct Turn {
  int stage = 0, parity = 0;

  __device__ void next(int stages) {
    if (++stage < stages) return;
    stage = 0;
    parity ^= 1;
  }
};

struct Ring {
  char* memory;
  barrier_t* full;
  barrier_t* empty;
  int stages, stage_bytes;

  __device__ char* at(const Turn& turn) const { return memory + turn.stage * stage_bytes; }
};

// The last warp: starts the copies of each stage as soon as it is free.
template <typename Size, bool PAIRS>
__device__ __forceinline__ void bring(const Ring& ring, const tensor_map_t* map,
                                      const uint32_t* words, const Grid* table, const Work& work) {
  const int lane = threadIdx.x % 32;
  const int blocks = (work.inputs + Size::BLOCK - 1) / Size::BLOCK;
  const int units = ((work.inputs - 1) >> work.shift) + 1;
  const int left = work.columns / layout::TILE - work.first_tile;
  // The upper one of the last pair may have no columns.
  const int most = Size::COLUMNS / layout::TILE, tiles = left < 0 ? 0 : left < most ? left : most;
  if (lane == 0) prefetch_map(map);
  Turn turn;
  for (int block = work.first; block < work.last; ++block) {
    const int first_unit = (block * Size::BLOCK) >> work.shift, there = units - first_unit;
    const int needed = Size::table_rows(work.shift), table_rows = there < needed ? there : needed;
    barrier_t* full = &ring.full[turn.stage];
    // The first time a stage is free: a barrier counts the phase before its first as complete.
    if (PAIRS)
      barrier_wait_cluster(&ring.empty[turn.stage], turn.parity ^ 1);
    else
      barrier_wait(&ring.empty[turn.stage], turn.parity ^ 1);
    if (lane == 0)
      barrier_expect(full, Size::BOXES * Size::BOX + tiles * layout::BLOCK_WORDS * 4 +
                               table_rows * tiles * layout::TILE * 4);
    __syncwarp();
    char* to = ring.at(turn);
    if (lane < Size::BOXES) {
      const int input = block * Size::BLOCK + lane * BOX_INPUTS;
      char* box = to + lane * Size::BOX;
      if (PAIRS)
        copy_box_to_two(box + work.upper * Size::BOX / 2, map, input,
                        work.first_row + work.upper * (Size::BOX / BOX_PITCH / 2), full, work.lower);
      else
        copy_box(box, map, input, work.first_row, full);
    }
    to += Size::BOXES * Size::BOX;
    if (lane < tiles) {
      const size_t from = static_cast<size_t>(work.first_tile + lane) * blocks + block;
      copy_bulk(to + lane * layout::BLOCK_WORDS * 4, words + from * layout::BLOCK_WORDS,
                layout::BLOCK_WORDS * 4, full);
    }
    to += Size::WORDS;
    if (lane < table_rows && tiles > 0) {
      const size_t from = static_cast<size_t>(first_unit + lane) * work.columns +
                          work.first_tile * layout::TILE;
      copy_bulk(to + lane * Size::COLUMNS * 4, table + from, tiles * layout::TILE * 4, full);
    }
    turn.next(ring.stages);
  }
}

// The first warpgroups: sum[i] += W x for each of TILES products of 64 columns.
template <int BITS, typename T, typename Size, int ROWS, int TILES, bool PAIRS>
__device__ __forceinline__ void multiply(const Ring& ring, const Work& work,
                                         float (&sum)[TILES][ROWS / 2]) {
  constexpr int RUNS = Size::BLOCK / layout::RUN, STEPS = BOX_INPUTS / 16;
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int first_tile = threadIdx.x / GROUP * TILES * 4 + threadIdx.x % GROUP / 32;
  const bool fine = Size::table_rows(work.shift) > 1;
  Turn turn, before;
  for (int block = work.first; block < work.last; ++block) {
    barrier_wait(&ring.full[turn.stage], turn.parity);
    const char* stage = ring.at(turn);
    const char* words = stage + Size::BOXES * Size::BOX;
    const Grid* table = reinterpret_cast<const Grid*>(words + Size::WORDS);
    const uint64_t x = swizzled_descriptor(stage);
#pragma unroll
    for (int i = 0; i < TILES; ++i) {
      const int tile = first_tile + 4 * i;
      WholeTile weight;
      weight.load(words + tile * layout::BLOCK_WORDS * 4, g);
      Grid grid[2];
#pragma unroll
      for (int run = 0; run < RUNS; ++run) {
        if (run == 0 || fine) {
          const int row = fine ? (run * layout::RUN) >> work.shift : 0;
          const Grid* from = table + row * Size::COLUMNS + tile * layout::TILE + g;
          // Rows of the table past the last input were not copied.
          const bool there = block * Size::BLOCK + run * layout::RUN < work.inputs;
          grid[0] = there ? from[0] : Grid{0};
          grid[1] = there ? from[8] : Grid{0};
        }
        uint32_t a[2][4];
        weight.template expand<BITS, T>(run, t, grid, a);
        wgmma_fence();
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int step = 2 * run + half;
          const uint64_t b = x + (step / STEPS * Size::BOX + step % STEPS * 32) / 16;
          wgmma(sum[i], a[half], b, block > work.first || run > 0 || half > 0, T());
        }
        wgmma_commit();
        wgmma_wait<1>();
        // All products before this run's are done, and with them those of the stage before this one.
        if (i == 0 && run == 0 && block > work.first) {
          __syncwarp();
          barrier_t* empty = &ring.empty[before.stage];
          if (!PAIRS && lane == 0) barrier_arrive(empty);
          if (PAIRS && lane < 2) barrier_arrive_at(empty, work.lower + lane);
        }
      }
    }
    before = turn;
    turn.next(ring.stages);
  }
  wgmma_wait<0>();
#pragma unroll
  for (int i = 0; i < TILES; ++i) wgmma_settle(sum[i]);
}

// y: the sums of all thread blocks of the cluster, (row, column) of PITCH, in their order. Each adds up a
// part of the results.
template <typename T, typename Size, int ROWS, bool PAIRS>
__device__ __forceinline__ void add_up(const float* sums, const float* bias, T* y, const Work& work,
                                       int rows, int outputs) {
  const int splits = gridDim.z, left = rows - work.first_row;
  const int count = (left < ROWS ? left : ROWS) * Size::COLUMNS;
  const float* of[MOST_SPLITS];
#pragma unroll
  for (int s = 0; s < MOST_SPLITS; ++s)
    of[s] = s < splits ? cluster_shared(sums, PAIRS ? 2 * s + work.upper : s) : nullptr;
  for (int i = blockIdx.z * Size::WORKING + threadIdx.x; i < count; i += splits * Size::WORKING) {
    const int row = i / Size::COLUMNS, in_tile = i % Size::COLUMNS;
    const int column = work.first_tile * layout::TILE + in_tile;
    if (column >= outputs) continue;
    float total = 0;
#pragma unroll
    for (int s = 0; s < MOST_SPLITS; ++s)
      if (s < splits) total += of[s][row * Size::PITCH + in_tile];
    y[static_cast<size_t>(work.first_row + row) * outputs + column] =
        from_float<T>(bias ? total + bias[column] : total);
  }
}

// map: of x, (rows, inputs), in boxes of ROWS rows, or half as many if PAIRS. words: (tiles, blocks, 256).
// table: (units, columns), one row for each 2**shift inputs. bias: (outputs,) or NULL. y: (rows, outputs).
// Thread blocks: (rows / ROWS, columns / COLUMNS, splits of the inputs), a cluster along the last, and of
// 2 along the columns if PAIRS.
template <int BITS, typename T, int ROWS, int WORKERS, int TILES, int BLOCKS, bool PAIRS>
__global__ void __launch_bounds__(Sizes<BITS, ROWS, WORKERS, TILES>::THREADS, BLOCKS)
    bulk_gemm(const GRID_CONSTANT tensor_map_t map, const uint32_t* __restrict__ words,
              const Grid* __restrict__ table, const float* __restrict__ bias, T* __restrict__ y,
              int rows, int inputs, int outputs, int columns, int shift, int stages) {
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using Size = Sizes<BITS, ROWS, WORKERS, TILES>;
  DYNAMIC_SHARED(uint4, shared);
  // Boxes are swizzled by the address.
  const uintptr_t start = reinterpret_cast<uintptr_t>(shared);
  char* memory = reinterpret_cast<char*>(shared) + (ALIGNMENT - start % ALIGNMENT) % ALIGNMENT;
  barrier_t* full = reinterpret_cast<barrier_t*>(memory + Size::ring(shift, stages));
  const Ring ring = {memory, full, full + stages, stages, Size::stage(shift)};
  barrier_t* all_read = full + 2 * stages;
  const int blocks = layout::block_count<BITS>(inputs), split = blockIdx.z, splits = gridDim.z;
  const Work work = {inputs,
                     columns,
                     shift,
                     static_cast<int>(blockIdx.x) * ROWS,
                     static_cast<int>(blockIdx.y) * Size::COLUMNS / layout::TILE,
                     blocks * split / splits,
                     blocks * (split + 1) / splits,
                     2 * split,
                     static_cast<int>(blockIdx.y % 2)};
  if (threadIdx.x == 0) {
    for (int i = 0; i < stages; ++i) {
      barrier_start(&ring.full[i], 1);
      barrier_start(&ring.empty[i], (PAIRS ? 2 : 1) * Size::WORKING / 32);
    }
    barrier_start(all_read, Size::WORKING / 32);
    barrier_fence();
  }
  // The other one of a pair arrives at these barriers too.
  if (PAIRS)
    cluster_sync();
  else
    __syncthreads();

  if (threadIdx.x >= Size::WORKING) {
    if (Size::MOVES_REGISTERS) lower_registers<BRINGER_REGISTERS>();
    if (threadIdx.x < Size::WORKING + 32) bring<Size, PAIRS>(ring, &map, words, table, work);
  } else {
    if (Size::MOVES_REGISTERS) raise_registers<WORKER_REGISTERS>();
    float sum[TILES][ROWS / 2];
    multiply<BITS, T, Size, ROWS, TILES, PAIRS>(ring, work, sum);
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int first_tile = threadIdx.x / GROUP * TILES * 4 + threadIdx.x % GROUP / 32;
    __syncwarp();
    if (lane == 0) barrier_arrive(all_read);
    barrier_wait(all_read, 0);  // sums take the place of the ring
    float* sums = reinterpret_cast<float*>(memory);
#pragma unroll
    for (int i = 0; i < TILES; ++i)
#pragma unroll
      for (int j = 0; j < ROWS / 2; ++j)
        sums[(j / 4 * 8 + 2 * t + j % 2) * Size::PITCH + (first_tile + 4 * i) * layout::TILE + g +
             j % 4 / 2 * 8] = sum[i][j];
    cluster_sync();  // the warps that bring have ended and are not waited for
    add_up<T, Size, ROWS, PAIRS>(sums, bias, y, work, rows, outputs);
    cluster_sync();  // nobody leaves while its sums are read
  }
#endif
}

template <int BITS, typename T, int ROWS, int WORKERS, int TILES, int BLOCKS, bool PAIRS = false>
int launch(const void* x, const void* words, const void* table, const float* bias, void* y, int rows,
           int inputs, int outputs, int columns, int shift, int splits, int stages,
           cudaStream_t stream) {
  using Size = Sizes<BITS, ROWS, WORKERS, TILES>;
  static_assert(!PAIRS || Size::BOX / 2 % ALIGNMENT == 0);
  const int bytes = Size::bytes(shift, stages);
  const auto kernel = bulk_gemm<BITS, T, ROWS, WORKERS, TILES, BLOCKS, PAIRS>;
  constexpr int wide = PAIRS ? 2 : 1;
  if (splits * wide > MOST_SPLITS) return cudaErrorInvalidValue;
  cudaError_t code =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (code != cudaSuccess) return code;
  tensor_map_t map;
  code = map_rows(&map, x, rows, inputs, ROWS / wide);
  if (code != cudaSuccess) return code;
  const dim3 grid(ceil_div(rows, ROWS), wide * ceil_div(columns, wide * Size::COLUMNS), splits);
  code = launch_cluster(kernel, grid, wide, Size::THREADS, bytes, stream, map,
                        static_cast<const uint32_t*>(words), static_cast<const Grid*>(table), bias,
                        static_cast<T*>(y), rows, inputs, outputs, columns, shift, stages);
  return code != cudaSuccess ? code : cudaGetLastError();
}

// The instances: quant_cuda/cuda/variants.py has the same list.
template <int BITS, typename T, typename... Rest>
int launch_tile(int pairs, int rows, int columns, Rest... rest) {
  switch (pairs * 1000000 + rows * 1000 + columns) {
    case 8128: return launch<BITS, T, 8, 1, 2, 2>(rest...);
    case 16128: return launch<BITS, T, 16, 1, 2, 2>(rest...);
    case 24128: return launch<BITS, T, 24, 1, 2, 2>(rest...);
    case 32128: return launch<BITS, T, 32, 1, 2, 2>(rest...);
    case 48128: return launch<BITS, T, 48, 1, 2, 2>(rest...);
    case 64128: return launch<BITS, T, 64, 1, 2, 2>(rest...);
    case 128128: return launch<BITS, T, 128, 2, 1, 1>(rest...);
    case 176128: return launch<BITS, T, 176, 2, 1, 1>(rest...);
    case 8256: return launch<BITS, T, 8, 2, 2, 1>(rest...);
    case 16256: return launch<BITS, T, 16, 2, 2, 1>(rest...);
    case 24256: return launch<BITS, T, 24, 2, 2, 1>(rest...);
    case 32256: return launch<BITS, T, 32, 2, 2, 1>(rest...);
    case 48256: return launch<BITS, T, 48, 2, 2, 1>(rest...);
    case 64256: return launch<BITS, T, 64, 2, 2, 1>(rest...);
    case 80256: return launch<BITS, T, 80, 2, 2, 1>(rest...);
    case 96256: return launch<BITS, T, 96, 2, 2, 1>(rest...);
    case 112256: return launch<BITS, T, 112, 2, 2, 1>(rest...);
    case 128256: return launch<BITS, T, 128, 2, 2, 1>(rest...);
    case 144256: return launch<BITS, T, 144, 2, 2, 1>(rest...);
    case 160256: return launch<BITS, T, 160, 2, 2, 1>(rest...);
    case 1032256: return launch<BITS, T, 32, 2, 2, 1, true>(rest...);
    case 1064256: return launch<BITS, T, 64, 2, 2, 1, true>(rest...);
    case 1096256: return launch<BITS, T, 96, 2, 2, 1, true>(rest...);
    case 1128256: return launch<BITS, T, 128, 2, 2, 1, true>(rest...);
    case 1160256: return launch<BITS, T, 160, 2, 2, 1, true>(rest...);
    case 1176128: return launch<BITS, T, 176, 2, 1, 1, true>(rest...);
    default: return cudaErrorInvalidValue;
  }
}

template <typename... Rest>
int launch_type(int bits, int type, Rest... rest) {
  if (bits == 4 && type == HALF) return launch_tile<4, half_t>(rest...);
  if (bits == 4 && type == BFLOAT) return launch_tile<4, bfloat_t>(rest...);
  if (bits == 8 && type == HALF) return launch_tile<8, half_t>(rest...);
  if (bits == 8 && type == BFLOAT) return launch_tile<8, bfloat_t>(rest...);
  return cudaErrorInvalidValue;
}

}  // namespace

// As quant_cuda_gemv, for any number of rows, in thread blocks of row_tile rows and column_tile columns,
// see launch_tile. splits: 1 .. 8 thread blocks share the inputs, and `partial` is not needed: NULL.
// stages: of the ring, 2 and more, as many as shared memory has room for. pairs: 1 for thread blocks
// that share x by two, with at most 4 splits; else 0.
// For GPUs of compute capability 9.0, in a library that was built for sm_90a.
EXPORT int quant_cuda_bulk(int bits, int type, const void* x, const void* words, const void* table,
                           const float* bias, void* y, const float* partial, int rows, int inputs,
                           int outputs, int columns, int shift, int splits, int row_tile,
                           int column_tile, int stages, int pairs, cudaStream_t stream) {
  const int blocks = bits == 4 ? layout::block_count<4>(inputs) : layout::block_count<8>(inputs);
  if (rows < 1 || inputs < 8 || inputs % 8 || columns % (2 * layout::TILE) || shift < 5 || partial ||
      splits < 1 || splits > MOST_SPLITS || splits > blocks || stages < 2)
    return cudaErrorInvalidValue;
  return launch_type(bits, type, pairs, row_tile, column_tile, x, words, table, bias, y, rows, inputs,
                     outputs, columns, shift, splits, stages, stream);
}

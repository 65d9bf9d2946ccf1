// The compute capability 9.0 (sm_90a): barriers in shared memory, the copy engine, clusters, and the
// products of a warpgroup. Twins for the host are in tests/helpers/cuda_twins_hopper.h.
#pragma once

#ifdef __CUDACC__

#include <cuda.h>

// Rows of x in one product of wgmma.cu.
constexpr int WGMMA_ROWS = 128;

#define GRID_CONSTANT __grid_constant__

// Of kernels launched by LAUNCH_OVERLAPPING; without effect in others. Lets the next one begin as soon
// as all thread blocks have called this.
__device__ __forceinline__ void release_next() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Waits until the kernel before this one has ended and what it wrote can be read.
__device__ __forceinline__ void await_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// A barrier in shared memory (mbarrier): when as many threads have arrived as it was started for, its
// phase is complete and the next begins. One thread starts it, before a __syncthreads.
struct barrier_t {
  uint64_t state;
};

__device__ __forceinline__ uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

__device__ __forceinline__ void barrier_start(barrier_t* barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count)
               : "memory");
}

__device__ __forceinline__ void barrier_arrive(barrier_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// Arrive, and let the phase wait for `bytes` more of the copies that name this barrier.
__device__ __forceinline__ void barrier_expect(barrier_t* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(
                   shared_address(barrier)),
               "r"(bytes)
               : "memory");
}

// Makes barriers that this thread has started visible to the copy engine.
__device__ __forceinline__ void barrier_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// Arrive at the barrier in the same place of another thread block of the cluster.
__device__ __forceinline__ void barrier_arrive_at(barrier_t* barrier, int rank) {
  asm volatile(
      "{.reg .b32 there;\n"
      "mapa.shared::cluster.u32 there, %0, %1;\n"
      "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [there];}" ::"r"(
          shared_address(barrier)),
      "r"(rank)
      : "memory");
}

// `barrier_wait` where other thread blocks of the cluster arrive too.
__device__ __forceinline__ void barrier_wait_cluster(barrier_t* barrier, int parity) {
  uint32_t done;
  do {
    asm volatile(
        "{.reg .pred p;\n"
        "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;}"
        : "=r"(done)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
  } while (!done);
}

// Wait until the phase of this parity is complete; the first has parity 0.
__device__ __forceinline__ void barrier_wait(barrier_t* barrier, int parity) {
  uint32_t done;
  do {
    asm volatile(
        "{.reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;}"
        : "=r"(done)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
  } while (!done);
}

// Four matrices of 8 x 8 numbers of 16 bits from a warp to shared memory: of matrix j, lane 4r + t
// has numbers (r, 2t), (r, 2t+1) in its word j, and lane 8j + r the address of row r.
__device__ __forceinline__ void store_matrices(void* shared, const uint4& words) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(
                   shared_address(shared)),
               "r"(words.x), "r"(words.y), "r"(words.z), "r"(words.w)
               : "memory");
}

// Makes this thread's writes to shared memory visible to `wgmma`.
__device__ __forceinline__ void fence_async() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Sets how many registers a thread of this warpgroup has from here on.
template <int COUNT>
__device__ __forceinline__ void raise_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}

template <int COUNT>
__device__ __forceinline__ void lower_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}

// The descriptor of `wgmma`'s B operand in shared memory: pieces of 8 inputs (16 bytes) by 8 rows,
// 128 bytes in a row each; `along` bytes from one to the next along the inputs, `across` along the rows.
__device__ __forceinline__ uint64_t matrix_descriptor(const void* shared, uint32_t along,
                                                      uint32_t across) {
  return static_cast<uint64_t>(shared_address(shared) >> 4 & 0x3FFF) |
         static_cast<uint64_t>(along >> 4) << 16 | static_cast<uint64_t>(across >> 4) << 32;
}

// Needed before the first `wgmma`, and before one whose operands in registers have changed.
__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

// Close a group of products.
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Wait until all but the last PENDING groups are done.
template <int PENDING>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// --- the copy engine ---

// Start to copy `bytes`, a multiple of 16, to shared memory; `barrier` expects them.
__device__ __forceinline__ void copy_bulk(void* shared, const void* global, int bytes,
                                          barrier_t* barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
          shared_address(shared)),
      "l"(global), "r"(bytes), "r"(shared_address(barrier))
      : "memory");
}

using tensor_map_t = CUtensorMap;

// Start to copy a map's box to shared memory (1024-byte aligned), from this input and row on;
// `barrier` expects all its bytes. What lies outside the tensor is zero.
__device__ __forceinline__ void copy_box(void* shared, const tensor_map_t* map, int input, int row,
                                         barrier_t* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], "
      "[%1, {%3, %4}], [%2];" ::"r"(shared_address(shared)),
      "l"(map), "r"(shared_address(barrier)), "r"(input), "r"(row)
      : "memory");
}

// The same, to the same place of two thread blocks of the cluster, `rank` and the next; the barrier of
// each expects the bytes.
__device__ __forceinline__ void copy_box_to_two(void* shared, const tensor_map_t* map, int input,
                                                int row, barrier_t* barrier, int rank) {
  const uint16_t mask = static_cast<uint16_t>(3 << rank);
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%3, %4}], [%2], %5;" ::"r"(shared_address(shared)),
      "l"(map), "r"(shared_address(barrier)), "r"(input), "r"(row), "h"(mask)
      : "memory");
}

__device__ __forceinline__ void prefetch_map(const tensor_map_t* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// The map of x: 16-bit numbers (rows, inputs), 16-byte aligned, inputs a multiple of 8. A box is
// box_rows rows of 64 inputs: 128 bytes a row, of which 16 bytes c lie at c ^ (row % 8).
inline cudaError_t map_rows(tensor_map_t* map, const void* x, int rows, int inputs, int box_rows) {
  static const auto encode = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result;
#if CUDART_VERSION >= 12050
    cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault,
                                     &result);
#else
    cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &result);
#endif
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(found);
  }();
  if (!encode) return cudaErrorNotSupported;
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(inputs), static_cast<cuuint64_t>(rows)};
  const cuuint64_t pitch[] = {2 * sizes[0]};
  const cuuint32_t box[] = {64, static_cast<cuuint32_t>(box_rows)}, steps[] = {1, 1};
  const CUresult code = encode(
      map, CU_TENSOR_MAP_DATA_TYPE_UINT16, 2, const_cast<void*>(x), sizes, pitch, box, steps,
      CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return code == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

// --- clusters of thread blocks ---

// Waits for all threads of the cluster; what they have written to shared memory is visible then.
__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// The same place in the shared memory of another thread block of the cluster.
template <typename T>
__device__ __forceinline__ const T* cluster_shared(const T* shared, int rank) {
  uint64_t there;
  asm volatile("mapa.u64 %0, %1, %2;" : "=l"(there) : "l"(shared), "r"(rank));
  return reinterpret_cast<const T*>(there);
}

// Launch with `wide` thread blocks along y and all those along z as a cluster, of 8 at most. Their
// ranks count along y first.
template <typename... Formal, typename... Actual>
cudaError_t launch_cluster(void (*kernel)(Formal...), dim3 grid, int wide, int threads,
                           size_t bytes, cudaStream_t stream, Actual... actual) {
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = 1;
  attribute.val.clusterDim.y = wide;
  attribute.val.clusterDim.z = grid.z;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, static_cast<Formal>(actual)...);
}

// --- products of a warpgroup ---

// The descriptor of `wgmma`'s B operand that `copy_box` has brought: 8 rows are 1024 bytes. The next
// 16 inputs are 32 bytes further, a descriptor that is greater by 2.
__device__ __forceinline__ uint64_t swizzled_descriptor(const void* shared) {
  return static_cast<uint64_t>(shared_address(shared) >> 4 & 0x3FFF) | 1ull << 16 |
         static_cast<uint64_t>(1024 >> 4) << 32 | 1ull << 62;
}

// Keeps the compiler from reading d before the last wait.
template <int COUNT>
__device__ __forceinline__ void wgmma_settle(float (&d)[COUNT]) {
#pragma unroll
  for (int i = 0; i < COUNT; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// wgmma(d, a, b, add, T()): start d = a * b, or d += a * b if `add`; a is 64 x 16 of a warpgroup's
// registers, b 16 x N of shared memory, N twice the length of d. Warp w holds rows 16w .. 16w+15 of a
// and d as in `mma`; d[4j..4j+3] are columns 8j .. 8j+7.
// Eight columns are four numbers of a lane. WGMMA_NAMES_m are those of d[0 .. 4m-1] in the instruction.
#define WGMMA_NAMES_1 "%0, %1, %2, %3"
#define WGMMA_NAMES_2 WGMMA_NAMES_1 ", %4, %5, %6, %7"
#define WGMMA_NAMES_3 WGMMA_NAMES_2 ", %8, %9, %10, %11"
#define WGMMA_NAMES_4 WGMMA_NAMES_3 ", %12, %13, %14, %15"
#define WGMMA_NAMES_5 WGMMA_NAMES_4 ", %16, %17, %18, %19"
#define WGMMA_NAMES_6 WGMMA_NAMES_5 ", %20, %21, %22, %23"
#define WGMMA_NAMES_7 WGMMA_NAMES_6 ", %24, %25, %26, %27"
#define WGMMA_NAMES_8 WGMMA_NAMES_7 ", %28, %29, %30, %31"
#define WGMMA_NAMES_9 WGMMA_NAMES_8 ", %32, %33, %34, %35"
#define WGMMA_NAMES_10 WGMMA_NAMES_9 ", %36, %37, %38, %39"
#define WGMMA_NAMES_11 WGMMA_NAMES_10 ", %40, %41, %42, %43"
#define WGMMA_NAMES_12 WGMMA_NAMES_11 ", %44, %45, %46, %47"
#define WGMMA_NAMES_13 WGMMA_NAMES_12 ", %48, %49, %50, %51"
#define WGMMA_NAMES_14 WGMMA_NAMES_13 ", %52, %53, %54, %55"
#define WGMMA_NAMES_15 WGMMA_NAMES_14 ", %56, %57, %58, %59"
#define WGMMA_NAMES_16 WGMMA_NAMES_15 ", %60, %61, %62, %63"
#define WGMMA_NAMES_17 WGMMA_NAMES_16 ", %64, %65, %66, %67"
#define WGMMA_NAMES_18 WGMMA_NAMES_17 ", %68, %69, %70, %71"
#define WGMMA_NAMES_19 WGMMA_NAMES_18 ", %72, %73, %74, %75"
#define WGMMA_NAMES_20 WGMMA_NAMES_19 ", %76, %77, %78, %79"
#define WGMMA_NAMES_21 WGMMA_NAMES_20 ", %80, %81, %82, %83"
#define WGMMA_NAMES_22 WGMMA_NAMES_21 ", %84, %85, %86, %87"
#define WGMMA_FOUR(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define WGMMA_SUMS_1 WGMMA_FOUR(0)
#define WGMMA_SUMS_2 WGMMA_SUMS_1, WGMMA_FOUR(4)
#define WGMMA_SUMS_3 WGMMA_SUMS_2, WGMMA_FOUR(8)
#define WGMMA_SUMS_4 WGMMA_SUMS_3, WGMMA_FOUR(12)
#define WGMMA_SUMS_5 WGMMA_SUMS_4, WGMMA_FOUR(16)
#define WGMMA_SUMS_6 WGMMA_SUMS_5, WGMMA_FOUR(20)
#define WGMMA_SUMS_7 WGMMA_SUMS_6, WGMMA_FOUR(24)
#define WGMMA_SUMS_8 WGMMA_SUMS_7, WGMMA_FOUR(28)
#define WGMMA_SUMS_9 WGMMA_SUMS_8, WGMMA_FOUR(32)
#define WGMMA_SUMS_10 WGMMA_SUMS_9, WGMMA_FOUR(36)
#define WGMMA_SUMS_11 WGMMA_SUMS_10, WGMMA_FOUR(40)
#define WGMMA_SUMS_12 WGMMA_SUMS_11, WGMMA_FOUR(44)
#define WGMMA_SUMS_13 WGMMA_SUMS_12, WGMMA_FOUR(48)
#define WGMMA_SUMS_14 WGMMA_SUMS_13, WGMMA_FOUR(52)
#define WGMMA_SUMS_15 WGMMA_SUMS_14, WGMMA_FOUR(56)
#define WGMMA_SUMS_16 WGMMA_SUMS_15, WGMMA_FOUR(60)
#define WGMMA_SUMS_17 WGMMA_SUMS_16, WGMMA_FOUR(64)
#define WGMMA_SUMS_18 WGMMA_SUMS_17, WGMMA_FOUR(68)
#define WGMMA_SUMS_19 WGMMA_SUMS_18, WGMMA_FOUR(72)
#define WGMMA_SUMS_20 WGMMA_SUMS_19, WGMMA_FOUR(76)
#define WGMMA_SUMS_21 WGMMA_SUMS_20, WGMMA_FOUR(80)
#define WGMMA_SUMS_22 WGMMA_SUMS_21, WGMMA_FOUR(84)
#define WGMMA_TYPED(N, T, TYPE, NAMES, A, B, ADD, ...)                                          \
  __device__ __forceinline__ void wgmma(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, \
                                        int add, T) {                                          \
    asm volatile("{.reg .pred p;\n"                                                            \
                 "setp.ne.b32 p, " ADD ", 0;\n"                                                \
                 "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" NAMES    \
                 "}, {" A "}, " B ", p, 1, 1, 0;}"                                             \
                 : __VA_ARGS__                                                                 \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));              \
  }
// EIGHTS: N / 8. A, B, ADD: the names that follow those of d.
#define WGMMA(N, EIGHTS, A, B, ADD)                                                            \
  WGMMA_TYPED(N, half_t, "f16", WGMMA_NAMES_##EIGHTS, A, B, ADD, WGMMA_SUMS_##EIGHTS)          \
  WGMMA_TYPED(N, bfloat_t, "bf16", WGMMA_NAMES_##EIGHTS, A, B, ADD, WGMMA_SUMS_##EIGHTS)

WGMMA(8, 1, "%4, %5, %6, %7", "%8", "%9")
WGMMA(16, 2, "%8, %9, %10, %11", "%12", "%13")
WGMMA(24, 3, "%12, %13, %14, %15", "%16", "%17")
WGMMA(32, 4, "%16, %17, %18, %19", "%20", "%21")
WGMMA(48, 6, "%24, %25, %26, %27", "%28", "%29")
WGMMA(64, 8, "%32, %33, %34, %35", "%36", "%37")
WGMMA(80, 10, "%40, %41, %42, %43", "%44", "%45")
WGMMA(96, 12, "%48, %49, %50, %51", "%52", "%53")
WGMMA(112, 14, "%56, %57, %58, %59", "%60", "%61")
WGMMA(128, 16, "%64, %65, %66, %67", "%68", "%69")
WGMMA(144, 18, "%72, %73, %74, %75", "%76", "%77")
WGMMA(160, 20, "%80, %81, %82, %83", "%84", "%85")
WGMMA(176, 22, "%88, %89, %90, %91", "%92", "%93")

#undef WGMMA
#undef WGMMA_TYPED
#undef WGMMA_FOUR

#endif

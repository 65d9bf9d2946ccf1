// What all kernels include. Under nvcc this is CUDA; any other compiler finds the emulation that runs
// the same source on the host in "cuda_emulation.h" (tests/helpers).
#pragma once

#include <cstdint>

#ifdef __CUDACC__

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

using half_t = __half;
using bfloat_t = __nv_bfloat16;

#define SHARED(type, name, extents) __shared__ type name extents
#define DYNAMIC_SHARED(type, name) extern __shared__ __align__(16) type name[]
#define LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  kernel<<<grid, block, shared_bytes, stream>>>(__VA_ARGS__)
#define LAUNCH_OVERLAPPING(kernel, grid, block, stream, ...) \
  launch_overlapping(kernel, grid, block, stream, __VA_ARGS__)

// A kernel that may begin before the one before it in the stream has ended (programmatic dependent
// launch, compute capability 9.0): it calls `await_previous` before it reads what that one writes,
// and before it writes at all.
template <typename... Wanted, typename... Given>
void launch_overlapping(void (*kernel)(Wanted...), dim3 grid, dim3 block, cudaStream_t stream,
                        Given... given) {
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  cudaLaunchKernelEx(&config, kernel, given...);
}

#else

#include "cuda_emulation.h"

#endif

#include "../layout.h"
#include "ptx.cuh"
#include "ptx_hopper.cuh"

#if defined(__GNUC__)
#define EXPORT extern "C" __attribute__((visibility("default")))
#else
#define EXPORT extern "C"
#endif

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(half_t x) { return __half2float(x); }
__device__ inline float to_float(bfloat_t x) { return __bfloat162float(x); }

template <typename T>
__device__ inline T from_float(float x);
template <>
__device__ inline float from_float<float>(float x) {
  return x;
}
template <>
__device__ inline half_t from_float<half_t>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ inline bfloat_t from_float<bfloat_t>(float x) {
  return __float2bfloat16_rn(x);
}

// Types of activations, numbered as in quant_cuda/cuda/kernels.py.
enum DataType { HALF = 0, BFLOAT = 1, FLOAT = 2 };

inline int ceil_div(int a, int b) { return (a + b - 1) / b; }

// Attention of one new token of each sequence over a cache of keys and values, for decode.cu.
//
// Thread blocks share a sequence's positions (Flash-Decoding: Dao et al. 2023), each with sums of
// its own, which `combine` adds. The one that has the new token's position turns its key by the
// rotary angles, if there are, and writes key and value to the cache before it reads them like all
// others. With ALiBi (Press et al. 2022) a score falls by a head's slope times the distance instead.
#pragma once

#include "common.cuh"

namespace {

constexpr int ATTENTION_WARPS = 4;
constexpr int AT_ONCE = 4;  // positions that a set of lanes reads before it uses them
constexpr float NOTHING = -INFINITY;

template <typename T>
struct alignas(16) Eight {
  T values[8];
};

template <typename T>
__device__ inline Eight<T> load_eight(const T* from) {
  return *reinterpret_cast<const Eight<T>*>(from);
}

template <typename T>
__device__ inline float rounded(float x) {
  return to_float(from_float<T>(x));
}

__device__ inline float sum_of_warp(float x) {
#pragma unroll
  for (int step = 16; step; step /= 2) x += __shfl_xor_sync(~0u, x, step);
  return x;
}

// Of tokens in T; `dim` of a head is the kernels' DIM. A group is the query heads of one key head.
template <typename T>
struct Attention {
  const T *query, *key, *value;  // (rows, heads, dim), and (rows, key_heads, dim) twice, by the steps
  const T *cosines, *sines;      // (dim,), of the new position; or NULL
  const float* slopes;           // (heads,), or NULL
  const T *query_norm, *key_norm;  // (dim,), or NULL
  T *keys, *values;              // (rows, key_heads, positions, dim), by the strides
  const int64_t* position;       // of the new token, or NULL for `length`
  float* partial;                // (rows, heads, splits, dim + 2): sums, their maximum and total
  float query_epsilon, key_epsilon, scale;
  int heads, key_heads, length, room, splits;
  int query_row, key_row, query_step, key_step;  // numbers to the next sequence and head
  int64_t row_stride, head_stride;  // numbers from a sequence, or head, of the cache to the next
};

// The norm and the rotary turn of one head, each if there is one, by one warp: from (DIM,) to `to`
// (DIM,), in shared memory as `raw`. Rounded to T wherever transformers' modules round.
template <typename T, int DIM>
__device__ void turn(const T* from, const T* norm, float epsilon, const T* cosines, const T* sines,
                     float* raw, float* to) {
  const int lane = threadIdx.x % 32;
  float squares = 0;
#pragma unroll
  for (int i = lane; i < DIM; i += 32) squares += to_float(from[i]) * to_float(from[i]);
  const float factor = norm ? rsqrtf(sum_of_warp(squares) / DIM + epsilon) : 1;
#pragma unroll
  for (int i = lane; i < DIM; i += 32) {
    const float x = to_float(from[i]);
    raw[i] = norm ? rounded<T>(to_float(norm[i]) * rounded<T>(x * factor)) : x;
  }
  __syncwarp();
#pragma unroll
  for (int i = lane; i < DIM; i += 32) {
    const float other = i < DIM / 2 ? -raw[i + DIM / 2] : raw[i - DIM / 2];
    to[i] = cosines ? rounded<T>(raw[i] * to_float(cosines[i]) + other * to_float(sines[i])) : raw[i];
  }
  __syncwarp();
}

// Grid: (splits, key_heads * thread blocks of a group, rows). GROUP: query heads of a thread block.
template <typename T, int DIM, int GROUP>
__global__ void __launch_bounds__(ATTENTION_WARPS * 32)
    attend(Attention<T> a, int blocks_of_group) {
  constexpr int LANES = DIM / 8;  // that read one position, 16 bytes each
  constexpr int SETS = ATTENTION_WARPS * 32 / LANES;
  SHARED(float, turned, [GROUP + 1][DIM]);  // queries, and the new key
  SHARED(float, raw, [ATTENTION_WARPS][DIM]);
  SHARED(float, set_sums, [SETS][GROUP][DIM]);
  SHARED(float, set_most, [SETS][GROUP]);
  SHARED(float, set_total, [SETS][GROUP]);
  release_next();
  await_previous();
  const int warp = threadIdx.x / 32, row = blockIdx.z, split = blockIdx.x;
  const int key_head = blockIdx.y / blocks_of_group, of_key = a.heads / a.key_heads;
  const int first = blockIdx.y % blocks_of_group * GROUP;  // of the group's query heads
  const int mine = of_key - first < GROUP ? of_key - first : GROUP;
  const int head = key_head * of_key + first;

  const int newest = a.position ? static_cast<int>(*a.position) : a.length;
  if (newest >= a.room) __trap();
  const int share = (newest + a.splits) / a.splits;
  const int begin = split * share;
  const int end = begin + share < newest + 1 ? begin + share : newest + 1;
  const bool has_newest = begin <= newest && newest < end;
  const size_t cached = row * a.row_stride + key_head * a.head_stride;
  // Not __restrict__: what the thread block writes here it reads again.
  T *keys = a.keys + cached, *values = a.values + cached;

  for (int i = warp; i < mine; i += ATTENTION_WARPS)
    turn<T, DIM>(a.query + static_cast<size_t>(row) * a.query_row + (head + i) * a.query_step,
                 a.query_norm, a.query_epsilon, a.cosines, a.sines, raw[warp], turned[i]);
  // Thread blocks of one group write the same key and value, which none but they read.
  if (has_newest) {
    const size_t from = static_cast<size_t>(row) * a.key_row + key_head * a.key_step;
    const size_t to = static_cast<size_t>(newest) * DIM;
    if (warp == ATTENTION_WARPS - 1) {
      turn<T, DIM>(a.key + from, a.key_norm, a.key_epsilon, a.cosines, a.sines, raw[warp],
                   turned[GROUP]);
      for (int i = threadIdx.x % 32; i < DIM; i += 32) keys[to + i] = from_float<T>(turned[GROUP][i]);
    }
    for (int i = threadIdx.x; i < DIM; i += ATTENTION_WARPS * 32) values[to + i] = a.value[from + i];
  }
  __syncthreads();

  const int set = threadIdx.x / LANES, at = threadIdx.x % LANES * 8;
  // Powers of two instead of e: the scale takes its logarithm in.
  constexpr float LOG2_E = 1.4426950408889634f;
  const float scale = a.scale * LOG2_E;
  float query[GROUP][8], sums[GROUP][8] = {}, most[GROUP], total[GROUP] = {}, slope[GROUP];
#pragma unroll
  for (int g = 0; g < GROUP; ++g) {
    most[g] = NOTHING;
    slope[g] = a.slopes && g < mine ? a.slopes[head + g] * LOG2_E : 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) query[g][i] = g < mine ? turned[g][at + i] * scale : 0;
  }
  for (int base = begin; base < end; base += SETS * AT_ONCE) {
    Eight<T> key[AT_ONCE], value[AT_ONCE];
    float score[AT_ONCE][GROUP];
#pragma unroll
    for (int j = 0; j < AT_ONCE; ++j) {
      const int p = base + j * SETS + set;
      const size_t place = static_cast<size_t>(p < end ? p : begin) * DIM + at;
      key[j] = load_eight(keys + place);
      value[j] = load_eight(values + place);
    }
#pragma unroll
    for (int j = 0; j < AT_ONCE; ++j)
#pragma unroll
      for (int g = 0; g < GROUP; ++g) {
        float dot = 0;
#pragma unroll
        for (int i = 0; i < 8; ++i) dot = __fmaf_rn(query[g][i], to_float(key[j].values[i]), dot);
#pragma unroll
        for (int step = LANES / 2; step; step /= 2) dot += __shfl_xor_sync(~0u, dot, step);
        const int p = base + j * SETS + set;
        score[j][g] = p < end ? __fmaf_rn(slope[g], p - newest, dot) : NOTHING;
      }
#pragma unroll
    for (int g = 0; g < GROUP; ++g) {
      float higher = most[g];
#pragma unroll
      for (int j = 0; j < AT_ONCE; ++j) higher = fmaxf(higher, score[j][g]);
      // A set without a position yet has nothing to subtract from.
      const float level = higher == NOTHING ? 0 : higher;
      const float shrink = exp2f(most[g] - level);
      most[g] = higher;
      total[g] *= shrink;
#pragma unroll
      for (int i = 0; i < 8; ++i) sums[g][i] *= shrink;
#pragma unroll
      for (int j = 0; j < AT_ONCE; ++j) {
        const float weight = exp2f(score[j][g] - level);
        total[g] += weight;
#pragma unroll
        for (int i = 0; i < 8; ++i)
          sums[g][i] = __fmaf_rn(weight, to_float(value[j].values[i]), sums[g][i]);
      }
    }
  }

#pragma unroll
  for (int g = 0; g < GROUP; ++g) {
    set_most[set][g] = most[g];
    set_total[set][g] = total[g];
#pragma unroll
    for (int i = 0; i < 8; ++i) set_sums[set][g][at + i] = sums[g][i];
  }
  __syncthreads();
  for (int i = threadIdx.x; i < mine * DIM; i += ATTENTION_WARPS * 32) {
    const int g = i / DIM, d = i % DIM;
    float highest = NOTHING, sum = 0, all = 0;
    for (int s = 0; s < SETS; ++s) highest = fmaxf(highest, set_most[s][g]);
    const float level = highest == NOTHING ? 0 : highest;
    for (int s = 0; s < SETS; ++s) {
      const float weight = exp2f(set_most[s][g] - level);
      sum = __fmaf_rn(weight, set_sums[s][g][d], sum);
      all = __fmaf_rn(weight, set_total[s][g], all);
    }
    float* out = a.partial + ((static_cast<size_t>(row) * a.heads + head + g) * a.splits + split) * (DIM + 2);
    out[d] = sum;
    if (d == 0) {
      out[DIM] = highest;
      out[DIM + 1] = all;
    }
  }
}

// y (rows, heads * DIM) of `Attention.partial`. Grid: (heads, rows). One thread block of DIM threads
// has a head.
template <typename T, int DIM>
__global__ void __launch_bounds__(DIM)
    combine(const float* partial, T* __restrict__ y, int splits) {
  release_next();
  await_previous();
  const size_t head = static_cast<size_t>(blockIdx.y) * gridDim.x + blockIdx.x;
  const float* mine = partial + head * splits * (DIM + 2);
  float highest = NOTHING, sum = 0, all = 0;
  for (int s = 0; s < splits; ++s) highest = fmaxf(highest, mine[s * (DIM + 2) + DIM]);
  for (int s = 0; s < splits; ++s) {
    const float* part = mine + s * (DIM + 2);
    const float weight = exp2f(part[DIM] - highest);
    sum = __fmaf_rn(weight, part[threadIdx.x], sum);
    all = __fmaf_rn(weight, part[DIM + 1], all);
  }
  y[head * DIM + threadIdx.x] = from_float<T>(sum / all);
}

// queue: calls (kernel, grid, block, arguments...).
template <typename T, int DIM, int GROUP, typename Queue>
void launch_attend(const Attention<T>& a, int rows, const Queue& queue) {
  const int blocks_of_group = ceil_div(a.heads / a.key_heads, GROUP);
  queue(attend<T, DIM, GROUP>, dim3(a.splits, a.key_heads * blocks_of_group, rows),
        ATTENTION_WARPS * 32, a, blocks_of_group);
}

template <typename T, int DIM, typename Queue>
void launch_attention(const Attention<T>& a, T* y, int rows, const Queue& queue) {
  if (a.heads == a.key_heads)
    launch_attend<T, DIM, 1>(a, rows, queue);
  else
    launch_attend<T, DIM, 4>(a, rows, queue);
  queue(combine<T, DIM>, dim3(a.heads, rows), DIM, a.partial, y, a.splits);
}

}  // namespace

// The GPTQ column sweep for a CPU: grid search and error propagation of a whole layer in one call.
//
// Outputs are independent, so that a tile of LANES of them is solved from the first column to the
// last while it stays in cache, and tiles are shared out over threads. The arithmetic is that of
// gptq/solver.py and gptq/grid.py in float32; only sums run in another order.
//
// Each sweep_*.cpp includes this file once with its own instruction set and SWEEP_NAME.

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <thread>
#include <vector>

#include "sweep_args.h"

namespace {

constexpr int LANES = 32;
constexpr int WIDTH = 16;
constexpr int PARTS = LANES / WIDTH;
constexpr int BLOCK = 128;
constexpr float HALF_SMALLEST = 5.9604644775390625e-08f;
constexpr float HALF_MAX = 65504.0f;
constexpr float INFINITE = __builtin_inff();

typedef float vec __attribute__((vector_size(WIDTH * sizeof(float)), aligned(4), may_alias));

// One number for each output of a tile.
struct Row {
  vec part[PARTS];
};

inline vec fill(float x) {
  vec v;
  for (int i = 0; i < WIDTH; ++i) v[i] = x;
  return v;
}

inline vec least(vec a, vec b) { return a < b ? a : b; }
inline vec greatest(vec a, vec b) { return a > b ? a : b; }

// Nearest integer, ties to even. Beyond 2**22 the result is only near, which clamping hides.
inline vec nearest(vec x) {
  const vec magic = fill(12582912.0f);
  return (x + magic) - magic;
}

// A scale as checkpoints store it: float16, positive, finite.
inline vec stored(vec scale) {
  scale = least(greatest(scale, fill(HALF_SMALLEST)), fill(HALF_MAX));
  for (int i = 0; i < WIDTH; ++i) scale[i] = static_cast<float>(static_cast<_Float16>(scale[i]));
  return scale;
}

struct Grid {
  Row scale, zero;
};

Grid make_grid(const Row& low, const Row& high, float factor, const SweepArgs& args) {
  Grid grid;
  const float maxq = static_cast<float>((1 << args.bits) - 1);
  for (int p = 0; p < PARTS; ++p) {
    const float share = factor < 0 ? -factor : factor;
    const vec a = low.part[p] * share, b = high.part[p] * share;
    if (args.sym) {
      const vec scale = stored(2 * greatest(-a, b) / maxq);
      grid.scale.part[p] = factor < 0 ? -scale : scale;
      grid.zero.part[p] = fill(static_cast<float>(1 << (args.bits - 1)));
      continue;
    }
    const vec scale = stored((b - a) / maxq);
    const vec zero = nearest(-a / scale);
    const auto positive = zero < 1.0f;
    grid.scale.part[p] = positive ? stored(b / (maxq - 1)) : scale;
    grid.zero.part[p] = positive ? fill(1.0f) : least(zero, fill(maxq));
  }
  return grid;
}

// What a weight on the grid differs by from w.
inline vec error_of(vec w, vec scale, vec zero, float maxq) {
  const vec step = least(greatest(nearest(w / scale), -zero), maxq - zero);
  return step * scale - w;
}

// error^T H error of the group for each output; H is symmetric, and its lower half is read.
Row loss_of(const Row* w, int size, const float* H, int stride, const Grid& grid, float maxq,
            Row* error) {
  for (int i = 0; i < size; ++i)
    for (int p = 0; p < PARTS; ++p)
      error[i].part[p] =
          error_of(w[i].part[p], grid.scale.part[p], grid.zero.part[p], maxq);
  Row loss = {};
  int i = 0;
  for (; i + 4 <= size; i += 4) {  // four rows of H at a time, so that errors are loaded once
    vec sum[4][PARTS] = {};
    for (int j = 0; j < i; ++j)
      for (int p = 0; p < PARTS; ++p) {
        const vec e = error[j].part[p];
        for (int r = 0; r < 4; ++r)
          sum[r][p] += H[static_cast<size_t>(i + r) * stride + j] * e;
      }
    for (int r = 0; r < 4; ++r)
      for (int p = 0; p < PARTS; ++p) {
        const float* row = H + static_cast<size_t>(i + r) * stride;
        vec s = sum[r][p];
        for (int j = i; j < i + r; ++j) s += row[j] * error[j].part[p];
        const vec e = error[i + r].part[p];
        loss.part[p] += e * (2 * s + row[i + r] * e);
      }
  }
  for (; i < size; ++i)
    for (int p = 0; p < PARTS; ++p) {
      const float* row = H + static_cast<size_t>(i) * stride;
      vec s = {};
      for (int j = 0; j < i; ++j) s += row[j] * error[j].part[p];
      loss.part[p] += error[i].part[p] * (2 * s + row[i] * error[i].part[p]);
    }
  return loss;
}

void keep_better(Grid& best, Row& best_loss, const Grid& grid, const Row& loss) {
  for (int p = 0; p < PARTS; ++p) {
    const auto better = loss.part[p] < best_loss.part[p];
    best.scale.part[p] = better ? grid.scale.part[p] : best.scale.part[p];
    best.zero.part[p] = better ? grid.zero.part[p] : best.zero.part[p];
    best_loss.part[p] = better ? loss.part[p] : best_loss.part[p];
  }
}

Grid find_grid(const Row* w, int size, const float* H, const SweepArgs& args, Row* error) {
  const float maxq = static_cast<float>((1 << args.bits) - 1);
  Row low = {}, high = {};
  for (int i = 0; i < size; ++i)
    for (int p = 0; p < PARTS; ++p) {
      low.part[p] = least(low.part[p], w[i].part[p]);
      high.part[p] = greatest(high.part[p], w[i].part[p]);
    }
  for (int p = 0; p < PARTS; ++p) {
    const auto empty = (low.part[p] == 0.0f) & (high.part[p] == 0.0f);
    low.part[p] = empty ? fill(-1.0f) : low.part[p];
    high.part[p] = empty ? fill(1.0f) : high.part[p];
  }
  Grid best = make_grid(low, high, 1.0f, args);
  if (args.factor_count == 0) return best;
  Row best_loss;
  for (int p = 0; p < PARTS; ++p) best_loss.part[p] = fill(INFINITE);
  for (int k = 0; k < args.factor_count; ++k) {
    const Grid grid = make_grid(low, high, args.factors[k], args);
    keep_better(best, best_loss, grid, loss_of(w, size, H, args.inputs, grid, maxq, error));
  }
  if (args.sym) return best;
  const Row found = best.zero;
  for (const float step : {-1.0f, 1.0f}) {
    Grid moved = best;
    for (int p = 0; p < PARTS; ++p)
      moved.zero.part[p] =
          least(greatest(found.part[p] + step, fill(1.0f)), fill(maxq));
    keep_better(best, best_loss, moved, loss_of(w, size, H, args.inputs, moved, maxq, error));
  }
  return best;
}

// Spread the errors of columns start..stop over all that come after.
void spread(Row* w, const Row* error, const SweepArgs& args, int start, int stop) {
  const int count = stop - start;
  int k = stop;
  for (; k + 4 <= args.inputs; k += 4) {
    vec sum[4][PARTS] = {};
    for (int j = 0; j < count; ++j)
      for (int p = 0; p < PARTS; ++p) {
        const vec e = error[j].part[p];
        for (int r = 0; r < 4; ++r)
          sum[r][p] += args.Ut[static_cast<size_t>(k + r) * args.inputs + start + j] * e;
      }
    for (int r = 0; r < 4; ++r)
      for (int p = 0; p < PARTS; ++p) w[k + r].part[p] -= sum[r][p];
  }
  for (; k < args.inputs; ++k)
    for (int j = 0; j < count; ++j)
      for (int p = 0; p < PARTS; ++p)
        w[k].part[p] -= args.Ut[static_cast<size_t>(k) * args.inputs + start + j] * error[j].part[p];
}

struct Scratch {
  std::vector<Row> w, block_error, group_error;
  std::vector<Grid> grids;
};

void solve_tile(const SweepArgs& args, int first, Scratch& scratch) {
  const int n = args.inputs, lanes = std::min(LANES, args.outputs - first);
  const float maxq = static_cast<float>((1 << args.bits) - 1);
  Row* w = scratch.w.data();
  const size_t m = static_cast<size_t>(args.outputs);
  for (int j = 0; j < n; ++j)
    for (int l = 0; l < LANES; ++l)
      w[j].part[l / WIDTH][l % WIDTH] = l < lanes ? args.w[j * m + first + l] : 0.0f;
  for (int g = 0; g < args.groups; ++g)  // static grids; found ones overwrite them
    for (int l = 0; l < LANES; ++l) {
      const bool real = args.is_static && l < lanes;
      scratch.grids[g].scale.part[l / WIDTH][l % WIDTH] =
          real ? args.scales[g * m + first + l] : 1.0f;
      scratch.grids[g].zero.part[l / WIDTH][l % WIDTH] =
          real ? args.zeros[g * m + first + l] : 1.0f;
    }
  for (int b = 0; b < args.block_count; ++b) {
    const int start = args.blocks[b], stop = args.blocks[b + 1];
    Row* error = scratch.block_error.data();
    for (int j = start; j < stop; ++j) {
      const int end = args.run_end[j];
      Grid& grid = scratch.grids[args.labels[j]];
      if (!args.is_static && end > 0)
        grid = find_grid(w + j, end - j, args.H + static_cast<size_t>(j) * n + j, args,
                         scratch.group_error.data());
      const float pivot = args.Ut[static_cast<size_t>(j) * n + j];
      uint8_t* q = args.q + j * m + first;
      for (int p = 0; p < PARTS; ++p) {
        const vec zero = grid.zero.part[p], scale = grid.scale.part[p];
        const vec step = least(greatest(nearest(w[j].part[p] / scale), -zero), maxq - zero);
        const vec number = step + zero;
        for (int i = 0; i < WIDTH; ++i)
          if (p * WIDTH + i < lanes) q[p * WIDTH + i] = static_cast<uint8_t>(number[i]);
        error[j - start].part[p] = (w[j].part[p] - step * scale) / pivot;
      }
      for (int k = j + 1; k < stop; ++k)
        for (int p = 0; p < PARTS; ++p)
          w[k].part[p] -= args.Ut[static_cast<size_t>(k) * n + j] * error[j - start].part[p];
    }
    spread(w, error, args, start, stop);
  }
  if (args.is_static) return;
  for (int g = 0; g < args.groups; ++g)
    for (int l = 0; l < lanes; ++l) {
      args.scales[g * m + first + l] = scratch.grids[g].scale.part[l / WIDTH][l % WIDTH];
      args.zeros[g * m + first + l] = scratch.grids[g].zero.part[l / WIDTH][l % WIDTH];
    }
}

}  // namespace

void SWEEP_NAME(const SweepArgs& args) {
  int longest = BLOCK;
  for (int b = 0; b < args.block_count; ++b)
    longest = std::max(longest, args.blocks[b + 1] - args.blocks[b]);
  int widest = 1;
  for (int j = 0; j < args.inputs; ++j) widest = std::max(widest, args.run_end[j] - j);
  const int tiles = (args.outputs + LANES - 1) / LANES;
  std::atomic<int> next{0};
  auto work = [&] {
    Scratch scratch;
    scratch.w.resize(args.inputs);
    scratch.block_error.resize(longest);
    scratch.group_error.resize(widest);
    scratch.grids.resize(args.groups);
    for (int tile; (tile = next.fetch_add(1)) < tiles;) solve_tile(args, tile * LANES, scratch);
  };
  std::vector<std::thread> threads;
  for (int t = 1; t < std::min(args.threads, tiles); ++t) threads.emplace_back(work);
  work();
  for (std::thread& thread : threads) thread.join();
}

// The GPTQ column sweep for a CPU: grid search and error propagation of a whole layer in one call.
//
// Threads take tiles of LANES outputs. The arithmetic is that of gptq/solver/sweep.py and
// gptq/solver/grid.py in float32; only the order of sums differs.
//
// Each solver_*.cpp includes this file once with its own instruction set and NAMED.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "lanes.h"
#include "parallel.h"
#include "solver_args.h"

namespace {

constexpr int BLOCK = 128;
constexpr float INFINITE = __builtin_inff();

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

// The error of rounding w to the grid.
inline vec error_of(vec w, vec scale, vec zero, float maxq) {
  const vec step = least(greatest(nearest(w / scale), -zero), maxq - zero);
  return step * scale - w;
}

// The share of ROWS rows of H from i on in error^T H error, on and below the diagonal.
template <int ROWS>
inline void add_loss(Row& loss, const float* H, size_t size, const Row* error, int i, int first) {
  vec sum[ROWS][PAIR] = {};
  accumulate<ROWS>(sum, H + i * size, size, error, first, i);
  for (int r = 0; r < ROWS; ++r)
    for (int p = 0; p < PAIR; ++p) {
      const float* row = H + (i + r) * size;
      vec s = sum[r][p];
      for (int j = i; j < i + r; ++j) s += row[j] * error[j].part[first + p];
      const vec e = error[i + r].part[first + p];
      loss.part[first + p] += e * (2 * s + row[i + r] * e);
    }
}

// error^T H error of the group for each output. Only the lower triangle of H (size, size) is read.
Row loss_of(const Row* w, int size, const float* H, const Grid& grid, float maxq, Row* error) {
  for (int i = 0; i < size; ++i)
    for (int p = 0; p < PARTS; ++p)
      error[i].part[p] =
          error_of(w[i].part[p], grid.scale.part[p], grid.zero.part[p], maxq);
  Row loss = {};
  for (int first = 0; first < PARTS; first += PAIR) {
    int i = 0;
    for (; i + STRIP <= size; i += STRIP) add_loss<STRIP>(loss, H, size, error, i, first);
    for (; i < size; ++i) add_loss<1>(loss, H, size, error, i, first);
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
    keep_better(best, best_loss, grid, loss_of(w, size, H, grid, maxq, error));
  }
  if (args.sym) return best;
  const Row found = best.zero;
  for (const float step : {-1.0f, 1.0f}) {
    Grid moved = best;
    for (int p = 0; p < PARTS; ++p)
      moved.zero.part[p] =
          least(greatest(found.part[p] + step, fill(1.0f)), fill(maxq));
    keep_better(best, best_loss, moved, loss_of(w, size, H, moved, maxq, error));
  }
  return best;
}

// Updates ROWS columns of w, from k on, by the errors of columns start..stop.
template <int ROWS>
inline void take(Row* w, const Row* error, const SweepArgs& args, int start, int stop, int k) {
  const size_t n = args.inputs;
  for (int first = 0; first < PARTS; first += PAIR) {
    vec sum[ROWS][PAIR] = {};
    accumulate<ROWS>(sum, args.Ut + k * n + start, n, error, first, stop - start);
    for (int r = 0; r < ROWS; ++r)
      for (int p = 0; p < PAIR; ++p) w[k + r].part[first + p] -= sum[r][p];
  }
}

// Updates all columns after `stop` by the errors of columns start..stop.
void spread(Row* w, const Row* error, const SweepArgs& args, int start, int stop) {
  int k = stop;
  for (; k + STRIP <= args.inputs; k += STRIP) take<STRIP>(w, error, args, start, stop, k);
  for (; k < args.inputs; ++k) take<1>(w, error, args, start, stop, k);
}

// Read by all tiles, besides the arguments.
struct Shared {
  DiagonalBlocks H;  // of the groups
  DiagonalBlocks U;  // of the blocks
};

struct Scratch {
  std::vector<Row> w, block_error, group_error;
  std::vector<Grid> grids;

  Scratch(const SweepArgs& args, int longest, int widest)
      : w(args.inputs), block_error(longest), group_error(widest), grids(args.groups) {}
};

void solve_tile(const SweepArgs& args, const Shared& shared, int first, Scratch& scratch) {
  const int n = args.inputs, lanes = std::min(LANES, args.outputs - first);
  const float maxq = static_cast<float>((1 << args.bits) - 1);
  Row* w = scratch.w.data();
  const size_t m = static_cast<size_t>(args.outputs);
  for (int j = 0; j < n; ++j) {
    w[j] = Row{};
    std::memcpy(&w[j], args.w + j * m + first, lanes * sizeof(float));
  }
  for (int g = 0; g < args.groups; ++g)  // static grids; those that are searched are overwritten
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
    const float* U = shared.U.at(start);
    for (int j = start; j < stop; ++j) {
      const int end = args.run_end[j];
      Grid& grid = scratch.grids[args.labels[j]];
      if (!args.is_static && end > 0)
        grid = find_grid(w + j, end - j, shared.H.at(j), args, scratch.group_error.data());
      const float* row = U + static_cast<size_t>(j - start) * (stop - start) - start;
      const float pivot = row[j];
      bytes numbers[PARTS];
      for (int p = 0; p < PARTS; ++p) {
        const vec zero = grid.zero.part[p], scale = grid.scale.part[p];
        const vec step = least(greatest(nearest(w[j].part[p] / scale), -zero), maxq - zero);
        numbers[p] = __builtin_convertvector(__builtin_convertvector(step + zero, ivec), bytes);
        error[j - start].part[p] = (w[j].part[p] - step * scale) / pivot;
      }
      std::memcpy(args.q + j * m + first, numbers, lanes);
      for (int k = j + 1; k < stop; ++k)
        for (int p = 0; p < PARTS; ++p) w[k].part[p] -= row[k] * error[j - start].part[p];
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

void NAMED(sweep)(const SweepArgs& args) {
  int longest = BLOCK;
  for (int b = 0; b < args.block_count; ++b)
    longest = std::max(longest, args.blocks[b + 1] - args.blocks[b]);
  int widest = 1;
  for (int j = 0; j < args.inputs; ++j) widest = std::max(widest, args.run_end[j] - j);
  const bool searches = !args.is_static && args.factor_count > 0;
  const Shared shared{
      DiagonalBlocks(args.H, args.inputs, false,
                     [&](int j) { return searches ? args.run_end[j] : 0; }),
      DiagonalBlocks(args.Ut, args.inputs, true, [&](int j) {
        const int* stop = std::upper_bound(args.blocks, args.blocks + args.block_count, j);
        return stop[-1] == j ? *stop : 0;
      })};
  const int tiles = (args.outputs + LANES - 1) / LANES;
  parallel_for(args.threads, tiles, [&](int tile) {
    Scratch scratch(args, longest, widest);
    solve_tile(args, shared, tile * LANES, scratch);
  });
}

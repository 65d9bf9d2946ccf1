// Refinement of a solved layer for a CPU: the rounds of gptq/solver/refine.py in one call, in float32.
//
// Each solver_*.cpp includes this file once with its own instruction set and NAMED.

#include <algorithm>
#include <cstring>
#include <vector>

#include "lanes.h"
#include "parallel.h"
#include "solver_args.h"

namespace {

// Columns whose errors are summed at a time; each is read once for STRIP rows of H.
constexpr int CACHED = 1024;

struct RefineScratch {
  std::vector<Row> error;     // of all columns
  std::vector<Row> gradient;  // of a group: H error
  std::vector<Row> left;      // the gradient as integers of the group change
  std::vector<Row> steps;     // q - zero
  std::vector<Row> moved;     // change of the dequantized values
  std::vector<Row> effect;    // of the group: H steps

  RefineScratch(int inputs, int widest)
      : error(inputs), gradient(widest), left(widest), steps(widest), moved(widest), effect(widest) {}
};

// out[r] += sum over j < count of a[r][j] * x[j], for ROWS rows of a.
template <int ROWS>
inline void add_rows(Row* out, const float* a, size_t stride, const Row* x, int first, int count) {
  vec sum[ROWS][PAIR] = {};
  accumulate<ROWS>(sum, a, stride, x, first, count);
  for (int r = 0; r < ROWS; ++r)
    for (int p = 0; p < PAIR; ++p) out[r].part[first + p] += sum[r][p];
}

// The same for `rows` rows.
void add_product(Row* out, const float* a, size_t stride, int rows, const Row* x, int count) {
  for (int from = 0; from < count; from += CACHED) {
    const int some = std::min(CACHED, count - from);
    for (int first = 0; first < PARTS; first += PAIR) {
      int r = 0;
      for (; r + STRIP <= rows; r += STRIP)
        add_rows<STRIP>(out + r, a + r * stride + from, stride, x + from, first, some);
      for (; r < rows; ++r) add_rows<1>(out + r, a + r * stride + from, stride, x + from, first, some);
    }
  }
}

// Sets each integer of a group in turn to its optimum with all others fixed. H: (size, size).
void improve_steps(const float* H, int size, const Row& scale, const Row& zero, float maxq,
                   RefineScratch& scratch) {
  Row* left = scratch.left.data();
  std::copy_n(scratch.gradient.data(), size, left);
  for (int j = 0; j < size; ++j) {
    const float* row = H + static_cast<size_t>(j) * size;
    for (int p = 0; p < PARTS; ++p) {
      vec& step = scratch.steps[j].part[p];
      const vec best = least(greatest(nearest(step + left[j].part[p] / (row[j] * scale.part[p])),
                                      -zero.part[p]),
                             maxq - zero.part[p]);
      scratch.moved[j].part[p] = (best - step) * scale.part[p];
      step = best;
    }
    // Only later integers need the gradient; improve_scale computes the rest at once.
    for (int k = j + 1; k < size; ++k)
      for (int p = 0; p < PARTS; ++p) left[k].part[p] -= row[k] * scratch.moved[j].part[p];
  }
}

// The optimal scale of each output's group, as float16; the old one if rounding would make it worse.
Row improve_scale(const float* H, int size, const Row& scale, RefineScratch& scratch) {
  Row* effect = scratch.effect.data();
  std::fill_n(effect, size, Row{});
  add_product(effect, H, size, size, scratch.steps.data(), size);
  Row found;
  for (int p = 0; p < PARTS; ++p) {
    vec curvature = {}, slope = {};
    for (int j = 0; j < size; ++j) {
      const vec step = scratch.steps[j].part[p];
      curvature += step * effect[j].part[p];
      // The gradient after the group's integers changed is the one before, less H moved.
      slope += step * scratch.gradient[j].part[p] - effect[j].part[p] * scratch.moved[j].part[p];
    }
    const vec old = scale.part[p], zero = {};
    const vec by = curvature > zero ? slope / curvature : zero;
    const vec size_of = stored(old > zero ? old + by : -old - by);
    const vec next = old > zero ? size_of : -size_of;
    const vec change = next - old;
    found.part[p] = change * (2 * slope - change * curvature) > zero ? next : old;
  }
  return found;
}

void refine_tile(const RefineArgs& args, const DiagonalBlocks& diagonal, int first,
                 RefineScratch& scratch) {
  const int lanes = std::min(LANES, args.outputs - first);
  const size_t m = args.outputs, n = args.inputs;
  const float maxq = static_cast<float>((1 << args.bits) - 1);
  const auto read = [&](const float* numbers, int row, float otherwise) {
    Row found;
    for (int p = 0; p < PARTS; ++p) found.part[p] = fill(otherwise);
    std::memcpy(&found, numbers + row * m + first, lanes * sizeof(float));
    return found;
  };
  const auto steps_of = [&](int j, const Row& zero) {
    uint8_t numbers[LANES] = {};
    std::memcpy(numbers, args.q + j * m + first, lanes);
    Row found;
    for (int l = 0; l < LANES; ++l) found.part[l / WIDTH][l % WIDTH] = numbers[l];
    for (int p = 0; p < PARTS; ++p) found.part[p] -= zero.part[p];
    return found;
  };
  for (int g = 0; g < args.groups; ++g) {
    const Row scale = read(args.scales, args.labels[g], 1.0f);
    const Row zero = read(args.zeros, args.labels[g], 0.0f);
    for (int j = args.ends[g]; j < args.ends[g + 1]; ++j) {
      const Row w = read(args.w, j, 0.0f), steps = steps_of(j, zero);
      for (int p = 0; p < PARTS; ++p)
        scratch.error[j].part[p] = w.part[p] - steps.part[p] * scale.part[p];
    }
  }
  for (int visit = 0; visit < args.rounds * args.groups; ++visit) {
    const int g = visit % args.groups, start = args.ends[g], size = args.ends[g + 1] - start;
    const float* H = diagonal.at(start);
    const Row scale = read(args.scales, args.labels[g], 1.0f);
    const Row zero = read(args.zeros, args.labels[g], 0.0f);
    for (int j = 0; j < size; ++j) scratch.steps[j] = steps_of(start + j, zero);
    std::fill_n(scratch.gradient.data(), size, Row{});
    add_product(scratch.gradient.data(), args.H + start * n, n, size, scratch.error.data(),
                args.inputs);
    improve_steps(H, size, scale, zero, maxq, scratch);
    const Row found = improve_scale(H, size, scale, scratch);
    for (int j = 0; j < size; ++j) {
      bytes numbers[PARTS];
      for (int p = 0; p < PARTS; ++p) {
        const vec step = scratch.steps[j].part[p];
        scratch.error[start + j].part[p] -=
            scratch.moved[j].part[p] + step * (found.part[p] - scale.part[p]);
        numbers[p] =
            __builtin_convertvector(__builtin_convertvector(step + zero.part[p], ivec), bytes);
      }
      std::memcpy(args.q + (start + j) * m + first, numbers, lanes);
    }
    std::memcpy(args.scales + args.labels[g] * m + first, &found, lanes * sizeof(float));
  }
}

}  // namespace

void NAMED(refine)(const RefineArgs& args) {
  int widest = 1;
  for (int g = 0; g < args.groups; ++g) widest = std::max(widest, args.ends[g + 1] - args.ends[g]);
  const DiagonalBlocks diagonal(args.H, args.inputs, false, [&](int j) {
    const int* end = std::upper_bound(args.ends, args.ends + args.groups, j);
    return end[-1] == j ? *end : 0;
  });
  parallel_for(args.threads, (args.outputs + LANES - 1) / LANES, [&](int tile) {
    RefineScratch scratch(args.inputs, widest);
    refine_tile(args, diagonal, tile * LANES, scratch);
  });
}

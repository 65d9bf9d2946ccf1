// Packs a checkpoint's words into tiles, unpacks them, and dequantizes tiles.

#include "tiles.h"

#include <algorithm>
#include <functional>
#include <vector>

#include "boundary.h"
#include "parallel.h"

namespace {

constexpr int STRIP = 8;  // tiles that are copied together, so that rows are read in longer pieces

// For each run, whether its words are those of the checkpoint unchanged.
std::vector<char> verbatim_runs(const Plan& plan) {
  std::vector<char> verbatim(plan.runs, plan.bits != 3);
  for (int run = 0; run < plan.runs; ++run) {
    const int32_t* order = plan.order + UNIT * plan.start[run];
    const int first = order[0], places = UNIT * (plan.start[run + 1] - plan.start[run]);
    if (first * plan.bits % 32 != 0 || first + places > plan.inputs) verbatim[run] = false;
    for (int place = 0; place < places && verbatim[run]; ++place) {
      const int in_unit = place % UNIT;
      verbatim[run] = order[place] == first + place - in_unit +
                                          input_of(plan.bits, in_unit / 4, in_unit % 4);
    }
  }
  return verbatim;
}

// Value `i` of a bit stream whose words are `stride` apart.
uint32_t field(const uint32_t* words, size_t stride, int bits, size_t i) {
  const size_t word = i * bits / 32, shift = i * bits % 32;
  uint64_t both = words[word * stride];
  if (shift + bits > 32) both |= static_cast<uint64_t>(words[(word + 1) * stride]) << 32;
  return both >> shift & ((1u << bits) - 1);
}

// Writes a value to a bit stream that is zero there.
void set_field(uint32_t* words, size_t stride, int bits, size_t i, uint32_t value) {
  const size_t word = i * bits / 32, shift = i * bits % 32;
  words[word * stride] |= value << shift;
  if (shift + bits > 32) words[(word + 1) * stride] |= value >> (32 - shift);
}

// The word and shift of a place in a unit. With 3 bits this is that of the low two.
struct Spot {
  int row, shift, high_shift;
};

Spot spot_of(int bits, int place) {
  const int step = place / 4, b = place % 4;
  if (bits == 8) return {step, 8 * b, 0};
  if (bits == 4) return {step / 2, 8 * b + 4 * (step % 2), 0};
  return {step / 4, 8 * b + 2 * (step % 4), 8 * b + step};
}

// Reads and writes the values of one place of a unit, for `lanes` outputs.
void get_place(const uint32_t* unit, int bits, int place, int lanes, uint32_t* values) {
  const Spot spot = spot_of(bits, place);
  const uint32_t* row = unit + spot.row * TILE;
  const uint32_t mask = (1u << (bits == 3 ? 2 : bits)) - 1;
  for (int l = 0; l < lanes; ++l) values[l] = row[l] >> spot.shift & mask;
  if (bits == 3)
    for (int l = 0; l < lanes; ++l) values[l] |= (unit[2 * TILE + l] >> spot.high_shift & 1) << 2;
}

void add_place(uint32_t* unit, int bits, int place, int lanes, const uint32_t* values) {
  const Spot spot = spot_of(bits, place);
  uint32_t* row = unit + spot.row * TILE;
  const uint32_t mask = (1u << (bits == 3 ? 2 : bits)) - 1;
  for (int l = 0; l < lanes; ++l) row[l] |= (values[l] & mask) << spot.shift;
  if (bits == 3)
    for (int l = 0; l < lanes; ++l) unit[2 * TILE + l] |= (values[l] >> 2) << spot.high_shift;
}

// Reads and writes the values of one input in the checkpoint's rows, for the outputs of a tile.
void get_input(const uint32_t* column, size_t stride, int bits, int input, int lanes,
               uint32_t* values) {
  const size_t word = static_cast<size_t>(input) * bits / 32, shift = input * bits % 32;
  const uint32_t* row = column + word * stride;
  const uint32_t mask = (1u << bits) - 1;
  for (int l = 0; l < lanes; ++l) values[l] = row[l] >> shift & mask;
  if (shift + bits > 32)
    for (int l = 0; l < lanes; ++l) values[l] |= row[stride + l] << (32 - shift) & mask;
}

void add_input(uint32_t* column, size_t stride, int bits, int input, int lanes,
               const uint32_t* values) {
  const size_t word = static_cast<size_t>(input) * bits / 32, shift = input * bits % 32;
  uint32_t* row = column + word * stride;
  for (int l = 0; l < lanes; ++l) row[l] |= values[l] << shift;
  if (shift + bits > 32)
    for (int l = 0; l < lanes; ++l) row[stride + l] |= values[l] >> (32 - shift);
}

struct Tile {
  int first, lanes;
  uint8_t* head;
  uint32_t* words;

  Tile(const Plan& plan, uint8_t* data, int index)
      : first(index * TILE),
        lanes(std::min(TILE, plan.outputs - first)),
        head(data + plan.tile_bytes() * index),
        words(reinterpret_cast<uint32_t*>(head + plan.words_at())) {}
};

template <typename Each>
void for_each_place(const Plan& plan, int run, const Each& each) {
  for (int unit = plan.start[run]; unit < plan.start[run + 1]; ++unit)
    for (int place = 0; place < UNIT; ++place) {
      const int input = plan.order[unit * UNIT + place];
      if (input < plan.inputs) each(unit, place, input);
    }
}

void pack_heads(const Plan& plan, const uint32_t* qzeros, const uint8_t* scales, const Tile& tile) {
  const size_t stride = plan.outputs, zero_words = (stride * plan.bits + 31) / 32;
  std::memset(tile.head, 0, plan.words_at());
  for (int g = 0; g < plan.groups; ++g) {
    uint8_t* head = tile.head + plan.head_bytes() * g;
    std::memcpy(head, scales + (g * stride + tile.first) * plan.scale_bytes,
                static_cast<size_t>(tile.lanes) * plan.scale_bytes);
    for (int l = 0; l < tile.lanes; ++l)
      head[TILE * plan.scale_bytes + l] =
          static_cast<uint8_t>(field(qzeros + g * zero_words, 1, plan.bits, tile.first + l));
  }
}

void unpack_scales(const Plan& plan, const Tile& tile, uint8_t* scales) {
  const size_t row = static_cast<size_t>(plan.outputs) * plan.scale_bytes;
  for (int g = 0; g < plan.groups; ++g)
    std::memcpy(scales + g * row + static_cast<size_t>(tile.first) * plan.scale_bytes,
                tile.head + plan.head_bytes() * g,
                static_cast<size_t>(tile.lanes) * plan.scale_bytes);
}

void unpack_zeros(const Plan& plan, uint8_t* data, uint32_t* qzeros) {
  const size_t zero_words = (static_cast<size_t>(plan.outputs) * plan.bits + 31) / 32;
  for (int output = 0; output < plan.outputs; ++output) {
    const Tile tile(plan, data, output / TILE);
    for (int g = 0; g < plan.groups; ++g)
      set_field(qzeros + g * zero_words, 1, plan.bits, output,
                tile.head[plan.head_bytes() * g + TILE * plan.scale_bytes + output % TILE]);
  }
}

// Copies a run with unchanged words, for some tiles, from the checkpoint's rows or back.
template <bool PACK>
void copy_run(const Plan& plan, int run, const std::vector<Tile>& tiles, uint32_t* qweight) {
  const size_t first = static_cast<size_t>(plan.order[UNIT * plan.start[run]]) * plan.bits / 32;
  const size_t at = static_cast<size_t>(plan.start[run]) * plan.bits;
  const size_t rows = static_cast<size_t>(plan.start[run + 1] - plan.start[run]) * plan.bits;
  for (size_t i = 0; i < rows; ++i)
    for (const Tile& tile : tiles) {
      uint32_t* packed = tile.words + (at + i) * TILE;
      uint32_t* plain = qweight + (first + i) * plan.outputs + tile.first;
      const size_t bytes = 4 * static_cast<size_t>(tile.lanes);
      if (!PACK) {
        std::memcpy(plain, packed, bytes);
      } else if (tile.lanes == TILE) {
        std::memcpy(packed, plain, 4 * TILE);
      } else {
        std::memset(packed, 0, 4 * TILE);
        std::memcpy(packed, plain, bytes);
      }
    }
}

// Moves a run whose inputs are in another order, one value at a time.
template <bool PACK>
void move_run(const Plan& plan, int run, const Tile& tile, uint32_t* qweight) {
  uint32_t* column = qweight + tile.first;
  const size_t stride = plan.outputs;
  uint32_t* words = tile.words + static_cast<size_t>(plan.start[run]) * plan.bits * TILE;
  if (PACK)
    std::memset(words, 0, plan.unit_bytes() * (plan.start[run + 1] - plan.start[run]));
  for_each_place(plan, run, [&](int unit, int place, int input) {
    uint32_t values[TILE];
    uint32_t* packed = tile.words + static_cast<size_t>(unit) * plan.bits * TILE;
    if (PACK) {
      get_input(column, stride, plan.bits, input, tile.lanes, values);
      add_place(packed, plan.bits, place, tile.lanes, values);
    } else {
      get_place(packed, plan.bits, place, tile.lanes, values);
      add_input(column, stride, plan.bits, input, tile.lanes, values);
    }
  });
}

template <bool PACK>
void move_words(const Plan& plan, uint8_t* data, uint32_t* qweight, int threads,
                const std::function<void(const Tile&)>& move_heads) {
  const std::vector<char> verbatim = verbatim_runs(plan);
  parallel_for(threads, (plan.tiles() + STRIP - 1) / STRIP, [&](int strip) {
    std::vector<Tile> tiles;
    for (int i = strip * STRIP; i < std::min((strip + 1) * STRIP, plan.tiles()); ++i)
      tiles.emplace_back(plan, data, i);
    for (const Tile& tile : tiles) move_heads(tile);
    for (int run = 0; run < plan.runs; ++run) {
      if (verbatim[run]) {
        copy_run<PACK>(plan, run, tiles, qweight);
        continue;
      }
      for (const Tile& tile : tiles) move_run<PACK>(plan, run, tile, qweight);
    }
  });
}

// Dequantizes a tile. w: the first of the tile's outputs in a matrix (inputs, stride).
void numbers_of_tile(const Plan& plan, uint8_t* data, int index, size_t stride, float* w) {
  const Tile tile(plan, data, index);
  for (int run = 0; run < plan.runs; ++run) {
    const uint8_t* head = tile.head + plan.head_bytes() * plan.group[run];
    float scale[TILE], zero[TILE];
    for (int l = 0; l < tile.lanes; ++l) {
      scale[l] = scale_at(plan, head, l);
      zero[l] = static_cast<float>(head[TILE * plan.scale_bytes + l] + plan.zero_offset);
    }
    for_each_place(plan, run, [&](int unit, int place, int input) {
      uint32_t values[TILE];
      get_place(tile.words + static_cast<size_t>(unit) * plan.bits * TILE, plan.bits, place,
                tile.lanes, values);
      float* row = w + input * stride;
      for (int l = 0; l < tile.lanes; ++l)
        row[l] = scale[l] * (static_cast<float>(static_cast<int32_t>(values[l])) - zero[l]);
    });
  }
}

// Dequantizes one output to w (inputs,).
void numbers_of_row(const Plan& plan, uint8_t* data, int output, float* w) {
  const Tile tile(plan, data, output / TILE);
  const int lane = output % TILE;
  for (int run = 0; run < plan.runs; ++run) {
    const uint8_t* head = tile.head + plan.head_bytes() * plan.group[run];
    const float scale = scale_at(plan, head, lane);
    const float zero = static_cast<float>(head[TILE * plan.scale_bytes + lane] + plan.zero_offset);
    for_each_place(plan, run, [&](int unit, int place, int input) {
      uint32_t value;
      get_place(tile.words + static_cast<size_t>(unit) * plan.bits * TILE + lane, plan.bits, place,
                1, &value);
      w[input] = scale * (static_cast<float>(value) - zero);
    });
  }
}

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

// Bytes of the data that a plan describes.
int64_t quant_cuda_tiles_bytes(const int32_t* plan) {
  const Plan p(plan);
  return static_cast<int64_t>(p.tile_bytes()) * p.tiles();
}

// qweight (inputs * bits / 32, outputs), qzeros (groups, outputs * bits / 32), scales (groups,
// outputs) of the plan's scale_bytes, into `data`. This and the following return a code of boundary.h.
int quant_cuda_tiles_pack(const int32_t* plan, const uint32_t* qweight, const uint32_t* qzeros,
                          const uint8_t* scales, uint8_t* data, int threads) {
  const Plan p(plan);
  return guarded([&] {
    move_words<true>(p, data, const_cast<uint32_t*>(qweight), threads,
                     [&](const Tile& tile) { pack_heads(p, qzeros, scales, tile); });
  });
}

// The inverse; qweight and qzeros must be zero before.
int quant_cuda_tiles_unpack(const int32_t* plan, uint8_t* data, uint32_t* qweight, uint32_t* qzeros,
                            uint8_t* scales, int threads) {
  const Plan p(plan);
  return guarded([&] {
    move_words<false>(p, data, qweight, threads,
                      [&](const Tile& tile) { unpack_scales(p, tile, scales); });
    // A word of zero points may belong to two tiles, so one thread writes them all.
    unpack_zeros(p, data, qzeros);
  });
}

// Dequantizes outputs first..first + count - 1 to float32 (inputs, count); first: a multiple of TILE.
int quant_cuda_tiles_numbers(const int32_t* plan, uint8_t* data, float* w, int first, int count,
                             int threads) {
  const Plan p(plan);
  return guarded([&] {
    parallel_for(threads, (count + TILE - 1) / TILE, [&](int tile) {
      numbers_of_tile(p, data, first / TILE + tile, count, w + static_cast<size_t>(tile) * TILE);
    });
  });
}

// Dequantizes the `count` outputs of `index`, each in 0..outputs - 1, to float32 (count, inputs).
int quant_cuda_tiles_rows(const int32_t* plan, uint8_t* data, const int64_t* index, float* w,
                          int64_t count, int threads) {
  const Plan p(plan);
  return guarded([&] {
    parallel_for(threads, static_cast<int>(count), [&](int i) {
      numbers_of_row(p, data, static_cast<int>(index[i]), w + static_cast<size_t>(i) * p.inputs);
    });
  });
}

}
#pragma GCC visibility pop

// The layout of a weight for the CPU kernels: tiles of 32 outputs, units of 32 inputs, words in the
// order in which they are read.
//
// Inputs are sorted by group (a stable sort), groups are cut into runs of at most 16 units, and each
// run is padded to whole units with inputs of weight zero. A unit of a tile
// is `bits` rows of 32 words, one word for each output, so that a vector of words holds the same
// inputs of many outputs and any four inputs of a word come out as its four bytes.
//
// The plan is a record of int32 that describes this; quant_cuda/cpu/layout.py makes it:
//   PLAN_* fields, start[runs + 1] in units, group[runs], order[32 * units] (the input at each place;
//   `inputs` if there is none).
// The data is, for each tile, its heads and then its words, both aligned to 64 bytes:
//   head: for each group 32 scales (float16 or float32) and 32 zero points (one byte each, less the
//   format's offset).
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

constexpr int TILE = 32;        // outputs
constexpr int UNIT = 32;        // inputs
constexpr int MAX_RUN = 16;     // units: sums of digits times weights stay exact in float32
constexpr int STEPS = UNIT / 4; // of four inputs each

enum {
  PLAN_BITS,
  PLAN_INPUTS,
  PLAN_OUTPUTS,
  PLAN_GROUPS,
  PLAN_RUNS,
  PLAN_UNITS,
  PLAN_SCALE_BYTES,
  PLAN_ZERO_OFFSET,
  PLAN_NUMBERS
};

struct Plan {
  int bits, inputs, outputs, groups, runs, units, scale_bytes, zero_offset;
  const int32_t *start, *group, *order;

  explicit Plan(const int32_t* p)
      : bits(p[PLAN_BITS]),
        inputs(p[PLAN_INPUTS]),
        outputs(p[PLAN_OUTPUTS]),
        groups(p[PLAN_GROUPS]),
        runs(p[PLAN_RUNS]),
        units(p[PLAN_UNITS]),
        scale_bytes(p[PLAN_SCALE_BYTES]),
        zero_offset(p[PLAN_ZERO_OFFSET]),
        start(p + PLAN_NUMBERS),
        group(start + runs + 1),
        order(group + runs) {}

  int tiles() const { return (outputs + TILE - 1) / TILE; }
  size_t head_bytes() const { return static_cast<size_t>(TILE) * (scale_bytes + 1); }
  size_t words_at() const { return (head_bytes() * groups + 63) / 64 * 64; }
  size_t unit_bytes() const { return static_cast<size_t>(TILE) * 4 * bits; }
  size_t tile_bytes() const { return words_at() + unit_bytes() * units; }

  // Whether both order activations alike.
  bool places_as(const Plan& other) const {
    return inputs == other.inputs && runs == other.runs && units == other.units &&
           std::memcmp(start, other.start, sizeof(int32_t) * (runs + 1)) == 0 &&
           std::memcmp(order, other.order, sizeof(int32_t) * UNIT * units) == 0;
  }
};

// The b-th of the four inputs of a step has place 4 * step + b in its unit. This is the input at that
// place, counted from the unit's first. For 2, 4 and 8 bits a word is then one of the
// checkpoint's; for 3 bits, two words hold the low two bits and the third the high one.
inline int input_of(int bits, int step, int b) {
  if (bits == 8) return 4 * step + b;
  if (bits == 4) return 8 * (step / 2) + 2 * b + step % 2;
  return 16 * (step / 4) + 4 * b + step % 4;
}

// IEEE float16 to float, without the instruction.
inline float half_to_float(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16, rest = h & 0x7fff;
  uint32_t bits = sign | ((rest << 13) + 0x38000000);
  if (rest >= 0x7c00) bits = sign | 0x7f800000 | (rest & 0x3ff) << 13;
  float value;
  if (rest < 0x400) {
    value = static_cast<float>(rest) * 5.9604644775390625e-08f;
    return sign ? -value : value;
  }
  std::memcpy(&value, &bits, 4);
  return value;
}

inline float scale_at(const Plan& plan, const uint8_t* head, int lane) {
  if (plan.scale_bytes == 4) {
    float value;
    std::memcpy(&value, head + 4 * lane, 4);
    return value;
  }
  uint16_t half;
  std::memcpy(&half, head + 2 * lane, 2);
  return half_to_float(half);
}

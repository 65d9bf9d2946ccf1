// x times a packed weight, for a CPU. tiles.h describes the weight's layout.
//
// Each product_*.cpp includes this file once with its own instruction set and PRODUCT_NAME.
//
// If the processor multiplies bytes, activations are rounded to fixed point of 1 or 2 signed bytes
// (digits), scaled to the largest of their run, and multiplied exactly as integers: four inputs of an
// output for each 32-bit word of a vector. VNNI does so in one instruction; AVX2 and AVX-512 without
// it take two, and one more a unit. Two bytes keep more bits than bfloat16 and float16 have.
// The generic code converts integers to float as it reads them and multiplies in float32.
// In both, the sum of a run is scaled once and added up in float32.

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "activations.h"
#include "parallel.h"
#include "product_args.h"
#include "tiles.h"

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif
constexpr int MAX_ROWS = 64;             // rows of x that are converted at once
constexpr size_t ROWS_BYTES = 512 << 10; // they should stay in the core's own cache
constexpr size_t WORTH_A_THREAD = 1 << 16;
// Distance of prefetching, in words; farther if a run is read more than once.
constexpr int AHEAD = 1024 / 4, FAR_AHEAD = 6144 / 4;

typedef float vecf __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef int32_t veci __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef uint32_t vecu __attribute__((vector_size(LANES * 4), aligned(4), may_alias));

// Four inputs of LANES outputs, as the four bytes of each word; step: 0..7 of the unit at `unit`.
template <int BITS>
inline vecu four_inputs(const uint32_t* unit, int step) {
  const auto row = [unit](int i) { return *reinterpret_cast<const vecu*>(unit + i * TILE); };
  if constexpr (BITS == 8) return row(step);
  if constexpr (BITS == 4) return (row(step / 2) >> 4 * (step % 2)) & 0x0f0f0f0fu;
  const vecu low = (row(step / 4) >> 2 * (step % 4)) & 0x03030303u;
  if constexpr (BITS == 2) return low;
  return low | ((row(2) >> step) & 0x01010101u) << 2;
}

// Prefetches a unit that will be read soon; it may be the next tile's, or past the end.
template <int BITS>
inline void fetch(const uint32_t* unit) {
  for (int i = 0; i < 2 * BITS; ++i) __builtin_prefetch(unit + 16 * i);
}

// Scales and zero points of a tile's group.
struct Head {
  float scale[TILE], zero[TILE];

  Head(const Plan& plan, const uint8_t* at) {
    if (plan.scale_bytes == 4) {
      std::memcpy(scale, at, sizeof scale);
    } else {
#if defined(__F16C__)
      for (int i = 0; i < TILE; i += 8) {
        const auto* halves = reinterpret_cast<const __m128i*>(at + 2 * i);
        _mm256_storeu_ps(scale + i, _mm256_cvtph_ps(_mm_loadu_si128(halves)));
      }
#else
      for (int i = 0; i < TILE; ++i) scale[i] = scale_at(plan, at, i);
#endif
    }
    const uint8_t* zeros = at + TILE * plan.scale_bytes;
    for (int i = 0; i < TILE; ++i) zero[i] = static_cast<float>(zeros[i] + plan.zero_offset);
  }
};

#if defined(__AVX2__)

constexpr bool FIXED = true;
constexpr int PARTS = TILE / LANES;

// How many rows are multiplied at once; their sums have to fit the registers.
constexpr int most_rows(int bits, int digits) {
#if defined(__AVX512VNNI__)
  return digits == 1 ? 8 : 4;
#else
  return (digits == 1 ? 8 : 4) / (bits == 8 ? 2 : 1);
#endif
}

inline veci every_word(const int8_t* four) {
  int32_t word;
  std::memcpy(&word, four, 4);
  return word - veci{};
}

// Adds the sums of ROWS rows over a run to y (rows, TILE), less the zero points' share. first: the
// first of the ASIDE vectors of outputs that they belong to; entry: the first row's place in scale
// and sums.
template <int DIGITS, int ROWS, int ASIDE>
inline void add_sums(const veci (&sum)[ROWS][DIGITS][ASIDE], int first, const Head& head,
                     const Activations& x, size_t entry, float* y) {
  for (int r = 0; r < ROWS; ++r)
    for (int p = 0; p < ASIDE; ++p) {
      const int part = first + p;
      const auto at = [part](const float* row) { return reinterpret_cast<const vecf*>(row)[part]; };
      const float* sums = x.sums.data() + (entry + r) * DIGITS;
      // Integers below 2**24, so that the difference is exact for each digit.
      vecf value = {};
      for (int d = DIGITS - 1; d >= 0; --d)
        value = value * 256 + (__builtin_convertvector(sum[r][d][p], vecf) - at(head.zero) * sums[d]);
      reinterpret_cast<vecf*>(y + r * TILE)[part] += value * (at(head.scale) * x.scale[entry + r]);
    }
}

#if defined(__AVX512VNNI__)

constexpr int parts_aside(int, int, int) { return PARTS; }

// Adds a unit's products to sum. digits: those of the first row; rows and digits are `length` apart.
template <int BITS, int DIGITS, int ROWS, int ASIDE>
inline void add_unit(const uint32_t* words, const int8_t* digits, int length,
                     veci (&sum)[ROWS][DIGITS][ASIDE]) {
  _Pragma("GCC unroll 8") for (int step = 0; step < STEPS; ++step) {
    vecu w[PARTS];
    _Pragma("GCC unroll 2") for (int p = 0; p < PARTS; ++p)
      w[p] = four_inputs<BITS>(words + p * LANES, step);
    _Pragma("GCC unroll 8") for (int r = 0; r < ROWS; ++r)
      _Pragma("GCC unroll 2") for (int d = 0; d < DIGITS; ++d) {
        const veci xs = every_word(digits + (r * DIGITS + d) * length + 4 * step);
        _Pragma("GCC unroll 2") for (int p = 0; p < PARTS; ++p)
          sum[r][d][p] = reinterpret_cast<veci>(
              _mm512_dpbusd_epi32(reinterpret_cast<__m512i>(sum[r][d][p]),
                                  reinterpret_cast<__m512i>(w[p]), reinterpret_cast<__m512i>(xs)));
      }
  }
}

#else

typedef int16_t vecs __attribute__((vector_size(LANES * 4), aligned(4), may_alias));

// Sums of two neighbouring products: of unsigned times signed bytes, or of 16-bit integers.
inline vecs pairs(vecu w, veci xs) {
#if defined(__AVX512F__)
  return reinterpret_cast<vecs>(
      _mm512_maddubs_epi16(reinterpret_cast<__m512i>(w), reinterpret_cast<__m512i>(xs)));
#else
  return reinterpret_cast<vecs>(
      _mm256_maddubs_epi16(reinterpret_cast<__m256i>(w), reinterpret_cast<__m256i>(xs)));
#endif
}

inline veci pairs(vecs a, int16_t factor) {
#if defined(__AVX512F__)
  return reinterpret_cast<veci>(
      _mm512_madd_epi16(reinterpret_cast<__m512i>(a), _mm512_set1_epi16(factor)));
#else
  return reinterpret_cast<veci>(
      _mm256_madd_epi16(reinterpret_cast<__m256i>(a), _mm256_set1_epi16(factor)));
#endif
}

constexpr int halves(int bits) { return bits == 8 ? 2 : 1; }

constexpr int parts_aside(int bits, int digits, int rows) {
  constexpr int ROOM = LANES == 16 ? 24 : 12;  // registers for sums
  return 2 * rows * digits * halves(bits) <= ROOM ? 2 : 1;
}

// Adds a unit's products to sum. digits: those of the first row; rows and digits are `length` apart.
// Two products of a 4-bit weight and a digit are at most 3840 in magnitude, so the sum over a unit's
// 8 steps fits 16 bits. 8-bit weights are split into two of 4 bits.
template <int BITS, int DIGITS, int ROWS, int ASIDE>
inline void add_unit(const uint32_t* words, const int8_t* digits, int length,
                     veci (&sum)[ROWS][DIGITS][ASIDE]) {
  constexpr int HALVES = halves(BITS);
  vecs part[ROWS][DIGITS][ASIDE][HALVES] = {};
  _Pragma("GCC unroll 8") for (int step = 0; step < STEPS; ++step) {
    vecu w[ASIDE][HALVES];
    _Pragma("GCC unroll 2") for (int p = 0; p < ASIDE; ++p) {
      w[p][0] = four_inputs<BITS>(words + p * LANES, step);
      if constexpr (HALVES == 2) {
        w[p][1] = (w[p][0] >> 4) & 0x0f0f0f0fu;
        w[p][0] &= 0x0f0f0f0fu;
      }
    }
    _Pragma("GCC unroll 8") for (int r = 0; r < ROWS; ++r)
      _Pragma("GCC unroll 2") for (int d = 0; d < DIGITS; ++d) {
        const veci xs = every_word(digits + (r * DIGITS + d) * length + 4 * step);
        _Pragma("GCC unroll 2") for (int p = 0; p < ASIDE; ++p)
          _Pragma("GCC unroll 2") for (int h = 0; h < HALVES; ++h)
            part[r][d][p][h] += pairs(w[p][h], xs);
      }
  }
  _Pragma("GCC unroll 8") for (int r = 0; r < ROWS; ++r)
    _Pragma("GCC unroll 2") for (int d = 0; d < DIGITS; ++d)
      _Pragma("GCC unroll 2") for (int p = 0; p < ASIDE; ++p) {
        sum[r][d][p] += pairs(part[r][d][p][0], 1);
        if constexpr (HALVES == 2) sum[r][d][p] += pairs(part[r][d][p][1], 16);
      }
}

#endif

template <int BITS, int DIGITS, int ROWS>
void add_run(const Plan& plan, int run, const uint32_t* words, const Head& head,
             const Activations& x, int first_row, float* y) {
  constexpr int ASIDE = parts_aside(BITS, DIGITS, ROWS);
  const int units = plan.start[run + 1] - plan.start[run], length = units * UNIT;
  const int8_t* digits = x.digits.data() +
                         (static_cast<size_t>(UNIT) * plan.start[run] * x.rows +
                          static_cast<size_t>(first_row) * length) * DIGITS;
  const size_t entry = static_cast<size_t>(run) * x.rows + first_row;
  const int ahead = ASIDE == PARTS ? AHEAD : std::max(FAR_AHEAD, units * TILE * BITS);
  for (int first = 0; first < PARTS; first += ASIDE) {
    veci sum[ROWS][DIGITS][ASIDE] = {};
    for (int unit = 0; unit < units; ++unit) {
      const uint32_t* own = words + unit * TILE * BITS;
      if (first == 0) fetch<BITS>(own + ahead);
      add_unit<BITS, DIGITS, ROWS, ASIDE>(own + first * LANES, digits + unit * UNIT, length, sum);
    }
    add_sums<DIGITS, ROWS, ASIDE>(sum, first, head, x, entry, y);
  }
}

#else

constexpr bool FIXED = false;
constexpr int most_rows(int, int) { return 4; }

template <int BITS, int, int ROWS>
void add_run(const Plan& plan, int run, const uint32_t* words, const Head& head,
             const Activations& x, int first_row, float* y) {
  constexpr int PARTS = 2;
  const int units = plan.start[run + 1] - plan.start[run], length = units * UNIT;
  const float* numbers = x.numbers.data() + static_cast<size_t>(UNIT) * plan.start[run] * x.rows +
                         static_cast<size_t>(first_row) * length;
  for (int lane = 0; lane < TILE; lane += PARTS * LANES) {
    vecf sum[ROWS][PARTS] = {}, zero[PARTS];
    for (int p = 0; p < PARTS; ++p)
      zero[p] = *reinterpret_cast<const vecf*>(head.zero + lane + p * LANES);
    for (int unit = 0; unit < units; ++unit) {
      if (lane == 0) fetch<BITS>(words + unit * TILE * BITS + AHEAD);
      vecf of_unit[ROWS][PARTS] = {};  // summed by unit first, which rounds less
      _Pragma("GCC unroll 8") for (int step = 0; step < STEPS; ++step) {
        vecu four[PARTS];
        for (int p = 0; p < PARTS; ++p)
          four[p] = four_inputs<BITS>(words + unit * TILE * BITS + lane + p * LANES, step);
        _Pragma("GCC unroll 4") for (int b = 0; b < 4; ++b) {
          const float* xs = numbers + unit * UNIT + 4 * step + b;
          _Pragma("GCC unroll 2") for (int p = 0; p < PARTS; ++p) {
            const veci q = reinterpret_cast<veci>((four[p] >> 8 * b) & 0xffu);
            const vecf w = __builtin_convertvector(q, vecf) - zero[p];
            _Pragma("GCC unroll 4") for (int r = 0; r < ROWS; ++r)
              of_unit[r][p] += w * xs[r * length];
          }
        }
      }
      for (int r = 0; r < ROWS; ++r)
        for (int p = 0; p < PARTS; ++p) sum[r][p] += of_unit[r][p];
    }
    for (int r = 0; r < ROWS; ++r)
      for (int p = 0; p < PARTS; ++p) {
        const int at = lane + p * LANES;
        *reinterpret_cast<vecf*>(y + r * TILE + at) +=
            sum[r][p] * *reinterpret_cast<const vecf*>(head.scale + at);
      }
  }
}

#endif

using AddRun = void (*)(const Plan&, int, const uint32_t*, const Head&, const Activations&, int,
                        float*);

// For 1, 2, 4 and 8 rows.
template <int BITS, int DIGITS>
AddRun rows_of(int rows) {
  constexpr int MOST = most_rows(BITS, DIGITS);
  if (MOST >= 8 && rows >= 8) return add_run<BITS, DIGITS, MOST >= 8 ? 8 : 1>;
  if (MOST >= 4 && rows >= 4) return add_run<BITS, DIGITS, MOST >= 4 ? 4 : 1>;
  return rows >= 2 ? add_run<BITS, DIGITS, 2> : add_run<BITS, DIGITS, 1>;
}

template <int BITS>
AddRun digits_of(int digits, int rows) {
  return !FIXED || digits == 2 ? rows_of<BITS, 2>(rows) : rows_of<BITS, 1>(rows);
}

AddRun kernel_of(int bits, int digits, int rows) {
  switch (bits) {
    case 2: return digits_of<2>(digits, rows);
    case 3: return digits_of<3>(digits, rows);
    case 4: return digits_of<4>(digits, rows);
    default: return digits_of<8>(digits, rows);
  }
}

// One tile of y, for the rows from `from` on that were converted.
void multiply_tile(const ProductArgs& args, const Plan& plan, const Activations& x, size_t from,
                   int tile) {
  alignas(64) float y[MAX_ROWS * TILE];
  std::fill(y, y + x.rows * TILE, 0.0f);
  const uint8_t* data = args.data + plan.tile_bytes() * tile;
  const uint8_t* words = data + plan.words_at();
  const int most = most_rows(plan.bits, args.digits);
  const AddRun add[] = {kernel_of(plan.bits, args.digits, 1), kernel_of(plan.bits, args.digits, 2),
                        kernel_of(plan.bits, args.digits, 4), kernel_of(plan.bits, args.digits, 8)};
  for (int run = 0; run < plan.runs; ++run) {
    const Head head(plan, data + plan.head_bytes() * plan.group[run]);
    const auto* of_run =
        reinterpret_cast<const uint32_t*>(words + plan.unit_bytes() * plan.start[run]);
    for (int row = 0; row < x.rows;) {
      int width = 3;  // 1 << width rows at once
      while (1 << width > std::min(most, x.rows - row)) --width;
      add[width](plan, run, of_run, head, x, row, y + row * TILE);
      row += 1 << width;
    }
  }
  const int lanes = std::min(TILE, plan.outputs - tile * TILE);
  for (int row = 0; row < x.rows; ++row)
    for (int l = 0; l < lanes; ++l) {
      const size_t output = static_cast<size_t>(tile) * TILE + l;
      const float bias = args.bias == nullptr ? 0 : args.bias[output];
      store(args.y, args.kind, (from + row) * plan.outputs + output, y[row * TILE + l] + bias);
    }
}

// Converts `rows` rows of x from `from` on.
void lay_out_rows(const ProductArgs& args, const Plan& plan, size_t from, int rows, Activations& to) {
  thread_local std::vector<float> lines;
  const size_t places = static_cast<size_t>(plan.units) * UNIT;
  to.rows = rows;
  if (FIXED) {
    to.digits.resize(places * rows * args.digits);
    to.scale.resize(static_cast<size_t>(plan.runs) * rows);
    to.sums.resize(to.scale.size() * args.digits);
  } else {
    to.numbers.resize(places * rows);
  }
  lines.resize(static_cast<size_t>(plan.inputs + 1) * rows);
  float* const line = lines.data();  // other threads would see their own `lines`, which is thread-local
  const bool few = places * rows < WORTH_A_THREAD;
  parallel_for(few ? 1 : args.threads, rows, [&](int row) {
    float* own = line + static_cast<size_t>(plan.inputs + 1) * row;
    lay_out(args, plan, from + row, row, FIXED, own, to);
  });
}

// Several weights (at most three) times one row of x, which is converted once if their plans order
// inputs alike.
void multiply_together(const ProductArgs* args, int count) {
  thread_local Activations rooms[3];
  std::vector<Plan> plans;
  const Activations* x[3];
  int first_tile[4] = {};
  size_t bytes = 0;
  for (int i = 0; i < count; ++i) {
    plans.emplace_back(args[i].plan);
    if (i > 0 && plans[i].places_as(plans[i - 1])) {
      x[i] = x[i - 1];
    } else {
      lay_out_rows(args[i], plans[i], 0, 1, rooms[i]);
      x[i] = &rooms[i];
    }
    first_tile[i + 1] = first_tile[i] + plans[i].tiles();
    bytes += plans[i].tile_bytes() * plans[i].tiles();
  }
  parallel_for(bytes < WORTH_A_THREAD ? 1 : args[0].threads, first_tile[count], [&](int tile) {
    int i = 0;
    while (tile >= first_tile[i + 1]) ++i;
    multiply_tile(args[i], plans[i], *x[i], 0, tile - first_tile[i]);
  });
}

}  // namespace

void PRODUCT_NAME(const ProductArgs& args) {
  const Plan plan(args.plan);
  const size_t places = static_cast<size_t>(plan.units) * UNIT;
  const size_t row_bytes = std::max<size_t>(1, places * (FIXED ? args.digits : sizeof(float)));
  const int64_t most = std::clamp<int64_t>(ROWS_BYTES / row_bytes / 8 * 8, 8, MAX_ROWS);
  thread_local Activations own;
  Activations& x = own;
  for (int64_t from = 0; from < args.rows; from += most) {
    lay_out_rows(args, plan, from, static_cast<int>(std::min(most, args.rows - from)), x);
    const bool little = plan.tile_bytes() * plan.tiles() * x.rows < WORTH_A_THREAD;
    parallel_for(little ? 1 : args.threads, plan.tiles(),
                 [&](int tile) { multiply_tile(args, plan, x, from, tile); });
  }
}

// float32 rows times a float16 or bfloat16 weight, as of an output head that is not quantized. Each
// weight is read once, as it is stored; sums are float32. Called by quant_cuda/cpu/half_matmul.py.
//
// Included after product.h by each product_*.cpp, with HALVES_NAME.

#include "halves_args.h"

namespace {

typedef uint16_t words16 __attribute__((vector_size(LANES * 2), aligned(2), may_alias));

template <bool BFLOAT>
inline vecf halves(const uint16_t* at) {
  if constexpr (BFLOAT) {
    const vecu wide = __builtin_convertvector(*reinterpret_cast<const words16*>(at), vecu) << 16;
    return (vecf)wide;
  }
#if defined(__AVX512F__)
  // The masked form with a full mask: the plain form makes GCC warn of an uninitialized value.
  const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at));
  return (vecf)_mm512_maskz_cvtph_ps(0xffff, words);
#elif defined(__F16C__)
  return (vecf)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
#else
  vecf found;
  for (int i = 0; i < LANES; ++i) found[i] = half_to_float(at[i]);
  return found;
#endif
}

// y[r][o] = x[r] . w[o] for ROWS rows and OUTPUTS outputs.
template <bool BFLOAT, int ROWS, int OUTPUTS>
void multiply_halves(const HalvesArgs& args, size_t row, size_t output) {
  const size_t n = args.inputs;
  const float* x = args.x + row * n;
  const uint16_t* w = args.weight + output * n;
  vecf sum[ROWS][OUTPUTS] = {};
  size_t k = 0;
  for (; k + LANES <= n; k += LANES) {
    vecf its[OUTPUTS];
    for (int o = 0; o < OUTPUTS; ++o) its[o] = halves<BFLOAT>(w + o * n + k);
    for (int r = 0; r < ROWS; ++r) {
      const vecf xs = *reinterpret_cast<const vecf*>(x + r * n + k);
      for (int o = 0; o < OUTPUTS; ++o) sum[r][o] += xs * its[o];
    }
  }
  for (int r = 0; r < ROWS; ++r)
    for (int o = 0; o < OUTPUTS; ++o) {
      float total = 0;
      for (int i = 0; i < LANES; ++i) total += sum[r][o][i];
      for (size_t rest = k; rest < n; ++rest)
        total += x[r * n + rest] * as_float(w + o * n, BFLOAT ? BFLOAT16 : FLOAT16, rest);
      args.y[(row + r) * args.outputs + output + o] = total;
    }
}

template <bool BFLOAT, int OUTPUTS>
void multiply_outputs(const HalvesArgs& args, size_t output) {
  int64_t row = 0;
  for (; row + 2 <= args.rows; row += 2) multiply_halves<BFLOAT, 2, OUTPUTS>(args, row, output);
  if (row < args.rows) multiply_halves<BFLOAT, 1, OUTPUTS>(args, row, output);
}

}  // namespace

void HALVES_NAME(const HalvesArgs& args) {
  constexpr int OUTPUTS = 4, PIECE = 16;  // outputs at once, and outputs that a thread takes at a time
  const bool little = 2 * args.inputs * args.outputs * args.rows < int64_t{WORTH_A_THREAD};
  const int64_t pieces = (args.outputs + PIECE - 1) / PIECE;
  parallel_for(little ? 1 : args.threads, static_cast<int>(pieces), [&](int piece) {
    const int64_t last = std::min<int64_t>(args.outputs, int64_t{PIECE} * (piece + 1));
    int64_t output = int64_t{PIECE} * piece;
    for (; output + OUTPUTS <= last; output += OUTPUTS)
      args.kind == BFLOAT16 ? multiply_outputs<true, OUTPUTS>(args, output)
                            : multiply_outputs<false, OUTPUTS>(args, output);
    for (; output < last; ++output)
      args.kind == BFLOAT16 ? multiply_outputs<true, 1>(args, output)
                            : multiply_outputs<false, 1>(args, output);
  });
}

// The C entry points, and the table of instruction sets that they choose from.

#include <cstdint>

#include "block_args.h"
#include "halves_args.h"
#include "product_args.h"
#include "solver_args.h"

#if defined(__x86_64__)
void sweep_avx512(const SweepArgs&);
void sweep_avx2(const SweepArgs&);
void refine_avx512(const RefineArgs&);
void refine_avx2(const RefineArgs&);
void product_avx512vnni(const ProductArgs&);
void product_avx512(const ProductArgs&);
void product_avx2(const ProductArgs&);
void block_avx512vnni(const BlockArgs&);
void halves_avx512vnni(const HalvesArgs&);
void block_avx512(const BlockArgs&);
void halves_avx512(const HalvesArgs&);
void block_avx2(const BlockArgs&);
void halves_avx2(const HalvesArgs&);
#endif
void sweep_generic(const SweepArgs&);
void refine_generic(const RefineArgs&);
void product_generic(const ProductArgs&);
void block_generic(const BlockArgs&);
void halves_generic(const HalvesArgs&);

namespace {

struct Choice {
  const char* name;
  void (*sweep)(const SweepArgs&);
  void (*refine)(const RefineArgs&);
  void (*product)(const ProductArgs&);
  void (*block)(const BlockArgs&);
  void (*halves)(const HalvesArgs&);
  bool (*runs_here)();
};

#if defined(__x86_64__)
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq");
}
#endif

const Choice choices[] = {
#if defined(__x86_64__)
    {"avx512vnni", sweep_avx512, refine_avx512, product_avx512vnni, block_avx512vnni, halves_avx512vnni,
     [] { return has_avx512() && __builtin_cpu_supports("avx512vnni"); }},
    {"avx512", sweep_avx512, refine_avx512, product_avx512, block_avx512, halves_avx512,
     has_avx512},
    {"avx2", sweep_avx2, refine_avx2, product_avx2, block_avx2, halves_avx2,
     [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }},
#endif
    {"generic", sweep_generic, refine_generic, product_generic, block_generic, halves_generic,
     [] { return true; }},
};
constexpr int COUNT = sizeof choices / sizeof choices[0];

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

// Name of the i-th instruction set that was compiled, best first; null past the last.
const char* quant_cuda_instruction_set(int index) {
  return index < COUNT ? choices[index].name : nullptr;
}

// Whether the i-th instruction set runs on this processor and operating system.
int quant_cuda_runs_here(int index) {
  return index >= 0 && index < COUNT && choices[index].runs_here();
}

// solver_args.h, product_args.h, block_args.h and tiles.h describe the arguments. `index`: of an
// instruction set that runs here.
void quant_cuda_sweep(int index, const SweepArgs* args) { choices[index].sweep(*args); }

void quant_cuda_refine(int index, const RefineArgs* args) { choices[index].refine(*args); }

void quant_cuda_product(int index, const void* x, const uint8_t* data, const int32_t* plan,
                        const float* bias, void* y, int64_t rows, int kind, int digits,
                        int threads) {
  choices[index].product({x, data, plan, bias, y, rows, kind, digits, threads});
}

// x and y are float32, the weight of `kind`; see halves_args.h.
void quant_cuda_halves(int index, const float* x, const uint16_t* weight, float* y, int64_t rows,
                       int64_t inputs, int64_t outputs, int kind, int threads) {
  choices[index].halves({x, weight, y, rows, inputs, outputs, kind, threads});
}

// One token through one block after another.
void quant_cuda_blocks(int index, const BlockArgs* blocks, int count) {
  for (int i = 0; i < count; ++i) choices[index].block(blocks[i]);
}

}

#pragma GCC visibility pop

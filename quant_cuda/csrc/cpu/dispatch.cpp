// The C entry points, and the table of instruction sets that they choose from.

#include <cstdint>
#include <cstdio>

#include "block_args.h"
#include "boundary.h"
#include "halves_args.h"
#include "parallel.h"
#include "product_args.h"
#include "solver_args.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

// setup.py defines it: the digest of the sources, see quant_cuda/sources.py.
#ifndef QUANT_CUDA_SOURCES
#define QUANT_CUDA_SOURCES unknown
#endif
#define TEXT_OF(name) #name
#define VALUE_OF(name) TEXT_OF(name)

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
// Not every compiler knows the name for __builtin_cpu_supports.
bool has_f16c() {
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c >> 29 & 1);
}

bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
}

bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq");
}
#endif

const Choice choices[] = {
#if defined(__x86_64__)
    {"avx512vnni", sweep_avx512, refine_avx512, product_avx512vnni, block_avx512vnni, halves_avx512vnni,
     [] { return has_avx512() && __builtin_cpu_supports("avx512vnni"); }},
    {"avx512", sweep_avx512, refine_avx512, product_avx512, block_avx512, halves_avx512,
     has_avx512},
    {"avx2", sweep_avx2, refine_avx2, product_avx2, block_avx2, halves_avx2, has_avx2},
#endif
    {"generic", sweep_generic, refine_generic, product_generic, block_generic, halves_generic,
     [] { return true; }},
};
constexpr int COUNT = sizeof choices / sizeof choices[0];

thread_local char last_error[256] = "";

}  // namespace

void keep_error(const char* text) noexcept {
  std::snprintf(last_error, sizeof last_error, "%s", text);
}

#pragma GCC visibility push(default)
extern "C" {

// The digest of the sources that the library was built from.
const char* quant_cuda_sources() { return VALUE_OF(QUANT_CUDA_SOURCES); }

// What the last call of this thread that returned FAILED has to say.
const char* quant_cuda_error() { return last_error; }

// To be called if the process was forked before this library was loaded.
void quant_cuda_after_fork() { after_fork(); }

// Name of the i-th instruction set that was compiled, best first; null past the last.
const char* quant_cuda_instruction_set(int index) {
  return index < COUNT ? choices[index].name : nullptr;
}

// Whether the i-th instruction set runs on this processor and operating system.
int quant_cuda_runs_here(int index) {
  return index >= 0 && index < COUNT && choices[index].runs_here();
}

// solver_args.h, product_args.h, block_args.h and tiles.h describe the arguments. `index`: of an
// instruction set that runs here. Each returns a code of boundary.h.
int quant_cuda_sweep(int index, const SweepArgs* args) {
  return guarded([&] { choices[index].sweep(*args); });
}

int quant_cuda_refine(int index, const RefineArgs* args) {
  return guarded([&] { choices[index].refine(*args); });
}

int quant_cuda_product(int index, const void* x, const uint8_t* data, const int32_t* plan,
                       const float* bias, void* y, int64_t rows, int kind, int digits, int threads) {
  return guarded(
      [&] { choices[index].product({x, data, plan, bias, y, rows, kind, digits, threads}); });
}

// x and y are float32, the weight of `kind`; see halves_args.h.
int quant_cuda_halves(int index, const float* x, const uint16_t* weight, float* y, int64_t rows,
                      int64_t inputs, int64_t outputs, int kind, int threads) {
  return guarded(
      [&] { choices[index].halves({x, weight, y, rows, inputs, outputs, kind, threads}); });
}

// One token through one block after another.
int quant_cuda_blocks(int index, const BlockArgs* blocks, int count) {
  return guarded([&] {
    for (int i = 0; i < count; ++i) choices[index].block(blocks[i]);
  });
}

}

#pragma GCC visibility pop

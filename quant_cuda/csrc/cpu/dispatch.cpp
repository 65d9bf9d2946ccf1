// C entry points: the best instruction set that this processor and its system have.

#include <cstring>

#include "sweep_args.h"

#if defined(__x86_64__)
void sweep_avx512(const SweepArgs&);
void sweep_avx2(const SweepArgs&);
#endif
void sweep_generic(const SweepArgs&);

namespace {

struct Choice {
  const char* name;
  void (*sweep)(const SweepArgs&);
  bool (*runs_here)();
};

const Choice choices[] = {
#if defined(__x86_64__)
    {"avx512",
     sweep_avx512,
     [] {
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
              __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq");
     }},
    {"avx2",
     sweep_avx2,
     [] {
       return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
     }},
#endif
    {"generic", sweep_generic, [] { return true; }},
};

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

// Name of the i-th instruction set that runs here, best first; null past the last.
const char* quant_cuda_instruction_set(int index) {
  for (const Choice& choice : choices)
    if (choice.runs_here() && index-- == 0) return choice.name;
  return nullptr;
}

// 0, or 1 where no such instruction set runs here.
int quant_cuda_sweep(const SweepArgs* args, const char* instruction_set) {
  for (const Choice& choice : choices)
    if (choice.runs_here() && std::strcmp(choice.name, instruction_set) == 0) {
      choice.sweep(*args);
      return 0;
    }
  return 1;
}

}

#pragma GCC visibility pop

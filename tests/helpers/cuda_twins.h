// Twins of the warp-wide functions of CUDA C++ and of quant_cuda/csrc/cuda/ptx.cuh; a part of
// cuda_emulation.h.
#pragma once

// --- warp-wide operations ---

struct Fragments {
  uint32_t a[4];
  uint32_t b[2];
  uint32_t unused[2];
};

template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  static_assert(sizeof(T) == 4, "one word");
  Fragments mine = {};
  std::memcpy(mine.a, &value, 4);
  const auto& all = emulation::exchange("shfl", mine);
  T got;
  std::memcpy(&got, all[(emulation::machine().current->rank % emulation::WARP) ^ mask].a, 4);
  return got;
}

inline unsigned __ballot_sync(unsigned, int vote) {
  Fragments mine = {};
  mine.a[0] = vote != 0;
  const auto& all = emulation::exchange("ballot", mine);
  unsigned votes = 0;
  for (int lane = 0; lane < emulation::WARP; ++lane) votes |= all[lane].a[0] << lane;
  return votes;
}

inline void __trap() {
  if (emulation::machine().error.empty()) emulation::machine().error = "a trap";
  emulation::to_scheduler(false);
}

inline void __syncwarp(unsigned = ~0u) { emulation::exchange("syncwarp", Fragments{}); }

inline int atomicAdd(int* address, int value) {
  const int old = *address;
  *address += value;
  return old;
}

// Half `high` of a word, as a number of T's type.
template <typename T>
float half_of(uint32_t word, int high) {
  const T number = {static_cast<uint16_t>(word >> (16 * high))};
  if constexpr (std::is_same_v<T, half_t>)
    return __half2float(number);
  else
    return __bfloat162float(number);
}

template <typename T>
void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, T) {
  const Fragments mine = {{a[0], a[1], a[2], a[3]}, {b0, b1}, {}};
  const auto& all = emulation::exchange("mma", mine);
  const int lane = emulation::machine().current->rank % emulation::WARP, g = lane / 4, t = lane % 4;
  for (int r = 0; r < 2; ++r)
    for (int c = 0; c < 2; ++c) {
      float sum = d[2 * r + c];
      for (int k = 0; k < 16; ++k) {
        const int owner = k % 8 / 2, upper = k / 8;
        const uint32_t aw = all[4 * g + owner].a[2 * upper + r];
        const uint32_t bw = all[4 * (2 * t + c) + owner].b[upper];
        sum += half_of<T>(aw, k % 2) * half_of<T>(bw, k % 2);
      }
      d[2 * r + c] = sum;
    }
}

// --- twins of ptx.cuh ---

template <uint32_t MASK, uint32_t BITS>
uint32_t and_or(uint32_t a) {
  return (a & MASK) | BITS;
}

inline uint32_t pick_bytes(uint32_t a, uint32_t b, uint32_t select) {
  const uint64_t bytes = static_cast<uint64_t>(b) << 32 | a;
  uint32_t d = 0;
  for (int i = 0; i < 4; ++i)
    d |= static_cast<uint32_t>(bytes >> (8 * (select >> (4 * i) & 7)) & 0xFF) << (8 * i);
  return d;
}

template <uint32_t SELECT>
uint32_t pick_bytes(uint32_t a, uint32_t b) {
  return pick_bytes(a, b, SELECT);
}

inline uint32_t half2_fma(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d = 0;
  for (int i = 0; i < 2; ++i) {
    const double exact = static_cast<double>(half_of<half_t>(a, i)) * half_of<half_t>(b, i) +
                         half_of<half_t>(c, i);
    _Float16 rounded = static_cast<_Float16>(exact);
    uint16_t bits;
    std::memcpy(&bits, &rounded, 2);
    d |= static_cast<uint32_t>(bits) << (16 * i);
  }
  return d;
}

inline uint32_t half2_sub(uint32_t a, uint32_t b) { return half2_fma(b, 0xBC00BC00u, a); }

inline uint32_t bfloat2_of(float low, float high) {
  return static_cast<uint32_t>(__float2bfloat16_rn(high).bits) << 16 |
         __float2bfloat16_rn(low).bits;
}

// Exact before its one rounding for the integers that the kernels put in.
inline uint32_t bfloat2_fma(uint32_t a, uint32_t b, uint32_t c) {
  const auto one = [&](int i) {
    return std::fma(half_of<bfloat_t>(a, i), half_of<bfloat_t>(b, i), half_of<bfloat_t>(c, i));
  };
  return bfloat2_of(one(0), one(1));
}

inline uint4 load_once(const uint4* p) {
  if (reinterpret_cast<uintptr_t>(p) % 16 && emulation::machine().error.empty())
    emulation::machine().error = "a 16-byte load from an address that is no multiple of 16";
  return *p;
}

inline void copy_async(void* shared, const void* global, bool valid) {
  if ((reinterpret_cast<uintptr_t>(global) | reinterpret_cast<uintptr_t>(shared)) % 16 &&
      emulation::machine().error.empty())
    emulation::machine().error = "a 16-byte copy at an address that is no multiple of 16";
  std::vector<emulation::Copy>& open = emulation::machine().current->open;
  open.push_back({shared, global, valid});
  if (emulation::machine().eager_copies) emulation::land(open);
}

inline void copy_commit() {
  emulation::Fiber& fiber = *emulation::machine().current;
  fiber.groups.push_back(std::move(fiber.open));
  fiber.open.clear();
}

template <int PENDING>
void copy_wait() {
  auto& groups = emulation::machine().current->groups;
  while (groups.size() > PENDING) {
    emulation::land(groups.front());
    groups.pop_front();
  }
}

inline uint32_t half2_mul(uint32_t a, uint32_t b) { return half2_fma(a, b, 0x80008000u); }

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
  std::memcpy(&got, all[(emulation::machine.current->rank % emulation::WARP) ^ mask].a, 4);
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
  const int lane = emulation::machine.current->rank % emulation::WARP, g = lane / 4, t = lane % 4;
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

template <uint32_t SELECT>
uint32_t pick_bytes(uint32_t a, uint32_t b) {
  const uint64_t bytes = static_cast<uint64_t>(b) << 32 | a;
  uint32_t d = 0;
  for (int i = 0; i < 4; ++i)
    d |= static_cast<uint32_t>(bytes >> (8 * (SELECT >> (4 * i) & 7)) & 0xFF) << (8 * i);
  return d;
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
  if (reinterpret_cast<uintptr_t>(p) % 16 && emulation::machine.error.empty())
    emulation::machine.error = "a 16-byte load from an address that is no multiple of 16";
  return *p;
}

inline void copy_async(void* shared, const void* global, bool valid) {
  if ((reinterpret_cast<uintptr_t>(global) | reinterpret_cast<uintptr_t>(shared)) % 16 &&
      emulation::machine.error.empty())
    emulation::machine.error = "a 16-byte copy at an address that is no multiple of 16";
  std::vector<emulation::Copy>& open = emulation::machine.current->open;
  open.push_back({shared, global, valid});
  if (emulation::machine.eager_copies) emulation::land(open);
}

inline void copy_commit() {
  emulation::Fiber& fiber = *emulation::machine.current;
  fiber.groups.push_back(std::move(fiber.open));
  fiber.open.clear();
}

template <int PENDING>
void copy_wait() {
  auto& groups = emulation::machine.current->groups;
  while (groups.size() > PENDING) {
    emulation::land(groups.front());
    groups.pop_front();
  }
}

inline uint32_t half2_mul(uint32_t a, uint32_t b) { return half2_fma(a, b, 0x80008000u); }

// --- compute capability 9.0 ---

constexpr int WGMMA_ROWS = 128;

inline void barrier_start(barrier_t* barrier, int count) {
  *barrier = {static_cast<uint16_t>(count), 0, 0};
}

inline void barrier_arrive(barrier_t* barrier) {
  if (++barrier->arrived < barrier->count) return;
  barrier->arrived = 0;
  ++barrier->phase;
}

inline void barrier_wait(barrier_t* barrier, int parity) {
  emulation::Fiber& fiber = *emulation::machine.current;
  fiber.barrier = barrier;
  fiber.parity = parity;
  if (!emulation::runnable(fiber)) emulation::to_scheduler(false);
}

// The stores land when this thread makes them visible to `wgmma`.
inline void fence_async() {
  std::vector<emulation::Row>& rows = emulation::machine.current->unfenced;
  for (const emulation::Row& row : rows) std::memcpy(row.to, row.words, 16);
  rows.clear();
}

inline void store_matrices(void* shared, const uint4& words) {
  struct Mine {
    void* to;
    uint32_t words[4];
    uint64_t unused;
  };
  const Mine mine = {shared, {words.x, words.y, words.z, words.w}, 0};
  const auto& all = emulation::exchange("stmatrix", mine);
  const int lane = emulation::machine.current->rank % emulation::WARP;
  emulation::Row row = {shared, {}};
  for (int t = 0; t < 4; ++t) row.words[t] = all[4 * (lane % 8) + t].words[lane / 8];
  emulation::machine.current->unfenced.push_back(row);
  if (emulation::machine.eager_copies) fence_async();
}

template <int COUNT>
void raise_registers() {
  static_assert(COUNT % 8 == 0 && COUNT >= 24 && COUNT <= 256, "what the instruction takes");
}

template <int COUNT>
void lower_registers() {
  raise_registers<COUNT>();
}

// Counts from where the block's dynamic shared memory starts.
inline uint64_t matrix_descriptor(const void* shared, uint32_t along, uint32_t across) {
  const auto from = reinterpret_cast<const char*>(shared) -
                    static_cast<const char*>(emulation::dynamic_memory());
  if ((from | along | across) % 16 && emulation::machine.error.empty())
    emulation::machine.error = "a matrix in shared memory that does not start at 16 bytes";
  return static_cast<uint64_t>(from >> 4 & 0x3FFF) | static_cast<uint64_t>(along >> 4) << 16 |
         static_cast<uint64_t>(across >> 4) << 32;
}

namespace emulation {

template <typename T>
float number_of(uint16_t bits) {
  return half_of<T>(bits, 0);
}

inline void multiply(std::vector<Product>& products) {
  const int t = machine.current->rank % 4;
  for (const Product& product : products)
    for (int column = 0; column < WGMMA_ROWS / 4; ++column) {
      const int j = column / 2, e = column % 2, n = 8 * j + 2 * t + e;
      float b[16];
      for (int k = 0; k < 16; ++k) {
        uint16_t bits;
        std::memcpy(&bits, product.b + k / 8 * product.along + n / 8 * product.across + n % 8 * 16 +
                               k % 8 * 2, 2);
        b[k] = product.number(bits);
      }
      for (int r = 0; r < 2; ++r) {
        float& d = product.d[4 * j + 2 * r + e];
        float sum = product.add ? d : 0.0f;
        for (int k = 0; k < 16; ++k) sum += product.a[r][k] * b[k];
        d = sum;
      }
    }
  products.clear();
}

}  // namespace emulation

inline void wgmma_fence() { emulation::machine.current->may_multiply = true; }

inline void wgmma_commit() {
  emulation::Fiber& fiber = *emulation::machine.current;
  fiber.may_multiply = false;
  fiber.product_groups.push_back(std::move(fiber.products));
  fiber.products.clear();
}

template <int PENDING>
void wgmma_wait() {
  auto& groups = emulation::machine.current->product_groups;
  while (groups.size() > PENDING) {
    emulation::multiply(groups.front());
    groups.pop_front();
  }
  emulation::exchange("wgmma wait", Fragments{});  // a warp waits as one
}

inline void wgmma_settle(float (&)[WGMMA_ROWS / 2]) {
  const emulation::Fiber& fiber = *emulation::machine.current;
  if (fiber.products.size() + fiber.product_groups.size() && emulation::machine.error.empty())
    emulation::machine.error = "sums are read before all products are done";
}

// Runs when it is waited for, or at once if copies land at once.
template <typename T>
void wgmma(float (&d)[WGMMA_ROWS / 2], const uint32_t (&a)[4], uint64_t b, int add, T) {
  struct Mine {
    uint32_t a[4];
    uint64_t b;
    int add, unused;
  };
  const Mine mine = {{a[0], a[1], a[2], a[3]}, b, add, 0};
  const auto& all = emulation::exchange("wgmma", mine);
  emulation::Fiber& fiber = *emulation::machine.current;
  if (!fiber.may_multiply && emulation::machine.error.empty())
    emulation::machine.error = "a product without a fence since the last group";
  emulation::Product product;
  product.d = d;
  const int g = fiber.rank % emulation::WARP / 4;
  for (int r = 0; r < 2; ++r)
    for (int k = 0; k < 16; ++k)
      product.a[r][k] = half_of<T>(all[4 * g + k % 8 / 2].a[k / 8 * 2 + r], k % 2);
  for (int lane = 0; lane < emulation::WARP; ++lane)
    if ((all[lane].b != b || all[lane].add != add) && emulation::machine.error.empty())
      emulation::machine.error = "lanes of a warp give different descriptors";
  product.b = static_cast<const char*>(emulation::dynamic_memory()) + (b & 0x3FFF) * 16;
  product.along = (b >> 16 & 0x3FFF) * 16;
  product.across = (b >> 32 & 0x3FFF) * 16;
  product.add = add != 0;
  product.number = emulation::number_of<T>;
  fiber.products.push_back(product);
  if (emulation::machine.eager_copies) emulation::multiply(fiber.products);
}

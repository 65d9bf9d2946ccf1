// Runs the source of CUDA kernels on the host, for tests: blocks one after another, a block's
// threads as fibers that change over at barriers and warp-wide operations only.
//
// What goes wrong on a GPU only sometimes goes wrong here always: shared memory is filled with NaN
// when a block starts, asynchronous copies land as late as they are allowed to (or at once, if
// `emulation_settings` says so), what the copy engine writes is NaN until all threads wait for it,
// thread blocks of a cluster run at once, fibers run in an order of choice, a kernel that may overlap
// the one before it begins before that one does, and a barrier or warp-wide operation that only some
// threads reach ends the launch with an error. With AddressSanitizer, an
// access outside a shared or global array ends the program.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __restrict__
#define __launch_bounds__(...)

#include "cuda_numbers.h"

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

struct alignas(16) float4 {
  float x, y, z, w;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

// --- the machine ---

using cudaStream_t = void*;
using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0;
constexpr cudaError_t cudaErrorInvalidValue = 1;
constexpr cudaError_t emulation_error = 999;
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };

// Twin of ptx_hopper.cuh's: threads that have arrived, and bytes that its phase still waits for.
struct alignas(8) barrier_t {
  uint8_t count, arrived;
  uint16_t phase;
  int32_t bytes;
};

namespace emulation {

constexpr size_t MOST_SHARED = 227 * 1024;
constexpr int WARP = 32;
constexpr size_t STACK = 256 * 1024;
// In turn, by three orders; or always the first (or the last) thread that can run, so that one part
// of a block gets as far ahead of another as it may.
enum class Order { FORWARD, BACKWARD, ODD_FIRST, FIRST, LAST };

struct Copy {
  void* to;
  const void* from;
  bool valid;
};

// Eight numbers of a matrix on their way to shared memory.
struct Row {
  void* to;
  uint32_t words[4];
};

// A lane's part of a warpgroup's product.
struct Product {
  float* d;
  float a[2][16];
  const char* b;
  size_t along, across;
  bool add, swizzle;
  int columns;
  float (*number)(uint16_t bits);
};

// Rows that the copy engine is about to write, each from memory or zeros.
struct Transfer {
  struct Row {
    char* to;
    const char* from;
    size_t bytes;
  };
  std::vector<Row> rows;
  barrier_t* barrier;
  int bytes;
};

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};

// A thread block, of those of a cluster.
struct Block {
  dim3 at;
  std::deque<std::unique_ptr<void, Free>> shared;
  std::vector<std::pair<const char*, void*>> named;
  std::vector<std::pair<void*, size_t>> sizes;
  int running = 0;
};

struct Fiber {
  ucontext_t context;
  Block* block = nullptr;
  std::unique_ptr<char[]> stack;
  dim3 thread;
  int rank;
  bool done = false;
  const char* waits_at = nullptr;  // a block-wide barrier
  unsigned awaited = 0;            // a warp's exchange to complete, or 0
  unsigned exchanges = 0;
  std::vector<Copy> open;
  std::deque<std::vector<Copy>> groups;
  const barrier_t* barrier = nullptr;  // in shared memory, whose phase of `parity` is awaited
  unsigned parity = 0;
  std::vector<Row> unfenced;
  bool may_multiply = false;
  std::vector<Product> products;
  std::deque<std::vector<Product>> product_groups;
  void* fake_stack = nullptr;
};

struct Slot {
  alignas(16) char bytes[WARP][32];
  const char* operation = nullptr;
  int arrived = 0;
};

struct Warp {
  Slot slots[2];
  unsigned completed = 0;
};

struct Machine {
  Order order = Order::FORWARD;
  bool eager_copies = false;
  size_t shared_limit = 0;  // 0: as much as is asked for
  std::string error;
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<Warp> warps;
  std::vector<Block> blocks;
  std::deque<Transfer> transfers;
  size_t dynamic_bytes = 0;
  ucontext_t scheduler;
  const void* scheduler_stack = nullptr;
  size_t scheduler_size = 0;
  void* scheduler_fake = nullptr;
  Fiber* current = nullptr;
  const std::function<void()>* body = nullptr;
  dim3 grid, block;
};

// The second runs the kernel that a thread of the first waits for.
inline Machine machines[2];
inline int level = 0;
inline Machine& machine() { return machines[level]; }

// Of kernels that may overlap the one before them: which of each two is put off (0 or 1), how many
// there were, and what is put off until a thread of the next kernel waits for it.
inline int put_off_at = 0, overlapping = 0;
inline std::function<void()> put_off;

inline void to_fiber(Fiber& fiber) {
  machine().current = &fiber;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&machine().scheduler_fake, fiber.stack.get(), STACK);
#endif
  swapcontext(&machine().scheduler, &fiber.context);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(machine().scheduler_fake, nullptr, nullptr);
#endif
}

inline void to_scheduler(bool last) {
  Fiber& fiber = *machine().current;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(last ? nullptr : &fiber.fake_stack, machine().scheduler_stack,
                                 machine().scheduler_size);
#endif
  swapcontext(&fiber.context, &machine().scheduler);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fiber.fake_stack, nullptr, nullptr);
#endif
}

inline void fiber_main() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &machine().scheduler_stack, &machine().scheduler_size);
#endif
  (*machine().body)();
  machine().current->done = true;
  to_scheduler(true);
}

// Memory of a block, alike for all its threads; NaN and large numbers at first.
inline void* shared_memory(const char* name, size_t bytes) {
  Block& block = *machine().current->block;
  for (auto& [known, memory] : block.named)
    if (known == name) return memory;
  // Alike in all thread blocks of a cluster, to the last bit that boxes are swizzled by.
  void* memory = nullptr;
  if (posix_memalign(&memory, 1024, bytes)) std::abort();
  block.shared.emplace_back(memory);
  std::memset(memory, 0xFF, bytes);
  block.named.emplace_back(name, memory);
  block.sizes.emplace_back(memory, bytes);
  return memory;
}

inline const char* const CLUSTER = "all threads of a cluster";

inline void complete(barrier_t& barrier) {
  if (barrier.arrived < barrier.count || barrier.bytes) return;
  barrier.arrived = 0;
  ++barrier.phase;
}

// What a transfer writes is unknown from its start on.
inline void begin(Transfer transfer) {
  for (const Transfer::Row& row : transfer.rows) std::memset(row.to, 0xFF, row.bytes);
  machine().transfers.push_back(std::move(transfer));
}

// Complete the transfer that was started last, or first.
inline void land_transfer(bool last) {
  const Transfer transfer = std::move(last ? machine().transfers.back() : machine().transfers.front());
  last ? machine().transfers.pop_back() : machine().transfers.pop_front();
  for (const Transfer::Row& row : transfer.rows)
    if (row.from)
      std::memcpy(row.to, row.from, row.bytes);
    else
      std::memset(row.to, 0, row.bytes);
  transfer.barrier->bytes -= transfer.bytes;
  complete(*transfer.barrier);
}

inline void barrier(const char* site) {
  machine().current->waits_at = site;
  to_scheduler(false);
}

// Every lane of a warp gives `mine` and gets all lanes' in order.
template <typename Mine>
const Mine (&exchange(const char* operation, const Mine& mine))[WARP] {
  static_assert(sizeof(Mine) == 32, "a slot");
  Fiber& fiber = *machine().current;
  Warp& warp = machine().warps[fiber.rank / WARP];
  Slot& slot = warp.slots[fiber.exchanges++ % 2];
  if (slot.arrived == 0) slot.operation = operation;
  if (slot.operation != operation && machine().error.empty())
    machine().error = std::string("lanes of a warp met in ") + slot.operation + " and " + operation;
  std::memcpy(slot.bytes[fiber.rank % WARP], &mine, 32);
  if (++slot.arrived == WARP) {
    slot.arrived = 0;
    ++warp.completed;
  } else {
    fiber.awaited = fiber.exchanges;
    to_scheduler(false);
  }
  return *reinterpret_cast<const Mine(*)[WARP]>(slot.bytes);
}

inline bool runnable(Fiber& fiber) {
  if (fiber.done || fiber.waits_at) return false;
  if (fiber.barrier && fiber.barrier->phase % 2 == fiber.parity) return false;
  fiber.barrier = nullptr;
  if (fiber.awaited && machine().warps[fiber.rank / WARP].completed < fiber.awaited) return false;
  fiber.awaited = 0;
  return true;
}

// Releases blocks, or the cluster, all of whose threads wait at one barrier; whether there were any.
inline bool release() {
  bool released = false;
  size_t at_cluster = 0;
  const size_t threads = machine().fibers.size() / machine().blocks.size();
  for (size_t first = 0; first < machine().fibers.size(); first += threads) {
    const char* site = machine().fibers[first]->waits_at;
    const auto begin = machine().fibers.begin() + first;
    // Threads that have ended are not waited for by a cluster.
    const bool all = std::all_of(begin, begin + threads, [&](auto& f) {
      return f->waits_at == site || (f->done && site == CLUSTER);
    });
    if (site == nullptr || !all) continue;
    at_cluster += site == CLUSTER;
    if (site == CLUSTER) continue;
    std::for_each(begin, begin + threads, [](auto& f) { f->waits_at = nullptr; });
    released = true;
  }
  if (at_cluster < machine().blocks.size()) return released;
  for (auto& fiber : machine().fibers) fiber->waits_at = nullptr;
  return true;
}

// What keeps a cluster in which no thread can run, and nothing is released, from going on.
inline std::string stuck() {
  const char* site = nullptr;
  for (auto& fiber : machine().fibers) {
    if (fiber->awaited) return "a warp-wide operation was reached by only some lanes of a warp";
    if (fiber->barrier) return "a barrier in shared memory is never completed";
  }
  const Block* block = nullptr;
  for (auto& fiber : machine().fibers) {
    if (!fiber->waits_at) continue;
    if (site && site != fiber->waits_at && block == fiber->block)
      return "threads of a block wait at two barriers";
    site = fiber->waits_at;
    block = fiber->block;
  }
  return std::string("a barrier was reached by only some threads: ") + site;
}

// Runs thread blocks of `block` threads each at once: those at `places`.
inline void run_cluster(const std::vector<dim3>& places, dim3 block) {
  const int size = block.x * block.y * block.z, threads = places.size() * size;
  machine().transfers.clear();
  machine().blocks = std::vector<Block>(places.size());
  machine().warps.assign(threads / WARP, {});
  for (int i = 0; i < threads; ++i) {
    Fiber& fiber = *machine().fibers[i];
    std::unique_ptr<char[]> stack = std::move(fiber.stack);
    fiber = Fiber{};
    fiber.stack = stack ? std::move(stack) : std::unique_ptr<char[]>(new char[STACK]);
    fiber.rank = i;
    fiber.block = &machine().blocks[i / size];
    fiber.block->at = places[i / size];
    ++fiber.block->running;
    const unsigned r = i % size;
    fiber.thread = dim3(r % block.x, r / block.x % block.y, r / (block.x * block.y));
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = STACK;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, fiber_main, 0);
  }
  const bool backward = machine().order == Order::BACKWARD || machine().order == Order::LAST;
  const bool in_turn = machine().order != Order::FIRST && machine().order != Order::LAST;
  std::vector<int> order(threads);
  for (int i = 0; i < threads; ++i) order[i] = backward ? threads - 1 - i : i;
  if (machine().order == Order::ODD_FIRST)
    std::stable_partition(order.begin(), order.end(), [](int i) { return i % 2; });
  while (true) {
    bool ran = false, alive = false;
    for (int i : order) {
      Fiber& fiber = *machine().fibers[i];
      if (runnable(fiber)) {
        to_fiber(fiber);
        ran = true;
        // One block of a cluster may get as far ahead of the others as it may.
        if (!in_turn && fiber.waits_at && fiber.waits_at != CLUSTER) release();
        // Nobody may read the shared memory of a thread block that has ended.
        if (fiber.done && --fiber.block->running == 0)
          for (auto& [memory, bytes] : fiber.block->sizes) std::memset(memory, 0xFF, bytes);
      }
      if (!machine().error.empty()) return;
      alive = alive || !fiber.done;
      if (ran && !in_turn) break;
    }
    if (ran) continue;
    if (!alive) return;
    if (release()) continue;
    if (machine().transfers.empty()) {
      machine().error = stuck();
      return;
    }
    land_transfer(backward);
  }
}

// wide: thread blocks of a cluster along y, which has all along z; 0 for none.
inline void launch(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& body,
                   int wide = 0) {
  const int threads = block.x * block.y * block.z;
  if (!machine().error.empty()) return;
  if (threads % WARP || threads > 1024 || grid.x == 0 || grid.y == 0 || grid.z == 0 ||
      grid.y > 65535 || grid.z > 65535) {
    machine().error = "a launch of an impossible size";
    return;
  }
  if (shared_bytes > std::max<size_t>(machine().shared_limit, 48 * 1024)) {
    machine().error = "more shared memory than the kernel was allowed";
    return;
  }
  const unsigned high = wide ? wide : 1, deep = wide ? grid.z : 1;
  if (high * deep > 8 || grid.y % high) {
    machine().error = "a cluster of more than eight thread blocks, or one that does not divide the grid";
    return;
  }
  while (machine().fibers.size() != high * deep * threads)
    if (machine().fibers.size() < high * deep * threads)
      machine().fibers.emplace_back(new Fiber);
    else
      machine().fibers.pop_back();
  machine().body = &body;
  machine().dynamic_bytes = shared_bytes;
  machine().grid = grid;
  machine().block = block;
  for (unsigned z = 0; z < grid.z; z += deep)
    for (unsigned y = 0; y < grid.y; y += high)
      for (unsigned x = 0; x < grid.x; ++x) {
        std::vector<dim3> places;
        for (unsigned i = 0; i < deep; ++i)
          for (unsigned j = 0; j < high; ++j) places.emplace_back(x, y + j, z + i);
        run_cluster(places, block);
        if (machine().error.empty()) continue;
        machine().current = nullptr;
        return;
      }
  machine().blocks.clear();
  machine().shared_limit = 0;
  machine().current = nullptr;
}

// Runs what was put off; in a kernel, when its first thread waits for the kernel before it.
inline void run_put_off() {
  if (!put_off) return;
  const std::function<void()> kernel = std::move(put_off);
  put_off = nullptr;
  const bool nested = machine().current != nullptr;
  if (nested) {
    machines[1].order = machine().order;
    machines[1].eager_copies = machine().eager_copies;
    ++level;
  }
  kernel();
  if (!nested) return;
  --level;
  if (machine().error.empty()) machine().error = machines[1].error;
  machines[1].error.clear();
}

// A launch that may begin before the kernel before it has ended, or even begun.
inline void launch_overlapping(dim3 grid, dim3 block, const std::function<void()>& body) {
  const auto kernel = [=] { launch(grid, block, 0, body); };
  const bool is_second = static_cast<bool>(put_off);
  if (!is_second && overlapping++ % 2 == put_off_at) {
    put_off = kernel;
    return;
  }
  if (is_second) ++overlapping;
  kernel();
  // Nobody has waited for it.
  run_put_off();
}

template <typename T>
T& shared_array(const char* name) {
  return *static_cast<T*>(shared_memory(name, sizeof(T)));
}

inline void* dynamic_memory() { return shared_memory("dynamic", machine().dynamic_bytes); }

inline void land(std::vector<Copy>& copies) {
  for (const Copy& copy : copies) {
    if (copy.valid)
      std::memcpy(copy.to, copy.from, 16);
    else
      std::memset(copy.to, 0, 16);
  }
  copies.clear();
}

}  // namespace emulation

#define threadIdx (emulation::machine().current->thread)
#define blockIdx (emulation::machine().current->block->at)
#define blockDim (emulation::machine().block)
#define gridDim (emulation::machine().grid)

#define EMULATION_TEXT2(x) #x
#define EMULATION_TEXT(x) EMULATION_TEXT2(x)
#define EMULATION_SITE __FILE__ ":" EMULATION_TEXT(__LINE__)
#define __syncthreads()                          \
  do {                                           \
    static const char* const site = EMULATION_SITE; \
    emulation::barrier(site);                    \
  } while (0)
#define SHARED(type, name, extents)                                  \
  using name##_type = type extents;                                  \
  static const char* const name##_name = EMULATION_SITE;             \
  name##_type& name = emulation::shared_array<name##_type>(name##_name)
#define DYNAMIC_SHARED(type, name) type* const name = static_cast<type*>(emulation::dynamic_memory())
#define LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  ((void)(stream), emulation::run_put_off(),                   \
   emulation::launch(grid, block, shared_bytes, [=] { kernel(__VA_ARGS__); }))
#define LAUNCH_OVERLAPPING(kernel, grid, block, stream, ...) \
  ((void)(stream), emulation::launch_overlapping(grid, block, [=] { kernel(__VA_ARGS__); }))

template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, cudaFuncAttribute, int bytes) {
  if (static_cast<size_t>(bytes) > emulation::MOST_SHARED) return cudaErrorInvalidValue;
  emulation::machine().shared_limit = bytes;
  return cudaSuccess;
}

inline cudaError_t cudaGetLastError() {
  emulation::run_put_off();
  return emulation::machine().error.empty() ? cudaSuccess : emulation_error;
}

inline const char* cudaGetErrorString(cudaError_t code) {
  static std::string text;
  text = code == emulation_error ? emulation::machine().error : "invalid argument";
  emulation::machine().error.clear();
  return text.c_str();
}

// For tests: an emulation::Order, and whether asynchronous copies land at once.
extern "C" inline __attribute__((visibility("default"), used)) void emulation_settings(
    int order, int eager_copies) {
  emulation::machine().order = static_cast<emulation::Order>(order);
  emulation::machine().eager_copies = eager_copies;
}

// For tests: which of two overlapping kernels is put off, 0 or 1.
extern "C" inline __attribute__((visibility("default"), used)) void emulation_put_off(int which) {
  emulation::put_off_at = which;
  emulation::overlapping = 0;
}

#include "cuda_twins.h"
#include "cuda_twins_hopper.h"

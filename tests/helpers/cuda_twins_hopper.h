// Twins of quant_cuda/csrc/cuda/ptx_hopper.cuh, for compute capability 9.0; a part of cuda_emulation.h.
#pragma once

#define GRID_CONSTANT

constexpr int WGMMA_ROWS = 128;

inline void barrier_start(barrier_t* barrier, int count) {
  *barrier = {static_cast<uint8_t>(count), 0, 0, 0};
}

inline void barrier_arrive(barrier_t* barrier) {
  ++barrier->arrived;
  emulation::complete(*barrier);
}

inline void barrier_expect(barrier_t* barrier, int bytes) {
  barrier->bytes += bytes;
  barrier_arrive(barrier);
}

inline void barrier_fence() {}

namespace emulation {

// The same place in the dynamic shared memory of another thread block of the cluster.
inline char* place_in(int rank, const void* mine) {
  const auto offset = static_cast<const char*>(mine) - static_cast<const char*>(dynamic_memory());
  for (auto& [name, memory] : machine().blocks[rank].named)
    if (std::string(name) == "dynamic") return static_cast<char*>(memory) + offset;
  if (machine().error.empty())
    machine().error = "shared memory of a thread block that has not started";
  return static_cast<char*>(dynamic_memory()) + offset;
}

}  // namespace emulation

inline void barrier_arrive_at(barrier_t* barrier, int rank) {
  if (emulation::machine().blocks[rank].running == 0 && emulation::machine().error.empty())
    emulation::machine().error = "a barrier of a thread block that has ended";
  barrier_arrive(reinterpret_cast<barrier_t*>(emulation::place_in(rank, barrier)));
}

inline void barrier_wait(barrier_t* barrier, int parity) {
  emulation::Fiber& fiber = *emulation::machine().current;
  fiber.barrier = barrier;
  fiber.parity = parity;
  if (!emulation::runnable(fiber)) emulation::to_scheduler(false);
}

inline void barrier_wait_cluster(barrier_t* barrier, int parity) { barrier_wait(barrier, parity); }

// The stores land when this thread makes them visible to `wgmma`.
inline void fence_async() {
  std::vector<emulation::Row>& rows = emulation::machine().current->unfenced;
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
  const int lane = emulation::machine().current->rank % emulation::WARP;
  emulation::Row row = {shared, {}};
  for (int t = 0; t < 4; ++t) row.words[t] = all[4 * (lane % 8) + t].words[lane / 8];
  emulation::machine().current->unfenced.push_back(row);
  if (emulation::machine().eager_copies) fence_async();
}

template <int COUNT>
void raise_registers() {
  static_assert(COUNT % 8 == 0 && COUNT >= 24 && COUNT <= 256, "what the instruction takes");
}

template <int COUNT>
void lower_registers() {
  raise_registers<COUNT>();
}

// --- the copy engine ---

inline void copy_bulk(void* shared, const void* global, int bytes, barrier_t* barrier) {
  const auto to = reinterpret_cast<uintptr_t>(shared), from = reinterpret_cast<uintptr_t>(global);
  if ((to | from | bytes) % 16 && emulation::machine().error.empty())
    emulation::machine().error = "a bulk copy whose addresses or size are no multiples of 16";
  emulation::begin({{{static_cast<char*>(shared), static_cast<const char*>(global),
                      static_cast<size_t>(bytes)}}, barrier, bytes});
  if (emulation::machine().eager_copies) emulation::land_transfer(true);
}

struct tensor_map_t {
  const char* x;
  int rows, inputs, box_rows;
};

inline cudaError_t map_rows(tensor_map_t* map, const void* x, int rows, int inputs, int box_rows) {
  if (reinterpret_cast<uintptr_t>(x) % 16 || inputs % 8 || box_rows < 1 || box_rows > 256)
    return cudaErrorInvalidValue;
  *map = {static_cast<const char*>(x), rows, inputs, box_rows};
  return cudaSuccess;
}

inline void prefetch_map(const tensor_map_t*) {}

namespace emulation {

// Boxes are swizzled by the address: 16-byte pieces of each 128 bytes change places.
inline char* swizzled(char* linear) {
  const auto address = reinterpret_cast<uintptr_t>(linear);
  return reinterpret_cast<char*>(address ^ (address >> 7 & 7) << 4);
}

}  // namespace emulation

inline void copy_box(void* shared, const tensor_map_t* map, int input, int row,
                     barrier_t* barrier) {
  if (reinterpret_cast<uintptr_t>(shared) % 1024 && emulation::machine().error.empty())
    emulation::machine().error = "a box whose place is no multiple of 1024";
  emulation::Transfer made = {{}, barrier, map->box_rows * 128};
  for (int r = 0; r < map->box_rows; ++r)
    for (int piece = 0; piece < 8; ++piece) {
      const int k = input + 8 * piece;
      const bool there = row + r < map->rows && k < map->inputs;
      const size_t at = static_cast<size_t>(row + r) * map->inputs + k;
      char* to = emulation::swizzled(static_cast<char*>(shared) + r * 128 + piece * 16);
      made.rows.push_back({to, there ? map->x + 2 * at : nullptr, 16});
    }
  emulation::begin(std::move(made));
  if (emulation::machine().eager_copies) emulation::land_transfer(true);
}

inline void copy_box_to_two(void* shared, const tensor_map_t* map, int input, int row,
                            barrier_t* barrier, int rank) {
  for (int r = rank; r < rank + 2; ++r)
    copy_box(emulation::place_in(r, shared), map, input, row,
             reinterpret_cast<barrier_t*>(emulation::place_in(r, barrier)));
}

// --- clusters ---

inline void cluster_sync() { emulation::barrier(emulation::CLUSTER); }

template <typename T>
const T* cluster_shared(const T* shared, int rank) {
  return reinterpret_cast<const T*>(emulation::place_in(rank, shared));
}

template <typename... Formal, typename... Actual>
cudaError_t launch_cluster(void (*kernel)(Formal...), dim3 grid, int wide, int threads,
                           size_t bytes, cudaStream_t, Actual... actual) {
  emulation::launch(grid, threads, bytes, [=] { kernel(actual...); }, wide);
  return cudaSuccess;
}

// --- products of a warpgroup ---

// Counts from where the block's dynamic shared memory starts.
inline uint64_t matrix_descriptor(const void* shared, uint32_t along, uint32_t across) {
  const auto from = reinterpret_cast<const char*>(shared) -
                    static_cast<const char*>(emulation::dynamic_memory());
  if ((from | along | across) % 16 && emulation::machine().error.empty())
    emulation::machine().error = "a matrix in shared memory that does not start at 16 bytes";
  return static_cast<uint64_t>(from >> 4 & 0x3FFF) | static_cast<uint64_t>(along >> 4) << 16 |
         static_cast<uint64_t>(across >> 4) << 32;
}

inline uint64_t swizzled_descriptor(const void* shared) {
  return matrix_descriptor(shared, 16, 1024) | 1ull << 62;
}

namespace emulation {

template <typename T>
float number_of(uint16_t bits) {
  return half_of<T>(bits, 0);
}

inline void multiply(std::vector<Product>& products) {
  const int t = machine().current->rank % 4;
  for (const Product& product : products)
    for (int column = 0; column < product.columns / 4; ++column) {
      const int j = column / 2, e = column % 2, n = 8 * j + 2 * t + e;
      float b[16];
      for (int k = 0; k < 16; ++k) {
        uint16_t bits;
        const char* at = product.b + n / 8 * product.across + k % 8 * 2;
        // Swizzled rows are 128 bytes apart, and pieces of eight inputs follow each other.
        at += product.swizzle ? n % 8 * 128 + k / 8 * 16 : n % 8 * 16 + k / 8 * product.along;
        if (product.swizzle) at = swizzled(const_cast<char*>(at));
        std::memcpy(&bits, at, 2);
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

inline void release_next() {}
inline void await_previous() { emulation::run_put_off(); }

inline void wgmma_fence() { emulation::machine().current->may_multiply = true; }

inline void wgmma_commit() {
  emulation::Fiber& fiber = *emulation::machine().current;
  fiber.may_multiply = false;
  fiber.product_groups.push_back(std::move(fiber.products));
  fiber.products.clear();
}

template <int PENDING>
void wgmma_wait() {
  auto& groups = emulation::machine().current->product_groups;
  while (groups.size() > PENDING) {
    emulation::multiply(groups.front());
    groups.pop_front();
  }
  emulation::exchange("wgmma wait", Fragments{});  // a warp waits as one
}

template <int COUNT>
void wgmma_settle(float (&)[COUNT]) {
  const emulation::Fiber& fiber = *emulation::machine().current;
  if (fiber.products.size() + fiber.product_groups.size() && emulation::machine().error.empty())
    emulation::machine().error = "sums are read before all products are done";
}

// Runs when it is waited for, or at once if copies land at once.
template <int COUNT, typename T>
void wgmma(float (&d)[COUNT], const uint32_t (&a)[4], uint64_t b, int add, T) {
  struct Mine {
    uint32_t a[4];
    uint64_t b;
    int add, unused;
  };
  const Mine mine = {{a[0], a[1], a[2], a[3]}, b, add, 0};
  const auto& all = emulation::exchange("wgmma", mine);
  emulation::Fiber& fiber = *emulation::machine().current;
  if (!fiber.may_multiply && emulation::machine().error.empty())
    emulation::machine().error = "a product without a fence since the last group";
  emulation::Product product;
  product.d = d;
  const int g = fiber.rank % emulation::WARP / 4;
  for (int r = 0; r < 2; ++r)
    for (int k = 0; k < 16; ++k)
      product.a[r][k] = half_of<T>(all[4 * g + k % 8 / 2].a[k / 8 * 2 + r], k % 2);
  for (int lane = 0; lane < emulation::WARP; ++lane)
    if ((all[lane].b != b || all[lane].add != add) && emulation::machine().error.empty())
      emulation::machine().error = "lanes of a warp give different descriptors";
  product.b = static_cast<const char*>(emulation::dynamic_memory()) + (b & 0x3FFF) * 16;
  product.along = (b >> 16 & 0x3FFF) * 16;
  product.across = (b >> 32 & 0x3FFF) * 16;
  product.swizzle = b >> 62 == 1;
  product.columns = 2 * COUNT;
  product.add = add != 0;
  product.number = emulation::number_of<T>;
  fiber.products.push_back(product);
  if (emulation::machine().eager_copies) emulation::multiply(fiber.products);
}

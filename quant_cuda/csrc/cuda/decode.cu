// The next token of one to eight sequences through transformer blocks of packed weights.
//
// A block is nine kernels: the residual sum and norm; query, key and value in one product; attention,
// with positions and the cache's new entries, and the sum of its parts; the output product; residual
// sum and norm again; gate and up in one product; SiLU; the down product. Without a gate, GELU is at
// the end of the up product. Products that go into the residual leave partial sums, which the next
// norm adds in order.

#include <algorithm>
#include <initializer_list>

#include "attention.cuh"
#include "gemv.cuh"

namespace {

constexpr int THREADS = 256;
constexpr int MOST_ROWS = 8;

// +------------------------------------------------------------------------------------------------+
// | The records of quant_cuda/cuda/decoder_block.py: fields in the same order.                     |
// +------------------------------------------------------------------------------------------------+

enum Name { QUERY, KEY, VALUE, ATTENDED, GATE, UP, DOWN, WEIGHTS };
enum NormName { OF_ATTENTION, OF_MLP, OF_QUERY, OF_KEY, NORMS };

struct Weight {
  const uint32_t* words;  // as quant_cuda_gemv takes it
  const Grid* table;
  const void* bias;  // of the activations' type (outputs,), or NULL
  int bits, outputs, columns, shift;
  int splits;  // thread blocks that share the inputs of ATTENDED and DOWN; not read for the others
};

struct Norm {
  const void* weight;  // of the activations' type, or NULL: there is none
  const void* bias;    // a layer norm's; an RMS norm has NULL
  float epsilon;
};

// Of a kind that is not there all fields are 0.
struct DecoderBlock {
  // Without KEY and VALUE, QUERY has all three of each head, one head after another. Without GATE
  // there is GELU instead of SiLU.
  Weight weights[WEIGHTS];
  Norm norms[NORMS];
  void *keys, *values;
  int64_t row_stride, head_stride;
  const int64_t* position;
  int length, room;
};

struct Token {
  const void* x;              // (rows, hidden)
  void* y;                    // (rows, hidden)
  const void *cosines, *sines;  // (dim,), or NULL
  const float* slopes;        // of ALiBi (heads,), or NULL
  void *residual, *normed;    // (rows, hidden)
  void *query, *key, *value;  // as the weights' outputs
  void* attended;             // (rows, heads * dim)
  void *gate, *up;            // (rows, inner)
  float* sums;                // (most splits of the weights, rows, hidden)
  float* attention;           // (rows, heads, splits, dim + 2)
  float scale;
  int type, rows, hidden, heads, key_heads, dim, inner, splits;
  int overlaps;  // whether a kernel may begin before the one before it has ended
};

// Launches kernels of a token one after another.
struct Queue {
  cudaStream_t stream;
  bool overlaps;

  template <typename... Wanted, typename... Given>
  void operator()(void (*kernel)(Wanted...), dim3 grid, int threads, Given... given) const {
    if (overlaps)
      LAUNCH_OVERLAPPING(kernel, grid, threads, stream, given...);
    else
      LAUNCH(kernel, grid, threads, 0, stream, given...);
  }
};

// Of all threads of the thread block. shared: (THREADS / 32,), of this call alone.
__device__ float sum_of_block(float x, float* shared) {
  x = sum_of_warp(x);
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
  __syncthreads();
  float total = 0;
  for (int w = 0; w < THREADS / 32; ++w) total += shared[w];
  return total;
}

// y = x + partial sums + bias; normed = the norm of y, unless it has no weight: a layer norm if
// CENTERED, else an RMS norm. A thread block has a row. partial: (splits, rows, hidden), or NULL.
// Rounded to T where transformers' modules do.
template <typename T, bool CENTERED>
__global__ void __launch_bounds__(THREADS)
    add_norm(const T* x, const float* partial, const T* __restrict__ bias, T* y, Norm norm,
             T* __restrict__ normed, int splits, int hidden) {
  SHARED(float, of_sums, [THREADS / 32]);
  SHARED(float, of_squares, [THREADS / 32]);
  const size_t row = static_cast<size_t>(blockIdx.x) * hidden;
  const size_t all = static_cast<size_t>(gridDim.x) * hidden;
  float sum = 0, squares = 0;
  release_next();
  await_previous();
  for (int i = threadIdx.x * 8; i < hidden; i += THREADS * 8) {
    Eight<T> mine = load_eight(x + row + i);
    if (partial) {
      float added[8] = {};
      for (int s = 0; s < splits; ++s)
#pragma unroll
        for (int j = 0; j < 8; ++j) added[j] += partial[s * all + row + i + j];
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const float total = bias ? added[j] + to_float(bias[i + j]) : added[j];
        mine.values[j] = from_float<T>(to_float(mine.values[j]) + rounded<T>(total));
      }
    }
    *reinterpret_cast<Eight<T>*>(y + row + i) = mine;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      sum += to_float(mine.values[j]);
      squares = __fmaf_rn(to_float(mine.values[j]), to_float(mine.values[j]), squares);
    }
  }
  if (norm.weight == nullptr) return;
  // From here each thread reads what it wrote.
  const float mean = CENTERED ? sum_of_block(sum, of_sums) / hidden : 0;
  if (CENTERED) {
    squares = 0;
    for (int i = threadIdx.x * 8; i < hidden; i += THREADS * 8) {
      const Eight<T> mine = load_eight(y + row + i);
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const float apart = to_float(mine.values[j]) - mean;
        squares = __fmaf_rn(apart, apart, squares);
      }
    }
  }
  const float factor = rsqrtf(sum_of_block(squares, of_squares) / hidden + norm.epsilon);
  for (int i = threadIdx.x * 8; i < hidden; i += THREADS * 8) {
    Eight<T> mine = load_eight(y + row + i);
    const Eight<T> by = load_eight(static_cast<const T*>(norm.weight) + i);
    const Eight<T> more = CENTERED ? load_eight(static_cast<const T*>(norm.bias) + i) : Eight<T>();
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const float one = (to_float(mine.values[j]) - mean) * factor;
      mine.values[j] = from_float<T>(
          CENTERED ? __fmaf_rn(one, to_float(by.values[j]), to_float(more.values[j]))
                   : to_float(by.values[j]) * rounded<T>(one));
    }
    *reinterpret_cast<Eight<T>*>(normed + row + i) = mine;
  }
}

// up = SiLU(gate) * up. count: a multiple of 8.
template <typename T>
__global__ void __launch_bounds__(THREADS)
    silu_gate(const T* gate, T* up, int64_t count) {
  release_next();
  await_previous();
  const int64_t i = (static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x) * 8;
  if (i >= count) return;
  const Eight<T> by = load_eight(gate + i);
  Eight<T> mine = load_eight(up + i);
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    const float x = to_float(by.values[j]);
    mine.values[j] = from_float<T>(rounded<T>(x / (1 + expf(-x))) * to_float(mine.values[j]));
  }
  *reinterpret_cast<Eight<T>*>(up + i) = mine;
}

// BloomGelu of transformers, which approximates GELU by a hyperbolic tangent.
__device__ float gelu(float x) {
  return x * 0.5f * (1 + tanhf(0.79788456f * x * (1 + 0.044715f * x * x)));
}

// A product of `multiply_parts`: a weight and where its results go.
struct Part {
  Weight weight;
  void* y;
};

// Products of the same x, whose columns lie one after another in the grid.
// y: T (rows, outputs) of each part, after GELU if `has_gelu`; or partial: (gridDim.y, rows, outputs)
// of the only one, without the bias.
template <int BITS, typename T, bool FINE>
__global__ void __launch_bounds__(WARPS * 32, 2)
    multiply_parts(const T* x, Part first, Part second, Part third,
                   float* __restrict__ partial, int rows, int inputs, bool has_gelu) {
  release_next();
  int block = blockIdx.x;
  Part part = first;
  if (block >= part.weight.columns / COLUMNS) {
    block -= part.weight.columns / COLUMNS;
    part = second;
    if (block >= part.weight.columns / COLUMNS) {
      block -= part.weight.columns / COLUMNS;
      part = third;
    }
  }
  const int outputs = part.weight.outputs;
  const T* bias = static_cast<const T*>(part.weight.bias);
  const auto write = [&](int row, int column, float total) {
    const size_t at = static_cast<size_t>(row) * outputs + column;
    if (partial) {
      partial[static_cast<size_t>(blockIdx.y) * rows * outputs + at] = total;
      return;
    }
    const float y = bias ? total + to_float(bias[column]) : total;
    static_cast<T*>(part.y)[at] = from_float<T>(has_gelu ? gelu(rounded<T>(y)) : y);
  };
  multiply_columns<BITS, T, FINE, 1>(x, part.weight.words, part.weight.table, rows, inputs, outputs,
                                     part.weight.columns, part.weight.shift, block,
                                     [] { await_previous(); }, write);
}

bool is_fine(const Weight& weight) {
  return (1 << weight.shift) < (weight.bits == 4 ? layout::block_inputs<4> : layout::block_inputs<8>);
}

template <int BITS, typename T>
void launch_parts(const T* x, const Part (&parts)[3], float* partial, int splits, int rows,
                  int inputs, bool has_gelu, const Queue& queue) {
  int columns = 0;
  for (const Part& part : parts) columns += part.weight.columns;
  const auto kernel = is_fine(parts[0].weight) ? multiply_parts<BITS, T, true>
                                               : multiply_parts<BITS, T, false>;
  queue(kernel, dim3(columns / COLUMNS, splits), WARPS * 32, x, parts[0], parts[1], parts[2],
        partial, rows, inputs, has_gelu);
}

template <typename T>
struct Decoder {
  const Token& token;
  Queue queue;

  // from: the weight that left the partial sums, or NULL if there are none.
  void add(const void* x, const Weight* from, void* y, const Norm& norm) const {
    const auto kernel = norm.bias ? add_norm<T, true> : add_norm<T, false>;
    queue(kernel, token.rows, THREADS, static_cast<const T*>(x), from ? token.sums : nullptr,
          static_cast<const T*>(from ? from->bias : nullptr), static_cast<T*>(y), norm,
          static_cast<T*>(token.normed), from ? from->splits : 0, token.hidden);
  }

  // The parts that are alike in one launch, others in launches of their own.
  void multiply(const void* x, std::initializer_list<Part> parts, int inputs, float* partial,
                bool has_gelu = false) const {
    Part together[3] = {};
    int count = 0;
    const auto launch = [&] {
      if (count == 0) return;
      const auto run = together[0].weight.bits == 4 ? launch_parts<4, T> : launch_parts<8, T>;
      run(static_cast<const T*>(x), together, partial, partial ? together[0].weight.splits : 1,
          token.rows, inputs, has_gelu, queue);
      for (Part& part : together) part = {};
      count = 0;
    };
    for (const Part& part : parts) {
      if (!part.weight.words) continue;
      if (count && (part.weight.bits != together[0].weight.bits ||
                    is_fine(part.weight) != is_fine(together[0].weight)))
        launch();
      together[count++] = part;
    }
    launch();
  }

  void attention(const DecoderBlock& block) const {
    Attention<T> a = {};
    const bool is_fused = !block.weights[KEY].words;
    a.query = static_cast<const T*>(token.query);
    a.key = is_fused ? a.query + token.dim : static_cast<const T*>(token.key);
    a.value = is_fused ? a.key + token.dim : static_cast<const T*>(token.value);
    a.query_step = a.key_step = is_fused ? 3 * token.dim : token.dim;
    a.query_row = token.heads * a.query_step;
    a.key_row = token.key_heads * a.key_step;
    a.slopes = token.slopes;
    a.cosines = static_cast<const T*>(token.cosines);
    a.sines = static_cast<const T*>(token.sines);
    a.query_norm = static_cast<const T*>(block.norms[OF_QUERY].weight);
    a.key_norm = static_cast<const T*>(block.norms[OF_KEY].weight);
    a.keys = static_cast<T*>(block.keys);
    a.values = static_cast<T*>(block.values);
    a.position = block.position;
    a.partial = token.attention;
    a.query_epsilon = block.norms[OF_QUERY].epsilon;
    a.key_epsilon = block.norms[OF_KEY].epsilon;
    a.scale = token.scale;
    a.heads = token.heads;
    a.key_heads = token.key_heads;
    a.length = block.length;
    a.room = block.room;
    a.splits = token.splits;
    a.row_stride = block.row_stride;
    a.head_stride = block.head_stride;
    const auto run = token.dim == 32    ? launch_attention<T, 32, Queue>
                     : token.dim == 64  ? launch_attention<T, 64, Queue>
                     : token.dim == 128 ? launch_attention<T, 128, Queue>
                                        : launch_attention<T, 256, Queue>;
    run(a, static_cast<T*>(token.attended), token.rows, queue);
  }

  // x: the block's input, without the partial sums that `from` left.
  void run(const DecoderBlock& block, const void* x, const Weight* from) const {
    const auto& weights = block.weights;
    const bool has_gate = weights[GATE].words;
    add(x, from, token.residual, block.norms[OF_ATTENTION]);
    multiply(token.normed,
             {{weights[QUERY], token.query}, {weights[KEY], token.key}, {weights[VALUE], token.value}},
             token.hidden, nullptr);
    attention(block);
    multiply(token.attended, {{weights[ATTENDED], nullptr}}, token.heads * token.dim, token.sums);
    add(token.residual, &weights[ATTENDED], token.residual, block.norms[OF_MLP]);
    multiply(token.normed, {{weights[GATE], token.gate}, {weights[UP], token.up}}, token.hidden,
             nullptr, !has_gate);
    if (has_gate) {
      const int64_t count = static_cast<int64_t>(token.rows) * token.inner;
      queue(silu_gate<T>, static_cast<unsigned>((count / 8 + THREADS - 1) / THREADS), THREADS,
            static_cast<const T*>(token.gate), static_cast<T*>(token.up), count);
    }
    multiply(token.up, {{weights[DOWN], nullptr}}, token.inner, token.sums);
  }
};

template <typename T>
void decode(const DecoderBlock* blocks, int count, const Token& token, cudaStream_t stream) {
  const Decoder<T> decoder = {token, {stream, token.overlaps != 0}};
  const Weight* from = nullptr;
  for (int i = 0; i < count; ++i) {
    decoder.run(blocks[i], from ? token.residual : token.x, from);
    from = &blocks[i].weights[DOWN];
  }
  decoder.add(token.residual, from, token.y, Norm());
}

bool is_taken(const DecoderBlock& block, const Token& token) {
  const auto& weights = block.weights;
  for (const Weight& weight : weights)
    if (weight.words && ((weight.bits != 4 && weight.bits != 8) || weight.shift < 5 ||
                         weight.columns % COLUMNS))
      return false;
  for (const Name name : {QUERY, ATTENDED, UP, DOWN})
    if (!weights[name].words) return false;
  const bool is_fused = !weights[KEY].words;
  return is_fused == !weights[VALUE].words && (!is_fused || token.heads == token.key_heads) &&
         weights[ATTENDED].splits > 0 && weights[DOWN].splits > 0;
}

}  // namespace

// rows 1..8, type float16 or bfloat16; dim 32, 64, 128 or 256; hidden, heads * dim and inner multiples
// of 8; all tensors contiguous and 16-byte aligned, but for the cache's strides. Blocks are alike in
// what they have, but for head norms and biases.
EXPORT int quant_cuda_decode(const void* blocks, int count, const void* token, cudaStream_t stream) {
  const auto& one = *static_cast<const Token*>(token);
  const auto* all = static_cast<const DecoderBlock*>(blocks);
  const bool has_dim = one.dim == 32 || one.dim == 64 || one.dim == 128 || one.dim == 256;
  if (count < 1 || one.rows < 1 || one.rows > MOST_ROWS || !has_dim || one.hidden % 8 ||
      one.inner % 8 || !one.cosines != !one.sines || one.key_heads < 1 ||
      one.heads % one.key_heads || one.splits < 1 || (one.type != HALF && one.type != BFLOAT))
    return cudaErrorInvalidValue;
  if (!std::all_of(all, all + count, [&](const DecoderBlock& it) { return is_taken(it, one); }))
    return cudaErrorInvalidValue;
  one.type == HALF ? decode<half_t>(all, count, one, stream)
                   : decode<bfloat_t>(all, count, one, stream);
  return cudaGetLastError();
}

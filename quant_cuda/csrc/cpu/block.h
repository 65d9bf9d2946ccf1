// One token through a transformer block with packed weights: RMS norm, attention with rotary positions
// over a cache of keys and values, perhaps with norms of each head's query and key, a gated
// feed-forward part. One call does all, because in a small
// model Python between the matmuls takes longer than they do.
//
// Included after product.h by each product_*.cpp, with BLOCK_NAME.

#include <cmath>

#include "block_args.h"

namespace {

inline vecf all(float x) { return x - vecf{}; }

// e^x to about two units in the last place; 0 or infinity only if float32 has nothing nearer.
inline vecf exponential(vecf x) {
  x = x < -87.0f ? all(-87) : x;
  x = x > 88.0f ? all(88) : x;
  const vecf magic = all(12582912.0f);
  const vecf power = (x * 1.44269504f + magic) - magic;
  const vecf r = x - power * 0.693359375f + power * 2.12194440e-4f;
  vecf sum = r * 1.9875691500e-4f + 1.3981999507e-3f;
  sum = sum * r + 8.3334519073e-3f;
  sum = sum * r + 4.1665795894e-2f;
  sum = sum * r + 1.6666665459e-1f;
  sum = sum * r + 5.0000001201e-1f;
  sum = sum * r * r + r + 1;
  const veci exponent = (__builtin_convertvector(power, veci) + 127) << 23;
  return sum * reinterpret_cast<vecf>(exponent);
}

// Replaces each number of x by f of it, a vector at a time.
template <typename F>
inline void each(float* x, int count, const F& f) {
  int i = 0;
  for (; i + LANES <= count; i += LANES) {
    vecf* at = reinterpret_cast<vecf*>(x + i);  // auto would drop its alignment
    *at = f(*at, i);
  }
  if (i == count) return;
  float rest[LANES] = {};
  std::copy(x + i, x + count, rest);
  vecf* at = reinterpret_cast<vecf*>(rest);
  *at = f(*at, i);
  std::copy(rest, rest + (count - i), x + i);
}

inline float sum_of(vecf x) {
  float sum = 0;
  for (int i = 0; i < LANES; ++i) sum += x[i];
  return sum;
}

inline float dot(const float* a, const float* b, int count) {
  vecf sum[2] = {};
  int i = 0;
  for (; i + 2 * LANES <= count; i += 2 * LANES)
    for (int p = 0; p < 2; ++p) {
      const int at = i + p * LANES;
      sum[p] += *reinterpret_cast<const vecf*>(a + at) * *reinterpret_cast<const vecf*>(b + at);
    }
  float rest = 0;
  for (; i < count; ++i) rest += a[i] * b[i];
  return sum_of(sum[0] + sum[1]) + rest;
}

// y may be x.
inline void normalize(const float* x, const float* weight, float epsilon, int count, float* y) {
  const float factor = 1 / std::sqrt(dot(x, x, count) / count + epsilon);
  for (int i = 0; i < count; ++i) y[i] = x[i] * factor * weight[i];
}

// Rotary positions: rotates the first half of a head against the second.
inline void rotate(const float* cos, const float* sin, int size, float* head) {
  const int half = size / 2;
  for (int i = 0; i < half; ++i) {
    const float low = head[i], high = head[i + half];
    head[i] = low * cos[i] - high * sin[i];
    head[i + half] = high * cos[i + half] + low * sin[i + half];
  }
}

// Attention of one query: the mean of values, weighted by the softmax of its scores with the keys.
// scores: room for `count` numbers.
inline void attend(const float* query, const float* keys, const float* values, float scale, int size,
                   int count, float* scores, float* mean) {
  float most = -INFINITY;
  for (int t = 0; t < count; ++t) {
    scores[t] = dot(query, keys + static_cast<size_t>(t) * size, size) * scale;
    most = std::max(most, scores[t]);
  }
  each(scores, count, [most](vecf x, int) { return exponential(x - most); });
  float total = 0;
  std::fill(mean, mean + size, 0.0f);
  for (int t = 0; t < count; ++t) {
    const float* value = values + static_cast<size_t>(t) * size;
    total += scores[t];
    for (int i = 0; i < size; ++i) mean[i] += scores[t] * value[i];
  }
  for (int i = 0; i < size; ++i) mean[i] /= total;
}

struct BlockRoom {
  std::vector<float> normed, query, key, value, attended, gate, up, scores;
};

}  // namespace

void BLOCK_NAME(const BlockArgs& args) {
  // Thread-local, because another thread may run a block too. The parallel code below runs on other
  // threads and must use the reference to this thread's.
  thread_local BlockRoom own;
  BlockRoom& room = own;
  const int size = args.head_dim, count = args.length + 1;
  const int shared = args.heads / args.key_heads;  // query heads for each key head
  room.normed.resize(args.hidden);
  room.query.resize(static_cast<size_t>(args.heads) * size);
  room.attended.resize(room.query.size());
  room.key.resize(static_cast<size_t>(args.key_heads) * size);
  room.value.resize(room.key.size());
  room.gate.resize(args.inner);
  room.up.resize(args.inner);
  room.scores.resize(static_cast<size_t>(args.heads) * count);
  const auto product = [&args](BlockWeight which, const std::vector<float>& x, std::vector<float>& y) {
    return ProductArgs{x.data(), args.data[which], args.plan[which], args.bias[which], y.data(), 1,
                       FLOAT32, args.digits, args.threads};
  };

  const auto norm = [&args](BlockNorm which, const float* x, int count, float* y) {
    if (args.norm[which]) normalize(x, args.norm[which], args.epsilon[which], count, y);
  };

  norm(ATTENTION_NORM, args.x, args.hidden, room.normed.data());
  const ProductArgs before[] = {product(QUERY, room.normed, room.query),
                                product(KEY, room.normed, room.key),
                                product(VALUE, room.normed, room.value)};
  multiply_together(before, 3);
  const size_t of_head = static_cast<size_t>(args.capacity) * size;
  const bool few = room.scores.size() * size < WORTH_A_THREAD;
  parallel_for(few ? 1 : args.threads, args.key_heads, [&](int head) {
    float *keys = args.keys + head * of_head, *values = args.values + head * of_head;
    float* key = room.key.data() + head * size;
    const float* value = room.value.data() + head * size;
    norm(KEY_NORM, key, size, key);
    rotate(args.cos, args.sin, size, key);
    std::copy(key, key + size, keys + static_cast<size_t>(args.length) * size);
    std::copy(value, value + size, values + static_cast<size_t>(args.length) * size);
    for (int q = head * shared; q < (head + 1) * shared; ++q) {
      float* query = room.query.data() + q * size;
      norm(QUERY_NORM, query, size, query);
      rotate(args.cos, args.sin, size, query);
      attend(query, keys, values, args.scale, size, count,
             room.scores.data() + static_cast<size_t>(q) * count, room.attended.data() + q * size);
    }
  });
  PRODUCT_NAME(product(ATTENDED, room.attended, room.normed));
  for (int i = 0; i < args.hidden; ++i) args.y[i] = args.x[i] + room.normed[i];

  norm(MLP_NORM, args.y, args.hidden, room.normed.data());
  const ProductArgs gated[] = {product(GATE, room.normed, room.gate),
                               product(UP, room.normed, room.up)};
  multiply_together(gated, 2);
  const float* up = room.up.data();
  each(room.gate.data(), args.inner, [up, &args](vecf x, int at) {
    vecf with = {};
    std::memcpy(&with, up + at, sizeof(float) * std::min(LANES, args.inner - at));
    return x / (1 + exponential(-x)) * with;
  });
  PRODUCT_NAME(product(DOWN, room.gate, room.normed));
  for (int i = 0; i < args.hidden; ++i) args.y[i] += room.normed[i];
}

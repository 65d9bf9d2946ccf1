// The arguments of one token through a transformer block; quant_cuda/cpu/decoder_block.py has the same
// record for ctypes.
#pragma once

#include <cstdint>

enum BlockWeight { QUERY, KEY, VALUE, ATTENDED, GATE, UP, DOWN, BLOCK_WEIGHTS };

struct BlockArgs {
  const uint8_t* data[BLOCK_WEIGHTS];  // packed weights, see tiles.h
  const int32_t* plan[BLOCK_WEIGHTS];
  const float* bias[BLOCK_WEIGHTS];    // each null or (outputs,)
  const float *attention_norm, *mlp_norm;  // (hidden,)
  const float* x;                      // (hidden,)
  float* y;                            // (hidden,), written; may be x
  const float *cos, *sin;              // (head_dim,)
  float *keys, *values;                // (key_heads, capacity, head_dim), the token's own written
  float attention_epsilon, mlp_epsilon;
  float scale;                         // of the scores of a query with keys
  int32_t hidden, heads, key_heads, head_dim, inner;
  int32_t capacity, length;            // tokens that the cache has room for; tokens in it
  int32_t digits, threads;             // as ProductArgs
};

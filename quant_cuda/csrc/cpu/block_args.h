// The arguments of one token through a transformer block; quant_cuda/cpu/decoder_block.py has the same
// record for ctypes.
#pragma once

#include <cstdint>

enum BlockWeight { QUERY, KEY, VALUE, ATTENDED, GATE, UP, DOWN, BLOCK_WEIGHTS };
enum BlockNorm { ATTENTION_NORM, MLP_NORM, QUERY_NORM, KEY_NORM, BLOCK_NORMS };

struct BlockArgs {
  const uint8_t* data[BLOCK_WEIGHTS];  // packed weights, see tiles.h
  const int32_t* plan[BLOCK_WEIGHTS];
  const float* bias[BLOCK_WEIGHTS];    // each null or (outputs,)
  const float* norm[BLOCK_NORMS];      // (hidden,), (hidden,), and null or (head_dim,)
  const float* x;                      // (hidden,)
  float* y;                            // (hidden,), written; may be x
  const float *cos, *sin;              // (head_dim,)
  float *keys, *values;                // key_heads, each capacity * head_dim further; the token's
                                       // own written
  float epsilon[BLOCK_NORMS];
  float scale;                         // of the scores of a query with keys
  int32_t hidden, heads, key_heads, head_dim, inner;
  int32_t capacity, length;            // tokens from head to head; tokens in the cache
  int32_t digits, threads;             // as ProductArgs
};

#define PRODUCT_NAME product_avx512
#define BLOCK_NAME block_avx512
#define HALVES_NAME halves_avx512
#include "product.h"

#include "block.h"
#include "halves.h"

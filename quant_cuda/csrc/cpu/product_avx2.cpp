#define PRODUCT_NAME product_avx2
#define BLOCK_NAME block_avx2
#define HALVES_NAME halves_avx2
#include "product.h"

#include "block.h"
#include "halves.h"

#define PRODUCT_NAME product_avx512vnni
#define BLOCK_NAME block_avx512vnni
#define HALVES_NAME halves_avx512vnni
#include "product.h"

#include "block.h"
#include "halves.h"

#define PRODUCT_NAME product_generic
#define BLOCK_NAME block_generic
#define HALVES_NAME halves_generic
#include "product.h"

#include "block.h"
#include "halves.h"

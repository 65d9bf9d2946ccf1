#define PRODUCT_NAME product_generic
#define BLOCK_NAME block_generic
#include "product.h"

#include "block.h"

#define PRODUCT_NAME product_avx512
#include "product.h"

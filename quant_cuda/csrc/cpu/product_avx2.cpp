#define PRODUCT_NAME product_avx2
#include "product.h"

#define PRODUCT_NAME product_avx512vnni
#include "product.h"

#define PRODUCT_NAME product_generic
#include "product.h"

#define NAMED(what) what##_avx512
#include "refine.h"
#include "sweep.h"

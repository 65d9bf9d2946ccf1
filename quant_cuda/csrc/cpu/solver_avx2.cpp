#define NAMED(what) what##_avx2
#include "refine.h"
#include "sweep.h"

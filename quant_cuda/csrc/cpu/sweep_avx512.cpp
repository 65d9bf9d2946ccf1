#define SWEEP_NAME sweep_avx512
#include "sweep.h"

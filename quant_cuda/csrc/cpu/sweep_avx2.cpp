#define SWEEP_NAME sweep_avx2
#include "sweep.h"

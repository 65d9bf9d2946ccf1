#define SWEEP_NAME sweep_generic
#include "sweep.h"

#define NAMED(what) what##_generic
#include "refine.h"
#include "sweep.h"

// The kernels, compiled once for each instruction set: see kernels.h.
#include "kernels.h"

// y += a x. x and y have n elements and do not overlap.
EXPORT void KERNEL(scale_add)(const float* x, float a, float* y, int64_t n) {
    for (int64_t i = 0; i < n; ++i) y[i] += a * x[i];
}

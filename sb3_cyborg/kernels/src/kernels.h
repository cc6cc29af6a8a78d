// Names and exports of the kernels.
//
// kernels.cpp is compiled once for each instruction set, with -DKERNEL_SUFFIX=<name>: KERNEL(f) is then f_base, f_avx2, ...,
// and all of them are in one library. Helpers are static or in an anonymous namespace. An inline function with external
// linkage, which includes templates of the standard library, is emitted by each compilation, and the linker keeps one copy:
// the base kernels could then call AVX-512 code. tests/kernels/test_build.py checks it.
#pragma once

#include <cstdint>

#ifndef KERNEL_SUFFIX
#define KERNEL_SUFFIX base
#endif

#define KERNEL_CONCAT(name, suffix) name##_##suffix
#define KERNEL_EXPAND(name, suffix) KERNEL_CONCAT(name, suffix)
#define KERNEL(name) KERNEL_EXPAND(name, KERNEL_SUFFIX)

// The library hides all symbols but these.
#define EXPORT extern "C" __attribute__((visibility("default")))

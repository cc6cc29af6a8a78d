// Queries of the loader, library.py. Compiled once, without flags for an instruction set.
#include "kernels.h"

// A checksum of the sources, which the loader finds in the file before it loads it: see `abi` in build.py.
EXPORT const char* sb3_cyborg_abi() { return SB3_CYBORG_ABI; }

// The best instruction set that both this processor and its operating system support.
EXPORT const char* sb3_cyborg_best_isa() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return "base";
    bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw");
    return has_avx512 ? "avx512" : "avx2";
#elif defined(__aarch64__)
    return "neon";
#else
    return "base";
#endif
}

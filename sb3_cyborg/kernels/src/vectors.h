// Vectors of VL floats as the compiler's vector types, and functions of them. Everything here is local to the file that includes
// it, see kernels.h.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define VL 16
#elif defined(__AVX2__)
#define VL 8
#else
#define VL 4
#endif

namespace {

typedef float vec __attribute__((vector_size(VL * 4)));
typedef float vec_u __attribute__((vector_size(VL * 4), aligned(4)));
typedef int32_t veci __attribute__((vector_size(VL * 4)));

inline vec load(const float* p) { return *reinterpret_cast<const vec_u*>(p); }
inline void store(float* p, vec x) { *reinterpret_cast<vec_u*>(p) = x; }
inline vec splat(float x) { return x - vec{}; }

// The first `n` floats, n > 0; zeros behind them. Memory behind them is not touched. The address sanitizer does not see masked
// instructions, so it gets copies.
#if defined(__SANITIZE_ADDRESS__)
#define NO_MASKED_LOADS
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define NO_MASKED_LOADS
#endif
#endif
#if defined(__AVX512F__) && !defined(NO_MASKED_LOADS)
inline __mmask16 first_lanes(int64_t n) { return static_cast<__mmask16>((1u << n) - 1u); }
inline vec load_n(const float* p, int64_t n) { return n >= VL ? load(p) : (vec)_mm512_maskz_loadu_ps(first_lanes(n), p); }
inline void store_n(float* p, vec x, int64_t n) {
  if (n >= VL) store(p, x);
  else _mm512_mask_storeu_ps(p, first_lanes(n), (__m512)x);
}
#elif defined(__AVX2__) && !defined(__AVX512F__) && !defined(NO_MASKED_LOADS)
inline __m256i first_lanes(int64_t n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
inline vec load_n(const float* p, int64_t n) { return n >= VL ? load(p) : (vec)_mm256_maskload_ps(p, first_lanes(n)); }
inline void store_n(float* p, vec x, int64_t n) {
  if (n >= VL) store(p, x);
  else _mm256_maskstore_ps(p, first_lanes(n), (__m256)x);
}
#else
inline vec load_n(const float* p, int64_t n) {
  if (n >= VL) return load(p);
  vec x = {};
  std::memcpy(&x, p, n * sizeof(float));
  return x;
}
inline void store_n(float* p, vec x, int64_t n) {
  if (n >= VL) store(p, x);
  else std::memcpy(p, &x, n * sizeof(float));
}
#endif
inline float sum(vec x) {
  typedef float quad __attribute__((vector_size(16)));
  quad total = {};
  for (int i = 0; i < VL / 4; ++i) {
    quad part;
    std::memcpy(&part, reinterpret_cast<const char*>(&x) + 16 * i, 16);
    total += part;
  }
  return (total[0] + total[2]) + (total[1] + total[3]);
}
inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// exp to about 1 ulp (Cephes). NaN stays NaN; above 88.7 it is inf, below -87.3 it is 0.
inline vec exp_v(vec x) {
  const vec hi = splat(88.72283905f), lo = splat(-87.33654475f);
  vec y = x > hi ? hi : x;
  y = y < lo ? lo : y;
  const vec magic = splat(12582912.0f);  // adding it rounds to a whole number, which then stands in the low bits
  vec t = y * 1.44269504088896341f + magic;
  veci n = (veci)t - (veci)magic;
  vec f = t - magic;
  vec r = y - f * 0.693359375f;
  r = r - f * -2.12194440e-4f;
  vec p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  // In two factors: 2^n overflows at n = 128, which is reached just below the largest argument.
  veci half = n >> 1;
  p = p * (vec)((half + 127) << 23) * (vec)((n - half + 127) << 23);
  p = x > hi ? splat(INFINITY) : p;
  p = x < lo ? splat(0.0f) : p;
  return x == x ? p : x;
}
inline vec sigmoid_v(vec x) { return 1.0f / (1.0f + exp_v(-x)); }
inline vec tanh_v(vec x) {
  vec a = x < 0.0f ? -x : x;
  vec z = x * x;
  vec p = splat(-5.70498872745e-3f);
  p = p * z + 2.06390887954e-2f;
  p = p * z - 5.37397155531e-2f;
  p = p * z + 1.33314422036e-1f;
  p = p * z - 3.33332819422e-1f;
  vec small = p * z * x + x;
  vec big = 1.0f - 2.0f / (exp_v(2.0f * a) + 1.0f);
  big = x < 0.0f ? -big : big;
  return a < 0.625f ? small : big;
}

enum Activation { NONE = 0, TANH = 1, RELU = 2, SILU = 3 };
template <int ACT>
inline vec activate(vec x) {
  if (ACT == TANH) return tanh_v(x);
  if (ACT == RELU) return x < 0.0f ? splat(0.0f) : x;  // NaN stays
  if (ACT == SILU) return x * sigmoid_v(x);
  return x;
}

}  // namespace

// Vectors of 16 float32 lanes: one AVX-512 register, two of AVX2, four of SSE or NEON.
//
// The compilers' own vector types carry the arithmetic; what they have no operator for stands here,
// once for each instruction set that has an instruction for it.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

// A step is one long expression: calls in it would cost more than they do.
#define JADAM_INLINE inline __attribute__((always_inline))

namespace jadam {
namespace JADAM_ISA {

constexpr int kLanes = 16;

typedef float F32 __attribute__((vector_size(4 * kLanes)));
typedef int32_t I32 __attribute__((vector_size(4 * kLanes)));
typedef uint32_t U32 __attribute__((vector_size(4 * kLanes)));
typedef uint16_t U16 __attribute__((vector_size(2 * kLanes)));

template <class To, class From>
JADAM_INLINE To bits(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To y;
  std::memcpy(&y, &x, sizeof y);
  return y;
}

template <class V, class T>
JADAM_INLINE V load_vector(const T* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

template <class V, class T>
JADAM_INLINE void store_vector(T* p, V v) {
  std::memcpy(p, &v, sizeof v);
}

JADAM_INLINE F32 all(float x) { return F32{} + x; }
JADAM_INLINE F32 to_float(I32 x) { return __builtin_convertvector(x, F32); }
JADAM_INLINE I32 truncate(F32 x) { return __builtin_convertvector(x, I32); }
JADAM_INLINE F32 abs(F32 x) { return bits<F32>(bits<U32>(x) & 0x7FFFFFFFu); }
JADAM_INLINE F32 copysign(F32 size, F32 sign) {
  return bits<F32>((bits<U32>(size) & 0x7FFFFFFFu) | (bits<U32>(sign) & 0x80000000u));
}
JADAM_INLINE F32 select(I32 mask, F32 x, F32 y) {
  return bits<F32>((bits<I32>(x) & mask) | (bits<I32>(y) & ~mask));
}
JADAM_INLINE I32 select(I32 mask, I32 x, I32 y) { return (x & mask) | (y & ~mask); }

// For size >= 0.
JADAM_INLINE I32 copysign(I32 size, F32 sign) {
#if defined(__AVX512F__)
  const __m512i x = __m512i(size);
  return I32(
      _mm512_mask_sub_epi32(x, _mm512_movepi32_mask(__m512i(sign)), _mm512_setzero_si512(), x));
#else
  U32 negative = bits<U32>(bits<I32>(sign) >> 31);
  return bits<I32>((bits<U32>(size) ^ negative) - negative);
#endif
}

// NaN in x stays; `low` and `high` are numbers.
JADAM_INLINE F32 at_least(F32 x, F32 low) {
#if defined(__AVX512F__)
  return F32(_mm512_max_ps(__m512(low), __m512(x)));
#else
  return select(x < low, low, x);
#endif
}
JADAM_INLINE F32 at_most(F32 x, F32 high) {
#if defined(__AVX512F__)
  return F32(_mm512_min_ps(__m512(high), __m512(x)));
#else
  return select(x > high, high, x);
#endif
}
JADAM_INLINE I32 at_most(I32 x, I32 high) {
#if defined(__AVX512F__)
  return I32(_mm512_min_epi32(__m512i(x), __m512i(high)));
#else
  return select(x > high, high, x);
#endif
}
JADAM_INLINE U32 at_most(U32 x, uint32_t high) {
#if defined(__AVX512F__)
  return U32(_mm512_min_epu32(__m512i(x), _mm512_set1_epi32(int(high))));
#else
  return bits<U32>(select(bits<I32>(x > high), bits<I32>(U32{} + high), bits<I32>(x)));
#endif
}
JADAM_INLINE bool any_above(U32 x, uint32_t high) {
#if defined(__AVX512F__)
  return _mm512_cmpgt_epu32_mask(__m512i(x), _mm512_set1_epi32(int(high))) != 0;
#else
  I32 above = bits<I32>(x > high);
  int32_t found = 0;
  for (int i = 0; i < kLanes; ++i) found |= above[i];
  return found != 0;
#endif
}
JADAM_INLINE I32 max(I32 x, I32 y) {
#if defined(__AVX512F__)
  return I32(_mm512_max_epi32(__m512i(x), __m512i(y)));
#else
  return select(x > y, x, y);
#endif
}

JADAM_INLINE U16 max(U16 x, U16 y) {
#if defined(__AVX512F__)
  return U16(_mm256_max_epu16(__m256i(x), __m256i(y)));
#else
  return x > y ? x : y;
#endif
}

JADAM_INLINE F32 sqrt(F32 x) {
#if defined(__AVX512F__)
  return F32(_mm512_sqrt_ps(__m512(x)));
#else
  F32 y;
  for (int i = 0; i < kLanes; ++i) y[i] = __builtin_sqrtf(x[i]);
  return y;
#endif
}

// 1/x to about one ulp, for x that is neither tiny nor huge.
JADAM_INLINE F32 reciprocal(F32 x) {
#if defined(__AVX512F__)
  F32 y = F32(_mm512_rcp14_ps(__m512(x)));
  return y * (2.0f - x * y);
#else
  return 1.0f / x;
#endif
}

JADAM_INLINE F32 floor(F32 x) {
#if defined(__AVX512F__)
  return F32(_mm512_roundscale_ps(__m512(x), _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC));
#else
  F32 y;
  for (int i = 0; i < kLanes; ++i) y[i] = __builtin_floorf(x[i]);
  return y;
#endif
}

#if defined(__AVX512F__)
// 32 numbers in two registers.
struct Table {
  __m512 low, high;

  explicit JADAM_INLINE Table(const float* x)
      : low(_mm512_loadu_ps(x)), high(_mm512_loadu_ps(x + 16)) {}

  // The number at i mod 32.
  JADAM_INLINE F32 operator[](I32 i) const {
    return F32(_mm512_permutex2var_ps(low, __m512i(i), high));
  }
};
#endif

JADAM_INLINE int32_t largest(I32 x) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_epi32(__m512i(x));
#else
  int32_t y = x[0];
  for (int i = 1; i < kLanes; ++i) y = x[i] > y ? x[i] : y;
  return y;
#endif
}

JADAM_INLINE I32 widen(U16 x) {
#if defined(__AVX512F__)
  return I32(_mm512_cvtepu16_epi32(__m256i(x)));
#else
  return __builtin_convertvector(x, I32);
#endif
}
JADAM_INLINE U16 narrow(I32 x) {
#if defined(__AVX512F__)
  return U16(_mm512_cvtepi32_epi16(__m512i(x)));
#else
  return __builtin_convertvector(x, U16);
#endif
}

}  // namespace JADAM_ISA
}  // namespace jadam

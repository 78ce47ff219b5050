// Vectors of float32 lanes, one register each: 16 lanes with AVX-512, 8 with AVX2, 4 with SSE2 and
// NEON, 4 as the compiler sees fit elsewhere.
//
// The compilers' vector types carry the arithmetic; what they have no operator for stands here,
// each as the instruction that does it. Google Highway and xsimd have all of it and more, but on no
// package index that pip reads, so that an installation would fetch or carry 100 times this file
// for 20 functions; std::experimental::simd comes with GCC alone, and has neither permutations nor
// conversions that saturate, so that the codes' tables would need these intrinsics all the same.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

// A step is one long expression, in which a call would cost more than what it calls.
#define JADAM_INLINE inline __attribute__((always_inline))

// The three sets of x86-64 name what they share alike.
#if defined(__AVX512F__)
#define JADAM_X86_OF(name) _mm512_##name
#elif defined(__AVX2__)
#define JADAM_X86_OF(name) _mm256_##name
#elif defined(__x86_64__)
#define JADAM_X86_OF(name) _mm_##name
#endif

namespace jadam {
namespace JADAM_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
using Floats = __m512;
using Ints = __m512i;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
using Floats = __m256;
using Ints = __m256i;
#elif defined(__x86_64__)
constexpr int kLanes = 4;
using Floats = __m128;
using Ints = __m128i;
#else
constexpr int kLanes = 4;
#endif

typedef float F32 __attribute__((vector_size(4 * kLanes)));
typedef int32_t I32 __attribute__((vector_size(4 * kLanes)));
typedef uint32_t U32 __attribute__((vector_size(4 * kLanes)));
using Mask = I32;  // of a comparison: all bits of a lane or none

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
  static_assert(sizeof(T) * kLanes == sizeof v);
  std::memcpy(p, &v, sizeof v);
}

JADAM_INLINE F32 all(float x) { return x - F32{}; }
JADAM_INLINE F32 to_float(I32 x) { return __builtin_convertvector(x, F32); }
JADAM_INLINE I32 truncate(F32 x) { return __builtin_convertvector(x, I32); }
// The first takes 0 <= x < 2^22, the second |x| < 2^22.
JADAM_INLINE I32 floor_under_2_22(F32 x) { return truncate(x); }
JADAM_INLINE F32 to_float_under_2_22(I32 x) { return to_float(x); }
JADAM_INLINE F32 divide(F32 x, F32 y) { return x / y; }
JADAM_INLINE F32 abs(F32 x) { return bits<F32>(bits<U32>(x) & 0x7FFFFFFFu); }
JADAM_INLINE F32 select(Mask mask, F32 x, F32 y) { return mask ? x : y; }
JADAM_INLINE I32 select(Mask mask, I32 x, I32 y) { return mask ? x : y; }
JADAM_INLINE U32 select(Mask mask, U32 x, U32 y) { return mask ? x : y; }

// 1 where the mask is set, else 0.
JADAM_INLINE I32 ones(Mask mask) { return -mask; }

// `size` with the sign of `sign`, for size >= 0, and 0 where sign is +0.
JADAM_INLINE I32 copysign(I32 size, F32 sign) {
#if defined(__AVX512F__)
  const __m512i x = __m512i(size);
  return I32(
      _mm512_mask_sub_epi32(x, _mm512_movepi32_mask(__m512i(sign)), _mm512_setzero_si512(), x));
#elif defined(__AVX2__)
  return I32(_mm256_sign_epi32(__m256i(size), __m256i(sign)));
#else
  const U32 negative = bits<U32>(bits<I32>(sign) >> 31);
  return bits<I32>((bits<U32>(size) ^ negative) - negative);
#endif
}

// NaN in x stays; `low` and `high` are numbers.
JADAM_INLINE F32 at_least(F32 x, F32 low) {
#if defined(__x86_64__)
  return F32(JADAM_X86_OF(max_ps)(Floats(low), Floats(x)));
#elif defined(__aarch64__)
  return F32(vmaxq_f32(float32x4_t(low), float32x4_t(x)));
#else
  return select(x < low, low, x);
#endif
}
JADAM_INLINE F32 at_most(F32 x, F32 high) {
#if defined(__x86_64__)
  return F32(JADAM_X86_OF(min_ps)(Floats(high), Floats(x)));
#elif defined(__aarch64__)
  return F32(vminq_f32(float32x4_t(high), float32x4_t(x)));
#else
  return select(x > high, high, x);
#endif
}

JADAM_INLINE I32 max(I32 x, I32 y) {
#if defined(__AVX2__)
  return I32(JADAM_X86_OF(max_epi32)(Ints(x), Ints(y)));
#elif defined(__aarch64__)
  return I32(vmaxq_s32(int32x4_t(x), int32x4_t(y)));
#else
  return select(x > y, x, y);
#endif
}
JADAM_INLINE I32 min(I32 x, I32 y) {
#if defined(__AVX2__)
  return I32(JADAM_X86_OF(min_epi32)(Ints(x), Ints(y)));
#elif defined(__aarch64__)
  return I32(vminq_s32(int32x4_t(x), int32x4_t(y)));
#else
  return select(x < y, x, y);
#endif
}

JADAM_INLINE int32_t largest(I32 x) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_epi32(__m512i(x));
#elif defined(__aarch64__)
  return vmaxvq_s32(int32x4_t(x));
#else
  // One half is folded onto the other until one lane is left: their number is a power of two.
  for (int step = kLanes / 2; step > 0; step /= 2) {
    I32 turned;
    for (int i = 0; i < kLanes; ++i) turned[i] = x[i ^ step];
    x = max(x, turned);
  }
  return x[0];
#endif
}

// Whether a lane of x or y is above.
JADAM_INLINE bool any_above(U32 x, U32 y, uint32_t high) {
#if defined(__AVX512F__)
  const __m512i most = _mm512_set1_epi32(int(high));
  return (_mm512_cmpgt_epu32_mask(__m512i(x), most) | _mm512_cmpgt_epu32_mask(__m512i(y), most)) !=
         0;
#elif defined(__x86_64__)
  // There is a comparison of signed numbers only.
  const auto above = [=](U32 z) { return bits<I32>(z - (1u << 31)) > int32_t(high - (1u << 31)); };
  return JADAM_X86_OF(movemask_ps)(Floats(above(x) | above(y))) != 0;
#elif defined(__aarch64__)
  return vmaxvq_u32(vmaxq_u32(uint32x4_t(x), uint32x4_t(y))) > high;
#else
  bool found = false;
  for (int i = 0; i < kLanes; ++i) found |= x[i] > high || y[i] > high;
  return found;
#endif
}

// Whether a lane of a mask is set.
JADAM_INLINE bool any(Mask mask) {
#if defined(__AVX512F__)
  return _mm512_movepi32_mask(__m512i(mask)) != 0;
#elif defined(__x86_64__)
  return JADAM_X86_OF(movemask_ps)(Floats(mask)) != 0;
#elif defined(__aarch64__)
  return vmaxvq_u32(uint32x4_t(mask)) != 0;
#else
  bool found = false;
  for (int i = 0; i < kLanes; ++i) found |= mask[i] != 0;
  return found;
#endif
}

JADAM_INLINE F32 sqrt(F32 x) {
#if defined(__x86_64__)
  return F32(JADAM_X86_OF(sqrt_ps)(Floats(x)));
#elif defined(__aarch64__)
  return F32(vsqrtq_f32(float32x4_t(x)));
#else
  F32 y;
  for (int i = 0; i < kLanes; ++i) y[i] = __builtin_sqrtf(x[i]);
  return y;
#endif
}

// A GPU's may be approximate. Here that is not faster, and an approximate reciprocal gives other bits
// on a processor of another maker.
JADAM_INLINE F32 quotient(F32 x, F32 y) { return x / y; }

// Tables of which each lane reads its own number.
#if defined(__AVX512F__)
#define JADAM_PLACES 32

// 32 numbers in two registers.
struct Table32 {
  __m512 low, high;

  explicit JADAM_INLINE Table32(const float* x)
      : low(_mm512_loadu_ps(x)), high(_mm512_loadu_ps(x + 16)) {}

  // The number at i mod 32.
  JADAM_INLINE F32 operator[](I32 i) const {
    return F32(_mm512_permutex2var_ps(low, __m512i(i), high));
  }
};
#elif defined(__AVX2__)
#define JADAM_PLACES 8

struct Table8 {
  __m256 numbers;

  explicit JADAM_INLINE Table8(const float* x) : numbers(_mm256_loadu_ps(x)) {}

  // The number at i mod 8.
  JADAM_INLINE F32 operator[](I32 i) const {
    return F32(_mm256_permutevar8x32_ps(numbers, __m256i(i)));
  }
};

// 4 numbers in each half of a register: within a half a permutation takes one cycle.
struct Table4 {
  __m256 numbers;

  explicit JADAM_INLINE Table4(const float* x)
      : numbers(_mm256_broadcast_ps(reinterpret_cast<const __m128*>(x))) {}

  // The number at i mod 4.
  JADAM_INLINE F32 operator[](I32 i) const {
    return F32(_mm256_permutevar_ps(numbers, __m256i(i)));
  }
};
#endif

// Numbers of 16 bits.
JADAM_INLINE I32 load_u16(const uint16_t* p) {
#if defined(__AVX512F__)
  return I32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#elif defined(__AVX2__)
  return I32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#elif defined(__x86_64__)
  return I32(_mm_unpacklo_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)),
                                _mm_setzero_si128()));
#elif defined(__aarch64__)
  return I32(vmovl_u16(vld1_u16(p)));
#else
  I32 x;
  for (int i = 0; i < kLanes; ++i) x[i] = p[i];
  return x;
#endif
}

// For 0 <= x < 2^16.
JADAM_INLINE void store_u16(uint16_t* p, I32 x) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(__m512i(x)));
#elif defined(__AVX2__)
  const __m128i low = _mm256_castsi256_si128(__m256i(x));
  const __m128i high = _mm256_extracti128_si256(__m256i(x), 1);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm_packus_epi32(low, high));
#elif defined(__x86_64__)
  // SSE2 saturates to signed numbers only: what is kept are the bits.
  const __m128i kept = __m128i((x << 16) >> 16);
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi32(kept, kept));
#elif defined(__aarch64__)
  vst1_u16(p, vmovn_u32(uint32x4_t(x)));
#else
  for (int i = 0; i < kLanes; ++i) p[i] = uint16_t(x[i]);
#endif
}

// Numbers of 8 bits, in the same way.
JADAM_INLINE I32 load_u8(const uint8_t* p) {
#if defined(__AVX512F__)
  return I32(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#elif defined(__AVX2__)
  return I32(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#elif defined(__x86_64__)
  int32_t four;
  std::memcpy(&four, p, sizeof four);
  const __m128i zero = _mm_setzero_si128();
  return I32(_mm_unpacklo_epi16(_mm_unpacklo_epi8(_mm_cvtsi32_si128(four), zero), zero));
#else
  I32 x;
  for (int i = 0; i < kLanes; ++i) x[i] = p[i];
  return x;
#endif
}
JADAM_INLINE void store_u8(uint8_t* p, I32 x) {
#if defined(__AVX512F__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(__m512i(x)));
#elif defined(__AVX2__)
  const __m128i low = _mm256_castsi256_si128(__m256i(x));
  const __m128i words = _mm_packs_epi32(low, _mm256_extracti128_si256(__m256i(x), 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(words, words));
#elif defined(__x86_64__)
  const __m128i words = _mm_packs_epi32(__m128i(x), __m128i(x));
  const int32_t four = _mm_cvtsi128_si32(_mm_packus_epi16(words, words));
  std::memcpy(p, &four, sizeof four);
#else
  for (int i = 0; i < kLanes; ++i) p[i] = uint8_t(x[i]);
#endif
}

// Signed numbers of 8 and 16 bits; what is stored is in their range.
JADAM_INLINE I32 load_integers(const int8_t* p) {
#if defined(__AVX512F__)
  return I32(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#elif defined(__AVX2__)
  return I32(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#else
  I32 x;
  for (int i = 0; i < kLanes; ++i) x[i] = p[i];
  return x;
#endif
}
JADAM_INLINE I32 load_integers(const int16_t* p) {
  return (load_u16(reinterpret_cast<const uint16_t*>(p)) << 16) >> 16;
}
JADAM_INLINE void store_integers(int8_t* p, I32 x) {
#if defined(__AVX512F__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(__m512i(x)));
#elif defined(__AVX2__)
  const __m128i low = _mm256_castsi256_si128(__m256i(x));
  const __m128i words = _mm_packs_epi32(low, _mm256_extracti128_si256(__m256i(x), 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(words, words));
#else
  for (int i = 0; i < kLanes; ++i) p[i] = int8_t(x[i]);
#endif
}
JADAM_INLINE void store_integers(int16_t* p, I32 x) {
  store_u16(reinterpret_cast<uint16_t*>(p), x & 0xFFFF);
}

}  // namespace JADAM_ISA
}  // namespace jadam

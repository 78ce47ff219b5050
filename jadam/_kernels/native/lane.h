// One float32 a thread, under the names of simd.h: on a GPU, or as plain C++ where that is checked.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "step.h"

#if defined(__CUDACC__)
#define JADAM_INLINE JADAM_EVERYWHERE __forceinline__
#else
#define JADAM_INLINE inline __attribute__((always_inline))
#endif

#define JADAM_HAS_EXP2

namespace jadam {
namespace JADAM_ISA {

using F32 = float;
using I32 = int32_t;
using U32 = uint32_t;
using Mask = bool;

template <class To, class From>
JADAM_INLINE To bits(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To y;
  std::memcpy(&y, &x, sizeof y);
  return y;
}

JADAM_INLINE F32 all(float x) { return x; }
JADAM_INLINE F32 to_float(I32 x) { return float(x); }
#if defined(__CUDA_ARCH__)
JADAM_INLINE F32 abs(F32 x) { return std::fabs(x); }  // where it flushes subnormal numbers
#else
JADAM_INLINE F32 abs(F32 x) { return std::fabs(x) < 0x1p-126f ? 0 : std::fabs(x); }
#endif
template <class T>
JADAM_INLINE T select(Mask mask, T x, T y) {
  return mask ? x : y;
}
JADAM_INLINE I32 ones(Mask mask) { return mask; }
JADAM_INLINE I32 copysign(I32 size, F32 sign) { return bits<I32>(sign) < 0 ? -size : size; }
JADAM_INLINE I32 max(I32 x, I32 y) { return x > y ? x : y; }
JADAM_INLINE I32 min(I32 x, I32 y) { return x < y ? x : y; }
JADAM_INLINE bool any_above(U32 x, U32 y, uint32_t high) { return x > high || y > high; }
JADAM_INLINE bool any(Mask mask) { return mask; }

// An instruction of a GPU for approximate floats, and what it stands for elsewhere.
#if defined(__CUDA_ARCH__)
#define JADAM_APPROXIMATE(name, instruction, elsewhere) \
  JADAM_INLINE F32 name(F32 x) {                        \
    F32 y;                                              \
    asm(instruction " %0, %1;" : "=f"(y) : "f"(x));     \
    return y;                                           \
  }
#else
#define JADAM_APPROXIMATE(name, instruction, elsewhere) \
  JADAM_INLINE F32 name(F32 x) { return elsewhere; }
#endif
JADAM_APPROXIMATE(exp2, "ex2.approx.ftz.f32", std::exp2(x))
JADAM_APPROXIMATE(log2, "lg2.approx.ftz.f32", std::log2(x))
JADAM_APPROXIMATE(reciprocal, "rcp.approx.ftz.f32", 1 / x)
JADAM_APPROXIMATE(reciprocal_root, "rsqrt.approx.ftz.f32", 1 / std::sqrt(x))
#undef JADAM_APPROXIMATE

// NaN in x stays; `low` and `high` are numbers.
#if defined(__CUDA_ARCH__)
JADAM_INLINE F32 at_least(F32 x, F32 low) {
  asm("max.NaN.ftz.f32 %0, %0, %1;" : "+f"(x) : "f"(low));
  return x;
}
JADAM_INLINE F32 at_most(F32 x, F32 high) {
  asm("min.NaN.ftz.f32 %0, %0, %1;" : "+f"(x) : "f"(high));
  return x;
}
#else
JADAM_INLINE F32 at_least(F32 x, F32 low) { return x < low ? low : x; }
JADAM_INLINE F32 at_most(F32 x, F32 high) { return x > high ? high : x; }
#endif

// The root of a number from 2^-103 on, by one step of Newton's iteration, as if it were rounded
// once; NaN for infinity.
JADAM_INLINE F32 sqrt(F32 x) {
  const F32 y = reciprocal_root(x), root = x * y;
  return std::fma(std::fma(-root, root, x), 0.5f * y, root);
}

// x/y for y that is neither tiny nor huge, in the same way; infinity and NaN for themselves.
JADAM_INLINE F32 divide(F32 x, F32 y) {
  F32 inverse = reciprocal(y);
  inverse = std::fma(std::fma(-y, inverse, 1.0f), inverse, inverse);
  const F32 quotient = x * inverse, rest = std::fma(-y, quotient, x);
  return std::fma(abs(quotient) < 0x1p127f ? rest : 0.0f, inverse, quotient);
}

// The same to about two ulps.
JADAM_INLINE F32 quotient(F32 x, F32 y) { return x * reciprocal(y); }

// Integers to floats and back without the instruction for it, of which a GPU makes few at a time: the
// sum of 2^23 and a number has the number's units in its last bits.
JADAM_INLINE F32 to_float_under_2_22(I32 x) { return bits<F32>(x + 0x4B400000) - 0x1.8p23f; }
JADAM_INLINE I32 floor_under_2_22(F32 x) {
#if defined(__CUDA_ARCH__)
  return bits<I32>(__fadd_rd(x, 0x1p23f)) - 0x4B000000;
#else
  return bits<I32>(float(std::floor(x)) + 0x1p23f) - 0x4B000000;
#endif
}
JADAM_INLINE I32 truncate(F32 x) { return int32_t(x); }

}  // namespace JADAM_ISA
}  // namespace jadam

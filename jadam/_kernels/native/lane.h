// One float32 a thread, under the names of simd.h: on a GPU, or as plain C++ where that is checked.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define JADAM_INLINE __host__ __device__ __forceinline__
#else
#define JADAM_INLINE inline __attribute__((always_inline))
#endif

#define JADAM_PLACES 32

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
JADAM_INLINE F32 abs(F32 x) { return std::fabs(x); }
template <class T>
JADAM_INLINE T select(Mask mask, T x, T y) {
  return mask ? x : y;
}
JADAM_INLINE I32 copysign(I32 size, F32 sign) { return bits<I32>(sign) < 0 ? -size : size; }

// NaN in x stays; `low` and `high` are numbers.
JADAM_INLINE F32 at_least(F32 x, F32 low) { return x < low ? low : x; }
JADAM_INLINE F32 at_most(F32 x, F32 high) { return x > high ? high : x; }
JADAM_INLINE I32 max(I32 x, I32 y) { return x > y ? x : y; }
JADAM_INLINE I32 min(I32 x, I32 y) { return x < y ? x : y; }
JADAM_INLINE bool any_above(U32 x, U32 y, uint32_t high) { return x > high || y > high; }
JADAM_INLINE bool any(Mask mask) { return mask; }
JADAM_INLINE F32 sqrt(F32 x) { return std::sqrt(x); }

#if defined(__CUDA_ARCH__)
JADAM_INLINE I32 truncate(F32 x) { return int32_t(x); }  // saturates; NaN gives 0

// x/y to about two ulps, for y that is neither tiny nor huge.
JADAM_INLINE F32 quotient(F32 x, F32 y) { return __fdividef(x, y); }

// 32 numbers, one in each thread of a warp: all of its threads read at the same time.
class Table32 {
 public:
  explicit JADAM_INLINE Table32(const float* numbers) : own_(numbers[threadIdx.x % 32]) {}

  // The number at i mod 32.
  JADAM_INLINE F32 operator[](I32 i) const { return __shfl_sync(0xFFFFFFFFu, own_, i); }

 private:
  const float own_;
};
#else
JADAM_INLINE I32 truncate(F32 x) {
  return std::fabs(x) < 0x1p31f ? int32_t(x) : x > 0 ? INT32_MAX : x < 0 ? INT32_MIN : 0;
}
JADAM_INLINE F32 quotient(F32 x, F32 y) { return x / y; }

class Table32 {
 public:
  explicit Table32(const float* numbers) : numbers_(numbers) {}
  F32 operator[](I32 i) const { return numbers_[i & 31]; }

 private:
  const float* const numbers_;
};
#endif

}  // namespace JADAM_ISA
}  // namespace jadam

// What the kernels for CPUs read and write: vectors of a dtype, the ends of rows, a moved parameter.
#pragma once

#include <type_traits>

// Comes before the equations, which are written in its vectors.
#include "../simd.h"

#include "../equations.h"

namespace jadam {
namespace JADAM_ISA {
namespace {

// ---- memory

struct BF16 {
  uint16_t bits;
};

template <class T>
JADAM_INLINE F32 load(const T* p);
template <>
JADAM_INLINE F32 load(const float* p) {
  return load_vector<F32>(p);
}
template <>
JADAM_INLINE F32 load(const BF16* p) {
  return widened(load_u16(&p->bits));
}

JADAM_INLINE void store(float* p, F32 x) { store_vector(p, x); }
JADAM_INLINE void store(BF16* p, F32 x) {
  store_u16(&p->bits, bits<I32>(bits<U32>(nearest_bf16(x)) >> 16));
}

// x as `store` would leave it in memory.
template <class T>
JADAM_INLINE F32 rounded(F32 x) {
  if constexpr (std::is_same_v<T, BF16>) return nearest_bf16(x);
  return x;
}

// ---- _leaf.py

JADAM_INLINE F32 update_of(F32 direction, F32 p, bool decays, const Numbers& s) {
  if (decays) direction += s.weight_decay * p;
  return -s.learning_rate * direction;
}

template <class G, class P, bool kWritesParams>
struct Move {
  const Numbers s;
  const bool decays;
  const P* p;
  std::conditional_t<kWritesParams, P, G>* out;

  JADAM_INLINE void operator()(F32 direction, int64_t i) const {
    const F32 update = update_of(direction, decays ? load(p + i) : F32{}, decays, s);
    if constexpr (kWritesParams) {
      store(out + i, load(p + i) + rounded<G>(update));
    } else {
      store(out + i, update);
    }
  }
};

// ---- the cache, the ends of rows

// What a loop will need, into the cache: a line of 64 bytes, or all lines of n numbers.
template <class T>
JADAM_INLINE void prefetch(const T* p) {
  __builtin_prefetch(p, 1);
}
template <class T>
JADAM_INLINE void prefetch(const T* p, int64_t n) {
  for (int64_t i = 0; i < n; i += 64 / int64_t(sizeof(T))) prefetch(p + i);
}

// The line that a loop which is at p will need. A processor sees by itself where a loop goes, but not
// past the end of a page, and not as far as memory is away.
constexpr int64_t kBytesAhead = 2048;
template <class T>
JADAM_INLINE void prefetch_ahead(const T* p) {
  prefetch(p + kBytesAhead / int64_t(sizeof(T)));
}

template <class T>
T* shifted(T* p, int64_t i) {
  return p == nullptr ? nullptr : p + i;
}

// A block's last numbers, where they do not fill a vector, go through copies that do.
template <class T>
struct Padded {
  alignas(64) T values[kBlock] = {};
  T* copy(const T* from, int64_t n) {
    if (from != nullptr) std::memcpy(values, from, n * sizeof(T));
    return values;
  }
};

template <class T>
void copy_back(void* to, const Padded<T>& from, int64_t n) {
  std::memcpy(to, from.values, n * sizeof(T));
}

}  // namespace
}  // namespace JADAM_ISA
}  // namespace jadam

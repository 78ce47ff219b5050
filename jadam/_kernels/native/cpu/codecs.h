// How codes lie in memory, and become moments and back: 16 bits an element for both moments by the
// Codec of equations.h, or 8 bits by that of this file, which no GPU has.
#pragma once

#include "memory.h"

namespace jadam {
namespace JADAM_ISA {
namespace {

// lattice.EIGHT_BITS
class EightBits : public Codec {
 public:
  using Both = uint16_t;
  static constexpr int kHighest = kTop;  // of a number
  static constexpr int32_t kOfNaN = 64 << 9 | kNaN;

  using Codec::Codec;

  static JADAM_INLINE I32 load_both(const Both* p) { return load_u16(p); }
  static JADAM_INLINE void store_both(Both* p, I32 both) { store_u16(p, both); }
  static JADAM_INLINE Mask is_nan(I32 both) { return (both & kNaN) == kNaN; }

  // The largest code of v among n, or among those that are numbers; kHighest + 1 is NaN's.
  template <bool kNumbersAlone>
  static JADAM_INLINE int32_t largest_code(const Both* both, int64_t n) {
    I32 found{};
    for (int64_t i = 0; i < n; i += kLanes) {
      I32 code = load_both(both + i) & kNaN;
      if constexpr (kNumbersAlone) code = code & (code != kNaN);
      found = max(found, code);
    }
    return largest(found);
  }

  // What a block's top adds to a level, as the functions of Codec take it.
  static int32_t offset_of(int32_t top) { return top - kTop; }
  static int32_t base_of(int32_t top) { return top - kTop + kBias; }

  JADAM_INLINE I32 encode_v(F32 v, I32 fed, I32 base, const Dithers& dithers, int64_t lane) const {
    return Codec::encode_v(v, fed, base, load_vector<F32>(dithers.unit[0] + lane));
  }

  // The top of a block whose largest v is this.
  JADAM_INLINE I32 top_above(F32 v) const { return biased_level(v, F32{}) - (kBias - 1); }
};

// lattice.FOUR_BITS: the levels are powers of two, so exponents of floats. Its functions are those of
// Codec. v's code is exact, since no power and no logarithm is approximated.
class FourBits {
 public:
  using Both = uint8_t;
  static constexpr int kHighest = 12, kSizes = 10, kSizeBase = 2 * kSizes + 1;
  static constexpr int32_t kOfNaN = 255;

  JADAM_INLINE FourBits(const Numbers& s, const Tables&)
      : before_a_(s.coarse_before_a),
        before_end_(kSizes * s.coarse_before_s),
        now_a_(s.coarse_now_a),
        now_end_(kSizes * s.coarse_now_s) {}

  static JADAM_INLINE I32 load_both(const Both* p) { return load_u8(p); }
  static JADAM_INLINE void store_both(Both* p, I32 both) { store_u8(p, both); }
  static JADAM_INLINE Mask is_nan(I32 both) { return both == kOfNaN; }

  template <bool kNumbersAlone>
  static JADAM_INLINE int32_t largest_code(const Both* both, int64_t n) {
    Both found = 0;
    for (int64_t i = 0; i < n; ++i) {
      const Both x = kNumbersAlone && both[i] == kOfNaN ? 0 : both[i];
      found = found < x ? x : found;
    }
    return (found + kSizeBase - 1) / kSizeBase;
  }

  static int32_t offset_of(int32_t top) { return top - kHighest; }
  static int32_t base_of(int32_t top) { return top - kHighest + kBiasOfRoot; }

  JADAM_INLINE void decode(I32 both, I32 offset, F32& m, F32& v) const {
    const F32 x = to_float(both);
    // ⌈both/21⌉: half a unit keeps the product from where the next one begins.
    const I32 code = truncate((x + (kSizeBase - 0.5f)) * (1.0f / kSizeBase));
    const F32 size = x - to_float(code) * kSizeBase + float(kSizes);
    const F32 root = select(code != 0, power_of_two(code + offset), F32{});
    m = root * quotient(before_a_ * size, before_end_ - abs(size));
    v = root * root;
  }

  // `fed` is 1 where the gradient is not 0, and 0 elsewhere.
  JADAM_INLINE I32 encode_v(F32 v, I32 fed, I32 base, const Dithers& dithers, int64_t lane) const {
    const U32 up = bits<U32>(v) + load_vector<U32>(dithers.to_level + lane);
    const I32 raised = bits<I32>(up >> 24) - base;
    return max(min(raised, I32{} + kHighest), fed) & (v > 0.0f);
  }

  // Of m over the root, r, the curve is y = end·r/(a + r), and end - y is end·a/(a + r).
  JADAM_INLINE I32 encode_m(F32 m, I32 code, I32 offset, F32 dither) const {
    const F32 r = abs(m) * power_of_two(-(code + offset)), sum = now_a_ + r;
    const F32 y = quotient(now_end_ * r, sum);
    const I32 below = truncate(y);
    const F32 lower = to_float(below);
    const F32 chance = (y - lower) * (now_end_ - 1.0f - lower) * (sum * per_end_a_);
    const I32 level = min(below - (chance + dither >= 1.0f), I32{} + kSizes);
    // Of NaN, which has a code of its own, this is any number: it may wrap.
    const U32 both = bits<U32>(code) * uint32_t(kSizeBase) + bits<U32>(copysign(level, m));
    return max(bits<I32>(both - uint32_t(kSizes)), I32{});
  }

  JADAM_INLINE I32 top_above(F32 v) const {
    return bits<I32>((bits<U32>(v) + kHalfExponent) >> 24) - (kBiasOfRoot - 1);
  }

  static JADAM_INLINE F32 power_of_two(I32 level) { return bits<F32>((level + 127) << 23); }

 private:
  static constexpr int kBiasOfRoot = 64;

  const float before_a_, before_end_, now_a_, now_end_;
  const float per_end_a_ = 1.0f / (now_end_ * now_a_);
};

}  // namespace
}  // namespace JADAM_ISA
}  // namespace jadam

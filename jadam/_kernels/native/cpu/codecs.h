// How codes lie in memory: 16 bits an element for both moments, or 8. The codecs are those of
// equations.h.
#pragma once

#include "memory.h"

namespace jadam {
namespace JADAM_ISA {
namespace {

// lattice.EIGHT_BITS
class EightBits : public Codec {
 public:
  static constexpr int kHighest = kTop;  // of a number

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

  JADAM_INLINE I32 encode_v(F32 v, I32 fed, I32 base, const Dithers& dithers, int64_t lane) const {
    return Codec::encode_v(v, fed, base, load_vector<F32>(dithers.unit[0] + lane));
  }
};

// lattice.FOUR_BITS
class FourBits : public CoarseCodec {
 public:
  JADAM_INLINE FourBits(const Numbers& s, const Tables&) : CoarseCodec(s) {}

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

  JADAM_INLINE I32 encode_v(F32 v, I32 fed, I32 base, const Dithers& dithers, int64_t lane) const {
    return CoarseCodec::encode_v(v, fed, base, load_vector<U32>(dithers.to_level + lane));
  }
};

}  // namespace
}  // namespace JADAM_ISA
}  // namespace jadam

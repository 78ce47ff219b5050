// The equations of a step, for whatever F32, I32, U32 and Mask are: registers of lanes (simd.h) or
// one number (lane.h). They are those of _math.py, _rounding.py, codes.py and _masters.py with the
// same roundings where results are floats, and with other approximations of powers, logarithms and
// reciprocals where they are codes; tests/test_native.py holds the two together.
#pragma once

#include "step.h"

namespace jadam {
namespace JADAM_ISA {

// ---- _rounding.py

// The power of two at or below x >= 0. Times 2^-23 it is the distance to the next number.
JADAM_INLINE F32 power(F32 x) { return bits<F32>(bits<U32>(x) & 0x7F800000u); }

constexpr uint32_t kSmall = 0x04000000u, kMax = 0x7F7F0000u;  // 2^-119, bfloat16's largest

// Whether a lane of either is where carried_to_bf16 does not hold: small or not finite.
JADAM_INLINE bool any_careful(F32 x, F32 y) {
  const U32 of_x = bits<U32>(abs(x)) - kSmall, of_y = bits<U32>(abs(y)) - kSmall;
  return __builtin_expect(any_above(of_x, of_y, kMax - kSmall), false);
}

// x's upper 16 bits, rounded with 16 bits of dither: a carry is a step to the next number.
JADAM_INLINE I32 carried_to_bf16(F32 x, U32 dither) {
  return bits<I32>((bits<U32>(x) + dither) >> 16);
}

// The same for any x. The spacing ends at 2^-126: below 2^-119 it is not that of the number's own
// power of two.
JADAM_INLINE I32 round_to_bf16(F32 x, U32 dither) {
  const U32 magnitude = bits<U32>(abs(x));
  // Of small numbers, which are under 2^7 here, truncation is the floor.
  const F32 steps = abs(x) * 0x1p126f + to_float(bits<I32>(dither)) * 0x1p-16f;
  const F32 small = to_float(truncate(steps)) * 0x1p-126f;
  U32 size = bits<U32>(min(bits<I32>(magnitude + dither), I32{} + int32_t(kMax + 0xFFFFu)));
  size = select(magnitude < kSmall, bits<U32>(small), size);
  size = select(magnitude > kMax, magnitude, size);
  return bits<I32>((size | (bits<U32>(x) & 0x80000000u)) >> 16);
}

// To the nearest number of bfloat16, ties to even; NaN stays one.
JADAM_INLINE F32 nearest_bf16(F32 x) {
  const U32 b = bits<U32>(x);
  const U32 nearest = b + (((b >> 16) & 1u) + 0x7FFFu);
  return bits<F32>(select(x == x, nearest, b | 0x400000u) & 0xFFFF0000u);
}

// A number of bfloat16 from its bits.
JADAM_INLINE F32 widened(I32 upper) { return bits<F32>(bits<U32>(upper) << 16); }

// Whether m may be beyond its bound beside v, both as they are stored. The squares say by themselves
// where it is far from that.
JADAM_INLINE Mask may_be_beyond(F32 m, F32 v, float bound) {
  return m * m > bound * bound * 0.999f * v;
}

// Bits of bfloat16 for m, as `kept`, cut where no rounding may take it past its bound beside v.
JADAM_INLINE I32 within_bound(I32 kept, F32 m, F32 v, float bound) {
  const F32 most = bound * sqrt(v);
  const U32 sign = bits<U32>(m) & 0x80000000u;
  const U32 cut = (bits<U32>(at_most(abs(m), most)) | sign) >> 16;
  return select(abs(widened(kept)) > most, bits<I32>(cut), kept);
}

// The moments as they are kept: bits of bfloat16 for those that are rounded.
template <bool kRoundsM, bool kRoundsV>
JADAM_INLINE void round_moments(F32 m, F32 v, U32 dither_m, U32 dither_v, const Numbers& s,
                                I32& m_bits, I32& v_bits) {
  if constexpr (!kRoundsM && !kRoundsV) return;
  const bool is_careful = any_careful(kRoundsM ? m : v, kRoundsV ? v : m);
  const auto rounded_up = [&](F32 x, U32 dither) {
    return is_careful ? round_to_bf16(x, dither) : carried_to_bf16(x, dither);
  };
  if constexpr (kRoundsV) {
    v_bits = rounded_up(v, dither_v);
    v = widened(v_bits);
  }
  if constexpr (kRoundsM) {
    m_bits = rounded_up(m, dither_m);
    const F32 second = at_least(v, all(s.least_bounding));
    if (any(may_be_beyond(widened(m_bits), second, s.bound))) {
      m_bits = within_bound(m_bits, m, second, s.bound);
    }
  }
}

// ---- _math.py

JADAM_INLINE F32 limit_range(F32 g) {
  F32 limited = at_most(at_least(g, all(-0x1p63f)), all(0x1p63f));
  return select(abs(g) == __builtin_inff(), g, limited);
}

// Which of both weighs more in a mean with this share of x - m. No branch: gcc fuses a product with
// its sum where both are in one block alone, and copies of this would differ in their last bit.
JADAM_INLINE F32 heavier(F32 m, F32 x, float share) {
  return select(bits<I32>(all(share)) < 0, x, m);
}

JADAM_INLINE F32 second_moment(F32 v, F32 g, const Numbers& s) {
  F32 toward = g * g - v + (s.dither * 0x1p-23f) * power(v);
  // A product of its own: gcc fuses the other one where nothing else needs it.
  return heavier(v, g * (g + 0.0f), s.share2) + s.share2 * toward;
}

template <bool kNesterov>
struct Adam {
  const Numbers s;
  const float inverse_c2 = 1.0f / s.c2;

  JADAM_INLINE F32 operator()(F32 g, F32& m, F32& v) const {
    m = heavier(m, g, s.share1) + s.share1 * (g - m);
    v = second_moment(v, g, s);
    const F32 v_hat = at_most(v * inverse_c2 + s.eps_root, all(s.most));
    const F32 root = sqrt(at_least(v_hat, all(0x1p-103f)));
    if constexpr (kNesterov) {
      return divide(s.m_weight * m + s.g_weight * g, root + s.eps);
    } else {
      return divide(m, s.c1 * (root + s.eps));
    }
  }
};

// ---- _missed.py

// Where eps_root is 0, missed steps move a parameter by m times the sum over the nodes q of
// _missed.Sums: factor_q/(max(√v, kFloor·scale_q) + eps·scale_q).
constexpr float kFloor = 0x1.6a09e6p-52f;  // the root of 2^-103

// Two nodes: the factors, and the scales times kFloor and times eps. Of a node that is not there the
// factor is 0.
struct NodePair {
  float factor[2] = {0, 0};
  float floor[2] = {1, 1};
  float shift[2] = {0, 0};
};

// The sum over nodes. Two quotients share one division, by the product of their divisors. Where b2 is
// above 1 - 2^-22 this could be under 2^-126.
JADAM_INLINE F32 motion_of(F32 root, const NodePair* pairs, int64_t n) {
  F32 total{};
  for (int64_t q = 0; q < n; ++q) {
    const auto& [factor, floor, shift] = pairs[q];
    const F32 x = at_least(root, all(floor[0])) + shift[0];
    const F32 y = at_least(root, all(floor[1])) + shift[1];
    total += divide(factor[0] * y + factor[1] * x, at_least(x * y, all(0x1p-126f)));
  }
  return total;
}

// The same as a geometric series in 1/√v, for √v far above eps: with `shift` the largest of all
// nodes and y = shift/√v it is 1/√v·Σ_k terms_k·yᵏ, terms_k = Σ_q factor_q·(-scale_q/largest)ᵏ.
// What is cut off is y⁶ of it, 2^-27 where √v is kShifts times the shift.
constexpr int kTerms = 6;
constexpr float kShifts = 23.0f;

struct Series {
  float shift, least, terms[kTerms];
};

// Whether the series is precise enough in all lanes: where m is 0 nothing moves.
JADAM_INLINE bool is_far(F32 root, F32 m, const Series& series) {
  return !any((root < series.least) & (m != 0.0f));
}

JADAM_INLINE F32 motion_of(F32 root, const Series& series) {
  const F32 x = 1.0f / at_least(root, all(series.least)), y = series.shift * x;
  F32 total = all(series.terms[kTerms - 1]);
  for (int k = kTerms - 2; k >= 0; --k) total = total * y + series.terms[k];
  return x * total;
}

// ---- codes.py

constexpr int kTop = 510, kNaN = 511, kM = 63;
constexpr int kBias = 127 * 16;  // of a float's exponent, in levels

// A polynomial's coefficients, each in all lanes.
template <int n>
struct Polynomial {
  F32 coefficients[n];

  explicit JADAM_INLINE Polynomial(const float (&from)[n]) {
    for (int i = 0; i < n; ++i) coefficients[i] = all(from[i]);
  }

  JADAM_INLINE F32 operator()(F32 x) const {
    F32 y = coefficients[n - 1];
    for (int i = n - 2; i >= 0; --i) y = y * x + coefficients[i];
    return y;
  }
};

// Codes to moments and back, with powers and logarithms by instructions of their own, by tables
// where they cost one instruction, or by polynomials.
class Codec {
 public:
  using Both = uint16_t;
  static constexpr int32_t kOfNaN = 64 << 9 | kNaN;

  // What a block's top adds to a level of v: to the level itself, and to the biased one.
  static JADAM_INLINE int32_t offset_of(int32_t top) { return top - kTop; }
  static JADAM_INLINE int32_t base_of(int32_t top) { return top - kTop + kBias; }

#if defined(JADAM_HAS_EXP2)
  explicit JADAM_INLINE Codec(const Numbers& s) : s_(s) {}
#else
  JADAM_INLINE Codec(const Numbers& s, const Tables& tables)
      : s_(s),
#if JADAM_PLACES == 32
        exp2_(tables.exp2),
        reciprocal_(tables.reciprocal),
        log2_(tables.log2),
        series_(tables.series) {
  }
#elif JADAM_PLACES == 8
        exp2_(tables.exp2_eighths),
        reciprocal_(tables.reciprocal_eighths),
        log2_(tables.log2_eighths),
        exp2_rest_(tables.exp2_rest),
        series_(tables.series_eighths) {
  }
#else
        exp2_(tables.exp2_polynomial),
        log2_(tables.log2_polynomial) {
  }
#endif
#endif

  // m and v from the codes of the step before; offset + code is v's level.
  JADAM_INLINE void decode(I32 both, I32 offset, F32& m, F32& v) const {
    I32 code = both & kNaN;
    F32 root = select(code != 0, power_of_two(code + offset), F32{});
    F32 x = to_float_under_2_22((both >> 9) - 64);
    m = root * quotient(s_.before_a * x, s_.before_s * kM - abs(x));
    v = root * root;
  }

  // The code of v after a step: base + code is its biased level. `fed` is 1 where the gradient is not
  // 0, and 0 elsewhere; the dither is in [0, 1). Of NaN it is any number.
  JADAM_INLINE I32 encode_v(F32 v, I32 fed, I32 base, F32 dither) const {
    I32 raised = biased_level(v, dither) - base;
    return select(v > 0.0f, max(min(raised, I32{} + kTop), fed), I32{});
  }

  // Both codes, with that of v.
  JADAM_INLINE I32 encode_m(F32 m, I32 code, I32 offset, F32 dither) const {
    F32 size = abs(m);
    F32 share = quotient(size, s_.now_a * power_of_two(code + offset) + size);
    // Of NaN, which has a code of its own, this is any number: it may wrap.
    I32 level = copysign(min(floor_under_2_22(scale_ * share + dither), I32{} + kM), m);
    return bits<I32>((bits<U32>(level) + 64u) << 9) | code;
  }

  // floor(32 log2 sqrt(x) + u) + kBias, for x > 0
  JADAM_INLINE I32 biased_level(F32 x, F32 u) const {
    I32 b = bits<I32>(x);
    F32 mantissa = bits<F32>((b & 0x7FFFFF) | 0x3F800000);
#if defined(JADAM_HAS_EXP2)
    return ((b >> 19) & ~15) + floor_under_2_22(16.0f * log2(mantissa) + u);
#elif defined(JADAM_PLACES)
    I32 place = b >> kPlaceShift;
    F32 r = mantissa * reciprocal_[place] - 1.0f;
    return level_of(place) + floor_under_2_22(log2_[place] + u + r * series_(r));
#else
    return ((b >> 19) & ~15) + floor_under_2_22(log2_(mantissa * 2.0f - 3.0f) + u);
#endif
  }

  // The top of a block whose largest v is this.
  JADAM_INLINE I32 top_above(F32 v) const { return biased_level(v, F32{}) - (kBias - 1); }

  // 2^(level/32)
  JADAM_INLINE F32 power_of_two(I32 level) const {
#if defined(JADAM_HAS_EXP2)
    return exp2(to_float_under_2_22(level) * (1.0f / 32));
#elif JADAM_PLACES == 32
    return bits<F32>(bits<I32>(exp2_[level]) + (level << 18));
#elif JADAM_PLACES == 8
    I32 eighths = level >> 2;
    return bits<F32>(bits<I32>(exp2_[eighths]) + (eighths << 20)) * exp2_rest_[level];
#else
    F32 fraction = bits<F32>(((level & 31) << 18) | 0x3F800000);
    return bits<F32>(bits<I32>(exp2_(fraction * 2.0f - 3.0f)) + ((level >> 5) << 23));
#endif
  }

 private:
  const Numbers s_;
  const float scale_ = kM * s_.now_s;
#if defined(JADAM_HAS_EXP2)
#elif JADAM_PLACES == 32
  static constexpr int kPlaceShift = 18;  // 32 places in an octave of 16 levels
  static JADAM_INLINE I32 level_of(I32 place) { return place >> 1; }
  const Table32 exp2_, reciprocal_, log2_;
  const Polynomial<3> series_;
#elif JADAM_PLACES == 8
  static constexpr int kPlaceShift = 20;  // 8 places
  static JADAM_INLINE I32 level_of(I32 place) { return place << 1; }
  const Table8 exp2_, reciprocal_, log2_;
  const Table4 exp2_rest_;
  const Polynomial<4> series_;
#else
  const Polynomial<7> exp2_;
  const Polynomial<10> log2_;
#endif
};

// Codes of 4 bits each, lattice.FOUR_BITS: levels of v are powers of two, so exponents of floats. Its
// functions are those of Codec. v's code is exact, since no power and no logarithm is approximated.
class CoarseCodec {
 public:
  using Both = uint8_t;
  static constexpr int kHighest = 12, kSizes = 10, kSizeBase = 2 * kSizes + 1, kBiasOfRoot = 64;
  static constexpr int32_t kOfNaN = 255;

  static JADAM_INLINE int32_t offset_of(int32_t top) { return top - kHighest; }
  static JADAM_INLINE int32_t base_of(int32_t top) { return top - kHighest + kBiasOfRoot; }

  explicit JADAM_INLINE CoarseCodec(const Numbers& s)
      : before_a_(s.coarse_before_a),
        before_end_(kSizes * s.coarse_before_s),
        now_a_(s.coarse_now_a),
        now_end_(kSizes * s.coarse_now_s) {}

  JADAM_INLINE void decode(I32 both, I32 offset, F32& m, F32& v) const {
    const F32 x = to_float_under_2_22(both);
    // ⌈both/21⌉: half a unit keeps the product from where the next one begins.
    const I32 code = floor_under_2_22((x + (kSizeBase - 0.5f)) * (1.0f / kSizeBase));
    const F32 size = x - to_float_under_2_22(code) * kSizeBase + float(kSizes);
    const F32 root = select(code != 0, power_of_two(code + offset), F32{});
    m = root * quotient(before_a_ * size, before_end_ - abs(size));
    v = root * root;
  }

  // `fed` is 1 where the gradient is not 0, and 0 elsewhere; `to_level` is that of a dither.
  JADAM_INLINE I32 encode_v(F32 v, I32 fed, I32 base, U32 to_level) const {
    const I32 raised = bits<I32>((bits<U32>(v) + to_level) >> 24) - base;
    return select(v > 0.0f, max(min(raised, I32{} + kHighest), fed), I32{});
  }

  // Of m over the root, r, the curve is y = end·r/(a + r), and end - y is end·a/(a + r).
  JADAM_INLINE I32 encode_m(F32 m, I32 code, I32 offset, F32 dither) const {
    const F32 r = abs(m) * power_of_two(-(code + offset)), sum = now_a_ + r;
    const F32 y = quotient(now_end_ * r, sum);
    const I32 below = floor_under_2_22(y);
    const F32 lower = to_float_under_2_22(below);
    const F32 chance = (y - lower) * (now_end_ - 1.0f - lower) * (sum * per_end_a_);
    const I32 level = min(below + ones(chance + dither >= 1.0f), I32{} + kSizes);
    // Of NaN, which has a code of its own, this is any number: it may wrap.
    const U32 both = bits<U32>(code) * uint32_t(kSizeBase) + bits<U32>(copysign(level, m));
    return max(bits<I32>(both - uint32_t(kSizes)), I32{});
  }

  // The top of a block whose largest v is this.
  JADAM_INLINE I32 top_above(F32 v) const {
    return bits<I32>((bits<U32>(v) + kHalfExponent) >> 24) - (kBiasOfRoot - 1);
  }

  static JADAM_INLINE F32 power_of_two(I32 level) { return bits<F32>((level + 127) << 23); }

 private:
  const float before_a_, before_end_, now_a_, now_end_;
  const float per_end_a_ = 1.0f / (now_end_ * now_a_);
};

// ---- _masters.py

constexpr int32_t kSign = INT32_MIN, kLargest = 0x7F7F;

JADAM_INLINE Mask is_finite(F32 x) { return abs(x) < __builtin_inff(); }
JADAM_INLINE I32 size_of(I32 order) { return max(order, -order); }

// float32's numbers in their order.
JADAM_INLINE I32 ordered(F32 x) {
  const I32 b = bits<I32>(x), sign = b >> 31;
  return ((b & ~kSign) ^ sign) - sign;
}

// u with x + u = target; -0 where nothing moves.
JADAM_INLINE F32 difference(F32 target, F32 x) {
  const float largest = 0x1.fffffep127f;
  const F32 moved = at_most(at_least(target - x, all(-largest)), all(largest));
  return select(bits<I32>(target) == bits<I32>(x), all(-0.0f),
                select(is_finite(target), moved, target));
}

// How many of the lower bits of a weight in float32 a residual of type R does not keep.
template <class R>
constexpr int kBelow = 16 - 8 * int(sizeof(R));

// The master weight of a bfloat16 x, so many float32 numbers above it.
JADAM_INLINE F32 join_carefully(F32 x, I32 steps) {
  const I32 order = ordered(x) + steps;
  const I32 joined = size_of(order) | (select(order == 0, bits<I32>(x), order) & kSign);
  return select(is_finite(x), bits<F32>(joined), x);
}

// The same where the weight surely is a number with the sign of x: x is neither 0 nor infinite.
JADAM_INLINE F32 join_usual(F32 x, I32 steps) {
  const I32 b = bits<I32>(x), sign = b >> 31;
  return bits<F32>(b + (steps ^ sign) - sign);
}
JADAM_INLINE bool any_unusual(F32 x) {
  const U32 size = bits<U32>(abs(x)) - 0x8000u;
  return any_above(size, size, 0x7F7F7FFFu);
}

template <class R>
JADAM_INLINE F32 join(F32 x, I32 residual) {
  const I32 steps = residual << kBelow<R>;
  if (__builtin_expect(any_unusual(x), false)) return join_carefully(x, steps);
  return join_usual(x, steps);
}

// The residual of a weight that is so many float32 numbers, and 2^15, above its bfloat16: the lower
// 16 bits of `above` say it.
template <class R>
JADAM_INLINE I32 residual_of(I32 above) {
  return ((above << 16) ^ kSign) >> (16 + kBelow<R>);
}

// A master's bits with half of the distance of bfloat16 numbers added, and its dither: upwards, so
// away from 0 or towards it. The upper 16 are then the nearest of them.
template <class R>
JADAM_INLINE I32 raised(I32 master, I32 sign, U32 dither) {
  U32 up = bits<U32>(sign) & 0xFFFFu;
  if constexpr (kBelow<R> > 0) {
    up ^= (dither >> (32 - kBelow<R>)) + 0x8000u;
  } else {
    up ^= 0x8000u;
  }
  return bits<I32>(bits<U32>(master) + up);
}

// Whether x and the update to `landed` are `landed` to the bit, and all are finite. The product is 0 or
// NaN. Where a zero changes its sign they are not: the sum of both zeros is +0.
JADAM_INLINE Mask is_exact(F32 master, F32 x, F32 landed) {
  const F32 sum = master * 0.0f + (x + (landed - x));
  return (bits<I32>(sum) == bits<I32>(landed)) & is_finite(sum);
}

// The bfloat16 nearest to the master, and what it leaves above it. True where this is what x and the
// update give.
template <class R>
JADAM_INLINE Mask split_usual(F32 master, F32 x, U32 dither, F32& landed, I32& above) {
  const I32 b = bits<I32>(master), sign = b >> 31, to = raised<R>(b, sign, dither);
  landed = bits<F32>(to & ~0xFFFF);
  above = to ^ sign;
  return is_exact(master, x, landed);
}

// The same wherever it is, with the update.
template <class R>
JADAM_INLINE void split_carefully(F32 master, F32 x, U32 dither, F32& update, F32& landed,
                                  I32& above) {
  const I32 b = bits<I32>(master), to = raised<R>(b, b >> 31, dither);
  const Mask finite = is_finite(master);
  const I32 largest = (b & kSign) | (kLargest << 16);
  const I32 target = select((to & ~kSign) < (0x7F80 << 16), to & ~0xFFFF, largest);
  update = difference(select(finite, bits<F32>(target), master), x);
  landed = nearest_bf16(x + update);
  const I32 place = ordered(landed);
  I32 order = ordered(master);
  if constexpr (kBelow<R> > 0) {  // of NaN it may wrap
    order = bits<I32>(bits<U32>(order) + (dither >> (32 - kBelow<R>)));
  }
  order = min(max(order, place - 0x8000), place + 0x7FFF);
  above = select(finite, order - place, I32{}) + 0x8000;
}

// Either.
template <class R>
JADAM_INLINE void split(F32 master, F32 x, U32 dither, F32& update, F32& landed, I32& above) {
  const Mask is_usual = split_usual<R>(master, x, dither, landed, above);
  update = difference(landed, x);
  if (__builtin_expect(any(!is_usual), false)) {
    split_carefully<R>(master, x, dither, update, landed, above);
  }
}

// One of the two neighbours of the master: the upper one where its lower 16 bits are above 16 random
// ones.
JADAM_INLINE F32 round_randomly(F32 master, U32 random) {
  const F32 carried = widened(carried_to_bf16(master, 0xFFFFu - (random >> 16)));
  if (!any_careful(master, master)) return carried;
  // The spacing ends at 2^-126: small numbers have more bits below it, and more random ones.
  const F32 steps = abs(master) * 0x1p126f, below = to_float(truncate(steps));
  const F32 share = to_float(bits<I32>(random >> 8)) * 0x1p-24f;
  const F32 small = (below + select(share < steps - below, all(1.0f), F32{})) * 0x1p-126f;
  const U32 magnitude = bits<U32>(abs(master)), sign = bits<U32>(master) & 0x80000000u;
  const F32 rounded = select(magnitude < kSmall, bits<F32>(bits<U32>(small) | sign), carried);
  return select(magnitude > kMax, nearest_bf16(master), rounded);
}

// _masters.random_bits of these places.
JADAM_INLINE U32 random_bits(U32 place, const uint32_t (&words)[2]) {
  for (const uint32_t word : words) {
    place ^= word;
    place = (place ^ (place >> 16)) * 0x7FEB352Du;
    place = (place ^ (place >> 15)) * 0x846CA68Bu;
    place ^= place >> 16;
  }
  return place;
}

}  // namespace JADAM_ISA
}  // namespace jadam

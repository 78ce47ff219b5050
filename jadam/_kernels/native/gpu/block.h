// A block of 128 numbers through one step, by a group of threads of which each has kN of them in
// registers: a warp or half of one on a GPU, where kN is 4 or 8.
#pragma once

#include "../lane.h"

#include "../equations.h"

namespace jadam {
namespace JADAM_ISA {

// A thread's part of a block. What is beyond the end of a row is 0.
template <int kN>
struct Block {
  F32 g[kN], p[kN], m[kN], v[kN];
  I32 codes[kN];     // of m and v
  I32 top;           // of the block, where it has codes
  I32 steps[kN];     // of p to the weight that it stands for, in float32's numbers
  I32 above[kN];     // the same after a step, as `residual_of` reads it
};

// The larger of what the threads of a group have.
template <int kN>
JADAM_INLINE I32 group_max(I32 x) {
  constexpr int kThreadsOfBlock = int(kBlock) / kN;
  if constexpr (kThreadsOfBlock == 32) {
    x = __reduce_max_sync(0xFFFFFFFFu, x);
  } else {
#pragma unroll
    for (int apart = kThreadsOfBlock / 2; apart > 0; apart /= 2) {
      x = max(x, __shfl_xor_sync(0xFFFFFFFFu, x, apart));
    }
  }
  return x;
}

// Whether it is so in any thread of a warp, which may have several groups.
JADAM_INLINE bool any_of_warp(bool x) { return __any_sync(0xFFFFFFFFu, x); }

// _rounding.weyl of a thread's numbers, the first of them at `lane`. It is that of all blocks.
template <int kN>
struct Weyl {
  uint32_t count;
  U32 of[kN];

  JADAM_INLINE Weyl(uint32_t lane, uint32_t at) : count(at) {
#pragma unroll
    for (int i = 0; i < kN; ++i) of[i] = (lane + i) % uint32_t(kBlock) * kLane + count * kStep;
  }
};

// A dither as a number in [0, 1), to 23 bits.
JADAM_INLINE F32 unit(U32 weyl) { return bits<F32>((weyl >> 9) | 0x3F800000u) - 1.0f; }

// The codecs, with what a block's largest code of v is found by: `seen` has the order of the codes.
// `DithersOfV` are those of a thread's numbers.

// lattice.EIGHT_BITS
class EightBits : public Codec {
 public:
  static constexpr I32 kSeenOfNaN = kNaN;

  using Codec::Codec;

  static JADAM_INLINE I32 seen(I32 both) { return both & kNaN; }
  static JADAM_INLINE I32 code_of(I32 seen) { return seen; }

  template <int kN>
  struct DithersOfV {
    explicit JADAM_INLINE DithersOfV(const Weyl<kN>& weyl) : weyl_(weyl) {}
    JADAM_INLINE F32 operator[](int i) const { return unit(weyl_.of[i]); }

   private:
    const Weyl<kN>& weyl_;
  };
};

// lattice.FOUR_BITS
class FourBits : public CoarseCodec {
 public:
  static constexpr I32 kSeenOfNaN = kOfNaN;

  using CoarseCodec::CoarseCodec;

  static JADAM_INLINE I32 seen(I32 both) { return both; }
  static JADAM_INLINE I32 code_of(I32 seen) { return (seen + kSizeBase - 1) / kSizeBase; }

  // Made once: a thread's numbers have the same places in all blocks.
  template <int kN>
  struct DithersOfV {
    explicit JADAM_INLINE DithersOfV(const Weyl<kN>& weyl) {
#pragma unroll
      for (int i = 0; i < kN; ++i) of_[i] = to_level(unit(weyl.of[i]));
    }
    JADAM_INLINE U32 operator[](int i) const { return of_[i]; }

   private:
    U32 of_[kN];
  };
};

constexpr int32_t kSmallestUsual = 0x05800000;  // 2^-116
constexpr int32_t kLargestG = 0x5F000000, kInfinity = 0x7F800000;  // 2^63 and infinity

// The equations of a step on moments as floats. Leaves the direction in g.
template <class Member, int kN>
JADAM_INLINE void step_member(Block<kN>& b, const Numbers& s) {
  const Member member{s};
#pragma unroll
  for (int i = 0; i < kN; ++i) b.g[i] = member(b.g[i], b.m[i], b.v[i]);
}
template <int kN>
JADAM_INLINE void step_limited(Block<kN>& b, const Numbers& s) {
  if (s.g_weight != 0) {
    step_member<Adam<true>>(b, s);
  } else {
    step_member<Adam<false>>(b, s);
  }
}

template <int kN>
JADAM_INLINE void limit_gradients(Block<kN>& b) {
#pragma unroll
  for (int i = 0; i < kN; ++i) b.g[i] = limit_range(b.g[i]);
}

template <int kN>
JADAM_INLINE void step_floats(Block<kN>& b, const Numbers& s) {
  I32 largest = 0;
#pragma unroll
  for (int i = 0; i < kN; ++i) largest = max(largest, bits<I32>(abs(b.g[i])));
  if (__builtin_expect(largest > kLargestG, false)) limit_gradients(b);
  step_limited(b, s);
}

// The same on moments as codes.
template <class Codec, int kN>
JADAM_INLINE void step_codes(Block<kN>& b, const Numbers& s, const Codec& codec,
                             const Weyl<kN>& weyl,
                             const typename Codec::template DithersOfV<kN>& dithers) {
  I32 seen = 0, size = 0;
#pragma unroll
  for (int i = 0; i < kN; ++i) {
    seen = max(seen, Codec::seen(b.codes[i]));
    size = max(size, bits<I32>(abs(b.g[i])));
  }
  seen = group_max<kN>(seen);
  size = group_max<kN>(size);
  // The same in all threads of the group; those of a warp stay together for what follows.
  const bool is_special = seen == Codec::kSeenOfNaN || size > kLargestG;
  I32 fed[kN];
#pragma unroll
  for (int i = 0; i < kN; ++i) {
    fed[i] = min(bits<I32>(abs(b.g[i])), 1);
    codec.decode(b.codes[i], Codec::offset_of(b.top), b.m[i], b.v[i]);
  }
  if (__builtin_expect(any_of_warp(is_special), false)) {
    limit_gradients(b);
    seen = size = 0;
#pragma unroll
    for (int i = 0; i < kN; ++i) {
      const I32 own_seen = Codec::seen(b.codes[i]), own_size = bits<I32>(abs(b.g[i]));
      if (own_seen == Codec::kSeenOfNaN) b.v[i] = bits<F32>(0x7FC00000);
      seen = max(seen, own_seen == Codec::kSeenOfNaN ? 0 : own_seen);
      size = max(size, own_size < kInfinity ? own_size : 0);
    }
    seen = group_max<kN>(seen);
    size = group_max<kN>(size);
  }
  const I32 code = Codec::code_of(seen);
  const F32 root = select(code > 0, codec.power_of_two(code + Codec::offset_of(b.top)), 0.0f);
  const F32 bound = second_moment(root * root, bits<F32>(size), s);
  b.top = select(bound > 0.0f, codec.top_above(bound), 0);
  step_limited(b, s);
#pragma unroll
  for (int i = 0; i < kN; ++i) {
    const I32 of_v = codec.encode_v(b.v[i], fed[i], Codec::base_of(b.top), dithers[i]);
    b.codes[i] = codec.encode_m(b.m[i], of_v, Codec::offset_of(b.top), unit(weyl.of[i] + kSalt));
  }
  if (__builtin_expect(is_special, false)) {
#pragma unroll
    for (int i = 0; i < kN; ++i) {
      if (!is_finite(b.v[i])) b.codes[i] = Codec::kOfNaN;
    }
  }
}

// What the storage of floats rounds to bfloat16: m, and v with it. They are then the numbers that
// are stored.
template <bool kRoundsV, int kN>
JADAM_INLINE void round_floats(Block<kN>& b, const Numbers& s, const Weyl<kN>& weyl) {
  I32 m[kN], v[kN], least = kInfinity, most = 0;
  bool is_rare = false;
#pragma unroll
  for (int i = 0; i < kN; ++i) {
    const U32 of_m = weyl.of[i] >> 16, of_v = (weyl.of[i] + kSalt) >> 16;
    const I32 m_size = bits<I32>(abs(b.m[i])), v_size = bits<I32>(abs(b.v[i]));
    least = min(least, min(m_size, v_size));
    most = max(most, max(m_size, v_size));
    m[i] = carried_to_bf16(b.m[i], of_m);
    v[i] = kRoundsV ? carried_to_bf16(b.v[i], of_v) : 0;
    const F32 stored_m = widened(m[i]), stored_v = kRoundsV ? widened(v[i]) : b.v[i];
    is_rare |= may_be_beyond(stored_m, stored_v, s.bound);
  }
  // Small numbers are rounded otherwise.
  is_rare |= least < kSmallestUsual || most > int32_t(kMax);
  if (__builtin_expect(is_rare, false)) {
#pragma unroll
    for (int i = 0; i < kN; ++i) {
      const U32 of_m = weyl.of[i] >> 16, of_v = (weyl.of[i] + kSalt) >> 16;
      round_moments<true, kRoundsV>(b.m[i], b.v[i], of_m, of_v, s, m[i], v[i]);
    }
  }
#pragma unroll
  for (int i = 0; i < kN; ++i) {
    b.m[i] = widened(m[i]);
    if (kRoundsV) b.v[i] = widened(v[i]);
  }
}

// Makes the update of weights p out of the direction.
template <int kN>
JADAM_INLINE void to_update(Block<kN>& b, const F32 (&p)[kN], const Numbers& s, bool decays) {
  if (decays) {
#pragma unroll
    for (int i = 0; i < kN; ++i) b.g[i] += s.weight_decay * p[i];
  }
#pragma unroll
  for (int i = 0; i < kN; ++i) b.g[i] *= -s.learning_rate;
}

// The weights that are trained, of parameters with a residual.
template <int kN>
JADAM_INLINE void join_weights(const Block<kN>& b, F32 (&master)[kN]) {
  bool is_rare = false;
#pragma unroll
  for (int i = 0; i < kN; ++i) {
    is_rare |= any_unusual(b.p[i]);
    master[i] = join_usual(b.p[i], b.steps[i]);
  }
  if (__builtin_expect(is_rare, false)) {
#pragma unroll
    for (int i = 0; i < kN; ++i) master[i] = join_carefully(b.p[i], b.steps[i]);
  }
}

// Makes of the weights after the step what lies in memory: p, or in g the update that takes p there.
template <class R, int kN>
JADAM_INLINE void split_weights(Block<kN>& b, F32 (&master)[kN], const U32 (&dither)[kN],
                                bool writes_params) {
  bool is_rare = false;
  F32 landed[kN];
#pragma unroll
  for (int i = 0; i < kN; ++i) {
    master[i] += b.g[i];
    is_rare |= !split_usual<R>(master[i], b.p[i], dither[i], landed[i], b.above[i]);
  }
  if (!writes_params) {
#pragma unroll
    for (int i = 0; i < kN; ++i) b.g[i] = difference(landed[i], b.p[i]);
  }
  if (__builtin_expect(is_rare, false)) {
#pragma unroll
    for (int i = 0; i < kN; ++i) {
      split_carefully<R>(master[i], b.p[i], dither[i], b.g[i], landed[i], b.above[i]);
    }
  }
#pragma unroll
  for (int i = 0; i < kN; ++i) b.p[i] = landed[i];
}

// The same for parameters that are rounded randomly, the first of them the element `place`.
template <int kN>
JADAM_INLINE void round_weights(Block<kN>& b, uint32_t place, const uint32_t (&words)[2]) {
#pragma unroll
  for (int i = 0; i < kN; ++i) {
    const U32 random = random_bits(place + i, words);
    b.g[i] = difference(round_randomly(b.p[i] + b.g[i], random), b.p[i]);
    b.p[i] = nearest_bf16(b.p[i] + b.g[i]);
  }
}

}  // namespace JADAM_ISA
}  // namespace jadam

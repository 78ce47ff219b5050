// A block of 128 numbers through one step, by a group of threads of which each has kN of them in
// registers: a warp on a GPU, where kN is 4, or one thread that has all, where this is checked.
#pragma once

#include "../lane.h"

#include "../equations.h"

namespace jadam {
namespace JADAM_ISA {

// A thread's part of a block: numbers first, ..., first + kN - 1 of it. What is beyond the end of a
// row is 0.
template <int kN>
struct Block {
  F32 g[kN], p[kN], m[kN], v[kN];
  I32 codes[kN];      // of m and v
  I32 top;            // of the block, where it has codes
  I32 residual[kN];   // of p
  uint32_t first_lane;  // of this part, along the last axis
};

// The larger of what the threads of a group have.
template <int kN>
JADAM_INLINE I32 group_max(I32 x) {
#if defined(__CUDA_ARCH__)
  return __reduce_max_sync(0xFFFFFFFFu, x);
#else
  static_assert(kN == kBlock);
  return x;
#endif
}

// _rounding.weyl at step `count`
JADAM_INLINE U32 weyl(uint32_t lane, uint32_t count, uint32_t salt) {
  return lane % uint32_t(kBlock) * kLane + count * kStep + salt * kSalt;
}

// The same as a number in [0, 1), to 23 bits.
JADAM_INLINE F32 unit(U32 weyl) { return bits<F32>((weyl >> 9) | 0x3F800000u) - 1.0f; }

// The equations of a step on moments as floats. Leaves the direction in g.
template <class Member, int kN>
JADAM_INLINE void step_member(Block<kN>& b, const Numbers& s) {
  const Member member{s};
#pragma unroll
  for (int i = 0; i < kN; ++i) b.g[i] = member(limit_range(b.g[i]), b.m[i], b.v[i]);
}
template <int kN>
JADAM_INLINE void step_floats(Block<kN>& b, const Numbers& s) {
  if (s.g_weight != 0) {
    step_member<Adam<true>>(b, s);
  } else {
    step_member<Adam<false>>(b, s);
  }
}

// The same on moments as codes.
template <int kN>
JADAM_INLINE void step_codes(Block<kN>& b, const Numbers& s, const Codec& codec, uint32_t count) {
  I32 largest_code = 0, largest_g = 0;
  bool is_fed[kN];
#pragma unroll
  for (int i = 0; i < kN; ++i) {
    const I32 code = b.codes[i] & kNaN, size = bits<I32>(abs(b.g[i]));
    largest_code = max(largest_code, code == kNaN ? 0 : code);
    largest_g = max(largest_g, size < 0x7F800000 ? size : 0);
    const F32 v_is_nan = code == kNaN ? bits<F32>(0x7FC00000) : 0.0f;
    codec.decode(b.codes[i], b.top - kTop, b.m[i], b.v[i]);
    b.v[i] += v_is_nan;
    is_fed[i] = b.g[i] != 0.0f;
  }
  largest_code = group_max<kN>(largest_code);
  const F32 g = at_most(bits<F32>(group_max<kN>(largest_g)), 0x1p63f);
  const F32 power = codec.power_of_two(largest_code - kTop + b.top);
  const F32 root = largest_code > 0 ? power : 0.0f, bound = second_moment(root * root, g, s);
  const I32 above = codec.biased_level(bound, 0.0f) - (kBias - 1), top = bound > 0.0f ? above : 0;
  step_floats(b, s);
#pragma unroll
  for (int i = 0; i < kN; ++i) {
    const F32 of_v = unit(weyl(b.first_lane + i, count, 0));
    const F32 of_m = unit(weyl(b.first_lane + i, count, 1));
    const I32 code = codec.encode_v(b.v[i], is_fed[i], top - kTop + kBias, of_v);
    const I32 both = codec.encode_m(b.m[i], code, top - kTop, of_m);
    b.codes[i] = is_finite(b.v[i]) ? both : (64 << 9) | kNaN;
  }
  b.top = top;
}

// What the storage of floats rounds, as bits of bfloat16 in the place of the codes: m in the lower
// half, v in the upper one.
template <int kN, bool kRoundsV>
JADAM_INLINE void round_floats(Block<kN>& b, const Numbers& s, uint32_t count) {
#pragma unroll
  for (int i = 0; i < kN; ++i) {
    const U32 of_m = weyl(b.first_lane + i, count, 0), of_v = weyl(b.first_lane + i, count, 1);
    I32 m_bits = 0, v_bits = 0;
    round_moments<true, kRoundsV>(b.m[i], b.v[i], of_m >> 16, of_v >> 16, s.bound, m_bits, v_bits);
    b.codes[i] = bits<I32>((U32(m_bits) & 0xFFFFu) | U32(v_bits) << 16);
  }
}

// The direction to the update of weights p.
template <int kN>
JADAM_INLINE void to_update(Block<kN>& b, const F32 (&p)[kN], const Numbers& s, bool decays) {
#pragma unroll
  for (int i = 0; i < kN; ++i) {
    if (decays) b.g[i] += s.weight_decay * p[i];
    b.g[i] *= -s.learning_rate;
  }
}

}  // namespace JADAM_ISA
}  // namespace jadam

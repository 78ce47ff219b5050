// One step over a range of a leaf's blocks, in one pass over memory. Compiled once for each
// instruction set. The equations are those of _math.py, _rounding.py and codes.py with the same
// roundings where results are floats, and with other approximations of powers, logarithms and
// reciprocals where they are codes; tests/test_native.py holds the two together.

#include <type_traits>

#include "simd.h"
#include "step.h"

namespace jadam {
namespace JADAM_ISA {
namespace {

// ---- _rounding.py

// The power of two at or below x >= 0, as often in x as ulps are in 1.
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
  return bits<F32>(load_u16(&p->bits) << 16);
}

// To the nearest number of bfloat16, ties to even; NaN stays one.
JADAM_INLINE U32 nearest_bf16(F32 x) {
  const U32 b = bits<U32>(x);
  const U32 nearest = b + (((b >> 16) & 1u) + 0x7FFFu);
  return select(x == x, nearest, b | 0x400000u) & 0xFFFF0000u;
}

JADAM_INLINE void store(float* p, F32 x) { store_vector(p, x); }
JADAM_INLINE void store(BF16* p, F32 x) { store_u16(&p->bits, bits<I32>(nearest_bf16(x) >> 16)); }

// x as `store` would leave it in memory.
template <class T>
JADAM_INLINE F32 rounded(F32 x) {
  if constexpr (std::is_same_v<T, BF16>) return bits<F32>(nearest_bf16(x));
  return x;
}

// ---- _math.py

JADAM_INLINE F32 limit_range(F32 g) {
  F32 limited = at_most(at_least(g, all(-0x1p63f)), all(0x1p63f));
  return select(abs(g) == __builtin_inff(), g, limited);
}

JADAM_INLINE F32 second_moment(F32 v, F32 g, const Numbers& s) {
  F32 toward = g * g - v + (s.dither * 0x1p-23f) * power(v);
  return v + s.complement2 * toward;
}

template <bool kNesterov>
struct Adam {
  const Numbers s;
  const float inverse_c2 = 1.0f / s.c2;

  JADAM_INLINE F32 operator()(F32 g, F32& m, F32& v) const {
    m = m + s.complement1 * (g - m);
    v = second_moment(v, g, s);
    const F32 v_hat = at_most(v * inverse_c2 + s.eps_root, all(s.most));
    const F32 root = sqrt(at_least(v_hat, all(0x1p-103f)));
    if constexpr (kNesterov) {
      return (s.m_weight * m + s.g_weight * g) / (root + s.eps);
    } else {
      return m / (s.c1 * (root + s.eps));
    }
  }
};

// ---- _leaf.py

template <class G, class P, bool kWritesParams>
struct Move {
  const Numbers s;
  const bool decays;
  const P* p;
  std::conditional_t<kWritesParams, P, G>* out;

  JADAM_INLINE void operator()(F32 direction, int64_t i) const {
    if (decays) direction += s.weight_decay * load(p + i);
    F32 update = -s.learning_rate * direction;
    if constexpr (kWritesParams) {
      store(out + i, load(p + i) + rounded<G>(update));
    } else {
      store(out + i, update);
    }
  }
};

// ---- codes.py

constexpr int kTop = 510, kNaN = 511, kM = 63;
constexpr int kBias = 127 * 16;  // of a float's exponent, in levels

// A polynomial's coefficients, each in all lanes.
template <int n>
struct Polynomial {
  F32 coefficients[n];

  explicit Polynomial(const float (&from)[n]) {
    for (int i = 0; i < n; ++i) coefficients[i] = all(from[i]);
  }

  JADAM_INLINE F32 operator()(F32 x) const {
    F32 y = coefficients[n - 1];
    for (int i = n - 2; i >= 0; --i) y = y * x + coefficients[i];
    return y;
  }
};

// Codes to moments and back, with tables where they cost one instruction.
class Codec {
 public:
  Codec(const Numbers& s, const Tables& tables)
      : s_(s),
#if defined(__AVX512F__)
        exp2_(tables.exp2),
        reciprocal_(tables.reciprocal),
        log2_(tables.log2),
        series_(tables.series) {
  }
#elif defined(JADAM_HAS_TABLES)
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

  // m and v from the codes of the step before; offset + code is v's level.
  JADAM_INLINE void decode(I32 both, I32 offset, F32& m, F32& v) const {
    I32 code = both & kNaN;
    F32 root = bits<F32>(bits<I32>(power_of_two(code + offset)) & (code != 0));
    F32 x = to_float((both >> 9) - 64);
    m = root * quotient(s_.before_a * x, s_.before_s * kM - abs(x));
    v = root * root;
  }

  // The code of v after a step: base + code is its biased level. `fed` is 1 where the gradient is
  // not 0, the dither is in [0, 1).
  JADAM_INLINE I32 encode_v(F32 v, I32 fed, I32 base, F32 dither) const {
    I32 raised = biased_level(v, dither) - base;
    return max(min(raised, I32{} + kTop), fed) & (v > 0.0f);
  }

  // Both codes, with that of v.
  JADAM_INLINE I32 encode_m(F32 m, I32 code, I32 offset, F32 dither) const {
    F32 size = abs(m);
    F32 share = quotient(size, s_.now_a * power_of_two(code + offset) + size);
    // Of NaN, which has a code of its own, this is any number: it may wrap.
    I32 level = copysign(min(truncate(scale_ * share + dither), I32{} + kM), m);
    return bits<I32>((bits<U32>(level) + 64u) << 9) | code;
  }

  // floor(32 log2 sqrt(x) + u) + kBias, for x > 0
  JADAM_INLINE I32 biased_level(F32 x, F32 u) const {
    I32 b = bits<I32>(x);
    F32 mantissa = bits<F32>((b & 0x7FFFFF) | 0x3F800000);
#if defined(JADAM_HAS_TABLES)
    I32 place = b >> kPlaceShift;
    F32 r = mantissa * reciprocal_[place] - 1.0f;
    return level_of(place) + truncate(log2_[place] + u + r * series_(r));
#else
    return ((b >> 19) & ~15) + truncate(log2_(mantissa * 2.0f - 3.0f) + u);
#endif
  }

  // 2^(level/32)
  JADAM_INLINE F32 power_of_two(I32 level) const {
#if defined(__AVX512F__)
    return bits<F32>(bits<I32>(exp2_[level]) + (level << 18));
#elif defined(JADAM_HAS_TABLES)
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
#if defined(__AVX512F__)
  static constexpr int kPlaceShift = 18;  // 32 places in an octave of 16 levels
  static JADAM_INLINE I32 level_of(I32 place) { return place >> 1; }
  const Table32 exp2_, reciprocal_, log2_;
  const Polynomial<3> series_;
#elif defined(JADAM_HAS_TABLES)
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

// The largest code of a number and the largest finite |g| of a block; whether it holds anything
// but numbers in the range of limit_range.
struct Largest {
  int32_t code = 0;
  int32_t g_bits = 0;
  bool is_special = false;
};

template <class G>
JADAM_INLINE Largest largest_of(const uint16_t* both, const G* g, int64_t n) {
  I32 code{}, g_bits{};
  for (int64_t i = 0; i < n; i += kLanes) {
    code = max(code, load_u16(both + i) & kNaN);
    g_bits = max(g_bits, bits<I32>(abs(load(g + i))));
  }
  Largest found{largest(code), largest(g_bits)};
  found.is_special = found.code == kNaN || found.g_bits > bits<int32_t>(0x1p63f);
  if (!found.is_special) return found;
  code = g_bits = I32{};
  for (int64_t i = 0; i < n; i += kLanes) {
    I32 c = load_u16(both + i) & kNaN;
    I32 b = bits<I32>(abs(load(g + i)));
    code = max(code, c & (c != kNaN));
    g_bits = max(g_bits, b & (b < 0x7F800000));
  }
  return {largest(code), largest(g_bits), true};
}

// A block through one step. In four short loops: each is a long chain of operations that wait for
// one another, and the shorter a loop is, the more vectors of it a processor has under way. One
// loop of all takes a quarter more time.
template <bool kIsSpecial, class G, class Member, class Out>
__attribute__((noinline)) void step_block(const uint16_t* both, uint16_t* both_out, const G* g,
                                          int64_t n, int32_t top, int32_t new_top,
                                          const Dithers& dithers, const Codec& codec,
                                          const Member& known_member, const Out& known_move) {
  // Copies: the compiler sees that no store changes them.
  const Member member = known_member;
  const Out move = known_move;
  const I32 offset = I32{} + (top - kTop), new_offset = I32{} + (new_top - kTop);
  const I32 new_base = I32{} + (new_top - kTop + kBias);
  const auto gradient = [&](int64_t i) {
    return kIsSpecial ? limit_range(load(g + i)) : load(g + i);
  };
  alignas(64) float m[kBlock], v[kBlock];
  alignas(64) int32_t codes[kBlock];
  for (int64_t i = 0; i < n; i += kLanes) {
    I32 old = load_u16(both + i);
    F32 m_, v_;
    codec.decode(old, offset, m_, v_);
    if constexpr (kIsSpecial) v_ = select((old & kNaN) == kNaN, all(__builtin_nanf("")), v_);
    store_vector(m + i, m_);
    store_vector(v + i, v_);
  }
  for (int64_t i = 0; i < n; i += kLanes) {
    const F32 g_ = gradient(i);
    F32 m_ = load_vector<F32>(m + i), v_ = load_vector<F32>(v + i);
    move(member(g_, m_, v_), i);
    store_vector(m + i, m_);
    store_vector(v + i, v_);
    store_vector(codes + i, (g_ != 0.0f) & 1);  // an update may lie where the gradient lay
  }
  for (int64_t i = 0; i < n; i += kLanes) {
    I32 code = codec.encode_v(load_vector<F32>(v + i), load_vector<I32>(codes + i), new_base,
                              load_vector<F32>(dithers.unit[0] + i));
    store_vector(codes + i, code);
  }
  for (int64_t i = 0; i < n; i += kLanes) {
    I32 new_ = codec.encode_m(load_vector<F32>(m + i), load_vector<I32>(codes + i), new_offset,
                              load_vector<F32>(dithers.unit[1] + i));
    if constexpr (kIsSpecial) {
      new_ =
          select(abs(load_vector<F32>(v + i)) < __builtin_inff(), new_, I32{} + ((64 << 9) | kNaN));
    }
    store_u16(both_out + i, new_);
  }
}

// So many blocks' tops are computed together.
constexpr int kGroup = 16;
static_assert(kGroup % kLanes == 0);

// The tops of blocks after a step: the equations of the largest v and |g| bound v.
JADAM_INLINE void tops_after(const Largest* largest, const int32_t* tops, int32_t* new_tops,
                             const Codec& codec, const Numbers& s) {
  for (int first = 0; first < kGroup; first += kLanes) {
    I32 code, top;
    F32 g;
    for (int i = 0; i < kLanes; ++i) {
      code[i] = largest[first + i].code;
      g[i] = bits<float>(largest[first + i].g_bits);
      top[i] = tops[first + i];
    }
    F32 root = bits<F32>(bits<I32>(codec.power_of_two(code - kTop + top)) & (code > 0));
    F32 bound = second_moment(root * root, at_most(g, all(0x1p63f)), s);
    I32 above = (codec.biased_level(bound, F32{}) - (kBias - 1)) & (bound > 0.0f);
    store_vector(new_tops + first, above);
  }
}

// What a loop will need, into the cache: n numbers from p on, a line of 64 bytes each.
template <class T>
JADAM_INLINE void prefetch(const T* p, int64_t n) {
  for (int64_t i = 0; i < n; i += 64 / int64_t(sizeof(T))) __builtin_prefetch(p + i, 1);
}

// ---- a leaf

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

template <class Member, class G, class P, bool kWritesParams>
void run_codes(const Leaf& leaf, Range range, const Numbers& s, const Tables& tables,
               const Dithers& dithers) {
  using Written = std::conditional_t<kWritesParams, P, G>;
  const Member member{s};
  const Codec codec(s, tables);
  const int64_t in_row = leaf.blocks_in_row();
  const auto* g = static_cast<const G*>(leaf.g);
  const auto* p = static_cast<const P*>(leaf.p);
  const auto* both = static_cast<const uint16_t*>(leaf.m);
  const auto* tops = static_cast<const int16_t*>(leaf.v);
  auto* both_out = static_cast<uint16_t*>(leaf.m_out);
  auto* tops_out = static_cast<int16_t*>(leaf.v_out);
  auto* out = static_cast<Written*>(leaf.out);

  for (int64_t first = range.begin; first < range.end; first += kGroup) {
    const int blocks = int(range.end - first < kGroup ? range.end - first : kGroup);
    Largest largest[kGroup];
    int32_t old_tops[kGroup] = {}, new_tops[kGroup];
    int64_t at[kGroup], length[kGroup];
    for (int b = 0; b < blocks; ++b) {
      const int64_t row = (first + b) / in_row, in = ((first + b) % in_row) * kBlock;
      at[b] = row * leaf.n + in;
      length[b] = leaf.n - in < kBlock ? leaf.n - in : kBlock;
      old_tops[b] = tops[first + b];
      if (length[b] % kLanes == 0) {
        largest[b] = largest_of(both + at[b], g + at[b], length[b]);
      } else {
        Padded<uint16_t> codes;
        Padded<G> gradient;
        largest[b] = largest_of(codes.copy(both + at[b], length[b]),
                                gradient.copy(g + at[b], length[b]), length[b]);
      }
    }
    tops_after(largest, old_tops, new_tops, codec, s);
    for (int b = 0; b < blocks; ++b) {
      const int64_t i = at[b], n = length[b];
      // The next blocks come from memory while these are computed.
      constexpr int64_t kAhead = kGroup * kBlock;
      prefetch(g + i + kAhead, kBlock);
      prefetch(both + i + kAhead, kBlock);
      if (p != nullptr) prefetch(p + i + kAhead, kBlock);
      const auto step = [&](const uint16_t* codes, uint16_t* codes_out, const G* gradient,
                            const Move<G, P, kWritesParams>& move) {
        if (largest[b].is_special) {
          step_block<true>(codes, codes_out, gradient, n, old_tops[b], new_tops[b], dithers, codec,
                           member, move);
        } else {
          step_block<false>(codes, codes_out, gradient, n, old_tops[b], new_tops[b], dithers, codec,
                            member, move);
        }
      };
      if (n % kLanes == 0) {
        step(both + i, both_out + i, g + i, {s, leaf.decays, shifted(p, i), out + i});
      } else {
        Padded<uint16_t> codes;
        Padded<G> gradient;
        Padded<P> param;
        Padded<Written> written;
        codes.copy(both + i, n);
        step(codes.values, codes.values, gradient.copy(g + i, n),
             {s, leaf.decays, p == nullptr ? nullptr : param.copy(p + i, n), written.values});
        copy_back(both_out + i, codes, n);
        copy_back(out + i, written, n);
      }
      tops_out[first + b] = int16_t(new_tops[b]);
    }
  }
}

// Both moments, rounded where their memory is narrower. One branch for both.
template <class M, class V>
JADAM_INLINE void store_moments(M* m_out, V* v_out, F32 m, F32 v, const Dithers& dithers,
                                int64_t lane, float bound) {
  const U32 dither_m = load_vector<U32>(dithers.upper[0] + lane);
  const U32 dither_v = load_vector<U32>(dithers.upper[1] + lane);
  constexpr bool kRoundsM = std::is_same_v<M, BF16>, kRoundsV = std::is_same_v<V, BF16>;
  const bool is_careful = (kRoundsM || kRoundsV) && any_careful(kRoundsM ? m : v, kRoundsV ? v : m);
  const auto rounded_up = [&](F32 x, U32 dither) {
    return is_careful ? round_to_bf16(x, dither) : carried_to_bf16(x, dither);
  };
  if constexpr (kRoundsV) {
    const I32 kept = rounded_up(v, dither_v);
    store_u16(&v_out->bits, kept);
    v = bits<F32>(bits<U32>(kept) << 16);
  } else {
    store(v_out, v);
  }
  if constexpr (kRoundsM) {
    // No rounding takes m past its bound beside the v that is stored: then it is cut.
    I32 kept = rounded_up(m, dither_m);
    const F32 size = abs(bits<F32>(bits<U32>(kept) << 16)), second = at_least(v, all(0x1p-116f));
    // The squares say by themselves where it is far from that.
    if (any(size * size > bound * bound * 0.999f * second)) {
      const F32 most = bound * sqrt(second);
      const U32 sign = bits<U32>(m) & 0x80000000u;
      const U32 cut = (bits<U32>(at_most(abs(m), most)) | sign) >> 16;
      kept = select(size > most, bits<I32>(cut), kept);
    }
    store_u16(&m_out->bits, kept);
  } else {
    store(m_out, m);
  }
}

template <class Member, class G, class P, bool kWritesParams, class M, class V>
void run_floats(const Leaf& leaf, Range range, const Numbers& s, const Dithers& dithers) {
  using Written = std::conditional_t<kWritesParams, P, G>;
  const Member known_member{s};
  const int64_t in_row = leaf.blocks_in_row();

  const auto step = [&](const G* g, const M* m, const V* v, M* m_out, V* v_out,
                        const Move<G, P, kWritesParams>& known_move, int64_t n)
                        __attribute__((noinline)) {
                          // Copies, as in step_block.
                          const Member member = known_member;
                          const auto move = known_move;
                          for (int64_t i = 0; i < n; i += kLanes) {
                            F32 m_ = load(m + i), v_ = load(v + i);
                            move(member(limit_range(load(g + i)), m_, v_), i);
                            store_moments(m_out + i, v_out + i, m_, v_, dithers, i % kBlock, s.bound);
                          }
                        };

  // A row's blocks at once, but for the last one where it does not fill its vectors.
  for (int64_t block = range.begin, count; block < range.end; block += count) {
    const int64_t row = block / in_row, in = (block % in_row) * kBlock, i = row * leaf.n + in;
    const int64_t rest = leaf.n - in;
    count = in_row - block % in_row;
    if (range.end - block < count) count = range.end - block;
    if (rest < count * kBlock && rest % kLanes != 0 && count > 1) --count;
    const int64_t n = rest < count * kBlock ? rest : count * kBlock;
    const auto* g = static_cast<const G*>(leaf.g) + i;
    const auto* p = shifted(static_cast<const P*>(leaf.p), i);
    const auto* m = static_cast<const M*>(leaf.m) + i;
    const auto* v = static_cast<const V*>(leaf.v) + i;
    auto* m_out = static_cast<M*>(leaf.m_out) + i;
    auto* v_out = static_cast<V*>(leaf.v_out) + i;
    auto* out = static_cast<Written*>(leaf.out) + i;
    if (n % kLanes == 0) {
      step(g, m, v, m_out, v_out, {s, leaf.decays, p, out}, n);
    } else {
      Padded<G> gradient;
      Padded<P> param;
      Padded<M> first;
      Padded<V> second;
      Padded<Written> written;
      step(gradient.copy(g, n), first.copy(m, n), second.copy(v, n), first.values, second.values,
           {s, leaf.decays, p == nullptr ? nullptr : param.copy(p, n), written.values}, n);
      copy_back(m_out, first, n);
      copy_back(v_out, second, n);
      copy_back(out, written, n);
    }
  }
}

// ---- dtypes to templates

template <class Member, class G, class P, bool kWritesParams>
void run_moments(const Leaf& leaf, Range range, const Numbers& s, const Tables& tables,
                 const Dithers& dithers) {
  if (leaf.is_coded) {
    run_codes<Member, G, P, kWritesParams>(leaf, range, s, tables, dithers);
  } else if (leaf.v_dtype == Float::kBF16) {
    run_floats<Member, G, P, kWritesParams, BF16, BF16>(leaf, range, s, dithers);
  } else if (leaf.m_dtype == Float::kBF16) {
    run_floats<Member, G, P, kWritesParams, BF16, float>(leaf, range, s, dithers);
  } else {
    run_floats<Member, G, P, kWritesParams, float, float>(leaf, range, s, dithers);
  }
}

template <class Member, class G, class P>
void run_params(const Leaf& leaf, Range range, const Numbers& s, const Tables& tables,
                const Dithers& dithers) {
  (leaf.writes_params ? run_moments<Member, G, P, true>
                      : run_moments<Member, G, P, false>)(leaf, range, s, tables, dithers);
}

template <class Member>
void run_member(const Leaf& leaf, Range range, const Numbers& s, const Tables& tables,
                const Dithers& dithers) {
  (leaf.g_dtype == Float::kF32   ? run_params<Member, float, float>
   : leaf.p_dtype == Float::kF32 ? run_params<Member, BF16, float>
                                 : run_params<Member, BF16, BF16>)(leaf, range, s, tables, dithers);
}

void run_plain(const Leaf& leaf, Range range, const Numbers& s, const Tables& tables,
               const Dithers& dithers) {
  (s.g_weight != 0 ? run_member<Adam<true>> : run_member<Adam<false>>)(leaf, range, s, tables,
                                                                       dithers);
}

// ---- _masters.py

constexpr int32_t kSign = INT32_MIN, kLargest = 0x7F7F;

JADAM_INLINE I32 is_finite(F32 x) { return abs(x) < __builtin_inff(); }
JADAM_INLINE I32 size_of(I32 order) { return max(order, -order); }

// float32's numbers in their order.
JADAM_INLINE I32 ordered(F32 x) {
  const I32 b = bits<I32>(x), sign = b >> 31;
  return ((b & ~kSign) ^ sign) - sign;
}

// The nearest bfloat16.
JADAM_INLINE F32 nearest(F32 x) {
  const U32 b = bits<U32>(x);
  const U32 near = b + (((b >> 16) & 1u) + 0x7FFFu);
  return bits<F32>(select(x == x, near, b | 0x400000u) & 0xFFFF0000u);
}

// u with x + u = target; -0 where nothing moves.
JADAM_INLINE F32 difference(F32 target, F32 x) {
  const float largest = 0x1.fffffep127f;
  const F32 moved = at_most(at_least(target - x, all(-largest)), all(largest));
  return select(bits<I32>(target) == bits<I32>(x), all(-0.0f),
                select(is_finite(target), moved, target));
}

template <class R>
JADAM_INLINE F32 join(F32 x, I32 residual) {
  constexpr int kShift = 16 - 8 * int(sizeof(R));
  const I32 order = ordered(x) + (residual << kShift);
  const I32 joined = size_of(order) | (select(order == 0, bits<I32>(x), order) & kSign);
  return select(is_finite(x), bits<F32>(joined), x);
}

// A weight after its step: the update, the bfloat16 that x and the update give, the residual there.
struct Narrowed {
  F32 update, landed;
  I32 residual;
};

// The bfloat16 nearest to the master, and what it leaves.
template <class R>
JADAM_INLINE Narrowed split(F32 master, F32 x, U32 dither) {
  constexpr int kShift = 16 - 8 * int(sizeof(R));
  const I32 sign = bits<I32>(master) & kSign;
  I32 order = ordered(master);
  if constexpr (kShift > 0) order += bits<I32>(dither >> (32 - kShift));
  I32 upper = (order + 0x8000) >> 16;
  // As nearly always: the numbers are finite and the sum is exact, so that it lands on the target.
  const F32 near = bits<F32>((size_of(upper) << 16) | sign), moved = near - x;
  const I32 is_usual = (abs(master) < 0x1p127f) & (x + moved == near);
  if (__builtin_expect(!any(~is_usual), true)) {
    const F32 update = select(bits<I32>(near) == bits<I32>(x), all(-0.0f), moved);
    return {update, near, (order - (upper << 16)) >> kShift};
  }
  const I32 finite = is_finite(master);
  upper = min(max(upper, I32{} - kLargest), I32{} + kLargest);
  const I32 target = (size_of(upper) << 16) | sign;
  const F32 update = difference(select(finite, bits<F32>(target), master), x);
  const F32 landed = nearest(x + update);
  const I32 place = ordered(landed);
  order = min(max(order, place - 0x8000), place + 0x7FFF);
  return {update, landed, finite & ((order - place) >> kShift)};
}

// One of the two neighbours of the master.
JADAM_INLINE F32 round_randomly(F32 master, U32 random) {
  const F32 size = abs(master), s = at_least(power(master) * 0x1p-7f, all(0x1p-126f));
  const F32 steps = size / s, below = to_float(truncate(steps));
  const F32 share = to_float(bits<I32>(random >> 8)) * 0x1p-24f;
  const F32 rounded = (below + select(share < steps - below, all(1.0f), F32{})) * s;
  const I32 with_sign = bits<I32>(rounded) | (bits<I32>(master) & kSign);
  const I32 in_range = (bits<I32>(master) & ~kSign) <= (kLargest << 16);
  return select(in_range, bits<F32>(with_sign), nearest(master));
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

// `weyl` of a block's lanes without its phase, twice: from any lane on a vector can be read.
struct Lanes {
  uint32_t weyl[2 * kBlock];

  constexpr Lanes() : weyl{} {
    for (uint32_t i = 0; i < 2 * kBlock; ++i) weyl[i] = i % kBlock * kLane;
  }
};
constexpr Lanes kLanesOfBlock;

// Some blocks' weights as float32, from those in memory and their residuals.
template <class R>
void expand(const BF16* p, const R* residual, int64_t n, float* master) {
  const int64_t whole = n - n % kLanes;
  for (int64_t i = 0; i < whole; i += kLanes) {
    store(master + i, join<R>(load(p + i), load_integers(residual + i)));
  }
  if (whole == n) return;
  Padded<BF16> last;
  Padded<R> rest;
  last.copy(p + whole, n - whole);
  rest.copy(residual + whole, n - whole);
  store(master + whole, join<R>(load(last.values), load_integers(rest.values)));
}

// Float32 weights as they lie in memory: the parameter, or the update to it, and the residual.
// `step(master, x, i)` is that of the vector at i.
template <class R, class Out, class Step>
JADAM_INLINE void narrow(const float* master, const BF16* p, int64_t n, R* residual, Out* out,
                         const Step& step) {
  const auto vector = [&](int64_t i, const BF16* from, R* residual_out, Out* to) {
    const Narrowed found = step(load(master + i), load(from), i);
    if constexpr (std::is_same_v<Out, BF16>) {
      store_u16(&to->bits, bits<I32>(bits<U32>(found.landed) >> 16));
    } else {
      store(to, found.update);
    }
    if (residual_out != nullptr) store_integers(residual_out, found.residual);
  };
  const int64_t whole = n - n % kLanes;
  for (int64_t i = 0; i < whole; i += kLanes) vector(i, p + i, shifted(residual, i), out + i);
  if (whole == n) return;
  Padded<BF16> last;
  Padded<R> rest;
  Padded<Out> written;
  vector(whole, last.copy(p + whole, n - whole), residual == nullptr ? nullptr : rest.values,
         written.values);
  if (residual != nullptr) copy_back(residual + whole, rest, n - whole);
  copy_back(out + whole, written, n - whole);
}

// The same by the leaf's kind of weights; its numbers begin at `first`, `out` is theirs.
template <class Out>
void narrow_leaf(const Leaf& leaf, const float* master, int64_t first, int64_t n, Out* out) {
  const BF16* p = static_cast<const BF16*>(leaf.p) + first;
  if (leaf.weights == Weights::kCompensated8) {
    const auto step = [&](F32 to, F32 x, int64_t i) {
      const uint32_t lane = (leaf.first_lane + uint32_t(i)) % kBlock;
      return split<int8_t>(to, x, load_vector<U32>(kLanesOfBlock.weyl + lane) + leaf.phase);
    };
    narrow(master, p, n, static_cast<int8_t*>(leaf.residual_out) + first, out, step);
  } else if (leaf.weights == Weights::kCompensated16) {
    const auto step = [](F32 to, F32 x, int64_t) { return split<int16_t>(to, x, U32{}); };
    narrow(master, p, n, static_cast<int16_t*>(leaf.residual_out) + first, out, step);
  } else {
    U32 lane;
    for (int i = 0; i < kLanes; ++i) lane[i] = uint32_t(i);
    const auto step = [&](F32 to, F32 x, int64_t i) -> Narrowed {
      const U32 random = random_bits(lane + uint32_t(first + i), leaf.words);
      const F32 update = difference(round_randomly(to, random), x);
      return {update, nearest(x + update), I32{}};
    };
    narrow(master, p, n, static_cast<int8_t*>(nullptr), out, step);
  }
}

inline void widen(const BF16* from, int64_t n, float* to) {
  for (int64_t i = 0; i < n; ++i) to[i] = bits<float>(uint32_t(from[i].bits) << 16);
}

// n numbers of a dtype from place i on.
inline const void* at(const void* x, Float dtype, int64_t i) {
  return static_cast<const char*>(x) + i * (dtype == Float::kF32 ? 4 : 2);
}
inline void* at(void* x, Float dtype, int64_t i) {
  return static_cast<char*>(x) + i * (dtype == Float::kF32 ? 4 : 2);
}

// A leaf of weights that stand for more than their 16 bits: some blocks at a time, the weights go
// through memory that stays in the cache, and are stepped there in float32.
void run_weights(const Leaf& leaf, Range range, const Numbers& s, const Tables& tables,
                 const Dithers& dithers) {
  const int64_t in_row = leaf.blocks_in_row();
  const auto* p = static_cast<const BF16*>(leaf.p);
  alignas(64) float master[kGroup * kBlock], gradient[kGroup * kBlock];
  for (int64_t block = range.begin, count; block < range.end; block += count) {
    const int64_t row = block / in_row, in = block % in_row;
    count = range.end - block < kGroup ? range.end - block : kGroup;
    count = in_row - in < count ? in_row - in : count;
    const int64_t i = row * leaf.n + in * kBlock;
    const int64_t rest = leaf.n - in * kBlock, n = count * kBlock < rest ? count * kBlock : rest;
    if (leaf.weights == Weights::kCompensated8) {
      expand(p + i, static_cast<const int8_t*>(leaf.residual) + i, n, master);
    } else if (leaf.weights == Weights::kCompensated16) {
      expand(p + i, static_cast<const int16_t*>(leaf.residual) + i, n, master);
    } else {
      widen(p + i, n, master);
    }
    Leaf part = leaf;
    part.rows = 1;
    part.n = n;
    part.g = at(leaf.g, leaf.g_dtype, i);
    if (leaf.g_dtype == Float::kBF16) {
      widen(static_cast<const BF16*>(part.g), n, gradient);
      part.g = gradient;
      part.g_dtype = Float::kF32;
    }
    const Float m_dtype = leaf.is_coded ? Float::kBF16 : leaf.m_dtype;  // codes have 16 bits too
    const Float v_dtype = leaf.is_coded ? Float::kBF16 : leaf.v_dtype;
    const int64_t of_v = leaf.is_coded ? block : i;
    part.m = at(leaf.m, m_dtype, i);
    part.m_out = at(leaf.m_out, m_dtype, i);
    part.v = at(leaf.v, v_dtype, of_v);
    part.v_out = at(leaf.v_out, v_dtype, of_v);
    part.p = part.out = master;
    part.p_dtype = Float::kF32;
    part.writes_params = true;
    run_plain(part, {0, count}, s, tables, dithers);
    if (leaf.writes_params) {
      narrow_leaf(leaf, master, i, n, static_cast<BF16*>(leaf.out) + i);
    } else {
      narrow_leaf(leaf, master, i, n, static_cast<float*>(leaf.out) + i);
    }
  }
}

}  // namespace

void run(const Leaf& leaf, Range range, const Numbers& s, const Tables& tables,
         const Dithers& dithers) {
  (leaf.weights == Weights::kPlain ? run_plain : run_weights)(leaf, range, s, tables, dithers);
}

}  // namespace JADAM_ISA
}  // namespace jadam

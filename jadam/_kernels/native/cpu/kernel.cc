// One step over a range of a leaf's blocks, in one pass over memory. Compiled once for each
// instruction set.

#include "codecs.h"

namespace jadam {
namespace JADAM_ISA {
namespace {

// ---- blocks of codes

// The numbers of a block, from when its codes are decoded until they are encoded again.
struct Block {
  alignas(64) float m[kBlock], v[kBlock];
  alignas(64) int32_t codes[kBlock];  // before v's codes are made, 1 where the gradient is not 0
};

// A block through one step is four short loops, in three functions: each loop is a long chain of
// operations that wait for one another, and the shorter a loop is, the more vectors of it a
// processor has under way. One loop of all takes a quarter more time. What stays the same in a loop
// is copied first: the compiler sees then that no store changes it.

template <bool kIsSpecial, class Codec>
__attribute__((noinline)) void decode_block(const Codec& known_codec,
                                            const typename Codec::Both* both, int64_t n,
                                            int32_t top, Block& block) {
  const Codec codec = known_codec;
  const I32 offset = I32{} + Codec::offset_of(top);
  for (int64_t i = 0; i < n; i += kLanes) {
    const I32 old = codec.load_both(both + i);
    F32 m, v;
    codec.decode(old, offset, m, v);
    if constexpr (kIsSpecial) v = select(codec.is_nan(old), all(__builtin_nanf("")), v);
    store_vector(block.m + i, m);
    store_vector(block.v + i, v);
  }
}

template <bool kIsSpecial, class G, class Member, class Out>
__attribute__((noinline)) void move_vectors(const G* g, int64_t n, const Member& known_member,
                                            const Out& known_move, Block& block) {
  const Member member = known_member;
  const Out move = known_move;
  for (int64_t i = 0; i < n; i += kLanes) {
    const F32 g_ = kIsSpecial ? limit_range(load(g + i)) : load(g + i);
    F32 m = load_vector<F32>(block.m + i), v = load_vector<F32>(block.v + i);
    move(member(g_, m, v), i);
    store_vector(block.m + i, m);
    store_vector(block.v + i, v);
    store_vector(block.codes + i, (g_ != 0.0f) & 1);  // an update may lie where the gradient lay
  }
}

template <bool kIsSpecial, class Codec>
__attribute__((noinline)) void encode_block(const Codec& known_codec, Block& block, int64_t n,
                                            int32_t top, const Dithers& dithers,
                                            typename Codec::Both* both) {
  const Codec codec = known_codec;
  const I32 offset = I32{} + Codec::offset_of(top), base = I32{} + Codec::base_of(top);
  for (int64_t i = 0; i < n; i += kLanes) {
    const I32 code =
        codec.encode_v(load_vector<F32>(block.v + i), load_vector<I32>(block.codes + i), base,
                       dithers, i);
    store_vector(block.codes + i, code);
  }
  for (int64_t i = 0; i < n; i += kLanes) {
    I32 new_ = codec.encode_m(load_vector<F32>(block.m + i), load_vector<I32>(block.codes + i),
                              offset, load_vector<F32>(dithers.unit[1] + i));
    if constexpr (kIsSpecial) {
      const Mask is_finite = abs(load_vector<F32>(block.v + i)) < __builtin_inff();
      new_ = select(is_finite, new_, I32{} + Codec::kOfNaN);
    }
    codec.store_both(both + i, new_);
  }
}

// The step of the decoded moments of a block whose numbers begin at `first`.
template <class Member, class G, class P, bool kWritesParams>
void move_block(const Leaf& leaf, const Numbers& s, int64_t first, int64_t n, bool is_special,
                Block& block) {
  using Written = std::conditional_t<kWritesParams, P, G>;
  const auto* g = static_cast<const G*>(leaf.g) + first;
  const auto* p = shifted(static_cast<const P*>(leaf.p), first);
  auto* out = static_cast<Written*>(leaf.out) + first;
  const auto step = [&](const G* gradient, const Move<G, P, kWritesParams>& move) {
    (is_special ? move_vectors<true, G, Member, Move<G, P, kWritesParams>>
                : move_vectors<false, G, Member, Move<G, P, kWritesParams>>)(gradient, n, Member{s},
                                                                             move, block);
  };
  if (n % kLanes == 0) {
    step(g, {s, leaf.decays, p, out});
  } else {
    Padded<G> gradient;
    Padded<P> param;
    Padded<Written> written;
    step(gradient.copy(g, n),
         {s, leaf.decays, p == nullptr ? nullptr : param.copy(p, n), written.values});
    copy_back(out, written, n);
  }
}

using MoveBlock = void (*)(const Leaf&, const Numbers&, int64_t, int64_t, bool, Block&);

// The largest code of a number and the largest finite |g| of a block; whether it holds anything
// but numbers in the range of limit_range.
struct Largest {
  int32_t code = 0;
  int32_t g_bits = 0;
  bool is_special = false;
};

template <bool kFiniteAlone, class G>
JADAM_INLINE int32_t largest_bits(const G* g, int64_t n) {
  I32 found{};
  for (int64_t i = 0; i < n; i += kLanes) {
    I32 b = bits<I32>(abs(load(g + i)));
    if constexpr (kFiniteAlone) b = b & (b < 0x7F800000);
    found = max(found, b);
  }
  return largest(found);
}

template <class Codec, class G>
JADAM_INLINE Largest largest_of_vectors(const typename Codec::Both* both, const G* g, int64_t n) {
  Largest found{Codec::template largest_code<false>(both, n), largest_bits<false>(g, n)};
  found.is_special = found.code > Codec::kHighest || found.g_bits > bits<int32_t>(0x1p63f);
  if (!found.is_special) return found;
  return {Codec::template largest_code<true>(both, n), largest_bits<true>(g, n), true};
}

template <class Codec, class G>
Largest largest_of(const typename Codec::Both* both, const G* g, int64_t n) {
  if (n % kLanes == 0) return largest_of_vectors<Codec>(both, g, n);
  Padded<typename Codec::Both> codes;
  Padded<G> gradient;
  return largest_of_vectors<Codec>(codes.copy(both, n), gradient.copy(g, n), n);
}

// How many blocks' tops are computed together.
constexpr int kGroup = 16;
static_assert(kGroup % kLanes == 0);

// The tops of blocks after a step: the equations of the largest v and |g| bound v.
template <class Codec>
JADAM_INLINE void tops_after(const Largest* largest, const int32_t* tops, int32_t* new_tops,
                             const Codec& codec, const Numbers& s) {
  for (int first = 0; first < kGroup; first += kLanes) {
    I32 code, offset;
    F32 g;
    for (int i = 0; i < kLanes; ++i) {
      code[i] = largest[first + i].code;
      g[i] = bits<float>(largest[first + i].g_bits);
      offset[i] = Codec::offset_of(tops[first + i]);
    }
    F32 root = bits<F32>(bits<I32>(codec.power_of_two(code + offset)) & (code > 0));
    F32 bound = second_moment(root * root, at_most(g, all(0x1p63f)), s);
    store_vector(new_tops + first, codec.top_above(bound) & (bound > 0.0f));
  }
}

// ---- a leaf

inline const char* at(const void* x, int64_t bytes) { return static_cast<const char*>(x) + bytes; }
inline char* at(void* x, int64_t bytes) { return static_cast<char*>(x) + bytes; }

template <class Codec>
void run_codes(const Leaf& leaf, Range range, const Numbers& s, const Tables& tables,
               const Dithers& dithers, MoveBlock move) {
  using Both = typename Codec::Both;
  const Codec codec(s, tables);
  const int64_t in_row = leaf.blocks_in_row();
  const auto* both = static_cast<const Both*>(leaf.m);
  const auto* tops = static_cast<const int16_t*>(leaf.v);
  auto* both_out = static_cast<Both*>(leaf.m_out);
  auto* tops_out = static_cast<int16_t*>(leaf.v_out);

  for (int64_t first = range.begin; first < range.end; first += kGroup) {
    const int blocks = int(range.end - first < kGroup ? range.end - first : kGroup);
    Largest largest[kGroup];
    int32_t old_tops[kGroup] = {}, new_tops[kGroup];
    int64_t begin[kGroup], length[kGroup];
    for (int b = 0; b < blocks; ++b) {
      const int64_t row = (first + b) / in_row, in = ((first + b) % in_row) * kBlock;
      const int64_t i = begin[b] = row * leaf.n + in;
      const int64_t n = length[b] = leaf.n - in < kBlock ? leaf.n - in : kBlock;
      old_tops[b] = tops[first + b];
      largest[b] = leaf.g_dtype == Float::kF32
                       ? largest_of<Codec>(both + i, static_cast<const float*>(leaf.g) + i, n)
                       : largest_of<Codec>(both + i, static_cast<const BF16*>(leaf.g) + i, n);
    }
    tops_after(largest, old_tops, new_tops, codec, s);
    for (int b = 0; b < blocks; ++b) {
      const int64_t i = begin[b], n = length[b];
      const bool is_special = largest[b].is_special;
      // The next blocks come from memory while these are computed.
      constexpr int64_t kAhead = kGroup * kBlock;
      const int64_t g_size = size_of(leaf.g_dtype), p_size = size_of(leaf.p_dtype);
      prefetch(at(leaf.g, (i + kAhead) * g_size), kBlock * g_size);
      prefetch(both + i + kAhead, kBlock);
      if (leaf.p != nullptr) prefetch(at(leaf.p, (i + kAhead) * p_size), kBlock * p_size);
      const auto decode = is_special ? decode_block<true, Codec> : decode_block<false, Codec>;
      const auto encode = is_special ? encode_block<true, Codec> : encode_block<false, Codec>;
      Block block;
      if (n % kLanes == 0) {
        decode(codec, both + i, n, old_tops[b], block);
        move(leaf, s, i, n, is_special, block);
        encode(codec, block, n, new_tops[b], dithers, both_out + i);
      } else {
        Padded<Both> codes;
        decode(codec, codes.copy(both + i, n), n, old_tops[b], block);
        move(leaf, s, i, n, is_special, block);
        encode(codec, block, n, new_tops[b], dithers, codes.values);
        copy_back(both_out + i, codes, n);
      }
      tops_out[first + b] = int16_t(new_tops[b]);
    }
  }
}

// Both moments, rounded where their memory is narrower. One branch for both.
template <class M, class V>
JADAM_INLINE void store_moments(M* m_out, V* v_out, F32 m, F32 v, const Dithers& dithers,
                                int64_t lane, const Numbers& s) {
  constexpr bool kRoundsM = std::is_same_v<M, BF16>, kRoundsV = std::is_same_v<V, BF16>;
  I32 m_bits, v_bits;
  round_moments<kRoundsM, kRoundsV>(m, v, load_vector<U32>(dithers.upper[0] + lane),
                                    load_vector<U32>(dithers.upper[1] + lane), s, m_bits,
                                    v_bits);
  if constexpr (kRoundsM) store_u16(&m_out->bits, m_bits); else store(m_out, m);
  if constexpr (kRoundsV) store_u16(&v_out->bits, v_bits); else store(v_out, v);
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
                            prefetch_ahead(g + i);
                            prefetch_ahead(m + i);
                            prefetch_ahead(v + i);
                            if (move.p != nullptr) prefetch_ahead(move.p + i);
                            F32 m_ = load(m + i), v_ = load(v + i);
                            move(member(limit_range(load(g + i)), m_, v_), i);
                            store_moments(m_out + i, v_out + i, m_, v_, dithers, i % kBlock, s);
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
  if (leaf.is_coded()) {
    (leaf.codes == Codes::kEightBits ? run_codes<EightBits> : run_codes<FourBits>)(
        leaf, range, s, tables, dithers, move_block<Member, G, P, kWritesParams>);
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
// `step(master, x, i, update, landed, above)` is that of the vector at i. What the blocks after these
// will need comes from memory meanwhile: their weights, and what of `g` is not null.
template <class R, class Out, class Step>
JADAM_INLINE void narrow(const float* master, const BF16* p, int64_t n, R* residual, Out* out,
                         const BF16* g, const Step& step) {
  const auto vector = [&](int64_t i, const BF16* from, R* residual_out, Out* to) {
    F32 update, landed;
    I32 above;
    step(load(master + i), load(from), i, update, landed, above);
    if constexpr (std::is_same_v<Out, BF16>) {
      store_u16(&to->bits, bits<I32>(bits<U32>(landed) >> 16));
    } else {
      store(to, update);
    }
    if (residual_out != nullptr) store_integers(residual_out, residual_of<R>(above));
  };
  const int64_t whole = n - n % kLanes;
  for (int64_t i = 0; i < whole; i += kLanes) {
    const int64_t next = i + kGroup * kBlock;
    prefetch(p + next);
    if (residual != nullptr) prefetch(residual + next);
    if (g != nullptr) prefetch(g + next);
    vector(i, p + i, shifted(residual, i), out + i);
  }
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
  const auto* g =
      leaf.g_dtype == Float::kBF16 ? static_cast<const BF16*>(leaf.g) + first : nullptr;
  if (leaf.weights == Weights::kCompensated8) {
    const auto step = [&](F32 to, F32 x, int64_t i, F32& update, F32& landed, I32& above) {
      const uint32_t lane = (leaf.first_lane + uint32_t(i)) % kBlock;
      const U32 dither = load_vector<U32>(kLanesOfBlock.weyl + lane) + leaf.phase;
      split<int8_t>(to, x, dither, update, landed, above);
    };
    narrow(master, p, n, static_cast<int8_t*>(leaf.residual_out) + first, out, g, step);
  } else if (leaf.weights == Weights::kCompensated16) {
    const auto step = [](F32 to, F32 x, int64_t, F32& update, F32& landed, I32& above) {
      split<int16_t>(to, x, U32{}, update, landed, above);
    };
    narrow(master, p, n, static_cast<int16_t*>(leaf.residual_out) + first, out, g, step);
  } else {
    U32 lane;
    for (int i = 0; i < kLanes; ++i) lane[i] = uint32_t(i);
    const auto step = [&](F32 to, F32 x, int64_t i, F32& update, F32& landed, I32& above) {
      const U32 random = random_bits(lane + uint32_t(first + i), leaf.words);
      landed = round_randomly(to, random);
      update = difference(landed, x);
      if (__builtin_expect(any(!is_exact(to, x, landed)), false)) landed = nearest_bf16(x + update);
      above = I32{};
    };
    narrow(master, p, n, static_cast<int8_t*>(nullptr), out, g, step);
  }
}

inline void widen(const BF16* from, int64_t n, float* to) {
  for (int64_t i = 0; i < n; ++i) to[i] = bits<float>(uint32_t(from[i].bits) << 16);
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
    part.g = at(leaf.g, i * size_of(leaf.g_dtype));
    if (leaf.g_dtype == Float::kBF16) {
      widen(static_cast<const BF16*>(part.g), n, gradient);
      part.g = gradient;
      part.g_dtype = Float::kF32;
    }
    const int64_t of_v = leaf.is_coded() ? block : i;
    part.m = at(leaf.m, i * leaf.m_size());
    part.m_out = at(leaf.m_out, i * leaf.m_size());
    part.v = at(leaf.v, of_v * leaf.v_size());
    part.v_out = at(leaf.v_out, of_v * leaf.v_size());
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

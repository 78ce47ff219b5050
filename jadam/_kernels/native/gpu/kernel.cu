// One step of many leaves in one pass over memory. The threads of a warp, or of half of one, take a
// block of 128 numbers at a time, four or eight each, those of an array in one access.

#include <type_traits>

#define JADAM_ISA gpu
#include "block.h"
#include "launch.h"

namespace jadam {
namespace gpu {
namespace {

// What a kernel steps: moments as floats, all arrays float32 or not, or as codes of 8 or 4 bits each;
// parameters that are what they stand for, or weights that stand for more.
enum class Kind {
  kFloat32,
  kFloats,
  kCodes,
  kCodes4,
  kNarrowFloats,
  kNarrowCodes,
  kNarrowCodes4,
};
constexpr bool has_4_bits(Kind kind) {
  return kind == Kind::kCodes4 || kind == Kind::kNarrowCodes4;
}
constexpr bool has_codes(Kind kind) {
  return kind == Kind::kCodes || kind == Kind::kNarrowCodes || has_4_bits(kind);
}
constexpr bool has_weights(Kind kind) { return kind >= Kind::kNarrowFloats; }
template <Kind kKind>
using CodecOf = std::conditional_t<has_4_bits(kKind), FourBits, EightBits>;
template <Kind kKind>
using BothOf = typename CodecOf<kKind>::Both;

// The options of a leaf that the choice of its kernel leaves open.
template <Kind kKind>
__device__ __forceinline__ uint32_t options_of(const DeviceLeaf& leaf) {
  return leaf.options & (kKind == Kind::kFloat32 ? ~uint32_t(kNarrow) : ~0u);
}

// A thread's numbers as they lie in memory, of 1, 2 or 4 bytes each.
template <int kN>
struct Lot {
  uint32_t words[kN];
};

// Where they lie: from `first` on, in a row that has `rest` of them to its end.
struct Place {
  int64_t first, rest;
};

// Where accesses take up to 16 bytes. Stores are asked for by name: written as assignments, they
// become one for each word.
template <int kN>
struct Whole {
  template <class Word>
  static __device__ __forceinline__ Lot<kN> load(const void* from, const Place& at) {
    constexpr int kWords = kN * sizeof(Word) / 4;
    const Word* const x = static_cast<const Word*>(from) + at.first;
    Lot<kN> y{};
    if constexpr (kWords == 1) {
      y.words[0] = *reinterpret_cast<const uint32_t*>(x);
    } else if constexpr (kWords == 2) {
      const uint2 z = *reinterpret_cast<const uint2*>(x);
      y.words[0] = z.x;
      y.words[1] = z.y;
    } else {
#pragma unroll
      for (int i = 0; i < kWords; i += 4) {
        const uint4 z = reinterpret_cast<const uint4*>(x)[i / 4];
        y.words[i] = z.x;
        y.words[i + 1] = z.y;
        y.words[i + 2] = z.z;
        y.words[i + 3] = z.w;
      }
    }
    return y;
  }

  template <class Word>
  static __device__ __forceinline__ void store(const Lot<kN>& x, void* to, const Place& at) {
    constexpr int kWords = kN * sizeof(Word) / 4;
    Word* const y = static_cast<Word*>(to) + at.first;
    if constexpr (kWords == 1) {
      __stwb(reinterpret_cast<uint32_t*>(y), x.words[0]);
    } else if constexpr (kWords == 2) {
      __stwb(reinterpret_cast<uint2*>(y), make_uint2(x.words[0], x.words[1]));
    } else {
#pragma unroll
      for (int i = 0; i < kWords; i += 4) {
        __stwb(reinterpret_cast<uint4*>(y) + i / 4, make_uint4(x.words[i], x.words[i + 1],
                                                               x.words[i + 2], x.words[i + 3]));
      }
    }
  }
};

// At the end of a row, or where rows or arrays begin between two accesses.
template <int kN>
struct Ragged {
  template <class Word>
  static __device__ __forceinline__ Lot<kN> load(const void* from, const Place& at) {
    Lot<kN> x{};
#pragma unroll
    for (int i = 0; i < kN; ++i) {
      if (i < at.rest) {
        const uint32_t word = static_cast<const Word*>(from)[at.first + i];
        x.words[i * sizeof(Word) / 4] |= word << (i * sizeof(Word) % 4 * 8);
      }
    }
    return x;
  }

  template <class Word>
  static __device__ __forceinline__ void store(const Lot<kN>& x, void* to, const Place& at) {
#pragma unroll
    for (int i = 0; i < kN; ++i) {
      const Word word = Word(x.words[i * sizeof(Word) / 4] >> (i * sizeof(Word) % 4 * 8));
      if (i < at.rest) static_cast<Word*>(to)[at.first + i] = word;
    }
  }
};

// Floats of either width.
template <class Access>
__device__ __forceinline__ auto load_floats(const void* from, bool is_narrow, const Place& at) {
  return is_narrow ? Access::template load<uint16_t>(from, at)
                   : Access::template load<uint32_t>(from, at);
}
template <class Access, int kN>
__device__ __forceinline__ void store_floats(const Lot<kN>& x, void* to, bool is_narrow,
                                             const Place& at) {
  if (is_narrow) {
    Access::template store<uint16_t>(x, to, at);
  } else {
    Access::template store<uint32_t>(x, to, at);
  }
}

// What a step takes of a block and what it leaves there. All loads are under way before the first
// of the numbers is looked at.
template <int kN, Kind kKind>
struct Lying {
  Lot<kN> g, p, m, v, residual, out;
  int16_t top;

  template <class Access>
  __device__ __forceinline__ void load(const DeviceLeaf& leaf, const Place& at, uint32_t block) {
    const uint32_t options = options_of<kKind>(leaf);
    g = load_floats<Access>(leaf.g, options & kNarrowG, at);
    if constexpr (has_codes(kKind)) {
      m = Access::template load<BothOf<kKind>>(leaf.m, at);
      top = block < leaf.blocks ? static_cast<const int16_t*>(leaf.v)[block] : int16_t(0);
    } else {
      m = load_floats<Access>(leaf.m, options & kNarrowM, at);
      v = load_floats<Access>(leaf.v, options & kNarrowV, at);
    }
    if constexpr (has_weights(kKind)) {
      p = Access::template load<uint16_t>(leaf.p, at);
      if (leaf.weights == Weights::kCompensated8) {
        residual = Access::template load<uint8_t>(leaf.residual, at);
      } else if (leaf.weights == Weights::kCompensated16) {
        residual = Access::template load<uint16_t>(leaf.residual, at);
      }
    } else if (leaf.p != nullptr) {
      p = load_floats<Access>(leaf.p, options & kNarrowP, at);
    }
  }

  template <class Access>
  __device__ __forceinline__ void store(const DeviceLeaf& leaf, const Place& at,
                                        uint32_t block) const {
    const uint32_t options = options_of<kKind>(leaf);
    if constexpr (has_codes(kKind)) {
      Access::template store<BothOf<kKind>>(m, leaf.m, at);
      const bool is_first = threadIdx.x % (kBlock / kN) == 0;
      if (is_first && block < leaf.blocks) static_cast<int16_t*>(leaf.v)[block] = top;
    } else {
      store_floats<Access>(m, leaf.m, options & kNarrowM, at);
      store_floats<Access>(v, leaf.v, options & kNarrowV, at);
    }
    bool is_narrow = options & kWritesParams;
    if constexpr (has_weights(kKind)) {
      if (leaf.weights == Weights::kCompensated8) {
        Access::template store<uint8_t>(residual, leaf.residual, at);
      } else if (leaf.weights == Weights::kCompensated16) {
        Access::template store<uint16_t>(residual, leaf.residual, at);
      }
    } else {
      is_narrow = options & (is_narrow ? kNarrowP : kNarrowG);
    }
    store_floats<Access>(out, leaf.out, is_narrow, at);
  }
};

// Numbers to and from how they lie.
template <int kN>
__device__ __forceinline__ void to_floats(const Lot<kN>& x, bool is_narrow, F32 (&y)[kN]) {
#pragma unroll
  for (int i = 0; i < kN; ++i) y[i] = bits<F32>(x.words[i]);
  if (!is_narrow) return;
#pragma unroll
  for (int i = 0; i < kN; ++i) {
    y[i] = bits<F32>(i % 2 ? x.words[i / 2] & 0xFFFF0000u : x.words[i / 2] << 16);
  }
}

// Two floats as the nearest numbers of bfloat16, the first in the lower half.
__device__ __forceinline__ uint32_t in_bf16(F32 x, F32 y) {
#if defined(__CUDA_ARCH__)
  uint32_t both;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(y), "f"(x));
  return both;
#else
  return bits<U32>(nearest_bf16(x)) >> 16 | bits<U32>(nearest_bf16(y));
#endif
}

template <int kN>
__device__ __forceinline__ Lot<kN> from_floats(const F32 (&x)[kN], bool is_narrow) {
  Lot<kN> y{};
  if (is_narrow) {
#pragma unroll
    for (int i = 0; i < kN; i += 2) y.words[i / 2] = in_bf16(x[i], x[i + 1]);
  } else {
#pragma unroll
    for (int i = 0; i < kN; ++i) y.words[i] = bits<U32>(x[i]);
  }
  return y;
}

// Codes.
template <class Both, int kN>
__device__ __forceinline__ void to_codes(const Lot<kN>& x, I32 (&y)[kN]) {
  constexpr int kInWord = 4 / sizeof(Both), kBits = 8 * sizeof(Both);
#pragma unroll
  for (int i = 0; i < kN; ++i) {
    y[i] = x.words[i / kInWord] >> (kBits * (i % kInWord)) & ((1 << kBits) - 1);
  }
}
template <class Both, int kN>
__device__ __forceinline__ Lot<kN> from_codes(const I32 (&x)[kN]) {
  Lot<kN> y{};
#pragma unroll
  for (int i = 0; i < kN; i += 2) {
    if constexpr (sizeof(Both) == 2) {
      y.words[i / 2] = __byte_perm(x[i], x[i + 1], 0x5410);
    } else {
      const uint32_t pair = __byte_perm(x[i], x[i + 1], 0x0040);
      y.words[i / 4] = i % 4 == 0 ? pair : __byte_perm(y.words[i / 4], pair, 0x5410);
    }
  }
  return y;
}

// The signed byte at a place of four, above one of zeros.
__device__ __forceinline__ I32 raised_byte(uint32_t four, uint32_t place) {
#if defined(__CUDA_ARCH__)
  I32 raised;
  asm("prmt.b32 %0, %1, 0, %2;" : "=r"(raised) : "r"(four), "r"(0x8804 + 0x1110 * place));
  return raised;
#else
  return int8_t(four >> (8 * place)) * 256;
#endif
}

// Residuals as steps of float32, and back from `Block::above`: its upper byte, or both.
template <class R, int kN>
__device__ __forceinline__ void to_steps(const Lot<kN>& x, I32 (&y)[kN]) {
#pragma unroll
  for (int i = 0; i < kN; ++i) {
    if constexpr (sizeof(R) == 2) {
      y[i] = int16_t(x.words[i / 2] >> (16 * (i % 2)));
    } else {
      y[i] = raised_byte(x.words[i / 4], i % 4);
    }
  }
}
template <class R, int kN>
__device__ __forceinline__ Lot<kN> from_above(const I32 (&x)[kN]) {
  Lot<kN> y{};
#pragma unroll
  for (int i = 0; i < kN; i += 2) {
    if constexpr (sizeof(R) == 2) {
      y.words[i / 2] = __byte_perm(x[i], x[i + 1], 0x5410) ^ 0x80008000u;
    } else {
      const uint32_t pair = __byte_perm(x[i], x[i + 1], 0x0051);
      y.words[i / 4] =
          i % 4 == 0 ? pair : __byte_perm(y.words[i / 4], pair, 0x5410) ^ 0x80808080u;
    }
  }
  return y;
}

// The update, in g, to what is written of parameters that are what they stand for.
template <int kN>
__device__ __forceinline__ Lot<kN> written(Block<kN>& b, uint32_t options) {
  const Lot<kN> update = from_floats(b.g, options & kNarrowG);
  if (!(options & kWritesParams)) return update;
  to_floats(update, options & kNarrowG, b.g);
#pragma unroll
  for (int i = 0; i < kN; ++i) b.g[i] += b.p[i];
  return from_floats(b.g, options & kNarrowP);
}

// The same of 16-bit weights with a residual.
template <class R, int kN>
__device__ __forceinline__ void compensate(Block<kN>& b, Lot<kN>& residual, const Numbers& s,
                                           uint32_t options, const U32 (&dither)[kN]) {
  F32 master[kN];
  to_steps<R>(residual, b.steps);
  join_weights(b, master);
  to_update(b, master, s, options & kDecays);
  split_weights<R>(b, master, dither, options & kWritesParams);
  residual = from_above<R>(b.above);
}

template <int kN, Kind kKind>
__device__ __forceinline__ void step(
    Lying<kN, kKind>& x, const DeviceLeaf& leaf, const Numbers& s, const CodecOf<kKind>& codec,
    const Weyl<kN>& weyl, const typename CodecOf<kKind>::template DithersOfV<kN>& dithers_of_v,
    const U32 (&dither)[kN], uint32_t element) {
  const uint32_t options = options_of<kKind>(leaf);
  Block<kN> b;
  to_floats(x.g, options & kNarrowG, b.g);
  to_floats(x.p, has_weights(kKind) || (options & kNarrowP), b.p);
  if constexpr (has_codes(kKind)) {
    b.top = x.top;
    to_codes<BothOf<kKind>>(x.m, b.codes);
    step_codes(b, s, codec, weyl, dithers_of_v);
    x.m = from_codes<BothOf<kKind>>(b.codes);
    x.top = int16_t(b.top);
  } else {
    to_floats(x.m, options & kNarrowM, b.m);
    to_floats(x.v, options & kNarrowV, b.v);
    step_floats(b, s);
    if (options & kNarrowV) {
      round_floats<true>(b, s, weyl);
    } else if (options & kNarrowM) {
      round_floats<false>(b, s, weyl);
    }
    x.m = from_floats(b.m, options & kNarrowM);
    x.v = from_floats(b.v, options & kNarrowV);
  }
  if constexpr (has_weights(kKind)) {
    if (leaf.weights == Weights::kCompensated8) {
      compensate<int8_t>(b, x.residual, s, options, dither);
    } else if (leaf.weights == Weights::kCompensated16) {
      compensate<int16_t>(b, x.residual, s, options, dither);
    } else {
      const uint32_t words[2] = {leaf.words[0], leaf.words[1]};
      to_update(b, b.p, s, options & kDecays);
      round_weights(b, element, words);
    }
    x.out = options & kWritesParams ? from_floats(b.p, true) : from_floats(b.g, false);
  } else {
    to_update(b, b.p, s, options & kDecays);
    x.out = written(b, options);
  }
}

// The leaf that a chunk is of: the last that begins at it or before.
__device__ __forceinline__ const DeviceLeaf& leaf_of(const Launch& launch, uint32_t chunk) {
  int low = 0, high = int(launch.leaves);
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (launch.leaf[middle].first_chunk <= chunk ? low : high) = middle;
  }
  return launch.leaf[low];
}

// The blocks of a leaf that a group of threads takes: each kStride-th. In a row one after the other,
// without a division for each.
template <int kStride>
struct Walk {
  uint32_t in_row, rows, columns, block, row, column;

  __device__ __forceinline__ Walk(uint32_t blocks_in_row, uint32_t first)
      : in_row(blocks_in_row),
        rows(kStride / in_row),
        columns(kStride % in_row),
        block(first),
        row(first / in_row),
        column(first % in_row) {}

  __device__ __forceinline__ void advance() {
    block += kStride;
    row += rows;
    column += columns;
    if (column >= in_row) {
      column -= in_row;
      ++row;
    }
  }
};

template <Kind kKind, int kN, bool kAhead>
__device__ __forceinline__ void run(const Launch& launch, uint32_t blocks_in_chunk) {
  constexpr int kGroup = int(kBlock) / kN, kGroups = kThreads / kGroup;
  const DeviceLeaf& leaf = leaf_of(launch, blockIdx.x);
  const uint32_t begin = (blockIdx.x - leaf.first_chunk) * blocks_in_chunk;
  const uint32_t end = leaf.blocks - begin < blocks_in_chunk ? leaf.blocks : begin + blocks_in_chunk;
  // Threads of a warp stay together, also where the last of its groups has no block.
  const uint32_t ahead_of_warp = threadIdx.x % 32 / kGroup;
  Walk<kGroups> walk(leaf.blocks_in_row, begin + threadIdx.x / kGroup);
  if (walk.block - ahead_of_warp >= end) return;

  const Numbers s = *launch.numbers;
  const CodecOf<kKind> codec(s);
  const uint32_t lane = threadIdx.x % kGroup * kN;
  const Weyl<kN> weyl(*launch.first_lane + lane, *launch.count);
  const typename CodecOf<kKind>::template DithersOfV<kN> dithers_of_v(weyl);
  U32 of_residual[kN] = {};
  if (has_weights(kKind) && leaf.weights == Weights::kCompensated8) {
    // Its own count, in the place of the step's.
    const uint32_t phase = (*leaf.words - weyl.count) * kStep + leaf.salt * kSalt;
#pragma unroll
    for (int i = 0; i < kN; ++i) of_residual[i] = weyl.of[i] + phase;
  }
  struct Fetched {
    Lying<kN, kKind> x;
    Place at;
    uint32_t block;
    bool is_whole;
  };
  const auto fetch = [&] {
    Fetched y;
    const int64_t in = int64_t(walk.column) * kBlock;
    const int64_t rest = walk.block < end ? leaf.n - in : 0;
    y.at = {walk.row * leaf.n + in + lane, rest - lane};
    y.block = walk.block;
    y.is_whole = (leaf.options & kIsAligned) && rest >= kBlock;
    if (y.is_whole) {
      y.x.template load<Whole<kN>>(leaf, y.at, y.block);
    } else {
      y.x.template load<Ragged<kN>>(leaf, y.at, y.block);
    }
    walk.advance();
    return y;
  };
  const auto finish = [&](Fetched& y) {
    step(y.x, leaf, s, codec, weyl, dithers_of_v, of_residual, uint32_t(y.at.first));
    if (y.is_whole) {
      y.x.template store<Whole<kN>>(leaf, y.at, y.block);
    } else {
      y.x.template store<Ragged<kN>>(leaf, y.at, y.block);
    }
  };
  Fetched now = fetch();
  while (true) {
    const bool is_last = walk.block - ahead_of_warp >= end;
    Fetched next;
    if (kAhead && !is_last) next = fetch();
    finish(now);
    if (is_last) return;
    now = kAhead ? next : fetch();
  }
}

}  // namespace
}  // namespace gpu
}  // namespace jadam

#define JADAM_KERNEL(name, kind)                                                               \
  extern "C" __global__ void __launch_bounds__(jadam::kThreads, jadam::kind.resident)          \
      name(const __grid_constant__ jadam::Launch launch) {                                     \
    jadam::gpu::run<jadam::gpu::Kind::kind, jadam::kind.numbers, jadam::kind.ahead>(           \
        launch, jadam::kind.blocks);                                                           \
  }
JADAM_KERNEL(jadam_float32, kFloat32)
JADAM_KERNEL(jadam_floats, kFloats)
JADAM_KERNEL(jadam_codes, kCodes)
JADAM_KERNEL(jadam_codes4, kCodes4)
JADAM_KERNEL(jadam_narrow_floats, kNarrowFloats)
JADAM_KERNEL(jadam_narrow_codes, kNarrowCodes)
JADAM_KERNEL(jadam_narrow_codes4, kNarrowCodes4)

// One step of many leaves in one pass over memory: a warp takes a block of 128 numbers at a time,
// four a thread, each four of them in one access.

#define JADAM_ISA gpu
#include "block.h"
#include "launch.h"

namespace jadam {
namespace gpu {
namespace {

constexpr int kN = 4, kWarp = 32, kWarps = kThreads / kWarp;

// Four numbers as they lie in memory, of 1, 2 or 4 bytes each.
struct Four {
  uint32_t words[4];
};

// A thread's numbers: from `first` on, in a row that has `rest` of them to its end.
struct Place {
  int64_t first, rest;
};

// Where one access takes all four.
struct Whole {
  template <class Word>
  static __device__ __forceinline__ Four load(const void* from, const Place& at) {
    const Word* const x = static_cast<const Word*>(from) + at.first;
    if constexpr (sizeof(Word) == 4) {
      const uint4 y = *reinterpret_cast<const uint4*>(x);
      return {{y.x, y.y, y.z, y.w}};
    } else if constexpr (sizeof(Word) == 2) {
      const uint2 y = *reinterpret_cast<const uint2*>(x);
      return {{y.x, y.y, 0, 0}};
    } else {
      return {{*reinterpret_cast<const uint32_t*>(x), 0, 0, 0}};
    }
  }

  template <class Word>
  static __device__ __forceinline__ void store(const Four& x, void* to, const Place& at) {
    // By name: written as assignments, these become a store for each word.
    Word* const y = static_cast<Word*>(to) + at.first;
    const auto& [a, b, c, d] = x.words;
    if constexpr (sizeof(Word) == 4) {
      __stwb(reinterpret_cast<uint4*>(y), make_uint4(a, b, c, d));
    } else if constexpr (sizeof(Word) == 2) {
      __stwb(reinterpret_cast<uint2*>(y), make_uint2(a, b));
    } else {
      __stwb(reinterpret_cast<uint32_t*>(y), a);
    }
  }
};

// At the end of a row, or where rows or arrays begin between two accesses.
struct Ragged {
  template <class Word>
  static __device__ __forceinline__ Four load(const void* from, const Place& at) {
    Four x{};
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
  static __device__ __forceinline__ void store(const Four& x, void* to, const Place& at) {
#pragma unroll
    for (int i = 0; i < kN; ++i) {
      const Word word = Word(x.words[i * sizeof(Word) / 4] >> (i * sizeof(Word) % 4 * 8));
      if (i < at.rest) static_cast<Word*>(to)[at.first + i] = word;
    }
  }
};

// Floats of either width.
template <class Access>
__device__ __forceinline__ Four load_floats(const void* from, bool is_narrow, const Place& at) {
  return is_narrow ? Access::template load<uint16_t>(from, at)
                   : Access::template load<uint32_t>(from, at);
}
template <class Access>
__device__ __forceinline__ void store_floats(const Four& x, void* to, bool is_narrow,
                                             const Place& at) {
  if (is_narrow) {
    Access::template store<uint16_t>(x, to, at);
  } else {
    Access::template store<uint32_t>(x, to, at);
  }
}

// What a step takes of a block and what it leaves there. All loads are under way before the first
// of the numbers is looked at.
template <bool kCodes, bool kNarrow>
struct Lying {
  Four g, p, m, v, residual, out;
  int16_t top;

  template <class Access>
  __device__ __forceinline__ void load(const DeviceLeaf& leaf, const Place& at, uint32_t block) {
    const uint32_t options = leaf.options;
    g = load_floats<Access>(leaf.g, options & kNarrowG, at);
    if constexpr (kCodes) {
      m = Access::template load<uint16_t>(leaf.m, at);
      top = static_cast<const int16_t*>(leaf.v)[block];
    } else {
      m = load_floats<Access>(leaf.m, options & kNarrowM, at);
      v = load_floats<Access>(leaf.v, options & kNarrowV, at);
    }
    if constexpr (kNarrow) {
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
    const uint32_t options = leaf.options;
    if constexpr (kCodes) {
      Access::template store<uint16_t>(m, leaf.m, at);
      if (threadIdx.x % kWarp == 0) static_cast<int16_t*>(leaf.v)[block] = top;
    } else {
      store_floats<Access>(m, leaf.m, options & kNarrowM, at);
      store_floats<Access>(v, leaf.v, options & kNarrowV, at);
    }
    if constexpr (kNarrow) {
      if (leaf.weights == Weights::kCompensated8) {
        Access::template store<uint8_t>(residual, leaf.residual, at);
      } else if (leaf.weights == Weights::kCompensated16) {
        Access::template store<uint16_t>(residual, leaf.residual, at);
      }
      store_floats<Access>(out, leaf.out, options & kWritesParams, at);
    } else {
      const bool is_narrow = options & (options & kWritesParams ? kNarrowP : kNarrowG);
      store_floats<Access>(out, leaf.out, is_narrow, at);
    }
  }
};

__device__ __forceinline__ void to_floats(const Four& x, bool is_narrow, F32 (&y)[kN]) {
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
  uint32_t both;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(y), "f"(x));
  return both;
}
__device__ __forceinline__ Four from_floats(const F32 (&x)[kN], bool is_narrow) {
  if (is_narrow) return {{in_bf16(x[0], x[1]), in_bf16(x[2], x[3]), 0, 0}};
  return {{bits<U32>(x[0]), bits<U32>(x[1]), bits<U32>(x[2]), bits<U32>(x[3])}};
}
__device__ __forceinline__ Four in_16_bits(const I32 (&x)[kN]) {
  return {{__byte_perm(x[0], x[1], 0x5410), __byte_perm(x[2], x[3], 0x5410), 0, 0}};
}
__device__ __forceinline__ Four in_8_bits(const I32 (&x)[kN]) {
  const uint32_t low = __byte_perm(x[0], x[1], 0x0040), high = __byte_perm(x[2], x[3], 0x0040);
  return {{__byte_perm(low, high, 0x5410), 0, 0, 0}};
}

// The update, in g, to what is written of parameters that are what they stand for.
__device__ __forceinline__ Four written(Block<kN>& b, uint32_t options) {
  const Four update = from_floats(b.g, options & kNarrowG);
  if (!(options & kWritesParams)) return update;
  to_floats(update, options & kNarrowG, b.g);
#pragma unroll
  for (int i = 0; i < kN; ++i) b.g[i] += b.p[i];
  return from_floats(b.g, options & kNarrowP);
}

// The same of 16-bit weights that stand for more.
template <class R>
__device__ __forceinline__ void compensate(Block<kN>& b, const Four& residual, const Numbers& s,
                                           bool decays, const U32 (&dither)[kN]) {
  F32 master[kN];
#pragma unroll
  for (int i = 0; i < kN; ++i) {
    b.residual[i] = R(residual.words[i * sizeof(R) / 4] >> (i * sizeof(R) % 4 * 8));
  }
  join_weights<R>(b, master);
  to_update(b, master, s, decays);
  split_weights<R>(b, master, dither);
}

template <bool kCodes, bool kNarrow>
__device__ __forceinline__ void step(Lying<kCodes, kNarrow>& x, const DeviceLeaf& leaf,
                                     const Numbers& s, const Codec& codec, const Weyl<kN>& weyl,
                                     const U32 (&dither)[kN], uint32_t element) {
  const uint32_t options = leaf.options;
  Block<kN> b;
  to_floats(x.g, options & kNarrowG, b.g);
  to_floats(x.p, kNarrow || (options & kNarrowP), b.p);
  if constexpr (kCodes) {
    b.top = x.top;
#pragma unroll
    for (int i = 0; i < kN; ++i) b.codes[i] = x.m.words[i / 2] >> (16 * (i % 2)) & 0xFFFF;
    step_codes(b, s, codec, weyl);
    x.m = in_16_bits(b.codes);
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
  if constexpr (kNarrow) {
    if (leaf.weights == Weights::kCompensated8) {
      compensate<int8_t>(b, x.residual, s, options & kDecays, dither);
      x.residual = in_8_bits(b.residual);
    } else if (leaf.weights == Weights::kCompensated16) {
      compensate<int16_t>(b, x.residual, s, options & kDecays, dither);
      x.residual = in_16_bits(b.residual);
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

template <bool kCodes, bool kNarrow>
__device__ __forceinline__ void run(const Launch& launch) {
  const DeviceLeaf& leaf = leaf_of(launch, blockIdx.x);
  const Numbers s = *launch.numbers;
  const Codec codec(s);
  const uint32_t lane = threadIdx.x % kWarp * kN;
  const Weyl<kN> weyl(*launch.first_lane + lane, *launch.count);
  U32 of_residual[kN] = {};
  if (kNarrow && leaf.weights == Weights::kCompensated8) {
    // Its own count, in the place of the step's.
    const uint32_t phase = (*leaf.words - weyl.count) * kStep + leaf.salt * kSalt;
#pragma unroll
    for (int i = 0; i < kN; ++i) of_residual[i] = weyl.of[i] + phase;
  }
  const uint32_t begin = (blockIdx.x - leaf.first_chunk) * kBlocksInChunk;
  const uint32_t end =
      leaf.blocks - begin < kBlocksInChunk ? leaf.blocks : begin + kBlocksInChunk;
  // A row's blocks one after the other, without a division for each.
  const uint32_t in_row = leaf.blocks_in_row, rows = kWarps / in_row, columns = kWarps % in_row;
  uint32_t block = begin + threadIdx.x / kWarp, row = block / in_row, column = block % in_row;
  for (; block < end; block += kWarps) {
    const int64_t in = int64_t(column) * kBlock, rest = leaf.n - in;
    const Place at{row * leaf.n + in + lane, rest - lane};
    const bool is_whole = (leaf.options & kIsAligned) && rest >= kBlock;
    Lying<kCodes, kNarrow> x;
    if (is_whole) {
      x.template load<Whole>(leaf, at, block);
    } else {
      x.template load<Ragged>(leaf, at, block);
    }
    step(x, leaf, s, codec, weyl, of_residual, uint32_t(at.first));
    if (is_whole) {
      x.template store<Whole>(leaf, at, block);
    } else {
      x.template store<Ragged>(leaf, at, block);
    }
    row += rows;
    column += columns;
    if (column >= in_row) {
      column -= in_row;
      ++row;
    }
  }
}

}  // namespace
}  // namespace gpu
}  // namespace jadam

#define JADAM_KERNEL(name, codes, narrow)                       \
  extern "C" __global__ void __launch_bounds__(jadam::kThreads) \
      name(const __grid_constant__ jadam::Launch launch) {      \
    jadam::gpu::run<codes, narrow>(launch);                     \
  }
JADAM_KERNEL(jadam_floats, false, false)
JADAM_KERNEL(jadam_codes, true, false)
JADAM_KERNEL(jadam_floats_narrow, false, true)
JADAM_KERNEL(jadam_codes_narrow, true, true)

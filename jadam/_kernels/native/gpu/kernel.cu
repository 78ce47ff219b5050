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

// Where a thread's numbers lie: from `first` on, in a row that has `rest` of them to its end.
struct Place {
  int64_t first;
  int64_t rest;
  bool is_whole;  // one access takes all four, in every thread of the warp
};

template <class Word>
__device__ __forceinline__ void load_each(Four& x, const void* from, const Place& at) {
#pragma unroll
  for (int i = 0; i < kN; ++i) {
    const bool inside = i < at.rest;
    const Word word = inside ? static_cast<const Word*>(from)[at.first + i] : Word(0);
    if constexpr (sizeof(Word) == 4) {
      x.words[i] = word;
    } else {
      constexpr int kEach = 4 / sizeof(Word), kBits = 8 * sizeof(Word);
      if (i % kEach == 0) x.words[i / kEach] = 0;
      x.words[i / kEach] |= uint32_t(word) << (i % kEach * kBits);
    }
  }
}

template <class Word>
__device__ __forceinline__ void store_each(const Four& x, void* to, const Place& at) {
#pragma unroll
  for (int i = 0; i < kN; ++i) {
    constexpr int kEach = 4 / sizeof(Word), kBits = 8 * sizeof(Word);
    const Word word = Word(x.words[i / kEach] >> (i % kEach * kBits % 32));
    if (i < at.rest) static_cast<Word*>(to)[at.first + i] = word;
  }
}

__device__ __forceinline__ Four load_32(const void* from, const Place& at) {
  Four x;
  if (at.is_whole) {
    const uint4 y = *reinterpret_cast<const uint4*>(static_cast<const uint32_t*>(from) + at.first);
    x = {{y.x, y.y, y.z, y.w}};
  } else {
    load_each<uint32_t>(x, from, at);
  }
  return x;
}
__device__ __forceinline__ Four load_16(const void* from, const Place& at) {
  Four x;
  if (at.is_whole) {
    const uint2 y = *reinterpret_cast<const uint2*>(static_cast<const uint16_t*>(from) + at.first);
    x = {{y.x, y.y, 0, 0}};
  } else {
    load_each<uint16_t>(x, from, at);
  }
  return x;
}
__device__ __forceinline__ Four load_8(const void* from, const Place& at) {
  Four x;
  if (at.is_whole) {
    x.words[0] = *reinterpret_cast<const uint32_t*>(static_cast<const uint8_t*>(from) + at.first);
  } else {
    load_each<uint8_t>(x, from, at);
  }
  return x;
}
__device__ __forceinline__ void store_32(const Four& x, void* to, const Place& at) {
  if (at.is_whole) {
    *reinterpret_cast<uint4*>(static_cast<uint32_t*>(to) + at.first) =
        make_uint4(x.words[0], x.words[1], x.words[2], x.words[3]);
  } else {
    store_each<uint32_t>(x, to, at);
  }
}
__device__ __forceinline__ void store_16(const Four& x, void* to, const Place& at) {
  if (at.is_whole) {
    *reinterpret_cast<uint2*>(static_cast<uint16_t*>(to) + at.first) =
        make_uint2(x.words[0], x.words[1]);
  } else {
    store_each<uint16_t>(x, to, at);
  }
}
__device__ __forceinline__ void store_8(const Four& x, void* to, const Place& at) {
  if (at.is_whole) {
    *reinterpret_cast<uint32_t*>(static_cast<uint8_t*>(to) + at.first) = x.words[0];
  } else {
    store_each<uint8_t>(x, to, at);
  }
}

// Floats of either width. What is loaded is not looked at before all loads are under way.
__device__ __forceinline__ Four load_float(const void* from, bool is_narrow, const Place& at) {
  return is_narrow ? load_16(from, at) : load_32(from, at);
}
__device__ __forceinline__ void to_floats(const Four& x, bool is_narrow, F32 (&y)[kN]) {
#pragma unroll
  for (int i = 0; i < kN; ++i) {
    const uint32_t half = i % 2 ? x.words[i / 2] & 0xFFFF0000u : x.words[i / 2] << 16;
    y[i] = bits<F32>(is_narrow ? half : x.words[i]);
  }
}

__device__ __forceinline__ Four in_16(const I32 (&x)[kN]) {
  return {{__byte_perm(x[0], x[1], 0x5410), __byte_perm(x[2], x[3], 0x5410), 0, 0}};
}
__device__ __forceinline__ Four in_8(const I32 (&x)[kN]) {
  const uint32_t low = __byte_perm(x[0], x[1], 0x0040), high = __byte_perm(x[2], x[3], 0x0040);
  return {{__byte_perm(low, high, 0x5410), 0, 0, 0}};
}
__device__ __forceinline__ Four in_32(const F32 (&x)[kN]) {
  return {{bits<U32>(x[0]), bits<U32>(x[1]), bits<U32>(x[2]), bits<U32>(x[3])}};
}
// Floats that have bfloat16's digits alone.
__device__ __forceinline__ Four upper_halves(const F32 (&x)[kN]) {
  return {{__byte_perm(bits<U32>(x[0]), bits<U32>(x[1]), 0x7632),
           __byte_perm(bits<U32>(x[2]), bits<U32>(x[3]), 0x7632), 0, 0}};
}

// The numbers of a block, in registers.
template <bool kCodes, bool kNarrow>
struct Loaded {
  Four g, p, m, v, residual;
  int16_t top;

  __device__ __forceinline__ Loaded(const DeviceLeaf& leaf, const Place& at, uint32_t block) {
    const uint32_t options = leaf.options;
    g = load_float(leaf.g, options & kNarrowG, at);
    if constexpr (kCodes) {
      m = load_16(leaf.m, at);
      top = static_cast<const int16_t*>(leaf.v)[block];
    } else {
      m = load_float(leaf.m, options & kNarrowM, at);
      v = load_float(leaf.v, options & kNarrowV, at);
    }
    if constexpr (kNarrow) {
      p = load_16(leaf.p, at);
      if (leaf.weights == Weights::kCompensated8) residual = load_8(leaf.residual, at);
      if (leaf.weights == Weights::kCompensated16) residual = load_16(leaf.residual, at);
    } else if (leaf.p != nullptr) {
      p = load_float(leaf.p, options & kNarrowP, at);
    }
  }
};

// The weight that is trained, from the number in memory.
__device__ __forceinline__ void join_weights(Block<kN>& b, const Four& residual, Weights weights,
                                             F32 (&master)[kN]) {
#pragma unroll
  for (int i = 0; i < kN; ++i) {
    if (weights == Weights::kCompensated8) {
      master[i] = join<int8_t>(b.p[i], int8_t(residual.words[0] >> (8 * i)));
    } else if (weights == Weights::kCompensated16) {
      master[i] = join<int16_t>(b.p[i], int16_t(residual.words[i / 2] >> (16 * (i % 2))));
    } else {
      master[i] = b.p[i];
    }
  }
}

// The weight after the step to what lies in memory: the update in g, the number in p.
__device__ __forceinline__ void split_weights(Block<kN>& b, const DeviceLeaf& leaf,
                                              const F32 (&master)[kN], uint32_t element) {
  const uint32_t words[2] = {leaf.words == nullptr ? 0 : leaf.words[0],
                             leaf.weights == Weights::kStochastic ? leaf.words[1] : 0};
#pragma unroll
  for (int i = 0; i < kN; ++i) {
    const F32 moved = master[i] + b.g[i];
    Narrowed found;
    if (leaf.weights == Weights::kCompensated8) {
      found = split<int8_t>(moved, b.p[i], weyl(b.first_lane + i, words[0], leaf.salt));
    } else if (leaf.weights == Weights::kCompensated16) {
      found = split<int16_t>(moved, b.p[i], 0);
    } else {
      const F32 update =
          difference(round_randomly(moved, random_bits(element + i, words)), b.p[i]);
      found = {update, nearest_bf16(b.p[i] + update), 0};
    }
    b.g[i] = found.update;
    b.p[i] = found.landed;
    b.residual[i] = found.residual;
  }
}

template <bool kCodes, bool kNarrow>
__device__ __forceinline__ void step_block(const DeviceLeaf& leaf, const Numbers& s,
                                           const Codec& codec, uint32_t count, uint32_t first_lane,
                                           const Place& at, uint32_t block) {
  const Loaded<kCodes, kNarrow> x(leaf, at, block);
  const uint32_t options = leaf.options;
  Block<kN> b;
  b.first_lane = first_lane;
  to_floats(x.g, options & kNarrowG, b.g);
  to_floats(x.p, kNarrow || (options & kNarrowP), b.p);
  if constexpr (kCodes) {
    b.top = x.top;
#pragma unroll
    for (int i = 0; i < kN; ++i) b.codes[i] = x.m.words[i / 2] >> (16 * (i % 2)) & 0xFFFF;
    step_codes(b, s, codec, count);
    store_16(in_16(b.codes), leaf.m_out, at);
    if (threadIdx.x % kWarp == 0) static_cast<int16_t*>(leaf.v_out)[block] = int16_t(b.top);
  } else {
    to_floats(x.m, options & kNarrowM, b.m);
    to_floats(x.v, options & kNarrowV, b.v);
    step_floats(b, s);
    if (options & kNarrowV) {
      round_floats<kN, true>(b, s, count);
      store_16(in_16(b.codes), leaf.m_out, at);
      F32 v[kN];
#pragma unroll
      for (int i = 0; i < kN; ++i) v[i] = bits<F32>(b.codes[i]);
      store_16(upper_halves(v), leaf.v_out, at);
    } else {
      if (options & kNarrowM) {
        round_floats<kN, false>(b, s, count);
        store_16(in_16(b.codes), leaf.m_out, at);
      } else {
        store_32(in_32(b.m), leaf.m_out, at);
      }
      store_32(in_32(b.v), leaf.v_out, at);
    }
  }
  if constexpr (kNarrow) {
    F32 master[kN];
    join_weights(b, x.residual, leaf.weights, master);
    to_update(b, master, s, options & kDecays);
    split_weights(b, leaf, master, uint32_t(at.first));
    if (leaf.weights == Weights::kCompensated8) store_8(in_8(b.residual), leaf.residual_out, at);
    if (leaf.weights == Weights::kCompensated16) store_16(in_16(b.residual), leaf.residual_out, at);
    if (options & kWritesParams) {
      store_16(upper_halves(b.p), leaf.out, at);
    } else {
      store_32(in_32(b.g), leaf.out, at);
    }
  } else {
    to_update(b, b.p, s, options & kDecays);
    if (options & kNarrowG) {
#pragma unroll
      for (int i = 0; i < kN; ++i) b.g[i] = nearest_bf16(b.g[i]);
    }
    bool is_narrow = options & kNarrowG;
    if (options & kWritesParams) {
      is_narrow = options & kNarrowP;
#pragma unroll
      for (int i = 0; i < kN; ++i) {
        b.g[i] += b.p[i];
        if (is_narrow) b.g[i] = nearest_bf16(b.g[i]);
      }
    }
    if (is_narrow) {
      store_16(upper_halves(b.g), leaf.out, at);
    } else {
      store_32(in_32(b.g), leaf.out, at);
    }
  }
}

// The leaf that a chunk is of: the last that begins at it or before.
__device__ __forceinline__ const DeviceLeaf& leaf_of(const Launch& launch, uint32_t chunk) {
  int low = 0, high = launch.leaves;
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
  const Codec codec(s, *launch.tables);
  const uint32_t count = *launch.count, lane = threadIdx.x % kWarp * kN;
  const uint32_t first_lane = *launch.first_lane + lane;
  const uint32_t begin = (blockIdx.x - leaf.first_chunk) * kBlocksInChunk;
  const uint32_t end =
      leaf.blocks - begin < kBlocksInChunk ? leaf.blocks : begin + kBlocksInChunk;
  // A row's blocks one after the other, without a division for each.
  const uint32_t in_row = leaf.blocks_in_row, rows = kWarps / in_row, columns = kWarps % in_row;
  uint32_t block = begin + threadIdx.x / kWarp, row = block / in_row, column = block % in_row;
  for (; block < end; block += kWarps) {
    const int64_t in = int64_t(column) * kBlock;
    const Place at{row * leaf.n + in + lane, leaf.n - in - lane,
                   (leaf.options & kIsAligned) && leaf.n - in >= kBlock};
    step_block<kCodes, kNarrow>(leaf, s, codec, count, first_lane, at, block);
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

#define JADAM_KERNEL(name, codes, narrow)                                                      \
  extern "C" __global__ void __launch_bounds__(jadam::kThreads)                                 \
      name(const __grid_constant__ jadam::Launch launch) {                                      \
    jadam::gpu::run<codes, narrow>(launch);                                                     \
  }
JADAM_KERNEL(jadam_floats, false, false)
JADAM_KERNEL(jadam_codes, true, false)
JADAM_KERNEL(jadam_floats_narrow, false, true)
JADAM_KERNEL(jadam_codes_narrow, true, true)

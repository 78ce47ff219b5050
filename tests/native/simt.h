// What CUDA gives to kernel.cu, in plain C++: a warp is 32 fibers of one thread of this machine.
// A fiber runs up to an exchange within its warp, where it publishes its value and lets the next
// one run; the warps and thread blocks of a launch run one after the other.
//
// What it cannot show: approximate functions, which are more exact here; races of threads, which
// change nothing that another reads; and what nvcc makes of the source.
#pragma once

#include <cstdint>

#define __global__
#define __device__
#define __forceinline__ inline __attribute__((always_inline))
#define __grid_constant__
#define __launch_bounds__(threads, blocks)

namespace simt {

constexpr int kWarp = 32;

// What the threads of a warp meet for.
enum class Meeting { kNone, kMaximum, kShuffle, kAny };

// The values that the threads of a warp come to a meeting with, by their places in it. All of them
// have to come.
const int* meet(Meeting meeting, int value);

// The place of the running thread in its warp.
int place();

}  // namespace simt

struct Index {
  uint32_t x;
};
extern Index threadIdx, blockIdx;  // of the running thread

struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

template <class T>
void __stwb(T* to, T x) {
  *to = x;
}

// The bytes of y and x, from x's lowest on, at the four places that the selector has.
inline uint32_t __byte_perm(uint32_t x, uint32_t y, uint32_t selector) {
  const uint64_t both = uint64_t(y) << 32 | x;
  uint32_t found = 0;
  for (int i = 0; i < 4; ++i) {
    found |= uint32_t(both >> (selector >> (4 * i) & 7) * 8 & 0xFF) << (8 * i);
  }
  return found;
}

inline int __reduce_max_sync(uint32_t, int x) {
  const int* const values = simt::meet(simt::Meeting::kMaximum, x);
  for (int i = 0; i < simt::kWarp; ++i) x = values[i] > x ? values[i] : x;
  return x;
}
inline int __shfl_xor_sync(uint32_t, int x, int apart) {
  return simt::meet(simt::Meeting::kShuffle, x)[simt::place() ^ apart];
}
inline int __any_sync(uint32_t, int x) {
  const int* const values = simt::meet(simt::Meeting::kAny, x);
  for (int i = 0; i < simt::kWarp; ++i) x |= values[i] != 0;
  return x;
}

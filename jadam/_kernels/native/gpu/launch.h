// What the binding gives to the kernels when it launches them.
#pragma once

#include "../step.h"

namespace jadam {

constexpr int kThreads = 256;  // of a thread block: 8 warps
constexpr int kLeavesInLaunch = 256;

// How a kernel divides its work.
struct Division {
  int numbers;      // of a thread, of each block
  uint32_t blocks;  // of a thread block: a chunk
  int resident;     // thread blocks that a multiprocessor has room for, at least
  bool ahead;       // a block is on its way while one is computed
};
constexpr Division kFloat32{4, 16, 4, false}, kFloats{4, 64, 3, true}, kCodes{8, 32, 2, true},
    kCodes4{8, 32, 2, true}, kNarrowFloats{4, 16, 3, false}, kNarrowCodes{8, 128, 2, true},
    kNarrowCodes4{8, 128, 2, true};

// The options of a leaf, as bits.
enum : uint32_t {
  kDecays = 1,
  kWritesParams = 2,
  kNarrowG = 4,  // bfloat16
  kNarrowP = 8,
  kNarrowM = 16,
  kNarrowV = 32,
  kIsAligned = 64,  // all its arrays, and its rows
  kNarrow = kNarrowG | kNarrowP | kNarrowM | kNarrowV,
};

// Moments and residual are replaced where they are.
struct DeviceLeaf {
  const void *g, *p;
  void *out, *m, *v, *residual;
  const uint32_t* words;  // the count of the residual's dither, or two words of random bits
  int64_t n;              // of a row
  uint32_t blocks, blocks_in_row;
  uint32_t first_chunk;  // of all leaves' chunks
  uint32_t salt;
  uint32_t options;
  Weights weights;
};

struct Launch {
  const Numbers* numbers;
  const uint32_t* count;
  const uint32_t* first_lane;
  int64_t leaves;
  DeviceLeaf leaf[kLeavesInLaunch];
};
// The most bytes that a kernel's parameters may have since CUDA 12.1.
static_assert(sizeof(Launch) <= 32764, "");

}  // namespace jadam

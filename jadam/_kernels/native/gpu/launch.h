// What the binding launches the kernels with, and they take.
#pragma once

#include "../step.h"

namespace jadam {

constexpr int kThreads = 256;         // of a thread block: 8 warps
constexpr uint32_t kBlocksInChunk = 64;  // of numbers, for a thread block
constexpr int kLeavesInLaunch = 32;

// The options of a leaf, as bits.
enum : uint32_t {
  kDecays = 1,
  kWritesParams = 2,
  kNarrowG = 4,  // bfloat16
  kNarrowP = 8,
  kNarrowM = 16,
  kNarrowV = 32,
  kIsAligned = 64,  // all its arrays, and its rows
};

struct DeviceLeaf {
  const void *g, *p, *m, *v, *residual;
  void *out, *m_out, *v_out, *residual_out;
  const uint32_t* words;  // the count of the residual's dither, or two words of random bits
  int64_t n;              // of a row
  uint32_t blocks, blocks_in_row;
  uint32_t first_chunk;  // of all leaves' chunks
  uint32_t salt;
  uint32_t options;
  Weights weights;
};

// Of at most 4 kB, which any driver passes as a kernel's parameter.
struct Launch {
  const Numbers* numbers;
  const Tables* tables;
  const uint32_t* count;
  const uint32_t* first_lane;
  int32_t leaves;
  DeviceLeaf leaf[kLeavesInLaunch];
};
static_assert(sizeof(Launch) <= 4096, "");

}  // namespace jadam

// Leaves in the form in which the kernels for GPUs take them.
#pragma once

#include <initializer_list>

#include "launch.h"

namespace jadam {

// The kernels by their names.
struct Entry {
  const char* name;
  Division division;
};
constexpr Entry kEntries[] = {{"jadam_float32", kFloat32},
                              {"jadam_floats", kFloats},
                              {"jadam_codes", kCodes},
                              {"jadam_codes4", kCodes4},
                              {"jadam_narrow_floats", kNarrowFloats},
                              {"jadam_narrow_codes", kNarrowCodes},
                              {"jadam_narrow_codes4", kNarrowCodes4}};

// Which of them has a leaf.
inline int entry_of(const Leaf& leaf) {
  const int first = leaf.weights == Weights::kPlain ? 1 : 4;  // of those for such weights
  if (leaf.codes == Codes::kFourBits) return first + 2;
  if (leaf.codes == Codes::kEightBits) return first + 1;
  if (leaf.weights != Weights::kPlain) return first;
  for (Float x : {leaf.g_dtype, leaf.p_dtype, leaf.m_dtype, leaf.v_dtype}) {
    if (x == Float::kBF16) return 1;
  }
  return 0;
}

inline bool is_aligned(const Leaf& leaf, const Division& division) {
  const void* const v = leaf.is_coded() ? nullptr : leaf.v;  // tops are read one by one
  for (const void* x : {leaf.g, leaf.p, leaf.m, v, leaf.residual, (const void*)leaf.out}) {
    if (reinterpret_cast<uintptr_t>(x) % 16 != 0) return false;
  }
  return leaf.rows == 1 || leaf.n % division.numbers == 0;
}

inline DeviceLeaf on_device(const Leaf& leaf, const Division& division, uint32_t first_chunk) {
  const auto option = [](uint32_t bit, bool is_on) { return is_on ? bit : 0; };
  const auto narrow = [&](uint32_t bit, Float dtype) { return option(bit, dtype == Float::kBF16); };
  DeviceLeaf found{};
  found.g = leaf.g;
  found.p = leaf.p;
  found.out = leaf.out;
  found.m = leaf.m_out;
  found.v = leaf.v_out;
  found.residual = leaf.residual_out;
  found.words = static_cast<const uint32_t*>(leaf.counted);
  found.n = leaf.n;
  found.blocks = uint32_t(leaf.blocks());
  found.blocks_in_row = uint32_t(leaf.blocks_in_row());
  found.first_chunk = first_chunk;
  found.salt = leaf.salt;
  found.options = option(kDecays, leaf.decays) | option(kWritesParams, leaf.writes_params) |
                  narrow(kNarrowG, leaf.g_dtype) | narrow(kNarrowP, leaf.p_dtype) |
                  narrow(kNarrowM, leaf.m_dtype) | narrow(kNarrowV, leaf.v_dtype) |
                  option(kIsAligned, is_aligned(leaf, division));
  found.weights = leaf.weights;
  return found;
}

// How many chunks a leaf has: a thread block steps one.
inline uint32_t chunks_of(const DeviceLeaf& leaf, const Division& division) {
  return (leaf.blocks - 1) / division.blocks + 1;
}

}  // namespace jadam

// What the binding and the kernels of each instruction set share.
#pragma once

#include <cstdint>

namespace jadam {

constexpr int64_t kBlock = 128;  // as _codec.BLOCK

// One step's numbers, in the order of _native.Step.
struct Step {
  float complement1;  // 1 - b1
  float complement2;  // 1 - b2
  float dither;       // of v, over 1 - b2
  float m_weight;     // Nesterov's weights; both 0 without
  float g_weight;
  float c1;  // the bias corrections
  float c2;
  float eps;
  float eps_root;
  float learning_rate;
  float weight_decay;
  float before_a;  // the curve of m's code in the step before
  float before_s;
  float now_a;  // and in this one
  float now_s;
};

// Powers of two and 16 times logarithms, in the order of _native._tables: at 1 + i/32, with the
// series of log(1 + r), and as polynomials in 2x - 3 on [1, 2). What a level or a number's upper
// bits hold of i is taken off the first and the third, so that either can be added as it is:
// i << 18 off the power's bits, i >> 1 off the logarithm.
struct Tables {
  float exp2[32];
  float reciprocal[32];
  float log2[32];
  float series[3];
  float exp2_polynomial[7];
  float log2_polynomial[10];
};

enum class Float { kF32, kBF16 };

// One leaf: rows of n numbers, each row in blocks of 128. Where an output aliases its input the
// two pointers are equal.
struct Leaf {
  int64_t rows, n;
  Float g_dtype, p_dtype, m_dtype, v_dtype;
  bool is_coded;
  bool decays;
  bool writes_params;  // p + update, else the update alone
  const void *g, *p, *m, *v;
  void *out, *m_out, *v_out;

  int64_t blocks_in_row() const { return (n + kBlock - 1) / kBlock; }
  int64_t blocks() const { return rows * blocks_in_row(); }
};

struct Range {
  int64_t begin, end;  // blocks
};

using Kernel = void (*)(const Leaf&, Range, const Step&, const Tables&, uint32_t count);

#define JADAM_DECLARE(isa)                                                  \
  namespace isa {                                                           \
  void run(const Leaf&, Range, const Step&, const Tables&, uint32_t count); \
  }
JADAM_DECLARE(avx512)
JADAM_DECLARE(avx2)
JADAM_DECLARE(baseline)
#undef JADAM_DECLARE

}  // namespace jadam

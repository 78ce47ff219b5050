// What the binding and the kernels of each instruction set share.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

// Of functions that run on a GPU too.
#if defined(__CUDACC__)
#define JADAM_EVERYWHERE __host__ __device__
#else
#define JADAM_EVERYWHERE
#endif

namespace jadam {

constexpr int64_t kBlock = 128;  // as codes.BLOCK

// Of the dithers, as _rounding.STEP and beside it.
constexpr uint32_t kStep = 0x9E3779B9u, kLane = 0xC13FA9A9u, kSalt = 0x85EBCA6Bu;

// One step's numbers, by native.NAMES.
struct Numbers {
  float share1;    // 1 - b1, or -b1 where that is smaller; of 0 it is -0
  float share2;    // likewise of b2
  float dither;    // of v, over 1 - b2
  float m_weight;  // Nesterov's weights; both 0 without
  float g_weight;
  float c1;  // the bias corrections
  float c2;
  float eps;
  float eps_root;
  float most;  // of v / c2 + eps_root
  float learning_rate;
  float weight_decay;
  float before_a;  // the curve of m's code in the step before
  float before_s;
  float now_a;  // and in this one
  float now_s;
  float bound;  // of |m| beside the root of v, after this step
  float least_bounding;  // a smaller v counts as this one there
  float coarse_before_a;  // the curve of 4 bits
  float coarse_before_s;
  float coarse_now_a;
  float coarse_now_s;
};

// Powers of two and 16 times logarithms on [1, 2), made by native.tables. AVX-512 has them at the
// 32 places 1 + i/32 with the series of log(1 + r), AVX2 at the 8 places 1 + i/8 with a longer one
// and, of powers, a table of 2^(i/32) for i < 4 as a factor; the others have polynomials in 2x - 3.
// A whole level is added to a power's bits, and a number's upper bits to its logarithm, with what
// they say of the place i in them. So the tables have that subtracted: i << 18 (of 8 places i << 20)
// from a power's bits, i >> 1 (2i) from a logarithm.
struct Tables {
  float exp2[32];
  float reciprocal[32];
  float log2[32];
  float series[3];
  float exp2_eighths[8];
  float exp2_rest[4];
  float reciprocal_eighths[8];
  float log2_eighths[8];
  float series_eighths[4];
  float exp2_polynomial[7];
  float log2_polynomial[10];
};

// The dithers of a block's lanes, of both salts: the upper 16 bits, and 23 bits as numbers in
// [0, 1). Codes of 4 bits have that of v in another form, `to_level`: added to the bits of v, it makes
// the bits from the 24th on the level of its root, as Lattice.rounded has it, plus 64.
struct Dithers {
  alignas(64) uint32_t upper[2][kBlock];
  alignas(64) float unit[2][kBlock];
  alignas(64) uint32_t to_level[kBlock];
};

// Added to the bits of v: an odd power of 2 has the level of the even one below it.
constexpr uint32_t kHalfExponent = 0x800000;

// What to add to a number's bits so that they carry over to the next level, a power of two of the
// root, where a dither in [0, 1) rounds up: from that part of an octave on where the chance of the
// upper level is 1 - dither.
JADAM_EVERYWHERE inline uint32_t to_level(float dither) {
  constexpr float kBend = 0.173f;  // lattice.FOUR_BITS.bend
  const float chance = 1 - dither, linear = 1 - kBend;
  const float part = 2 * chance / (linear + sqrtf(linear * linear + 4 * kBend * chance));
  const float one = 1, from = exp2f(2 * part);
  uint32_t bits_of_one, bits_of_from;
  std::memcpy(&bits_of_one, &one, sizeof one);
  std::memcpy(&bits_of_from, &from, sizeof from);
  return kHalfExponent + (1u << 24) - (bits_of_from - bits_of_one);
}

enum class Float { kF32, kBF16 };
inline int64_t size_of(Float dtype) { return dtype == Float::kF32 ? 4 : 2; }

// How the moments lie as codes, if they do: v's array then has the tops of blocks.
enum class Codes { kNone, kEightBits, kFourBits };

// How a parameter lies between two steps: as it is, or in bfloat16 with a residual of 8 or 16 bits,
// or in bfloat16 rounded randomly. The numbers of native.weights_attributes.
enum class Weights : int32_t { kPlain, kCompensated8, kCompensated16, kStochastic };

// One leaf: rows of n numbers, each row in blocks of 128. Where an output aliases its input the
// two pointers are equal. What pointers lead to is in the memory of the device.
struct Leaf {
  int64_t rows, n;
  Float g_dtype, p_dtype, m_dtype, v_dtype;
  Codes codes;
  bool decays;
  bool writes_params;  // p + update, else the update alone
  const void *g, *p, *m, *v;
  void *out, *m_out, *v_out;
  Weights weights;
  const void* residual;
  void* residual_out;
  uint32_t salt;
  const void* counted;  // the count of the dither of an 8-bit residual, or two random words
  uint32_t phase;       // of that dither
  uint32_t first_lane;  // at which each row begins, where a leaf is divided along its rows
  uint32_t words[2];    // the random ones

  bool is_coded() const { return codes != Codes::kNone; }
  // Bytes of a number, of both codes, of a top.
  int64_t m_size() const {
    return codes == Codes::kFourBits ? 1 : codes == Codes::kEightBits ? 2 : size_of(m_dtype);
  }
  int64_t v_size() const { return is_coded() ? 2 : size_of(v_dtype); }

  int64_t blocks_in_row() const { return (n + kBlock - 1) / kBlock; }
  int64_t blocks() const { return rows * blocks_in_row(); }
};

struct Range {
  int64_t begin, end;  // blocks, or rows of a batch
};

using Kernel = void (*)(const Leaf&, Range, const Numbers&, const Tables&, const Dithers&);

// What the steps that rows have missed make of them, as _missed.Sums: a number for each place of a
// batch, and for each node of the interpolation.
struct Missed {
  const float *steps, *plain, *first, *second, *decay;
  const float *factors, *scales;  // [nodes, n]
  int64_t nodes;
};

// The rows of a table that a batch touches; table, moments and gradients are in float32.
struct Batch {
  int64_t rows, width;  // of the table
  int64_t n;            // places of the batch, each with a row
  const int32_t* ids;   // the rows; what is not in the table counts for nothing
  Missed missed;
  const float *p, *m, *v;

  bool has(int64_t place) const { return 0 <= ids[place] && ids[place] < rows; }
};

// A place of a batch among those with the same row.
struct Place {
  bool is_first;
  int32_t next;  // -1 where there is none
};

// A step of these rows in place. A row that comes again has one gradient, the sum.
struct Update {
  const float* g;  // [n, width]
  const Place* places;
  float *p, *m, *v;
  int32_t* last;
  int32_t count;  // after the step
  bool decays;
};

// The first writes the rows as they are after the missed steps, [n, width].
using CatchUp = void (*)(const Batch&, Range places, float eps, float* now);
using StepRows = void (*)(const Batch&, const Update&, Range places, const Numbers&);

#define JADAM_DECLARE(isa)                                                     \
  namespace isa {                                                              \
  void run(const Leaf&, Range, const Numbers&, const Tables&, const Dithers&); \
  void catch_up(const Batch&, Range, float, float*);                           \
  void step_rows(const Batch&, const Update&, Range, const Numbers&);          \
  }
JADAM_DECLARE(avx512)
JADAM_DECLARE(avx2)
JADAM_DECLARE(baseline)
#undef JADAM_DECLARE

}  // namespace jadam

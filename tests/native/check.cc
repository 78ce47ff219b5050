// The native kernels by themselves: every template of that for CPUs, in every instruction set that
// this machine has, and the CUDA source as plain C++ (simt.h), as one more set, against the equations
// of _math.py, _rounding.py, codes.py and _masters.py in double precision; and a Work's jobs on
// several threads. Built with sanitizers it also shows that nothing is read or written out of
// bounds, undefined or raced for.
//
// The reference holds intervals: a float32 operation is off by half a unit in the last place and
// flushes what is under 2^-126, so a chain of them gives a number between two that can be said,
// whether products are fused or not. A rounding to storage is monotone: what is stored lies between
// the two ends' roundings. So no tolerance is chosen but those of approximations, named below.

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "cpu/work.h"
#include "on_gpu.h"

namespace {

using jadam::Codes;
using jadam::Float;
using jadam::Leaf;
using jadam::Numbers;
using jadam::Tables;
using jadam::Weights;
using jadam::size_of;

const Tables kTables = {
#include "tables.inc"
};

// An instruction set; that for GPUs has no kernel for CPUs.
using Isa = jadam::InstructionSet;
bool is_gpu(const Isa& isa) { return isa.kernel == nullptr; }

std::vector<Isa> all_sets() {
  std::vector<Isa> found = jadam::instruction_sets();
#if defined(JADAM_HAS_gpu)
  found.push_back({"gpu", nullptr, nullptr, nullptr});
#endif
  return found;
}

// ---- intervals

constexpr double kHalfUnit = 0x1p-24, kSmallest = 0x1p-126;

// 2^x by a polynomial to 2e-7, and its evaluation in float32.
constexpr double kPowerError = 4e-7;
// 16 log2 in levels: a polynomial to 5e-6, sums up to 17 in float32, a dither of 23 bits for 24.
constexpr double kLevelError = 2e-5;
// m's code: that of the power, a reciprocal to one unit, three roundings; and the sum with the
// dither, up to 65.
constexpr double kShareError = 1e-6, kCodeError = 1e-5;
// Of 4 bits: the chance of v's upper level, eight roundings, and the dither as above.
constexpr double kChanceError = 1e-6;

struct Interval {
  double lo, hi;
  Interval(double x) : lo(x), hi(x) {}
  Interval(double low, double high) : lo(low), hi(high) {}
};

Interval widened(Interval x, double relative) {
  if (!std::isfinite(x.lo) || !std::isfinite(x.hi)) return x;
  return {x.lo - std::abs(x.lo) * relative, x.hi + std::abs(x.hi) * relative};
}

// After one float32 operation; exact zeros stay.
Interval rounded(double lo, double hi) {
  if (std::isnan(lo) || std::isnan(hi)) return std::nan("");
  const auto flushed = [](double x) {
    return x != 0 && std::abs(x) < 2 * kSmallest ? kSmallest : 0;
  };
  return widened({lo - flushed(lo), hi + flushed(hi)}, kHalfUnit);
}

Interval operator+(Interval x, Interval y) { return rounded(x.lo + y.lo, x.hi + y.hi); }
Interval operator-(Interval x, Interval y) { return rounded(x.lo - y.hi, x.hi - y.lo); }
Interval operator*(Interval x, Interval y) {
  const auto [lo, hi] = std::minmax({x.lo * y.lo, x.lo * y.hi, x.hi * y.lo, x.hi * y.hi});
  return std::isnan(x.lo * y.lo) ? Interval(std::nan("")) : rounded(lo, hi);
}
Interval operator/(Interval x, Interval y) {  // y > 0
  const auto [lo, hi] = std::minmax({x.lo / y.lo, x.lo / y.hi, x.hi / y.lo, x.hi / y.hi});
  return std::isnan(x.lo / y.lo) ? Interval(std::nan("")) : rounded(lo, hi);
}
Interval at_least(Interval x, double low) { return {std::max(x.lo, low), std::max(x.hi, low)}; }
Interval at_most(Interval x, double high) {
  return std::isnan(x.lo) ? x : Interval(std::min(x.lo, high), std::min(x.hi, high));
}
Interval root_of(Interval x) { return rounded(std::sqrt(x.lo), std::sqrt(x.hi)); }

// ---- _rounding.py

uint32_t weyl(uint32_t lane, uint32_t count, uint32_t salt) {
  return lane * 0xC13FA9A9u + count * 0x9E3779B9u + salt * 0x85EBCA6Bu;
}
double unit(uint32_t lane, uint32_t count, uint32_t salt) {
  return (weyl(lane, count, salt) >> 8) * 0x1p-24;
}

double spacing_of_bf16(double x, int smallest) {
  return std::ldexp(1, std::max(x == 0 ? smallest : std::ilogb(x) - 7, smallest));
}
double to_float32(double x) { return double(float(x)); }
double to_bf16(double x) {
  if (!std::isfinite(x)) return x;
  const double s = spacing_of_bf16(x, -133), nearest = std::nearbyint(x / s) * s;
  return std::abs(nearest) < 0x1p128 ? nearest : std::copysign(INFINITY, x);
}
double dithered(double x, uint32_t lane, uint32_t count, uint32_t salt) {
  if (!std::isfinite(x)) return x;
  const double s = spacing_of_bf16(x, -126), u = (weyl(lane, count, salt) >> 16) * 0x1p-16;
  return std::copysign(std::min(std::floor(std::abs(x) / s + u) * s, 0x1.FEp127), x);
}

// ---- _math.py

double flush(double x) { return std::abs(x) < kSmallest ? std::copysign(0, x) : x; }

double limit_range(double g) {
  return std::isfinite(g) ? std::min(std::max(g, -0x1p63), 0x1p63) : g;
}

// Adam's numbers at step t, as _math.adam, _math.nadam and _math.moment_ratios make them. RAdam's
// first steps are not divided by the root: `most`, of v / c2 + eps_root, is 0 there, and eps 1.
struct Hyper {
  const char* name;
  double b1, b2, t, eps, eps_root, most = INFINITY;
};

struct Curve {
  double a, s;
};

Curve curve_of(const Hyper& h, double t, double dense) {
  t = std::max(t, 1.0);
  const double rho = h.b1 * h.b1 / h.b2;
  const double noise =
      std::sqrt((1 - h.b1) / (1 + h.b1) * (1 - std::pow(h.b1, 2 * t)) / (1 - std::pow(h.b2, t)));
  const double bound =
      (1 - h.b1) / std::sqrt(1 - h.b2) * std::sqrt((1 - std::pow(rho, t)) / (1 - rho));
  const double a = dense * noise;
  return {a, 1 + a / std::min(bound, 200 * noise)};
}

Numbers step_of(const Hyper& h, bool nesterov) {
  const Curve before = curve_of(h, h.t - 1, 3), now = curve_of(h, h.t, 3);
  const Curve coarse_before = curve_of(h, h.t - 1, 2), coarse_now = curve_of(h, h.t, 2);
  const double dither = unit(0, uint32_t(h.t), 0) - (0.5 - 0x1p-25);
  const auto correction = [&](double b, double t) { return -std::expm1(t * std::log(b)); };
  Numbers s{};
  s.share1 = float(h.b1 < 0.5 ? -h.b1 : 1 - h.b1);
  s.share2 = float(h.b2 < 0.5 ? -h.b2 : 1 - h.b2);
  s.dither = float(1 - h.b2 <= 0.5 ? dither / (1 - h.b2) : 0);
  s.m_weight = float(nesterov ? h.b1 / correction(h.b1, h.t + 1) : 0);
  s.g_weight = float(nesterov ? (1 - h.b1) / correction(h.b1, h.t) : 0);
  s.c1 = float(nesterov ? 1 : correction(h.b1, h.t));
  s.c2 = float(correction(h.b2, h.t));
  s.eps = float(h.eps);
  s.eps_root = float(h.eps_root);
  s.most = float(h.most);
  s.learning_rate = 1e-3f;
  s.weight_decay = 0.1f;
  s.before_a = float(before.a);
  s.before_s = float(before.s);
  s.now_a = float(now.a);
  s.now_s = float(now.s);
  s.coarse_before_a = float(coarse_before.a);
  s.coarse_before_s = float(coarse_before.s);
  s.coarse_now_a = float(coarse_now.a);
  s.coarse_now_s = float(coarse_now.s);
  s.bound = 0x1p100f;  // the reference does not cut m
  s.least_bounding = 0x1p-126f;
  return s;
}

Interval average(Interval m, Interval x, float share) {
  return (share < 0 ? x : m) + share * (x - m);
}

// v is a point where it was stored as a float, an interval where as a code.
Interval second_moment(Interval v, double g, const Numbers& s) {
  const auto power = [](double x) { return x > 0 ? std::ldexp(1, std::ilogb(x)) : 0; };
  const Interval dither = Interval(s.dither) * Interval(power(v.lo), power(v.hi)) * 0x1p-23;
  return (s.share2 < 0 ? Interval(g) * g : v) + s.share2 * (Interval(g) * g - v + dither);
}

Interval direction(double g, Interval m, Interval v, bool nesterov, const Numbers& s) {
  // 1/c2 is rounded before it multiplies v.
  const Interval v_hat = v * (Interval(1) / s.c2);
  const Interval limited = at_most(v_hat + s.eps_root, s.most);
  const Interval denominator = root_of(at_least(limited, 0x1p-103)) + s.eps;
  if (nesterov) return (Interval(s.m_weight) * m + Interval(s.g_weight) * g) / denominator;
  return m / (s.c1 * denominator);
}

// ---- codes.py

// lattice.EIGHT_BITS or FOUR_BITS.
struct Lattice {
  int per_octave, top, sizes, bytes;

  bool is_coarse() const { return per_octave == 1; }
  int nan() const { return top + 1; }
  int code_of(int both) const { return is_coarse() ? (both + 20) / 21 : both & nan(); }
  int size_of(int both) const {
    return is_coarse() ? both - 21 * code_of(both) + sizes : (both >> 9) - (sizes + 1);
  }
  // 4 bits of zero and of NaN have no size.
  int both_of(int code, int size) const {
    if (!is_coarse()) return (size + sizes + 1) << 9 | code;
    return code == nan() ? 255 : std::max(21 * code + size - sizes, 0);
  }
  Curve before(const Numbers& s) const {
    if (is_coarse()) return {s.coarse_before_a, s.coarse_before_s};
    return {s.before_a, s.before_s};
  }
  Curve now(const Numbers& s) const {
    return is_coarse() ? Curve{s.coarse_now_a, s.coarse_now_s} : Curve{s.now_a, s.now_s};
  }
  double root_of(int code, int top_of_block) const {
    return std::exp2(double(code - top + top_of_block) / per_octave);
  }
  double level_of(double v) const { return 0.5 * per_octave * std::log2(v); }
  double level_error() const { return is_coarse() ? 0 : kLevelError; }
  double dither_error() const { return is_coarse() ? kChanceError : kLevelError; }
};
constexpr Lattice kEightBits{32, 510, 63, 2}, kFourBits{1, 12, 10, 1};

const Lattice& lattice_of(const Leaf& leaf) {
  return leaf.codes == Codes::kFourBits ? kFourBits : kEightBits;
}

Interval decoded_root(const Lattice& lattice, int code, int top) {
  if (code == 0) return 0;
  return widened(lattice.root_of(code, top), lattice.is_coarse() ? 0 : kPowerError);
}

Interval decoded_m(const Lattice& lattice, int x, Interval root, const Numbers& s) {
  const Curve curve = lattice.before(s);
  const Interval rest = Interval(curve.s) * lattice.sizes - std::abs(x);
  return root * (Interval(curve.a) * x * widened(Interval(1) / rest, 0x1p-23));
}

int code_of_v(const Lattice& lattice, double v, bool is_fed, double u, int top) {
  if (!std::isfinite(v)) return lattice.nan();
  if (v < kSmallest) return 0;
  const double level = lattice.level_of(v), lower = std::floor(level), part = level - lower;
  // As often on the upper level as keeps the mean of the fourth root of v.
  const double chance = lattice.is_coarse() ? part - 0.173 * part * (1 - part) : part;
  const int raised = int(lower) + int(std::floor(chance + u)) - top + lattice.top;
  return raised >= 1 ? std::min(raised, lattice.top) : is_fed;
}

// m's code, as far up (1) or down (-1) as it may come out.
int code_of_m(const Lattice& lattice, double m, double root, double u, const Numbers& s, int way) {
  const double size = std::abs(m), outward = m < 0 ? -way : way;
  const auto [a, s_] = lattice.now(s);
  const double end = to_float32(lattice.sizes * s_);
  double x = end * size / (a * root + size) * (1 + outward * kShareError);
  if (lattice.is_coarse()) {
    // The chance of the upper code keeps the mean of m itself; beyond the last one there is none.
    const double lower = std::min(std::floor(x), double(lattice.sizes));
    x = lower + std::min(std::max((x - lower) * (end - lower - 1) / (end - x), 0.0), 1.0);
  }
  const double code = std::floor(x + u + outward * kCodeError);
  const int kept = int(std::max(0.0, std::min(code, double(lattice.sizes))));
  return m < 0 ? -kept : kept;
}

// ---- _masters.py

// float32's numbers in their order.
int64_t ordered(double x) {
  const float in_float32 = float(x);
  uint32_t bits;
  std::memcpy(&bits, &in_float32, 4);
  const int64_t size = bits & 0x7FFFFFFFu;
  return bits >> 31 ? -size : size;
}
double of_order(int64_t order) {
  const uint32_t bits = uint32_t(std::abs(order));
  float x;
  std::memcpy(&x, &bits, 4);
  return order < 0 ? -x : x;
}

int bits_below(Weights weights) { return weights == Weights::kCompensated8 ? 8 : 0; }

double join(double x, int residual, Weights weights) {
  return std::isfinite(x) ? of_order(ordered(x) + residual * (1 << bits_below(weights))) : x;
}

double difference(double target, double x) {
  constexpr double kMost = std::numeric_limits<float>::max();
  if (!std::isfinite(target)) return target == x ? -0.0 : target;
  return std::min(std::max(to_float32(target - x), -kMost), kMost);
}

// The parameter after an update to it.
double landed(double x, double update) { return to_bf16(flush(to_float32(x + update))); }

// A weight as it lies in memory: the update that takes x there, the parameter then, and the place of
// the weight with its residual among float32's numbers.
struct Lying {
  double update, param;
  int64_t place;
};

Lying split(double master, double x, Weights weights, uint32_t dither) {
  const int below = bits_below(weights);
  int64_t order = ordered(master);
  if (below > 0) order += dither >> (32 - below);
  constexpr int64_t kLargest = 0x7F7F;
  const int64_t upper = std::min(std::max((order + 0x8000) >> 16, -kLargest), kLargest);
  const double update = difference(std::isfinite(master) ? of_order(upper * 0x10000) : master, x);
  const double param = landed(x, update);
  const int64_t there = ordered(param);
  if (!std::isfinite(master)) return {update, param, there};
  const int64_t kept = std::min(std::max(order, there - 0x8000), there + 0x7FFF) - there;
  return {update, param, there + (kept >> below) * (1 << below)};
}

uint32_t random_bits(uint32_t place, const uint32_t (&words)[2]) {
  for (const uint32_t word : words) {
    place ^= word;
    place = (place ^ place >> 16) * 0x7FEB352Du;
    place = (place ^ place >> 15) * 0x846CA68Bu;
    place ^= place >> 16;
  }
  return place;
}

Lying round_randomly(double master, double x, uint32_t random) {
  double target = to_bf16(master);
  if (std::abs(master) <= 0x1.FEp127) {
    const double s = spacing_of_bf16(master, -126), u = (random >> 8) * 0x1p-24;
    const double steps = std::abs(master) / s, below = std::floor(steps);
    target = std::copysign((below + (u < steps - below)) * s, master);
  }
  const double update = difference(target, x), param = landed(x, update);
  return {update, param, ordered(param)};
}

// ---- memory

// bfloat16 is the upper half of a float32, which lies behind the lower one.
void write(std::vector<char>& to, Float dtype, int64_t i, float x) {
  const int64_t size = size_of(dtype);
  std::memcpy(&to[i * size], reinterpret_cast<char*>(&x) + 4 - size, size);
}
double read(const std::vector<char>& from, Float dtype, int64_t i) {
  const int64_t size = size_of(dtype);
  float x = 0;
  std::memcpy(reinterpret_cast<char*>(&x) + 4 - size, &from[i * size], size);
  return x;
}
template <class T>
T read(const std::vector<char>& from, int64_t i) {
  T x;
  std::memcpy(&x, &from[i * sizeof x], sizeof x);
  return x;
}

int read_both(const Lattice& lattice, const std::vector<char>& from, int64_t i) {
  return lattice.bytes == 1 ? read<uint8_t>(from, i) : read<uint16_t>(from, i);
}

// Exactly as many bytes as are needed, at `offset` from what an allocator aligns to.
class Buffer {
 public:
  Buffer(const std::vector<char>& bytes, int64_t offset)
      : offset_(offset), size_(bytes.size()), memory_(new char[offset + bytes.size()]) {
    std::copy(bytes.begin(), bytes.end(), data());
  }
  char* data() { return memory_.get() + offset_; }
  std::vector<char> bytes() { return {data(), data() + size_}; }

 private:
  int64_t offset_;
  size_t size_;
  std::unique_ptr<char[]> memory_;
};

// ---- cases

enum class Kind { kF32, kBF16, kBF16M, kEightBits, kFourBits };
const char* const kKinds[] = {"float32", "bfloat16", "bfloat16 m", "8-bit codes", "4-bit codes"};
const char* const kWeights[] = {"", ", compensated in 8 bits", ", compensated in 16 bits",
                                ", rounded randomly"};

struct Case {
  Leaf leaf;  // without buffers
  Kind kind;
  bool nesterov;
  Hyper hyper;
  Numbers step;

  bool is_plain() const { return leaf.weights == Weights::kPlain; }
  Float written() const {
    return leaf.writes_params ? leaf.p_dtype : is_plain() ? leaf.g_dtype : Float::kF32;
  }
  bool has_params() const { return leaf.writes_params || leaf.decays || !is_plain(); }
  int64_t residual_size() const {
    return leaf.weights == Weights::kCompensated8    ? 1
           : leaf.weights == Weights::kCompensated16 ? 2
                                                     : 0;
  }
  int64_t size() const { return leaf.rows * leaf.n; }
  uint32_t count() const { return uint32_t(hyper.t); }

  std::string name() const {
    const auto dtype = [](Float x) { return x == Float::kF32 ? "float32" : "bfloat16"; };
    return std::string("g ") + dtype(leaf.g_dtype) + ", p " + dtype(leaf.p_dtype) + ", moments " +
           kKinds[int(kind)] + (leaf.writes_params ? ", params" : ", update") +
           (leaf.decays ? ", decay" : "") + kWeights[int(leaf.weights)] + (nesterov ? ", Nesterov, " : ", ") +
           std::to_string(leaf.rows) + " x " + std::to_string(leaf.n) + ", " + hyper.name;
  }
};

Case make_case(Float g, Float p, Kind kind, Weights weights, bool writes_params, bool decays,
               bool nesterov, int64_t rows, int64_t n, const Hyper& hyper) {
  Leaf leaf{};
  leaf.rows = rows;
  leaf.n = n;
  leaf.g_dtype = g;
  leaf.p_dtype = p;
  leaf.m_dtype = kind == Kind::kF32 ? Float::kF32 : Float::kBF16;
  leaf.v_dtype = kind == Kind::kBF16 ? Float::kBF16 : Float::kF32;
  leaf.codes = kind == Kind::kEightBits  ? Codes::kEightBits
               : kind == Kind::kFourBits ? Codes::kFourBits
                                         : Codes::kNone;
  leaf.decays = decays;
  leaf.writes_params = writes_params;
  leaf.weights = weights;
  leaf.salt = 5;
  leaf.words[0] = uint32_t(12345 * n);  // also the count of the residual's dither
  leaf.words[1] = 0xFEDCBA98u;
  leaf.phase = leaf.words[0] * jadam::kStep + leaf.salt * jadam::kSalt;
  return {leaf, kind, nesterov, hyper, step_of(hyper, nesterov)};
}

struct Inputs {
  std::vector<char> g, p, m, v, residual;
};

struct Outputs {
  std::vector<char> out, m, v, residual;
  bool operator==(const Outputs& x) const {
    return out == x.out && m == x.m && v == x.v && residual == x.residual;
  }
};

int residual_of(const Case& c, const std::vector<char>& from, int64_t i) {
  return c.leaf.weights == Weights::kCompensated8    ? read<int8_t>(from, i)
         : c.leaf.weights == Weights::kCompensated16 ? read<int16_t>(from, i)
                                                     : 0;
}

class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed * 2 + 1) {}
  uint32_t next() {
    state_ = state_ * 6364136223846793005u + 1442695040888963407u;
    return uint32_t(state_ >> 32);
  }
  uint32_t below(uint32_t n) { return uint32_t(uint64_t(next()) * n >> 32); }
  int between(int low, int high) { return low + int(below(uint32_t(high - low + 1))); }
  // Of size 2^-20 to 2^4, and zeros.
  float number() {
    const float size = std::ldexp(float(1 + next() * 0x1p-32), between(-20, 3));
    return below(16) == 0 ? 0 : below(2) == 0 ? size : -size;
  }

 private:
  uint64_t state_;
};

constexpr float kInfinity = std::numeric_limits<float>::infinity();
float of_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
// Among them NaN with bits that no operation gives it. To round those of the second and third up is
// to come to another sign.
const float kSpecial[] = {0,
                          -0.0f,
                          kInfinity,
                          -kInfinity,
                          NAN,
                          of_bits(0x7FFFFFFF),
                          of_bits(0xFFFFFFFF),
                          of_bits(0x7F800001),
                          of_bits(0xFF810000),
                          1e30f,
                          -1e30f,
                          0x1.FEp127f,
                          1e-30f,
                          -1e-30f,
                          1e-42f,
                          3e-39f,
                          0x1p63f};

Inputs make_inputs(const Case& c, bool is_special, uint64_t seed) {
  Random random(seed);
  const int64_t size = c.size();
  const auto number = [&] {
    const bool is_here = is_special && random.below(16) == 0;
    return is_here ? kSpecial[random.below(std::size(kSpecial))] : random.number();
  };
  Inputs in;
  in.g.resize(size * size_of(c.leaf.g_dtype));
  in.p.resize(size * size_of(c.leaf.p_dtype));
  in.m.resize(size * c.leaf.m_size());
  in.v.resize((c.leaf.is_coded() ? c.leaf.blocks() : size) * c.leaf.v_size());
  const Lattice& lattice = lattice_of(c.leaf);
  for (int64_t i = 0; i < size; ++i) {
    write(in.g, c.leaf.g_dtype, i, number());
    write(in.p, c.leaf.p_dtype, i, number());
    if (c.leaf.is_coded()) {
      const bool is_nan = is_special && random.below(64) == 0, is_zero = random.below(16) == 0;
      const int x = is_nan ? 0 : random.between(-lattice.sizes, lattice.sizes);
      const int code = is_nan ? lattice.nan() : is_zero ? 0 : random.between(1, lattice.top);
      const uint16_t both = uint16_t(lattice.both_of(code, x));  // its lower bytes come first
      std::memcpy(&in.m[lattice.bytes * i], &both, lattice.bytes);
    } else {
      // Some are under 2^-119, where bfloat16 is rounded in another way.
      const float root = random.number(), scale = random.below(16) == 0 ? 0x1p-110f : 1;
      write(in.m, c.leaf.m_dtype, i, scale * random.number());
      write(in.v, c.leaf.v_dtype, i, scale * root * root);
    }
  }
  in.residual.resize(size * c.residual_size());
  for (char& x : in.residual) {
    const char edges[] = {0, 127, -128};
    x = random.below(8) == 0 ? edges[random.below(3)] : char(random.between(-128, 127));
  }
  for (int64_t i = 0; c.leaf.is_coded() && i < c.leaf.blocks(); ++i) {
    const int edges[] = {-1900, 1700, 0}, fine = 32 / lattice.per_octave;
    const int16_t top = int16_t(
        (random.below(8) == 0 ? edges[random.below(3)] : random.between(-600, 100)) / fine);
    std::memcpy(&in.v[2 * i], &top, 2);
  }
  return in;
}

enum class Place { kApart, kUnaligned, kInPlace, kInPlaceUnaligned, kInTwoParts };
const char* const kPlaceNames[] = {"apart", "at unaligned addresses", "in place",
                                   "in place, at unaligned addresses", "in two parts"};

Outputs run(const Case& c, const Inputs& in, const Isa& isa, Place place) {
  const bool unaligned = place == Place::kUnaligned || place == Place::kInPlaceUnaligned;
  const bool in_place = place == Place::kInPlace || place == Place::kInPlaceUnaligned;
  const auto buffer = [&](const std::vector<char>& x, int64_t size) {
    return Buffer(x, unaligned ? size : 0);
  };
  Buffer g = buffer(in.g, size_of(c.leaf.g_dtype)), p = buffer(in.p, size_of(c.leaf.p_dtype));
  Buffer m = buffer(in.m, c.leaf.m_size()), v = buffer(in.v, c.leaf.v_size());
  const std::vector<char> empty(c.size() * size_of(c.written()), char(0xAA));
  Buffer out = buffer(empty, size_of(c.written()));
  // On a GPU moments and residuals are replaced where they are: XLA copies them there before.
  const auto before = [&](const std::vector<char>& x) {
    return is_gpu(isa) ? x : std::vector<char>(x.size(), char(0xAA));
  };
  Buffer m_out = buffer(before(in.m), c.leaf.m_size());
  Buffer v_out = buffer(before(in.v), c.leaf.v_size());
  Buffer residual(in.residual, unaligned ? c.residual_size() : 0);
  Buffer residual_out(before(in.residual), unaligned ? c.residual_size() : 0);
  Buffer& replaced = c.leaf.writes_params ? p : g;
  Buffer& moved = in_place && replaced.bytes().size() == empty.size() ? replaced : out;
  Buffer& new_m = in_place ? m : m_out;
  Buffer& new_v = in_place ? v : v_out;
  Buffer& new_residual = in_place ? residual : residual_out;

  Leaf leaf = c.leaf;
  leaf.g = g.data();
  leaf.p = c.has_params() ? p.data() : nullptr;
  leaf.m = m.data();
  leaf.v = v.data();
  leaf.out = moved.data();
  leaf.m_out = new_m.data();
  leaf.v_out = new_v.data();
  leaf.counted = c.leaf.words;
  if (c.residual_size() > 0) {
    leaf.residual = residual.data();
    leaf.residual_out = new_residual.data();
  }
  const int64_t blocks = leaf.blocks(), half = place == Place::kInTwoParts ? (blocks + 1) / 2 : 0;
  const jadam::Dithers dithers = jadam::dithers_of(c.count(), leaf.first_lane, true);
  const jadam::FlushSubnormals flush;
  for (const jadam::Range range : {jadam::Range{0, half}, jadam::Range{half, blocks}}) {
#if defined(JADAM_HAS_gpu)
    if (is_gpu(isa)) {
      simt::run_on_gpu(leaf, range, c.step, c.count());
      continue;
    }
#endif
    isa.kernel(leaf, range, c.step, kTables, dithers);
  }
  return {moved.bytes(), new_m.bytes(), new_v.bytes(), new_residual.bytes()};
}

// ---- what a step gives

// A leaf after a step, before it is stored: `out` as it is written, or the weights that stand for
// more than their 16 bits in float32; `bounds` is the second moment of the largest finite v
// and |g| of each block of codes.
struct Expected {
  std::vector<Interval> out, m, v, bounds;
  std::vector<double> g;
};

struct Span {
  int64_t begin, end;
};
Span elements(const Leaf& leaf, int64_t block) {
  const int64_t row = block / leaf.blocks_in_row();
  const int64_t begin = row * leaf.n + block % leaf.blocks_in_row() * jadam::kBlock;
  return {begin, std::min(begin + jadam::kBlock, (row + 1) * leaf.n)};
}

Interval written(const Case& c, Interval direction, double p) {
  if (c.leaf.decays) direction = direction + Interval(c.step.weight_decay) * p;
  const Interval update = Interval(-c.step.learning_rate) * direction;
  if (!c.is_plain()) return p + update;
  const auto in_g = c.leaf.g_dtype == Float::kF32 ? to_float32 : to_bf16;
  const auto in_p = c.leaf.p_dtype == Float::kF32 ? to_float32 : to_bf16;
  const Interval stored(in_g(update.lo), in_g(update.hi));
  if (!c.leaf.writes_params) return stored;
  const Interval moved = p + stored;
  return {in_p(moved.lo), in_p(moved.hi)};
}

Expected expect(const Case& c, const Inputs& in) {
  const Numbers& s = c.step;
  const Lattice& lattice = lattice_of(c.leaf);
  Expected expected;
  for (int64_t block = 0; block < c.leaf.blocks(); ++block) {
    const int top = c.leaf.is_coded() ? read<int16_t>(in.v, block) : 0;
    const Span span = elements(c.leaf, block);
    int largest_code = 0;
    double largest_g = 0;
    for (int64_t i = span.begin; i < span.end; ++i) {
      const double g = limit_range(flush(read(in.g, c.leaf.g_dtype, i)));
      Interval m = 0, v = 0;
      if (c.leaf.is_coded()) {
        const int both = read_both(lattice, in.m, i), code = lattice.code_of(both);
        const Interval root = decoded_root(lattice, code, top);
        m = decoded_m(lattice, lattice.size_of(both), root, s);
        v = code == lattice.nan() ? NAN : root * root;
        if (code != lattice.nan()) largest_code = std::max(largest_code, code);
        if (std::isfinite(g)) largest_g = std::max(largest_g, std::abs(g));
      } else {
        m = flush(read(in.m, c.leaf.m_dtype, i));
        v = flush(read(in.v, c.leaf.v_dtype, i));
      }
      m = average(m, g, s.share1);
      v = second_moment(v, g, s);
      const double in_memory = read(in.p, c.leaf.p_dtype, i);
      const double p = flush(join(in_memory, residual_of(c, in.residual, i), c.leaf.weights));
      expected.out.push_back(written(c, direction(g, m, v, c.nesterov, s), p));
      expected.m.push_back(m);
      expected.v.push_back(v);
      expected.g.push_back(g);
    }
    const Interval root = decoded_root(lattice, largest_code, top);
    expected.bounds.push_back(second_moment(root * root, largest_g, s));
  }
  return expected;
}

// ---- the comparison

[[noreturn]] void fail(const std::string& isa, const Case& c, const std::string& what) {
  std::fprintf(stderr, "check: %s: %s: %s\n", isa.c_str(), c.name().c_str(), what.c_str());
  std::exit(1);
}

// How many codes differ: from those of the intervals' middles, or between instruction sets.
struct Tally {
  int64_t numbers = 0, different = 0;
  void count(bool differs) { ++numbers, different += differs; }
  double share() const { return double(different) / double(std::max<int64_t>(numbers, 1)); }
};

// One leaf's outputs against what is expected of them.
class Comparison {
 public:
  Comparison(const Isa& isa, const Case& c, const Inputs& in, const Expected& expected,
             const Outputs& got)
      : isa_(isa), c_(c), in_(in), expected_(expected), got_(got) {}

  void of_all(Tally& codes) const {
    for (int64_t block = 0; block < c_.leaf.blocks(); ++block) {
      const Span span = elements(c_.leaf, block);
      if (c_.leaf.is_coded()) of_top(block);
      for (int64_t i = span.begin; i < span.end; ++i) {
        const uint32_t lane = (uint32_t(i - span.begin) + c_.leaf.first_lane) % jadam::kBlock;
        if (c_.is_plain()) {
          of_number("out", i, read(got_.out, c_.written(), i), expected_.out[i]);
        } else {
          of_weight(i, lane);
        }
        if (c_.leaf.is_coded()) {
          of_codes(i, lane, read<int16_t>(got_.v, block), codes);
        } else {
          of_moment("m", i, got_.m, c_.leaf.m_dtype, expected_.m[i], lane, 0);
          of_moment("v", i, got_.v, c_.leaf.v_dtype, expected_.v[i], lane, 1);
        }
      }
    }
  }

 private:
  void of_number(const char* what, int64_t i, double got, Interval expected) const {
    const bool is_in = expected.lo <= got && got <= expected.hi;
    if (std::isnan(expected.lo) ? std::isnan(got) : is_in) return;
    char line[200];
    std::snprintf(line, sizeof line, "%s[%lld] is %.9g, not in [%.9g, %.9g]", what,
                  static_cast<long long>(i), got, expected.lo, expected.hi);
    fail(isa_.name, c_, line);
  }

  // Every step from a weight to how it lies is monotone.
  void of_weight(int64_t i, uint32_t lane) const {
    const double x = flush(read(in_.p, Float::kBF16, i));
    const Weights weights = c_.leaf.weights;
    const auto lying = [&](double master) {
      if (weights == Weights::kStochastic) {
        return round_randomly(to_float32(master), x, random_bits(uint32_t(i), c_.leaf.words));
      }
      return split(to_float32(master), x, weights, weyl(lane, c_.leaf.words[0], c_.leaf.salt));
    };
    const Lying lo = lying(expected_.out[i].lo), hi = lying(expected_.out[i].hi);
    double param = read(got_.out, c_.written(), i);
    if (!c_.leaf.writes_params) {
      // Where NaN stays as it is nothing moves.
      if (!std::isnan(x)) of_number("update", i, param, {lo.update, hi.update});
      param = landed(x, param);
    }
    of_number("param", i, param, {lo.param, hi.param});
    const int residual = residual_of(c_, got_.residual, i);
    if (std::isfinite(param)) {
      const double place = double(ordered(param) + residual * (1 << bits_below(weights)));
      of_number("weight", i, place, {double(lo.place), double(hi.place)});
    } else {
      of_number("residual", i, residual, 0);
    }
  }

  void of_moment(const char* what, int64_t i, const std::vector<char>& got, Float dtype,
                 Interval expected, uint32_t lane, uint32_t salt) const {
    if (dtype == Float::kBF16) {
      expected = {dithered(expected.lo, lane, c_.count(), salt),
                  dithered(expected.hi, lane, c_.count(), salt)};
    }
    of_number(what, i, read(got, dtype, i), expected);
  }

  void of_top(int64_t block) const {
    const Interval bound = expected_.bounds[block];
    const double top = read<int16_t>(got_.v, block);
    if (top == 0 && bound.lo < kSmallest) return;
    const auto above = [](double level) { return std::floor(level) + 1; };
    of_number("top", block, top,
              {above(lattice_.level_of(std::max(bound.lo, kSmallest)) - lattice_.level_error()),
               bound.hi < kSmallest ? 0
                                    : above(lattice_.level_of(bound.hi) + lattice_.level_error())});
  }

  void of_codes(int64_t i, uint32_t lane, int top, Tally& codes) const {
    const Interval m = expected_.m[i], v = expected_.v[i];
    const int both = read_both(lattice_, got_.m, i);
    const int of_v = lattice_.code_of(both), of_m = lattice_.size_of(both);
    if (!std::isfinite(v.hi)) {
      of_number("both codes", i, both, lattice_.both_of(lattice_.nan(), 0));
      return;
    }
    const bool is_fed = expected_.g[i] != 0;
    const double u_v = unit(lane, c_.count(), 0), u_m = unit(lane, c_.count(), 1);
    const auto v_code = [&](double x, double u) {
      return code_of_v(lattice_, x, is_fed, u, top);
    };
    const double error = lattice_.dither_error();
    of_number("v's code", i, of_v,
              {double(v_code(v.lo, u_v - error)), double(v_code(v.hi, u_v + error))});
    if (of_v == 0 && lattice_.is_coarse()) return of_number("both codes", i, both, 0);
    const double root = lattice_.root_of(of_v, top);
    const auto m_code = [&](double x, int way) {
      return code_of_m(lattice_, x, root, u_m, c_.step, way);
    };
    of_number("m's code", i, of_m, {double(m_code(m.lo, -1)), double(m_code(m.hi, 1))});
    codes.count(of_v != v_code((v.lo + v.hi) / 2, u_v) || of_m != m_code((m.lo + m.hi) / 2, 0));
  }

  const Isa& isa_;
  const Case& c_;
  const Lattice& lattice_ = lattice_of(c_.leaf);
  const Inputs& in_;
  const Expected& expected_;
  const Outputs& got_;
};

// Between instruction sets: v's level and m's code.
void count_codes(const Case& c, const Outputs& x, const Outputs& y, Tally& codes) {
  const Lattice& lattice = lattice_of(c.leaf);
  for (int64_t block = 0; block < c.leaf.blocks(); ++block) {
    const Span span = elements(c.leaf, block);
    const int raised = read<int16_t>(x.v, block) - read<int16_t>(y.v, block);
    for (int64_t i = span.begin; i < span.end; ++i) {
      const int in_x = read_both(lattice, x.m, i), in_y = read_both(lattice, y.m, i);
      const int code = lattice.code_of(in_x);
      const bool is_number = code % lattice.nan() != 0;
      codes.count(code + (is_number ? raised : 0) != lattice.code_of(in_y) ||
                  lattice.size_of(in_x) != lattice.size_of(in_y));
    }
  }
}

struct Totals {
  int64_t cases = 0, elements = 0;
  Tally from_equations, between_sets;
};

// A thread block is 256 fibers, which take their time: a GPU has each seventh leaf.
constexpr int kTurnOfGpu = 7;

// Outputs of moments in floats, every NaN the same one: which of two NaN an operation returns hangs on
// the order in which the compiler puts its operands.
Outputs with_one_nan(const Case& c, Outputs outputs) {
  const auto unify = [&](std::vector<char>& numbers, Float dtype) {
    for (int64_t i = 0; i < c.size(); ++i) {
      if (std::isnan(read(numbers, dtype, i))) write(numbers, dtype, i, NAN);
    }
  };
  unify(outputs.out, c.written());
  unify(outputs.m, c.leaf.m_dtype);
  unify(outputs.v, c.leaf.v_dtype);
  return outputs;
}

// A NaN or an infinity in one element of each block, in place of a gradient of 0, a parameter or the
// moments: the bits of all others stay what they are. Blocks of codes with such an element have loops
// of their own, and a vector of weights or of moments in 16 bits another branch.
void check_isolation(const Case& c, const Isa& isa, uint64_t seed) {
  const float bad[] = {NAN, kInfinity, -kInfinity, of_bits(0xFFFFFFFF)};
  const Lattice& lattice = lattice_of(c.leaf);
  Random random(seed);
  Inputs zero = make_inputs(c, false, seed);
  std::vector<int64_t> places;
  for (int64_t block = 0; block < c.leaf.blocks(); ++block) {
    const Span span = elements(c.leaf, block);
    const int64_t i = span.begin + random.below(uint32_t(span.end - span.begin));
    places.push_back(i);
    write(zero.g, c.leaf.g_dtype, i, 0);
    if (c.leaf.is_coded()) std::memset(&zero.m[lattice.bytes * i], 0, lattice.bytes);
  }
  Inputs spoiled = zero;
  for (const int64_t i : places) {
    const float x = bad[random.below(std::size(bad))];
    const uint32_t where = 1 + random.below(7);
    if (where & 1) write(spoiled.g, c.leaf.g_dtype, i, x);
    if (where & 2) write(spoiled.p, c.leaf.p_dtype, i, x);
    if ((where & 4) && c.leaf.is_coded()) {
      const uint16_t nan = uint16_t(lattice.both_of(lattice.nan(), 0));
      std::memcpy(&spoiled.m[lattice.bytes * i], &nan, lattice.bytes);
    } else if (where & 4) {
      write(spoiled.m, c.leaf.m_dtype, i, x);
      write(spoiled.v, c.leaf.v_dtype, i, std::abs(x));
    }
  }
  const Outputs expected = run(c, zero, isa, Place::kApart);
  Outputs got = run(c, spoiled, isa, Place::kApart);
  const auto leave_out = [&](std::vector<char>& to, const std::vector<char>& from, int64_t size) {
    for (const int64_t i : places) std::copy_n(&from[size * i], size, &to[size * i]);
  };
  leave_out(got.out, expected.out, size_of(c.written()));
  leave_out(got.m, expected.m, c.leaf.m_size());
  if (!c.leaf.is_coded()) leave_out(got.v, expected.v, c.leaf.v_size());
  if (c.residual_size() > 0) leave_out(got.residual, expected.residual, c.residual_size());
  if (!(got == expected)) fail(isa.name, c, "an element that is not finite moves others");
}

void check_case(const Case& c, bool is_special, std::vector<Isa> isas, Totals& totals) {
  if (totals.cases % kTurnOfGpu != 0) {
    isas.erase(std::remove_if(isas.begin(), isas.end(), is_gpu), isas.end());
  }
  const uint64_t seed = uint64_t(++totals.cases);
  const Inputs in = make_inputs(c, is_special, seed);
  const Expected expected = expect(c, in);
  totals.elements += c.size();
  std::vector<Outputs> of_sets;
  for (const Isa& isa : isas) {
    const Outputs got = run(c, in, isa, Place::kApart);
    Comparison(isa, c, in, expected, got).of_all(totals.from_equations);
    for (const Place place :
         {Place::kUnaligned, Place::kInPlace, Place::kInPlaceUnaligned, Place::kInTwoParts}) {
      if (!(run(c, in, isa, place) == got)) {
        fail(isa.name, c, std::string("other bits ") + kPlaceNames[int(place)]);
      }
    }
    if (!is_special) check_isolation(c, isa, seed);
    of_sets.push_back(got);
  }
  for (size_t i = 1; i < isas.size(); ++i) {
    if (c.leaf.is_coded()) {
      count_codes(c, of_sets[0], of_sets[i], totals.between_sets);
    } else if (!is_gpu(isas[i]) && isas[i].kernel != jadam::baseline::run &&
               !(with_one_nan(c, of_sets[i]) == with_one_nan(c, of_sets[0]))) {
      // Both fuse the same products; baseline fuses none, and a GPU others.
      fail(isas[i].name, c, std::string("other bits than ") + isas[0].name);
    }
  }
}

const Hyper kHypers[] = {{"t 1", 0.9, 0.999, 1, 1e-8, 0},
                         {"t 7, b2 .99999", 0.9, 0.99999, 7, 1e-8, 1e-12},
                         {"t 1000, eps 0", 0.9, 0.999, 1000, 0, 0},
                         {"t 3, b1 .1, b2 .3", 0.1, 0.3, 3, 1e-6, 0},
                         {"t 5, b1 .01, b2 .001", 0.01, 0.001, 5, 0, 0},
                         {"t 4, not divided", 0.9, 0.999, 4, 1, 1e-12, 0}};
constexpr std::pair<Float, Float> kDtypes[] = {
    {Float::kF32, Float::kF32}, {Float::kBF16, Float::kF32}, {Float::kBF16, Float::kBF16}};

void check_templates(const std::vector<Isa>& isas, bool is_short) {
  // Rows that end within a vector of 16, within a block of 128 and on both; in which each second
  // begins between two accesses of 16 bytes; more than 16 blocks, and more than a thread block of
  // any kernel has. With the sizes up to 300 their number is prime: each shape comes with each kind
  // of numbers.
  std::vector<std::pair<int64_t, int64_t>> shapes = {{1, 1000}, {1, 4099}, {140, 3}, {7, 15},
                                                     {5, 17},   {20, 40},  {4, 130}, {17, 129},
                                                     {3, 256},  {3, 388},  {2, is_short ? 2200 : 8328}};
  for (int64_t n = 1; n <= 300; n += is_short ? 17 : 1) shapes.push_back({1, n});
  Totals totals;
  const auto check = [&](Float g, Float p, Kind kind, Weights weights, int flags, size_t shape) {
    const auto& [rows, n] = shapes[shape];
    // Each with special numbers and without.
    const Hyper& hyper = kHypers[totals.cases / 3 % std::size(kHypers)];
    Case c = make_case(g, p, kind, weights, flags & 1, flags & 2, flags & 4, rows, n, hyper);
    if (n % 3 == 0) c.leaf.first_lane = uint32_t(37 * n % jadam::kBlock);
    check_case(c, totals.cases % 3 == 0, isas, totals);
  };
  size_t first = 0;
  for (const Kind kind :
       {Kind::kF32, Kind::kBF16, Kind::kBF16M, Kind::kEightBits, Kind::kFourBits}) {
    for (int flags = 0; flags < 8; ++flags) {
      for (const auto& [g, p] : kDtypes) {
        for (size_t shape = 0; shape < shapes.size(); ++shape) {
          check(g, p, kind, Weights::kPlain, flags, shape);
        }
      }
      for (const Weights weights :
           {Weights::kCompensated8, Weights::kCompensated16, Weights::kStochastic}) {
        for (const Float g : {Float::kF32, Float::kBF16}) {
          // In short each second template has the other half of the shapes.
          const size_t stride = is_short ? 2 : 1;
          for (size_t shape = first++ % stride; shape < shapes.size(); shape += stride) {
            check(g, Float::kBF16, kind, weights, flags, shape);
          }
        }
      }
    }
  }
  std::string names;
  for (const Isa& isa : isas) names += std::string(names.empty() ? "" : ", ") + isa.name;
  std::printf("%s: %lld leaves of 360 templates, %lld numbers\n", names.c_str(),
              static_cast<long long>(totals.cases), static_cast<long long>(totals.elements));
  std::printf("codes: %.4f%% are not those of exact arithmetic, %.4f%% differ between sets\n",
              100 * totals.from_equations.share(), 100 * totals.between_sets.share());
  // An error of 2e-5 levels crosses a border once in 50,000 numbers, m's no more often.
  if (totals.from_equations.share() > 1e-3 || totals.between_sets.share() > 1e-3) {
    std::fprintf(stderr, "check: codes differ too often\n");
    std::exit(1);
  }
}

// ---- threads

// Leaves of one step with their buffers, and what one thread makes of them.
class Group {
 public:
  Group(const Isa& isa, int64_t small_leaves, int64_t large_rows, bool nesterov, uint64_t seed)
      : kernel_(isa.kernel) {
    Random random(seed);
    for (int64_t i = 0; i <= small_leaves; ++i) {
      const auto [g, p] = kDtypes[random.below(3)];
      const bool is_large = i == small_leaves / 2 && large_rows > 0;
      const int64_t rows = is_large ? large_rows : random.between(1, 4);
      const int64_t n = is_large ? 50021 : random.between(1, 40);
      const Case c = make_case(g, p, Kind(random.below(5)), Weights::kPlain, random.below(2),
                               random.below(2), nesterov, rows, n, kHypers[1]);
      cases_.push_back(c);
      inputs_.push_back(make_inputs(c, true, seed + uint64_t(i)));
      alone_.push_back(run(c, inputs_.back(), isa, Place::kApart));
    }
  }

  // As binding.cc does it: helpers and the caller take jobs, the caller waits for the last job but
  // for no helper. Helpers that come late find nothing left, neither jobs nor buffers.
  void step(int threads) const {
    std::vector<std::thread> helpers;
    {
      std::vector<Outputs> outputs = alone_;
      std::vector<Leaf> leaves;
      for (size_t i = 0; i < cases_.size(); ++i) leaves.push_back(connected(i, outputs[i]));
      const auto work = std::make_shared<jadam::Work>(kernel_, leaves, cases_[0].step, kTables,
                                                      cases_[0].count());
      for (int i = 1; i < threads; ++i) {
        const bool is_late = i == 3;
        helpers.emplace_back([work, is_late] {
          if (is_late) std::this_thread::sleep_for(std::chrono::milliseconds(50));
          work->take_jobs();
        });
      }
      work->take_jobs();
      work->wait();
      for (size_t i = 0; i < cases_.size(); ++i) {
        if (!(outputs[i] == alone_[i])) {
          fail(std::to_string(threads) + " threads", cases_[i], "other bits than on one");
        }
      }
    }
    for (std::thread& helper : helpers) helper.join();
  }

 private:
  Leaf connected(size_t i, Outputs& outputs) const {
    for (std::vector<char>* x : {&outputs.out, &outputs.m, &outputs.v}) {
      std::fill(x->begin(), x->end(), char(0xAA));
    }
    Leaf leaf = cases_[i].leaf;
    leaf.g = inputs_[i].g.data();
    leaf.p = cases_[i].has_params() ? inputs_[i].p.data() : nullptr;
    leaf.m = inputs_[i].m.data();
    leaf.v = inputs_[i].v.data();
    leaf.out = outputs.out.data();
    leaf.m_out = outputs.m.data();
    leaf.v_out = outputs.v.data();
    return leaf;
  }

  jadam::Kernel kernel_;
  std::vector<Case> cases_;
  std::vector<Inputs> inputs_;
  std::vector<Outputs> alone_;
};

void check_threads(const Isa& isa, int rounds) {
  const Group groups[] = {{isa, 600, 3, false, 1}, {isa, 5000, 0, true, 2}, {isa, 0, 1, false, 3}};
  for (const int threads : {1, 2, 4}) {
    for (int round = 0; round < rounds; ++round) {
      std::vector<std::thread> callers;
      for (const Group& group : groups) {
        callers.emplace_back([&group, threads] { group.step(threads); });
      }
      for (std::thread& caller : callers) caller.join();
    }
  }
  std::printf("%s: 3 steps at a time on 1, 2 and 4 threads each: equal bits\n", isa.name);
}

// ---- the rows of a table that a batch touches

// A table with a batch, and what a step makes of it in exact arithmetic.
class RowsCase {
 public:
  RowsCase(int64_t width, int64_t nodes, bool nesterov, bool decays, uint64_t seed)
      : width_(width), nesterov_(nesterov), decays_(decays), nodes_(nodes) {
    Random random(seed);
    const auto numbers = [&](int64_t n, bool positive) {
      std::vector<float> x(n);
      for (float& y : x) y = positive ? std::abs(random.number()) : random.number();
      return x;
    };
    p_ = numbers(kRows * width, false);
    m_ = numbers(kRows * width, false);
    v_ = numbers(kRows * width, true);
    // Of every third row √v is around eps.
    for (int64_t i = 0; i < kRows * width; ++i) v_[i] *= i / width % 3 ? 1.0f : 0x1p-44f;
    g_ = numbers(kPlaces * width, false);
    // Of each row the same, wherever it comes.
    const auto of_rows = [&](int64_t n) { return numbers(n * (kRows + 1), true); };
    const std::vector<float> plain = of_rows(1), first = of_rows(1), second = of_rows(1),
                             decay = of_rows(1), factors = of_rows(nodes), scales = of_rows(nodes);
    for (int64_t place = 0; place < kPlaces; ++place) {
      const int32_t id = random.below(6) == 0 ? kRows + int32_t(random.below(2)) * 7
                                              : int32_t(random.below(kRows));
      ids_.push_back(random.below(20) == 0 ? -1 : id);
      const int64_t row = has(place) ? id : kRows;
      const bool missed = row % 5 != 0;
      steps_.push_back(missed ? 3.0f : 0.0f);
      plain_.push_back(missed ? plain[row] : 0.0f);
      first_.push_back(missed ? first[row] : 1.0f);
      second_.push_back(missed ? second[row] : 1.0f);
      decay_.push_back(missed ? -0x1p-6f * decay[row] : 0.0f);
    }
    for (int64_t q = 0; q < nodes; ++q) {
      for (int64_t place = 0; place < kPlaces; ++place) {
        const int64_t row = has(place) ? ids_[place] : kRows, at = q * (kRows + 1) + row;
        factors_.push_back(q % 2 ? factors[at] : -factors[at]);
        // √(1 - b2) at least, where two floors have a product that is not flushed.
        scales_.push_back(0x1p-11f + scales[at]);
      }
    }
    step_ = step_of(kHypers[2 * (seed % 2)], nesterov);
  }

  void check(const Isa& isa) const {
    const Result alone = run(isa, 1);
    compare(isa, alone);
    if (!(run(isa, 3) == alone)) fail_rows(isa, "other bits on 3 threads");
  }

 private:
  static constexpr int32_t kRows = 40;
  static constexpr int64_t kPlaces = 150;

  struct Result {
    std::vector<float> now, p, m, v;
    std::vector<int32_t> last;
    bool operator==(const Result& other) const {
      return now == other.now && p == other.p && m == other.m && v == other.v && last == other.last;
    }
  };

  bool has(int64_t place) const { return 0 <= ids_[place] && ids_[place] < kRows; }

  static void work(std::shared_ptr<jadam::Jobs> jobs, int threads) {
    std::vector<std::thread> helpers;
    for (int i = 1; i < threads; ++i) helpers.emplace_back([jobs] { jobs->take_jobs(); });
    jobs->take_jobs();
    jobs->wait();
    for (std::thread& helper : helpers) helper.join();
  }

  Result run(const Isa& isa, int threads) const {
    Result x{std::vector<float>(g_.size(), -1.0f), p_, m_, v_, std::vector<int32_t>(kRows, 7)};
    jadam::Batch batch{};
    batch.rows = kRows;
    batch.width = width_;
    batch.n = kPlaces;
    batch.ids = ids_.data();
    batch.missed = {steps_.data(), plain_.data(),   first_.data(),  second_.data(),
                    decay_.data(), factors_.data(), scales_.data(), nodes_};
    batch.p = x.p.data();
    batch.m = x.m.data();
    batch.v = x.v.data();
    work(std::make_shared<jadam::CatchUpWork>(isa.catch_up, batch, step_.eps, x.now.data()),
         threads);
    jadam::Update update{};
    update.g = g_.data();
    update.p = x.p.data();
    update.m = x.m.data();
    update.v = x.v.data();
    update.last = x.last.data();
    update.count = 11;
    update.decays = decays_;
    work(std::make_shared<jadam::StepRowsWork>(isa.step_rows, batch, update, step_), threads);
    return x;
  }

  // A row after its missed steps.
  Interval caught_up(int64_t place, int64_t i) const {
    if (!has(place)) return 0;
    const int64_t at = ids_[place] * width_ + i;
    if (steps_[place] == 0) return p_[at];
    const Interval root = root_of(Interval(flush(v_[at])));
    Interval total = 0;
    double size = 0;
    for (int64_t q = 0; q < nodes_; ++q) {
      const Interval factor = factors_[q * kPlaces + place], scale = scales_[q * kPlaces + place];
      const Interval floor = Interval(0x1.6a09e6p-52) * scale;
      const Interval larger(std::max(root.lo, floor.lo), std::max(root.hi, floor.hi));
      const Interval term = factor / (larger + Interval(step_.eps) * scale);
      total = total + term;
      size += std::max(std::abs(term.lo), std::abs(term.hi));
    }
    // A pair of quotients and a series are both off by some roundings of each term: of 6 operations,
    // of sums over nodes, and 6 powers of quotients; the series is cut at 2^-27.
    const double off = kHalfUnit * double(nodes_ + 20) * size + kSmallest;
    total = Interval(total.lo - off, total.hi + off);
    const Interval p = Interval(p_[at]) + Interval(decay_[place]) * p_[at];
    return p - Interval(m_[at]) * (Interval(plain_[place]) + total);
  }

  void compare(const Isa& isa, const Result& got) const {
    std::vector<int64_t> first(kRows, -1);
    for (int64_t place = kPlaces - 1; place >= 0; --place) {
      if (has(place)) first[ids_[place]] = place;
      for (int64_t i = 0; i < width_; ++i) {
        of_number(isa, "now", got.now[place * width_ + i], caught_up(place, i));
      }
    }
    for (int64_t row = 0; row < kRows; ++row) {
      const bool is_touched = first[row] >= 0;
      if (got.last[row] != (is_touched ? 11 : 7)) fail_rows(isa, "last is another");
      for (int64_t i = 0; i < width_; ++i) {
        const int64_t at = row * width_ + i;
        if (!is_touched) {
          of_number(isa, "p", got.p[at], p_[at]);
          of_number(isa, "m", got.m[at], m_[at]);
          of_number(isa, "v", got.v[at], v_[at]);
          continue;
        }
        // In the order of the batch, as float32 adds.
        float g = g_[first[row] * width_ + i];
        for (int64_t place = first[row] + 1; place < kPlaces; ++place) {
          if (ids_[place] == row) g += g_[place * width_ + i];
        }
        Interval m = Interval(m_[at]) * first_[first[row]];
        Interval v = Interval(v_[at]) * second_[first[row]];
        m = average(m, g, step_.share1);
        v = second_moment(v, g, step_);
        const Interval p = caught_up(first[row], i);
        Interval d = direction(g, m, v, nesterov_, step_);
        if (decays_) d = d + Interval(step_.weight_decay) * p;
        of_number(isa, "p", got.p[at], p + Interval(-step_.learning_rate) * d);
        of_number(isa, "m", got.m[at], m);
        of_number(isa, "v", got.v[at], v);
      }
    }
  }

  void of_number(const Isa& isa, const char* what, double got, Interval expected) const {
    if (expected.lo <= got && got <= expected.hi) return;
    char line[200];
    std::snprintf(line, sizeof line, "%s is %.9g, not in [%.9g, %.9g]", what, got, expected.lo,
                  expected.hi);
    fail_rows(isa, line);
  }

  [[noreturn]] void fail_rows(const Isa& isa, const char* what) const {
    std::fprintf(stderr, "check: %s: rows of %lld, %lld nodes: %s\n", isa.name,
                 static_cast<long long>(width_), static_cast<long long>(nodes_), what);
    std::exit(1);
  }

  const int64_t width_;
  const bool nesterov_, decays_;
  const int64_t nodes_;
  std::vector<float> p_, m_, v_, g_, steps_, plain_, first_, second_, decay_, factors_, scales_;
  std::vector<int32_t> ids_;
  Numbers step_;
};

void check_rows(const Isa& isa) {
  uint64_t seed = 0;
  for (const int64_t width : {1, 3, 8, 17, 64, 130}) {
    for (const int64_t nodes : {0, 1, 4, 13}) {
      for (int flags = 0; flags < 4; ++flags) {
        RowsCase(width, nodes, flags & 1, flags & 2, ++seed).check(isa);
      }
    }
  }
  std::printf("%s: %d tables by the rows of a batch\n", isa.name, int(seed));
}

// The sets that are named, all that the machine has where none is.
std::vector<Isa> sets_named(const std::vector<std::string>& names) {
  std::vector<Isa> all = all_sets(), found;
  if (names.empty()) return all;
  for (const std::string& name : names) {
    const auto set = std::find_if(all.begin(), all.end(), [&](Isa x) { return name == x.name; });
    if (set == all.end()) {
      std::fprintf(stderr, "check: this processor or build does not have %s\n", name.c_str());
      std::exit(2);
    }
    found.push_back(*set);
  }
  return found;
}

}  // namespace

// check [--short] [instruction set]...
int main(int argc, char** argv) {
  std::vector<std::string> names(argv + 1, argv + argc);
  const bool is_short = !names.empty() && names[0] == "--short";
  if (is_short) names.erase(names.begin());
  const std::vector<Isa> isas = sets_named(names);
  for (const Isa& isa : isas) {
    if (!is_gpu(isa)) check_rows(isa);
  }
  check_templates(isas, is_short);
  for (const Isa& isa : isas) {
    if (!is_gpu(isa)) check_threads(isa, is_short ? 1 : 5);
  }
}

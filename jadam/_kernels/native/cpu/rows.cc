// The rows of a table that a batch touches: brought up to date, and stepped in place. Compiled once
// for each instruction set.

#include <vector>

#include "memory.h"

namespace jadam {
namespace JADAM_ISA {
namespace {

// So many rows come from memory while one is computed.
constexpr int64_t kAhead = 4;

// The vectors of a row: `step(i, n)` of each, n less than all lanes in the last one alone.
template <class Step>
JADAM_INLINE void of_vectors(int64_t width, const Step& step) {
  for (int64_t i = 0; i < width; i += kLanes) step(i, width - i < kLanes ? width - i : kLanes);
}

// A vector with n numbers from memory.
JADAM_INLINE F32 load_some(const float* p, int64_t n) {
  if (n == kLanes) return load(p);
  F32 x{};
  std::memcpy(&x, p, n * sizeof(float));
  return x;
}
JADAM_INLINE void store_some(float* p, F32 x, int64_t n) {
  if (n == kLanes) return store(p, x);
  std::memcpy(p, &x, n * sizeof(float));
}

// The nodes of some rows. In a batch the numbers of a node lie together; here those of a row do.
class Nodes {
 public:
  static constexpr int64_t kRows = 16;

  Nodes(const Batch& batch, float eps)
      : batch_(batch), eps_(eps), pairs_((batch.missed.nodes + 1) / 2), of_rows_(kRows * pairs_) {}

  int64_t pairs() const { return pairs_; }
  const NodePair* of(int64_t place) const { return of_rows_.data() + (place - first_) * pairs_; }

  void read(int64_t first) {
    first_ = first;
    const int64_t rows = batch_.n - first < kRows ? batch_.n - first : kRows;
    for (int64_t q = 0; q < batch_.missed.nodes; ++q) {
      for (int64_t row = 0; row < rows; ++row) {
        const int64_t at = q * batch_.n + first + row;
        const float scale = batch_.missed.scales[at];
        NodePair& pair = of_rows_[row * pairs_ + q / 2];
        pair.factor[q % 2] = batch_.missed.factors[at];
        pair.floor[q % 2] = 0x1.6a09e6p-52f * scale;
        pair.shift[q % 2] = eps_ * scale;
      }
    }
  }

 private:
  const Batch& batch_;
  const float eps_;
  const int64_t pairs_;
  std::vector<NodePair> of_rows_;
  int64_t first_ = 0;
};

// The gradient of a row, the sum of those of its places in their order.
const float* gradient(const Batch& batch, const Update& update, int64_t place,
                      std::vector<float>& sum) {
  const float* g = update.g + place * batch.width;
  if (update.next[place] < 0) return g;
  sum.assign(g, g + batch.width);
  while ((place = update.next[place]) >= 0) {
    g = update.g + place * batch.width;
    for (int64_t i = 0; i < batch.width; ++i) sum[i] += g[i];
  }
  return sum.data();
}

template <class Member>
void step_member(const Batch& batch, const Update& update, Range rows, const Numbers& s) {
  const Member member{s};
  const int64_t width = batch.width;
  std::vector<float> sum;
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    if (row + kAhead < rows.end) {
      const int64_t to_come = int64_t(batch.ids[update.first[row + kAhead]]) * width;
      for (const float* x : {update.p, update.m, update.v}) prefetch(x + to_come, width);
    }
    const int64_t place = update.first[row], id = batch.ids[place];
    const float* g = gradient(batch, update, place, sum);
    const float first = batch.missed.first[place], second = batch.missed.second[place];
    const float* now = batch.now + place * width;
    float *p = update.p + id * width, *m = update.m + id * width, *v = update.v + id * width;
    of_vectors(width, [&](int64_t i, int64_t n) {
      F32 m_ = load_some(m + i, n) * first, v_ = load_some(v + i, n) * second;
      const F32 p_ = load_some(now + i, n);
      const F32 direction = member(limit_range(load_some(g + i, n)), m_, v_);
      store_some(p + i, p_ + update_of(direction, p_, update.decays, s), n);
      store_some(m + i, m_, n);
      store_some(v + i, v_, n);
    });
    update.last[id] = update.count;
  }
}

}  // namespace

void catch_up(const Batch& batch, Range places, float eps) {
  Nodes nodes(batch, eps);
  const int64_t width = batch.width;
  for (int64_t place = places.begin; place < places.end; ++place) {
    if ((place - places.begin) % Nodes::kRows == 0) nodes.read(place);
    if (place + kAhead < places.end && batch.has(place + kAhead)) {
      const int64_t to_come = int64_t(batch.ids[place + kAhead]) * width;
      for (const float* x : {batch.p, batch.m, batch.v}) prefetch(x + to_come, width);
    }
    float* now = batch.now + place * width;
    if (!batch.has(place)) {
      std::memset(now, 0, width * sizeof(float));
      continue;
    }
    const int64_t first = int64_t(batch.ids[place]) * width;
    const float *p = batch.p + first, *m = batch.m + first, *v = batch.v + first;
    if (batch.missed.steps[place] == 0) {
      std::memcpy(now, p, width * sizeof(float));
      continue;
    }
    const NodePair* pairs = nodes.of(place);
    const float plain = batch.missed.plain[place], decay = batch.missed.decay[place];
    of_vectors(width, [&](int64_t i, int64_t n) {
      const F32 p_ = load_some(p + i, n), m_ = load_some(m + i, n), v_ = load_some(v + i, n);
      const F32 motion = m_ * (plain + motion_of(v_, pairs, nodes.pairs()));
      store_some(now + i, (p_ + decay * p_) - motion, n);
    });
  }
}

void step_rows(const Batch& batch, const Update& update, Range rows, const Numbers& s) {
  (s.g_weight != 0 ? step_member<Adam<true>> : step_member<Adam<false>>)(batch, update, rows, s);
}

}  // namespace JADAM_ISA
}  // namespace jadam

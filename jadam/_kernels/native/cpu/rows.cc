// The rows of a table that a batch touches: brought up to date, and stepped in place. Compiled once
// for each instruction set.

#include <vector>

#include "memory.h"

namespace jadam {
namespace JADAM_ISA {
namespace {

// How many rows are fetched ahead of the one that is computed.
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

// The series of the rows of kLanes places, a lane each.
class SeriesOfPlaces {
 public:
  // Those of the places from `first` on.
  void read(const Batch& batch, int64_t first, float eps) {
    const int64_t n = batch.n - first < kLanes ? batch.n - first : kLanes;
    const auto of_places = [&](const float* x, int64_t q) {
      return load_some(x + q * batch.n + first, n);
    };
    F32 largest{}, terms[kTerms] = {};
    for (int64_t q = 0; q < batch.missed.nodes; ++q) {
      largest = at_least(of_places(batch.missed.scales, q), largest);
    }
    const F32 inverse = -1.0f / largest;
    for (int64_t q = 0; q < batch.missed.nodes; ++q) {
      const F32 ratio = of_places(batch.missed.scales, q) * inverse;
      F32 term = of_places(batch.missed.factors, q);
      for (F32& sum : terms) {
        sum += term;
        term *= ratio;
      }
    }
    for (int k = 0; k < kTerms; ++k) store(terms_[k], terms[k]);
    store(shift_, eps * largest);
    // No root of a number is smaller than 2^-63: for rows without nodes, whose sums are 0.
    const F32 least = at_least(kShifts * eps * largest, kFloor * largest);
    store(least_, at_least(least, all(0x1p-63f)));
    first_ = first;
  }

  Series of(int64_t place) const {
    const int64_t lane = place - first_;
    Series series{shift_[lane], least_[lane], {}};
    for (int k = 0; k < kTerms; ++k) series.terms[k] = terms_[k][lane];
    return series;
  }

 private:
  float terms_[kTerms][kLanes], shift_[kLanes], least_[kLanes];
  int64_t first_ = 0;
};

// The rows of places that follow each other, after the steps that they have missed.
class CaughtUp {
 public:
  CaughtUp(const Batch& batch, float eps)
      : batch_(batch), eps_(eps), pairs_((batch.missed.nodes + 1) / 2) {}

  void go_to(int64_t place) {
    place_ = place;
    has_pairs_ = false;
    has_missed_ = batch_.missed.steps[place] != 0;
    if (!has_missed_) return;
    if (place >= end_) {
      of_places_.read(batch_, place, eps_);
      end_ = place + kLanes;
    }
    series_ = of_places_.of(place);
    plain_ = batch_.missed.plain[place];
    decay_ = batch_.missed.decay[place];
  }

  JADAM_INLINE F32 operator()(F32 p, F32 m, F32 v) {
    if (!has_missed_) return p;
    const F32 root = sqrt(v);
    F32 motion;
    if (__builtin_expect(is_far(root, m, series_), true)) {
      motion = motion_of(root, series_);
    } else {
      if (!has_pairs_) read_pairs();
      motion = motion_of(root, pairs_.data(), int64_t(pairs_.size()));
    }
    return (p + decay_ * p) - m * (plain_ + motion);
  }

 private:
  // In a batch the numbers of a node lie together; here those of a row do.
  void read_pairs() {
    for (int64_t q = 0; q < batch_.missed.nodes; ++q) {
      const int64_t at = q * batch_.n + place_;
      const float scale = batch_.missed.scales[at];
      NodePair& pair = pairs_[q / 2];
      pair.factor[q % 2] = batch_.missed.factors[at];
      pair.floor[q % 2] = kFloor * scale;
      pair.shift[q % 2] = eps_ * scale;
    }
    has_pairs_ = true;
  }

  const Batch& batch_;
  const float eps_;
  std::vector<NodePair> pairs_;
  SeriesOfPlaces of_places_;
  Series series_{};
  int64_t place_ = 0, end_ = 0;
  float plain_ = 0, decay_ = 0;
  bool has_missed_ = false, has_pairs_ = false;
};

// Fetches the row of a place into the cache, where there is one.
void prefetch_row(const Batch& batch, int64_t place, int64_t end) {
  if (place >= end || !batch.has(place)) return;
  const int64_t first = int64_t(batch.ids[place]) * batch.width;
  for (const float* x : {batch.p, batch.m, batch.v}) prefetch(x + first, batch.width);
}

// `of_place(place)` of each of some places, whose rows are in the cache by then.
template <class OfPlace>
JADAM_INLINE void of_places(const Batch& batch, Range places, const OfPlace& of_place) {
  for (int64_t i = 0; i < kAhead; ++i) prefetch_row(batch, places.begin + i, places.end);
  for (int64_t place = places.begin; place < places.end; ++place) {
    prefetch_row(batch, place + kAhead, places.end);
    of_place(place);
  }
}

// The gradient of a row, the sum of those of its places in their order.
const float* gradient(const Batch& batch, const Update& update, int64_t place,
                      std::vector<float>& sum) {
  const float* g = update.g + place * batch.width;
  if (update.places[place].next < 0) return g;
  sum.assign(g, g + batch.width);
  while ((place = update.places[place].next) >= 0) {
    g = update.g + place * batch.width;
    for (int64_t i = 0; i < batch.width; ++i) sum[i] += g[i];
  }
  return sum.data();
}

template <class Member>
void step_member(const Batch& batch, const Update& update, Range places, const Numbers& s) {
  const Member member{s};
  const int64_t width = batch.width;
  CaughtUp now(batch, s.eps);
  std::vector<float> sum;
  of_places(batch, places, [&](int64_t place) {
    if (!update.places[place].is_first) return;
    now.go_to(place);
    const int64_t id = batch.ids[place];
    const float* g = gradient(batch, update, place, sum);
    const float first = batch.missed.first[place], second = batch.missed.second[place];
    float *p = update.p + id * width, *m = update.m + id * width, *v = update.v + id * width;
    of_vectors(width, [&](int64_t i, int64_t n) {
      F32 m_ = load_some(m + i, n), v_ = load_some(v + i, n);
      const F32 p_ = now(load_some(p + i, n), m_, v_);
      m_ *= first;
      v_ *= second;
      const F32 direction = member(limit_range(load_some(g + i, n)), m_, v_);
      store_some(p + i, p_ + update_of(direction, p_, update.decays, s), n);
      store_some(m + i, m_, n);
      store_some(v + i, v_, n);
    });
    update.last[id] = update.count;
  });
}

}  // namespace

void catch_up(const Batch& batch, Range places, float eps, float* now) {
  const int64_t width = batch.width;
  CaughtUp caught_up(batch, eps);
  of_places(batch, places, [&](int64_t place) {
    float* row = now + place * width;
    if (!batch.has(place)) {
      std::memset(row, 0, width * sizeof(float));
      return;
    }
    caught_up.go_to(place);
    const int64_t first = int64_t(batch.ids[place]) * width;
    const float *p = batch.p + first, *m = batch.m + first, *v = batch.v + first;
    of_vectors(width, [&](int64_t i, int64_t n) {
      store_some(row + i, caught_up(load_some(p + i, n), load_some(m + i, n), load_some(v + i, n)),
                 n);
    });
  });
}

void step_rows(const Batch& batch, const Update& update, Range places, const Numbers& s) {
  (s.g_weight != 0 ? step_member<Adam<true>> : step_member<Adam<false>>)(batch, update, places, s);
}

}  // namespace JADAM_ISA
}  // namespace jadam

// A step over many leaves or rows, cut into jobs for any number of threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <condition_variable>
#include <cstring>
#include <mutex>
#include <utility>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "../step.h"

namespace jadam {

struct InstructionSet {
  const char* name;
  Kernel kernel;
  CatchUp catch_up;
  StepRows step_rows;
};

// Those that were built and that this processor has, the best first.
inline std::vector<InstructionSet> instruction_sets() {
  std::vector<InstructionSet> found;
#if defined(__x86_64__)
  [[maybe_unused]] const bool has_avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
#if defined(JADAM_HAS_avx512)
  if (has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    found.push_back({"avx512", avx512::run, avx512::catch_up, avx512::step_rows});
  }
#endif
#if defined(JADAM_HAS_avx2)
  if (has_avx2) found.push_back({"avx2", avx2::run, avx2::catch_up, avx2::step_rows});
#endif
  found.push_back({"baseline", baseline::run, baseline::catch_up, baseline::step_rows});
  return found;
}

// _rounding.weyl of a block's lanes at step `count`.
inline Dithers dithers_of(uint32_t count, uint32_t first_lane, bool has_four_bits) {
  Dithers dithers;
  for (uint32_t salt = 0; salt < 2; ++salt) {
    for (uint32_t i = 0; i < kBlock; ++i) {
      const uint32_t lane = (first_lane + i) % kBlock;
      const uint32_t weyl = lane * kLane + count * kStep + salt * kSalt;
      dithers.upper[salt][i] = weyl >> 16;
      dithers.unit[salt][i] = float(weyl >> 9) * 0x1p-23f;
    }
  }
  if (has_four_bits) {
    for (int64_t i = 0; i < kBlock; ++i) dithers.to_level[i] = to_level(dithers.unit[0][i]);
  }
  return dithers;
}

// Numbers under 2^-126 count as 0, as in XLA's own loops.
class FlushSubnormals {
 public:
  FlushSubnormals() : saved_(control()) { set_control(saved_ | kFlush); }
  ~FlushSubnormals() { set_control(saved_); }

 private:
#if defined(__x86_64__)
  static constexpr uint64_t kFlush = 0x8040;  // results and operands
  static uint64_t control() { return _mm_getcsr(); }
  static void set_control(uint64_t control) { _mm_setcsr(unsigned(control)); }
#elif defined(__aarch64__)
  static constexpr uint64_t kFlush = 1 << 24;
  static uint64_t control() {
    uint64_t control;
    __asm__("mrs %0, fpcr" : "=r"(control));
    return control;
  }
  static void set_control(uint64_t control) { __asm__ volatile("msr fpcr, %0" ::"r"(control)); }
#else
  static constexpr uint64_t kFlush = 0;
  static uint64_t control() { return 0; }
  static void set_control(uint64_t) {}
#endif

  const uint64_t saved_;
};

// A part of a leaf.
struct Part {
  int64_t leaf;
  Range blocks;
};

// Jobs that any number of threads take one after the other. A thread that comes late finds none left;
// so nobody waits for a thread that has not begun.
class Jobs {
 public:
  virtual ~Jobs() = default;

  virtual int64_t jobs() const = 0;

  void take_jobs() {
    const FlushSubnormals flush;
    int64_t finished = 0;
    for (int64_t job; (job = next_.fetch_add(1)) < jobs(); ++finished) run(job);
    if (finished == 0) return;
    const std::lock_guard<std::mutex> lock(mutex_);
    finished_ += finished;
    if (finished_ == jobs()) all_finished_.notify_all();
  }

  void wait() {
    std::unique_lock<std::mutex> lock(mutex_);
    all_finished_.wait(lock, [this] { return finished_ == jobs(); });
  }

 private:
  virtual void run(int64_t job) const = 0;

  std::atomic<int64_t> next_{0};
  std::mutex mutex_;
  std::condition_variable all_finished_;
  int64_t finished_ = 0;
};

// A step over many leaves.
class Work : public Jobs {
 public:
  Work(Kernel kernel, std::vector<Leaf> leaves, const Numbers& step, const Tables& tables,
       uint32_t count, uint32_t first_lane = 0)
      : kernel_(kernel),
        leaves_(std::move(leaves)),
        step_(step),
        tables_(tables),
        dithers_(dithers_of(count, first_lane,
                            std::any_of(leaves_.begin(), leaves_.end(), [](const Leaf& leaf) {
                              return leaf.codes == Codes::kFourBits;
                            }))) {
    int64_t all = 0;
    for (const Leaf& leaf : leaves_) all += leaf.blocks();
    const int64_t most = std::clamp(all / kJobs, kLeastInJob, kMostInJob);
    int64_t in_job = most;
    for (int64_t i = 0; i < int64_t(leaves_.size()); ++i) {
      const int64_t blocks = leaves_[i].blocks();
      for (int64_t begin = 0; begin < blocks; begin += most) {
        const int64_t end = std::min(begin + most, blocks);
        if (in_job + (end - begin) > most) {
          starts_.push_back(int64_t(parts_.size()));
          in_job = 0;
        }
        in_job += end - begin;
        parts_.push_back({i, {begin, end}});
      }
    }
  }

  int64_t jobs() const override { return int64_t(starts_.size()); }

 private:
  void run(int64_t job) const override {
    const int64_t end = job + 1 < jobs() ? starts_[job + 1] : int64_t(parts_.size());
    for (int64_t i = starts_[job]; i < end; ++i) {
      kernel_(leaves_[parts_[i].leaf], parts_[i].blocks, step_, tables_, dithers_);
    }
  }

  // Enough jobs for many threads, each longer than waking one, and if there is much to do long beside
  // its end, where what is asked for ahead is another thread's. In blocks.
  static constexpr int64_t kJobs = 64, kLeastInJob = 256, kMostInJob = 1024;

  const Kernel kernel_;
  const std::vector<Leaf> leaves_;
  const Numbers step_;
  const Tables tables_;
  const Dithers dithers_;
  std::vector<Part> parts_;
  std::vector<int64_t> starts_;  // of each job in parts_
};

// Which places of a batch have the same row.
class Places {
 public:
  explicit Places(const Batch& batch) : places_(batch.n, Place{false, -1}) {
    int bits = 4;
    while (int64_t(1) << bits < 2 * batch.n) ++bits;
    std::vector<int32_t> latest(int64_t(1) << bits, -1);  // by the row's place in a table of hashes
    for (int64_t place = 0; place < batch.n; ++place) {
      if (!batch.has(place)) continue;
      const int32_t id = batch.ids[place];
      uint32_t at = uint32_t(id) * kStep >> (32 - bits);
      while (latest[at] >= 0 && batch.ids[latest[at]] != id) at = (at + 1) % latest.size();
      if (latest[at] < 0) {
        places_[place].is_first = true;
      } else {
        places_[latest[at]].next = int32_t(place);
      }
      latest[at] = int32_t(place);
    }
  }

  const Place* data() const { return places_.data(); }

 private:
  std::vector<Place> places_;
};

// Work on the rows of a batch, cut into jobs that are longer than waking a thread.
class RowsWork : public Jobs {
 public:
  int64_t jobs() const override { return (batch_.n + in_job_ - 1) / in_job_; }

 protected:
  explicit RowsWork(const Batch& batch)
      : batch_(batch), in_job_(std::max<int64_t>(1, 4096 / std::max<int64_t>(batch.width, 1))) {}

  Range places_of(int64_t job) const {
    return {job * in_job_, std::min((job + 1) * in_job_, batch_.n)};
  }

  const Batch batch_;

 private:
  const int64_t in_job_;
};

// The rows of a batch as they are after the steps that they have missed.
class CatchUpWork : public RowsWork {
 public:
  CatchUpWork(CatchUp kernel, const Batch& batch, float eps, float* now)
      : RowsWork(batch), kernel_(kernel), eps_(eps), now_(now) {}

 private:
  void run(int64_t job) const override { kernel_(batch_, places_of(job), eps_, now_); }

  const CatchUp kernel_;
  const float eps_;
  float* const now_;
};

// A step of the rows of a batch, each once.
class StepRowsWork : public RowsWork {
 public:
  StepRowsWork(StepRows kernel, const Batch& batch, const Update& update, const Numbers& step)
      : RowsWork(batch), kernel_(kernel), update_(update), step_(step), places_(batch) {
    update_.places = places_.data();
  }

 private:
  void run(int64_t job) const override { kernel_(batch_, update_, places_of(job), step_); }

  const StepRows kernel_;
  Update update_;
  const Numbers step_;
  const Places places_;
};

}  // namespace jadam

// A step over many leaves, cut into jobs for any number of threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
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
    found.push_back({"avx512", avx512::run});
  }
#endif
#if defined(JADAM_HAS_avx2)
  if (has_avx2) found.push_back({"avx2", avx2::run});
#endif
  found.push_back({"baseline", baseline::run});
  return found;
}

// _rounding.weyl of a block's lanes at step `count`.
inline Dithers dithers_of(uint32_t count, uint32_t first_lane) {
  Dithers dithers;
  for (uint32_t salt = 0; salt < 2; ++salt) {
    for (uint32_t i = 0; i < kBlock; ++i) {
      const uint32_t lane = (first_lane + i) % kBlock;
      const uint32_t weyl = lane * kLane + count * kStep + salt * kSalt;
      dithers.upper[salt][i] = weyl >> 16;
      dithers.unit[salt][i] = float(weyl >> 9) * 0x1p-23f;
    }
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

// A step over many leaves, in jobs that any number of threads take one after the other. A thread
// that comes late finds none left; so nobody waits for a thread that has not begun.
class Work {
 public:
  Work(Kernel kernel, std::vector<Leaf> leaves, const Numbers& step, const Tables& tables,
       uint32_t count, uint32_t first_lane = 0)
      : kernel_(kernel),
        leaves_(std::move(leaves)),
        step_(step),
        tables_(tables),
        dithers_(dithers_of(count, first_lane)) {
    int64_t in_job = kBlocksInJob;
    for (int64_t i = 0; i < int64_t(leaves_.size()); ++i) {
      const int64_t blocks = leaves_[i].blocks();
      for (int64_t begin = 0; begin < blocks; begin += kBlocksInJob) {
        const int64_t end = std::min(begin + kBlocksInJob, blocks);
        if (in_job + (end - begin) > kBlocksInJob) {
          starts_.push_back(int64_t(parts_.size()));
          in_job = 0;
        }
        in_job += end - begin;
        parts_.push_back({i, {begin, end}});
      }
    }
  }

  int64_t jobs() const { return int64_t(starts_.size()); }

  void take_jobs() {
    const FlushSubnormals flush;
    int64_t finished = 0;
    for (int64_t job; (job = next_.fetch_add(1)) < jobs(); ++finished) {
      const int64_t end = job + 1 < jobs() ? starts_[job + 1] : int64_t(parts_.size());
      for (int64_t i = starts_[job]; i < end; ++i) {
        kernel_(leaves_[parts_[i].leaf], parts_[i].blocks, step_, tables_, dithers_);
      }
    }
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
  static constexpr int64_t kBlocksInJob = 256;  // 32,768 numbers: longer than waking a thread

  const Kernel kernel_;
  const std::vector<Leaf> leaves_;
  const Numbers step_;
  const Tables tables_;
  const Dithers dithers_;
  std::vector<Part> parts_;
  std::vector<int64_t> starts_;  // of each job in parts_
  std::atomic<int64_t> next_{0};
  std::mutex mutex_;
  std::condition_variable all_finished_;
  int64_t finished_ = 0;
};

}  // namespace jadam

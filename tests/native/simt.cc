// The CUDA source as plain C++, run by fibers in the place of a GPU's threads.

#include "simt.h"

#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "gpu/kernel.cu"

#include "gpu/device_leaf.h"
#include "on_gpu.h"

Index threadIdx, blockIdx;

namespace simt {
namespace {

using Program = void (*)(jadam::Launch);

[[noreturn]] void fail(const char* what) {
  std::fprintf(stderr, "check: gpu: thread %u of block %u: %s\n", threadIdx.x, blockIdx.x, what);
  std::_Exit(1);
}

// A warp, whose threads take turns in the order of their places.
class Warp {
 public:
  static Warp& get() {
    static Warp warp;
    return warp;
  }

  void run(Program program, const jadam::Launch& launch, uint32_t first_thread) {
    program_ = program;
    launch_ = &launch;
    first_thread_ = first_thread;
    for (int i = 0; i < kWarp; ++i) {
      Fiber& fiber = fibers_[i];
      fiber.meetings = 0;
      fiber.is_done = false;
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.get();
      fiber.context.uc_stack.ss_size = kStackSize;
      fiber.context.uc_link = i + 1 < kWarp ? &fibers_[i + 1].context : &caller_;
      makecontext(&fiber.context, enter, 0);
    }
    place_ = -1;
    swapcontext(&caller_, &fibers_[0].context);
    for (const Fiber& fiber : fibers_) {
      if (!fiber.is_done) fail("ends where another of its warp goes on");
    }
  }

  const int* meet(Meeting meeting, int value) {
    const int own = place_, next = (own + 1) % kWarp;
    Fiber& fiber = fibers_[own];
    // Of two buffers: the first to go on may come to the next meeting before others have read.
    const int buffer = fiber.meetings++ % 2;
    values_[buffer][own] = value;
    kinds_[buffer][own] = meeting;
    if (fibers_[next].is_done) fail("waits for one of its warp that has ended");
    swapcontext(&fiber.context, &fibers_[next].context);
    take_turn(own);
    for (int i = 0; i < kWarp; ++i) {
      const int ahead = fibers_[i].meetings - fiber.meetings;
      if (kinds_[buffer][i] != meeting || ahead < 0 || ahead > 1) fail("meets others elsewhere");
    }
    return values_[buffer];
  }

  int place() const { return place_; }

 private:
  static constexpr size_t kStackSize = 256 * 1024;

  struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack{new char[kStackSize]};
    int meetings;
    bool is_done;
  };

  // A thread from its beginning to its end; then the next one runs.
  static void enter() {
    Warp& warp = get();
    const int own = warp.place_ + 1;
    warp.take_turn(own);
    warp.program_(*warp.launch_);
    warp.take_turn(own);
    warp.fibers_[own].is_done = true;
  }

  void take_turn(int place) {
    place_ = place;
    threadIdx.x = first_thread_ + uint32_t(place);
  }

  Program program_;
  const jadam::Launch* launch_;
  uint32_t first_thread_;
  int place_;  // of the fiber that runs
  Fiber fibers_[kWarp];
  ucontext_t caller_;
  int values_[2][kWarp];
  Meeting kinds_[2][kWarp];
};

}  // namespace

const int* meet(Meeting meeting, int value) { return Warp::get().meet(meeting, value); }
int place() { return Warp::get().place(); }

void run_on_gpu(const jadam::Leaf& leaf, jadam::Range range, const jadam::Numbers& numbers,
                uint32_t count) {
  constexpr Program kPrograms[] = {jadam_float32, jadam_floats, jadam_codes, jadam_codes4,
                                   jadam_narrow_floats, jadam_narrow_codes, jadam_narrow_codes4};
  const int entry = jadam::entry_of(leaf);
  const jadam::Division& division = jadam::kEntries[entry].division;
  static jadam::Launch launch;
  launch.numbers = &numbers;
  launch.count = &count;
  launch.first_lane = &leaf.first_lane;
  // The leaf has its place among others, of which nothing is there but their chunks.
  const uint32_t others = uint32_t(leaf.n % jadam::kLeavesInLaunch);
  launch.leaves = 0;
  uint32_t chunks = 0, first = 0;
  for (uint32_t i = 0; i < jadam::kLeavesInLaunch && i < others + 3; ++i) {
    jadam::DeviceLeaf found{};
    if (i == others) {
      first = chunks;
      found = jadam::on_device(leaf, division, chunks);
    } else {
      found.first_chunk = chunks;
      found.blocks = 1 + 7 * i % (2 * division.blocks);
    }
    chunks += jadam::chunks_of(found, division);
    launch.leaf[launch.leaves++] = found;
  }
  const uint32_t own = jadam::chunks_of(launch.leaf[others], division);
  for (uint32_t chunk = 0; chunk < own; ++chunk) {
    const int64_t begin = int64_t(chunk) * division.blocks;
    if (begin < range.begin || begin >= range.end) continue;
    blockIdx.x = first + chunk;
    for (uint32_t thread = 0; thread < jadam::kThreads; thread += kWarp) {
      Warp::get().run(kPrograms[entry], launch, thread);
    }
  }
}

}  // namespace simt

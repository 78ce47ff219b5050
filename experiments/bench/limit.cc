// What no step of Adam in float32 can beat: the same bytes in the same pattern, and no arithmetic
// to speak of. Reads g, p, m, v and writes p, m, v of every leaf, with all cores.

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

namespace {

constexpr long kJob = 32768;  // numbers: longer than taking the job

struct Leaf {
  float *g, *p, *m, *v;
};

struct Job {
  long leaf, begin, end;
};

struct Leaves {
  std::vector<Leaf> leaves;
  std::vector<Job> jobs;
  long first;  // size of the first leaf
};

// Plain aligned memory, as XLA and torch allocate it: no huge pages that they do not have.
float* filled(long n, float value) {
  const long bytes = (n * sizeof(float) + 63) / 64 * 64;
  float* memory = static_cast<float*>(std::aligned_alloc(64, bytes));
  if (memory) std::fill(memory, memory + n, value);
  return memory;
}

void move(float* __restrict g, float* __restrict p, float* __restrict m, float* __restrict v,
          long n) {
  for (long i = 0; i < n; ++i) {
    p[i] += 1e-3f * g[i];
    m[i] += 1e-3f * g[i];
    v[i] += 1e-3f * g[i];
  }
}

template <typename Work>
void on_all_cores(int threads, const Work& work) {
  std::vector<std::thread> others;
  for (int i = 1; i < threads; ++i) others.emplace_back(work, i);
  work(0);
  for (std::thread& other : others) other.join();
}

}  // namespace

extern "C" {

void* make(long count, const long* sizes) {
  auto* made = new Leaves{{}, {}, sizes[0]};
  for (long i = 0; i < count; ++i) {
    const long n = sizes[i];
    made->leaves.push_back({filled(n, 1e-3f), filled(n, 1), filled(n, 0), filled(n, 0)});
    for (long begin = 0; begin < n; begin += kJob) {
      made->jobs.push_back({i, begin, std::min(begin + kJob, n)});
    }
  }
  return made;
}

void step(void* handle, int threads) {
  const auto& made = *static_cast<Leaves*>(handle);
  std::atomic<size_t> next{0};
  on_all_cores(threads, [&](int) {
    for (size_t i; (i = next.fetch_add(1)) < made.jobs.size();) {
      const auto [leaf, begin, end] = made.jobs[i];
      const auto [g, p, m, v] = made.leaves[leaf];
      move(g + begin, p + begin, m + begin, v + begin, end - begin);
    }
  });
}

// g to p of the first leaf, a slice for each core.
void copy(void* handle, int threads) {
  const auto& made = *static_cast<Leaves*>(handle);
  const auto [g, p, m, v] = made.leaves[0];
  on_all_cores(threads, [&, g = g, p = p](int i) {
    const long begin = made.first * i / threads, end = made.first * (i + 1) / threads;
    std::memcpy(p + begin, g + begin, (end - begin) * sizeof(float));
  });
}

void drop(void* handle) {
  const auto* made = static_cast<Leaves*>(handle);
  for (const auto& [g, p, m, v] : made->leaves) {
    for (float* memory : {g, p, m, v}) std::free(memory);
  }
  delete made;
}
}

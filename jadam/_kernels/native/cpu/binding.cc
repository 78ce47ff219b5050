// The kernel for CPUs behind jax.ffi: leaves to jobs, jobs to XLA's threads.

#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "../leaves.h"
#include "work.h"

namespace jadam {
namespace {

// The kernel in use; jadam_use_instruction_set changes it.
std::atomic<Kernel> kernel_in_use{instruction_sets()[0].kernel};

ffi::Error step_leaves(ffi::ThreadPool threads, ffi::RemainingArgs args, ffi::RemainingRets rets,
                       ffi::Span<const int32_t> decays, bool writes_params,
                       ffi::Span<const int32_t> weights, ffi::Span<const int32_t> salts) {
  Shared shared;
  std::vector<Leaf> leaves;
  const ffi::Error error =
      read_call(args, rets, decays, writes_params, weights, salts, shared, leaves);
  if (error.failure()) return error;
  Numbers numbers;
  Tables tables;
  std::memcpy(&numbers, shared.numbers, sizeof numbers);
  std::memcpy(&tables, shared.tables, sizeof tables);
  for (Leaf& leaf : leaves) {
    leaf.first_lane = *shared.first_lane;
    if (leaf.weights == Weights::kStochastic) {
      std::memcpy(leaf.words, leaf.counted, sizeof leaf.words);
    } else if (leaf.weights == Weights::kCompensated8) {
      uint32_t made;
      std::memcpy(&made, leaf.counted, sizeof made);
      leaf.phase = made * kStep + leaf.salt * kSalt;
    }
  }
  const auto work = std::make_shared<Work>(kernel_in_use.load(), std::move(leaves), numbers, tables,
                                           *shared.count, *shared.first_lane);
  const int64_t helpers = std::min(threads.num_threads(), work->jobs()) - 1;
  for (int64_t i = 0; i < helpers; ++i) {
    threads.Schedule([work] { work->take_jobs(); });
  }
  work->take_jobs();
  work->wait();
  return ffi::Error::Success();
}

}  // namespace
}  // namespace jadam

extern "C" int jadam_ffi_api_version() { return XLA_FFI_API_MAJOR * 1000 + XLA_FFI_API_MINOR; }

// The names of those that this processor has, the best first, with a blank between two.
extern "C" const char* jadam_instruction_sets() {
  static const std::string names = [] {
    std::string names;
    for (const auto& set : jadam::instruction_sets()) {
      names += (names.empty() ? "" : " ") + std::string(set.name);
    }
    return names;
  }();
  return names.c_str();
}

// Takes this one for all steps to come. False where the processor does not have it.
extern "C" bool jadam_use_instruction_set(const char* name) {
  for (const auto& set : jadam::instruction_sets()) {
    if (std::strcmp(name, set.name) == 0) {
      jadam::kernel_in_use = set.kernel;
      return true;
    }
  }
  return false;
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    jadam_step, jadam::step_leaves,
    jadam::with_attributes(xla::ffi::Ffi::Bind().Ctx<xla::ffi::ThreadPool>()));

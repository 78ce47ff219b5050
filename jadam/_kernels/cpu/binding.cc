// The kernel behind jax.ffi: buffers to leaves, leaves to jobs, jobs to XLA's threads.

#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "work.h"
#include "xla/ffi/api/ffi.h"

namespace jadam {
namespace {

namespace ffi = xla::ffi;

ffi::Error wrong(const std::string& what) {
  return ffi::Error::InvalidArgument("jadam_step: " + what);
}

// The kernel in use; jadam_use_instruction_set changes it.
std::atomic<Kernel> kernel_in_use{instruction_sets()[0].kernel};

bool float_of(ffi::DataType dtype, Float& found) {
  if (dtype == ffi::DataType::F32) found = Float::kF32;
  if (dtype == ffi::DataType::BF16) found = Float::kBF16;
  return dtype == ffi::DataType::F32 || dtype == ffi::DataType::BF16;
}

// Operands: numbers, tables, count, the lane at which rows begin, then of each leaf g, m, v, where
// it is needed p, and where its weights say so the residual and its dither's count, or two words of
// random bits. Results: of each leaf p or the update, m, v and the residual.
ffi::Error step_leaves(ffi::ThreadPool threads, ffi::RemainingArgs args, ffi::RemainingRets rets,
                       ffi::Span<const int32_t> decays, bool writes_params,
                       ffi::Span<const int32_t> weights, ffi::Span<const int32_t> salts) {
  constexpr size_t kFirst = 4;
  const auto step = args.get<ffi::Buffer<ffi::F32>>(0);
  const auto tables = args.get<ffi::Buffer<ffi::F32>>(1);
  const auto count = args.get<ffi::Buffer<ffi::U32>>(2);
  const auto lane = args.get<ffi::Buffer<ffi::U32>>(3);
  if (!step.has_value() || !tables.has_value() || !count.has_value() || !lane.has_value() ||
      step->size_bytes() != sizeof(Numbers) || tables->size_bytes() != sizeof(Tables)) {
    return wrong("this library and this jadam are of different versions");
  }
  std::vector<Leaf> leaves;
  size_t arg = kFirst, ret = 0;
  for (size_t i = 0; i < decays.size(); ++i) {
    Leaf leaf{};
    leaf.weights = Weights(weights[i]);
    leaf.first_lane = *lane->typed_data();
    const bool has_params = writes_params || decays[i] || leaf.weights != Weights::kPlain;
    ffi::AnyBuffer buffers[4] = {*args.get<ffi::AnyBuffer>(arg), *args.get<ffi::AnyBuffer>(arg + 1),
                                 *args.get<ffi::AnyBuffer>(arg + 2),
                                 *args.get<ffi::AnyBuffer>(has_params ? arg + 3 : arg)};
    arg += has_params ? 4 : 3;
    const size_t out = ret;
    ret += 3;
    if (leaf.weights == Weights::kStochastic) {
      const auto words = args.get<ffi::AnyBuffer>(arg++);
      std::memcpy(leaf.words, words->untyped_data(), sizeof leaf.words);
    } else if (leaf.weights != Weights::kPlain) {
      leaf.residual = args.get<ffi::AnyBuffer>(arg++)->untyped_data();
      leaf.residual_out = (*rets.get<ffi::AnyBuffer>(ret++))->untyped_data();
      if (leaf.weights == Weights::kCompensated8) {
        uint32_t made;
        std::memcpy(&made, args.get<ffi::AnyBuffer>(arg++)->untyped_data(), sizeof made);
        leaf.phase = made * kStep + uint32_t(salts[i]) * kSalt;
      }
    }
    const auto [g, m, v, p] = buffers;
    leaf.is_coded = m.element_type() == ffi::DataType::U16;
    const bool known =
        float_of(g.element_type(), leaf.g_dtype) && float_of(p.element_type(), leaf.p_dtype) &&
        (leaf.is_coded ||
         (float_of(m.element_type(), leaf.m_dtype) && float_of(v.element_type(), leaf.v_dtype)));
    if (!known) return wrong("a leaf has a dtype that the kernel does not know");
    const auto dims = g.dimensions();
    const int64_t size = int64_t(g.element_count());
    if (size == 0) continue;
    // Lanes and blocks count along the last axis; where nothing is dithered by them there are none.
    const bool is_flat = !leaf.is_coded && leaf.m_dtype == Float::kF32 &&
                         leaf.v_dtype == Float::kF32 && leaf.weights != Weights::kCompensated8;
    leaf.n = is_flat || dims.size() == 0 ? size : dims.back();
    leaf.rows = size / leaf.n;
    leaf.decays = decays[i];
    leaf.writes_params = writes_params;
    leaf.g = g.untyped_data();
    leaf.m = m.untyped_data();
    leaf.v = v.untyped_data();
    leaf.p = has_params ? p.untyped_data() : nullptr;
    leaf.out = (*rets.get<ffi::AnyBuffer>(out))->untyped_data();
    leaf.m_out = (*rets.get<ffi::AnyBuffer>(out + 1))->untyped_data();
    leaf.v_out = (*rets.get<ffi::AnyBuffer>(out + 2))->untyped_data();
    leaves.push_back(leaf);
  }
  Numbers step_numbers;
  Tables table_numbers;
  std::memcpy(&step_numbers, step->untyped_data(), sizeof step_numbers);
  std::memcpy(&table_numbers, tables->untyped_data(), sizeof table_numbers);
  const auto work = std::make_shared<Work>(kernel_in_use.load(), std::move(leaves), step_numbers,
                                           table_numbers, *count->typed_data(),
                                           *lane->typed_data());
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

XLA_FFI_DEFINE_HANDLER_SYMBOL(jadam_step, jadam::step_leaves,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attr<xla::ffi::Span<const int32_t>>("decays")
                                  .Attr<bool>("writes_params")
                                  .Attr<xla::ffi::Span<const int32_t>>("weights")
                                  .Attr<xla::ffi::Span<const int32_t>>("salts"));

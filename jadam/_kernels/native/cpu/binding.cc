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

const std::vector<InstructionSet> sets = instruction_sets();
// That in use; jadam_use_instruction_set changes it.
std::atomic<const InstructionSet*> in_use{&sets[0]};

// On XLA's threads and this one.
void run_on(ffi::ThreadPool threads, std::shared_ptr<Jobs> work) {
  const int64_t helpers = std::min(threads.num_threads(), work->jobs()) - 1;
  for (int64_t i = 0; i < helpers; ++i) {
    threads.Schedule([work] { work->take_jobs(); });
  }
  work->take_jobs();
  work->wait();
}

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
  run_on(threads, std::make_shared<Work>(in_use.load()->kernel, std::move(leaves), numbers, tables,
                                         *shared.count, *shared.first_lane));
  return ffi::Error::Success();
}

using Floats = ffi::Buffer<ffi::F32>;
using Ints = ffi::Buffer<ffi::S32>;

// The rows of a call, if shapes match.
ffi::Error read_batch(const Floats& table, const Floats& m, const Floats& v, const Ints& ids,
                      const Floats& missed, const Floats& now, Batch& batch) {
  const auto sizes = table.dimensions();
  if (sizes.size() < 2 || missed.dimensions().size() != 2) return wrong("a table is [rows, ...]");
  batch.rows = sizes[0];
  batch.width = 1;
  for (size_t i = 1; i < sizes.size(); ++i) batch.width *= sizes[i];
  batch.n = int64_t(ids.element_count());
  const int64_t numbers = missed.dimensions()[1], size = int64_t(table.element_count());
  batch.nodes = (numbers - Batch::kMissed) / 2;
  if (int64_t(m.element_count()) != size || int64_t(v.element_count()) != size ||
      missed.dimensions()[0] != batch.n || Batch::kMissed + 2 * batch.nodes != numbers ||
      batch.nodes < 0 || int64_t(now.element_count()) != batch.n * batch.width) {
    return wrong("shapes do not match");
  }
  batch.ids = ids.typed_data();
  batch.missed = missed.typed_data();
  batch.p = table.typed_data();
  batch.m = m.typed_data();
  batch.v = v.typed_data();
  return ffi::Error::Success();
}

ffi::Error rows_now(ffi::ThreadPool threads, Floats table, Floats m, Floats v, Ints ids,
                    Floats missed, Floats eps, ffi::Result<Floats> now) {
  Batch batch;
  const ffi::Error error = read_batch(table, m, v, ids, missed, *now, batch);
  if (error.failure()) return error;
  batch.now = now->typed_data();
  run_on(threads, std::make_shared<CatchUpWork>(in_use.load()->catch_up, batch, *eps.typed_data()));
  return ffi::Error::Success();
}

ffi::Error step_rows(ffi::ThreadPool threads, Floats table, Floats m, Floats v, Ints last, Ints ids,
                     Floats missed, Floats now, Floats g, Floats numbers, Ints count,
                     ffi::Result<Floats> table_out, ffi::Result<Floats> m_out,
                     ffi::Result<Floats> v_out, ffi::Result<Ints> last_out, bool decays) {
  Batch batch;
  const ffi::Error error = read_batch(table, m, v, ids, missed, now, batch);
  if (error.failure()) return error;
  if (g.element_count() != now.element_count() || int64_t(last.element_count()) != batch.rows ||
      numbers.size_bytes() != sizeof(Numbers)) {
    return wrong("shapes do not match");
  }
  batch.now = now.typed_data();
  Update update{};
  update.g = g.typed_data();
  update.p = table_out->typed_data();
  update.m = m_out->typed_data();
  update.v = v_out->typed_data();
  update.last = last_out->typed_data();
  if (update.p != batch.p || update.m != batch.m || update.v != batch.v ||
      update.last != last.typed_data()) {
    return wrong("a table is stepped in place");
  }
  update.count = *count.typed_data();
  update.decays = decays;
  Numbers step;
  std::memcpy(&step, numbers.typed_data(), sizeof step);
  run_on(threads, std::make_shared<RowsWork>(in_use.load()->step_rows, batch, update, step));
  return ffi::Error::Success();
}

}  // namespace
}  // namespace jadam

extern "C" int jadam_ffi_api_version() { return XLA_FFI_API_MAJOR * 1000 + XLA_FFI_API_MINOR; }

// The names of those that this processor has, the best first, with a blank between two.
extern "C" const char* jadam_instruction_sets() {
  static const std::string names = [] {
    std::string names;
    for (const auto& set : jadam::sets) {
      names += (names.empty() ? "" : " ") + std::string(set.name);
    }
    return names;
  }();
  return names.c_str();
}

// Takes this one for all steps to come. False where the processor does not have it.
extern "C" bool jadam_use_instruction_set(const char* name) {
  for (const auto& set : jadam::sets) {
    if (std::strcmp(name, set.name) == 0) {
      jadam::in_use = &set;
      return true;
    }
  }
  return false;
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    jadam_step, jadam::step_leaves,
    jadam::with_attributes(xla::ffi::Ffi::Bind().Ctx<xla::ffi::ThreadPool>()));

XLA_FFI_DEFINE_HANDLER_SYMBOL(jadam_rows_now, jadam::rows_now,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<jadam::Floats>()
                                  .Arg<jadam::Floats>()
                                  .Arg<jadam::Floats>()
                                  .Arg<jadam::Ints>()
                                  .Arg<jadam::Floats>()
                                  .Arg<jadam::Floats>()
                                  .Ret<jadam::Floats>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(jadam_rows_step, jadam::step_rows,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<jadam::Floats>()
                                  .Arg<jadam::Floats>()
                                  .Arg<jadam::Floats>()
                                  .Arg<jadam::Ints>()
                                  .Arg<jadam::Ints>()
                                  .Arg<jadam::Floats>()
                                  .Arg<jadam::Floats>()
                                  .Arg<jadam::Floats>()
                                  .Arg<jadam::Floats>()
                                  .Arg<jadam::Ints>()
                                  .Ret<jadam::Floats>()
                                  .Ret<jadam::Floats>()
                                  .Ret<jadam::Floats>()
                                  .Ret<jadam::Ints>()
                                  .Attr<bool>("decays"));

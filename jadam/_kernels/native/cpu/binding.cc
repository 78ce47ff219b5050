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
// The instruction set in use; jadam_use_instruction_set changes it.
std::atomic<const InstructionSet*> in_use{&sets[0]};

// Runs jobs on XLA's threads and on this one.
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

// The operands that both calls for rows begin with.
struct Rows {
  Floats table, m, v;
  Ints ids;
  Floats steps, plain, first, second, decay, factors, scales;
};

// The rows of a call, if shapes match.
ffi::Error read_rows(const Rows& rows, const Floats& of_places, Batch& batch) {
  const auto sizes = rows.table.dimensions();
  if (sizes.size() < 2 || rows.factors.dimensions().size() != 2) return wrong("of other shapes");
  const size_t n = rows.ids.element_count(), size = rows.table.element_count();
  batch.rows = sizes[0];
  batch.width = 1;
  for (size_t i = 1; i < sizes.size(); ++i) batch.width *= sizes[i];
  batch.n = int64_t(n);
  batch.missed.nodes = rows.factors.dimensions()[0];
  bool fits = rows.m.element_count() == size && rows.v.element_count() == size &&
              int64_t(of_places.element_count()) == batch.n * batch.width &&
              rows.scales.element_count() == n * size_t(batch.missed.nodes) &&
              rows.factors.element_count() == rows.scales.element_count();
  for (const Floats* x : {&rows.steps, &rows.plain, &rows.first, &rows.second, &rows.decay}) {
    fits = fits && x->element_count() == n;
  }
  if (!fits) return wrong("of other shapes");
  if (batch.n > INT32_MAX) return wrong("more than 2^31 places");
  batch.ids = rows.ids.typed_data();
  batch.missed.steps = rows.steps.typed_data();
  batch.missed.plain = rows.plain.typed_data();
  batch.missed.first = rows.first.typed_data();
  batch.missed.second = rows.second.typed_data();
  batch.missed.decay = rows.decay.typed_data();
  batch.missed.factors = rows.factors.typed_data();
  batch.missed.scales = rows.scales.typed_data();
  batch.p = rows.table.typed_data();
  batch.m = rows.m.typed_data();
  batch.v = rows.v.typed_data();
  return ffi::Error::Success();
}

ffi::Error rows_now(ffi::ThreadPool threads, Floats table, Floats m, Floats v, Ints ids,
                    Floats steps, Floats plain, Floats first, Floats second, Floats decay,
                    Floats factors, Floats scales, Floats eps, ffi::Result<Floats> now) {
  Batch batch{};
  const Rows rows{table, m, v, ids, steps, plain, first, second, decay, factors, scales};
  const ffi::Error error = read_rows(rows, *now, batch);
  if (error.failure()) return error;
  run_on(threads, std::make_shared<CatchUpWork>(in_use.load()->catch_up, batch, *eps.typed_data(),
                                                now->typed_data()));
  return ffi::Error::Success();
}

ffi::Error step_rows(ffi::ThreadPool threads, Floats table, Floats m, Floats v, Ints ids,
                     Floats steps, Floats plain, Floats first, Floats second, Floats decay,
                     Floats factors, Floats scales, Ints last, Floats g, Floats numbers,
                     Ints count, ffi::Result<Floats> table_out,
                     ffi::Result<Floats> m_out, ffi::Result<Floats> v_out,
                     ffi::Result<Ints> last_out, bool decays) {
  Batch batch{};
  const Rows rows{table, m, v, ids, steps, plain, first, second, decay, factors, scales};
  const ffi::Error error = read_rows(rows, g, batch);
  if (error.failure()) return error;
  if (int64_t(last.element_count()) != batch.rows || numbers.size_bytes() != sizeof(Numbers)) {
    return wrong("of other shapes");
  }
  Update update{};
  update.g = g.typed_data();
  update.p = table_out->typed_data();
  update.m = m_out->typed_data();
  update.v = v_out->typed_data();
  update.last = last_out->typed_data();
  if (update.p != batch.p || update.m != batch.m || update.v != batch.v ||
      update.last != last.typed_data()) {
    return wrong("not in place");
  }
  update.count = *count.typed_data();
  update.decays = decays;
  Numbers step;
  std::memcpy(&step, numbers.typed_data(), sizeof step);
  run_on(threads, std::make_shared<StepRowsWork>(in_use.load()->step_rows, batch, update, step));
  return ffi::Error::Success();
}

// The table, its m and v, the ids, and the seven arrays of _missed.Sums.
template <class Binding>
auto with_rows(Binding binding) {
  return std::move(binding)
      .template Arg<Floats>()
      .template Arg<Floats>()
      .template Arg<Floats>()
      .template Arg<Ints>()
      .template Arg<Floats>()
      .template Arg<Floats>()
      .template Arg<Floats>()
      .template Arg<Floats>()
      .template Arg<Floats>()
      .template Arg<Floats>()
      .template Arg<Floats>();
}

}  // namespace
}  // namespace jadam

extern "C" int jadam_ffi_api_version() { return XLA_FFI_API_MAJOR * 1000 + XLA_FFI_API_MINOR; }

// The names of the instruction sets that this processor has, the best first, with blanks between.
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

// Sets the instruction set of all steps to come; false where the processor does not have it.
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

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    jadam_rows_now, jadam::rows_now,
    jadam::with_rows(xla::ffi::Ffi::Bind().Ctx<xla::ffi::ThreadPool>())
        .Arg<jadam::Floats>()
        .Ret<jadam::Floats>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    jadam_rows_step, jadam::step_rows,
    jadam::with_rows(xla::ffi::Ffi::Bind().Ctx<xla::ffi::ThreadPool>())
        .Arg<jadam::Ints>()
        .Arg<jadam::Floats>()
        .Arg<jadam::Floats>()
        .Arg<jadam::Ints>()
        .Ret<jadam::Floats>()
        .Ret<jadam::Floats>()
        .Ret<jadam::Floats>()
        .Ret<jadam::Ints>()
        .Attr<bool>("decays"));

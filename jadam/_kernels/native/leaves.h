// The buffers of a call by XLA as leaves.
#pragma once

#include <string>
#include <vector>

#include "step.h"
#include "xla/ffi/api/ffi.h"

namespace jadam {

namespace ffi = xla::ffi;

inline ffi::Error wrong(const std::string& what) {
  return ffi::Error::InvalidArgument("jadam_step: " + what);
}

inline bool float_of(ffi::DataType dtype, Float& found) {
  if (dtype == ffi::DataType::F32) found = Float::kF32;
  if (dtype == ffi::DataType::BF16) found = Float::kBF16;
  return dtype == ffi::DataType::F32 || dtype == ffi::DataType::BF16;
}

// What all leaves share, in the memory of the device.
struct Shared {
  const Numbers* numbers;
  const Tables* tables;
  const uint32_t* count;
  const uint32_t* first_lane;
};

// Operands: numbers, tables, count, the lane at which rows begin, then of each leaf g, m, v, where
// it is needed p, and where its weights say so the residual and its dither's count, or two words of
// random bits. Results: of each leaf p or the update, m, v and the residual.
inline ffi::Error read_call(ffi::RemainingArgs args, ffi::RemainingRets rets,
                            ffi::Span<const int32_t> decays, bool writes_params,
                            ffi::Span<const int32_t> weights, ffi::Span<const int32_t> salts,
                            Shared& shared, std::vector<Leaf>& leaves) {
  constexpr size_t kFirst = 4;
  const auto numbers = args.get<ffi::Buffer<ffi::F32>>(0);
  const auto tables = args.get<ffi::Buffer<ffi::F32>>(1);
  const auto count = args.get<ffi::Buffer<ffi::U32>>(2);
  const auto lane = args.get<ffi::Buffer<ffi::U32>>(3);
  if (!numbers.has_value() || !tables.has_value() || !count.has_value() || !lane.has_value() ||
      numbers->size_bytes() != sizeof(Numbers) || tables->size_bytes() != sizeof(Tables)) {
    return wrong("this library and this jadam are of different versions");
  }
  shared = {static_cast<const Numbers*>(numbers->untyped_data()),
            static_cast<const Tables*>(tables->untyped_data()), count->typed_data(),
            lane->typed_data()};
  size_t arg = kFirst, ret = 0;
  for (size_t i = 0; i < decays.size(); ++i) {
    Leaf leaf{};
    leaf.weights = Weights(weights[i]);
    leaf.salt = uint32_t(salts[i]);
    const bool has_params = writes_params || decays[i] || leaf.weights != Weights::kPlain;
    ffi::AnyBuffer buffers[4] = {*args.get<ffi::AnyBuffer>(arg), *args.get<ffi::AnyBuffer>(arg + 1),
                                 *args.get<ffi::AnyBuffer>(arg + 2),
                                 *args.get<ffi::AnyBuffer>(has_params ? arg + 3 : arg)};
    arg += has_params ? 4 : 3;
    const size_t out = ret;
    ret += 3;
    if (leaf.weights == Weights::kStochastic) {
      leaf.counted = args.get<ffi::AnyBuffer>(arg++)->untyped_data();
    } else if (leaf.weights != Weights::kPlain) {
      leaf.residual = args.get<ffi::AnyBuffer>(arg++)->untyped_data();
      leaf.residual_out = (*rets.get<ffi::AnyBuffer>(ret++))->untyped_data();
      if (leaf.weights == Weights::kCompensated8) {
        leaf.counted = args.get<ffi::AnyBuffer>(arg++)->untyped_data();
      }
    }
    const auto [g, m, v, p] = buffers;
    leaf.codes = m.element_type() == ffi::DataType::U16  ? Codes::kEightBits
                 : m.element_type() == ffi::DataType::U8 ? Codes::kFourBits
                                                         : Codes::kNone;
    const bool known =
        float_of(g.element_type(), leaf.g_dtype) && float_of(p.element_type(), leaf.p_dtype) &&
        (leaf.is_coded() ||
         (float_of(m.element_type(), leaf.m_dtype) && float_of(v.element_type(), leaf.v_dtype)));
    if (!known) return wrong("a leaf has a dtype that the kernel does not know");
    const auto dims = g.dimensions();
    const int64_t size = int64_t(g.element_count());
    if (size == 0) continue;
    // Lanes and blocks count along the last axis; where nothing is dithered by them there are none.
    const bool is_flat = !leaf.is_coded() && leaf.m_dtype == Float::kF32 &&
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
  return ffi::Error::Success();
}

// The attributes of a call.
template <class Binding>
auto with_attributes(Binding binding) {
  return std::move(binding)
      .RemainingArgs()
      .RemainingRets()
      .template Attr<ffi::Span<const int32_t>>("decays")
      .template Attr<bool>("writes_params")
      .template Attr<ffi::Span<const int32_t>>("weights")
      .template Attr<ffi::Span<const int32_t>>("salts");
}

}  // namespace jadam

// What the torch bindings of masked_sgd on the CPU and on CUDA check and describe alike.
#pragma once

#include "../kernels.h"
#include "../torch_stable.h"

namespace imgopt {
namespace {

inline void check(const Tensor& t, int64_t entries, ScalarType dtype, const char* name, const char* expected) {
    STD_TORCH_CHECK(t.dim() == 1 && t.size(0) == entries && t.scalar_type() == dtype && t.is_contiguous(), name,
                    ": expected contiguous ", expected);
}

// An order of the values for masked_matmul: both tensors or neither.
inline void check_values(const std::optional<Tensor>& values, const std::optional<Tensor>& places, int64_t kept) {
    STD_TORCH_CHECK(values.has_value() == places.has_value(), "places: expected with values, and only then");
    if (!values) return;
    check(*values, values->numel(), ScalarType::Float, "values", "float32 of one axis");
    check(*places, kept, ScalarType::Int, "places", "int32 (kept,)");
}

// A step on tensors whose mask keeps `kept` entries.
inline MaskedSgd checked_step(Tensor& weight, std::optional<Tensor>& velocity, const Tensor& grad, const Tensor& bits,
                              const Tensor& offsets, double rate, double factor, double gain, double decay, bool first,
                              bool nesterov, std::optional<Tensor>& values, const std::optional<Tensor>& places,
                              std::optional<Tensor>& transposed_values, const std::optional<Tensor>& transposed_places,
                              int64_t kept) {
    STD_TORCH_CHECK(weight.dim() == 1, "weight: expected one axis");
    const int64_t entries = weight.size(0), blocks = (entries + MaskedSgd::kBlock - 1) / MaskedSgd::kBlock;
    check(weight, entries, ScalarType::Float, "weight", "float32 (entries,)");
    check(grad, entries, ScalarType::Float, "grad", "float32 of the weight's shape");
    check(bits, (entries + 63) / 64, ScalarType::Long, "bits", "int64 (ceil(entries / 64),)");
    check(offsets, blocks + 1, ScalarType::Long, "offsets", "int64, one per block of 4096 entries and one more");
    if (velocity) check(*velocity, kept, ScalarType::Float, "velocity", "float32 (kept,)");
    check_values(values, places, kept);
    check_values(transposed_values, transposed_places, kept);
    const auto written = [](std::optional<Tensor>& t) { return t ? t->mutable_data_ptr<float>() : nullptr; };
    const auto read = [](const std::optional<Tensor>& t) { return t ? t->const_data_ptr<int32_t>() : nullptr; };
    return {static_cast<const uint64_t*>(bits.const_data_ptr()),
            offsets.const_data_ptr<int64_t>(),
            weight.mutable_data_ptr<float>(),
            velocity ? velocity->mutable_data_ptr<float>() : nullptr,
            grad.const_data_ptr<float>(),
            entries,
            static_cast<float>(rate),
            static_cast<float>(factor),
            static_cast<float>(gain),
            static_cast<float>(decay),
            first,
            nesterov,
            {written(values), written(transposed_values)},
            {read(places), read(transposed_places)}};
}

}  // namespace
}  // namespace imgopt

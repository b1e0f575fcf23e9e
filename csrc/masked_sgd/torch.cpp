// masked_sgd for torch on the CPU: checks, and the loop over threads.
#include "../torch_stable.h"

namespace imgopt {
namespace {

constexpr int64_t kWorthThread = 16;  // blocks: some 10 us of a core

void check(const Tensor& t, int64_t entries, ScalarType dtype, const char* name, const char* expected) {
    STD_TORCH_CHECK(t.dim() == 1 && t.size(0) == entries && t.scalar_type() == dtype && t.is_contiguous(), name,
                    ": expected contiguous ", expected);
}

// One of the two orders of values: both tensors or neither.
void check_values(const std::optional<Tensor>& values, const std::optional<Tensor>& places, int64_t kept) {
    STD_TORCH_CHECK(values.has_value() == places.has_value(), "places: expected with values, and only then");
    if (!values) return;
    check(*values, values->numel(), ScalarType::Float, "values", "float32 of one axis");
    check(*places, kept, ScalarType::Int, "places", "int32 (kept,)");
}

void masked_sgd(Tensor weight, std::optional<Tensor> velocity, Tensor grad, Tensor bits, Tensor offsets, double rate,
                double factor, double gain, double decay, bool first, bool nesterov, std::optional<Tensor> values,
                std::optional<Tensor> places, std::optional<Tensor> transposed_values,
                std::optional<Tensor> transposed_places) {
    STD_TORCH_CHECK(weight.dim() == 1, "weight: expected one axis");
    const int64_t entries = weight.size(0), blocks = (entries + MaskedSgd::kBlock - 1) / MaskedSgd::kBlock;
    check(weight, entries, ScalarType::Float, "weight", "float32 (entries,)");
    check(grad, entries, ScalarType::Float, "grad", "float32 of the weight's shape");
    check(bits, (entries + 63) / 64, ScalarType::Long, "bits", "int64 (ceil(entries / 64),)");
    check(offsets, blocks + 1, ScalarType::Long, "offsets", "int64, one per block of 4096 entries and one more");
    const int64_t* before = offsets.const_data_ptr<int64_t>();
    if (velocity) check(*velocity, before[blocks], ScalarType::Float, "velocity", "float32 (kept,)");
    check_values(values, places, before[blocks]);
    check_values(transposed_values, transposed_places, before[blocks]);
    const auto written = [](std::optional<Tensor>& t) { return t ? t->mutable_data_ptr<float>() : nullptr; };
    const auto read = [](const std::optional<Tensor>& t) { return t ? t->const_data_ptr<int32_t>() : nullptr; };
    const MaskedSgd p{static_cast<const uint64_t*>(bits.const_data_ptr()),
                      before,
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
    const KernelTable& table = kernels();
    parallel_units(blocks, kWorthThread, [&](int64_t begin, int64_t end) { table.masked_sgd(p, begin, end); });
}

}  // namespace
}  // namespace imgopt

STABLE_TORCH_LIBRARY_IMPL(imgopt_fast, CPU, m) { m.impl("masked_sgd", TORCH_BOX(&imgopt::masked_sgd)); }

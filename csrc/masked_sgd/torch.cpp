// masked_sgd for torch on the CPU: the loop over threads.
#include "binding.h"

namespace imgopt {
namespace {

constexpr int64_t kWorthThread = 16;  // blocks: some 10 us of a core

void masked_sgd(Tensor weight, std::optional<Tensor> velocity, Tensor grad, Tensor bits, Tensor offsets, double rate,
                double factor, double gain, double decay, bool first, bool nesterov, std::optional<Tensor> values,
                std::optional<Tensor> places, std::optional<Tensor> transposed_values,
                std::optional<Tensor> transposed_places) {
    const int64_t kept = offsets.numel() > 0 ? offsets.const_data_ptr<int64_t>()[offsets.numel() - 1] : 0;
    const MaskedSgd p = checked_step(weight, velocity, grad, bits, offsets, rate, factor, gain, decay, first, nesterov,
                                     values, places, transposed_values, transposed_places, kept);
    const KernelTable& table = kernels();
    parallel_units((p.entries + MaskedSgd::kBlock - 1) / MaskedSgd::kBlock, kWorthThread,
                   [&](int64_t begin, int64_t end) { table.masked_sgd(p, begin, end); });
}

}  // namespace
}  // namespace imgopt

STABLE_TORCH_LIBRARY_IMPL(imgopt_fast, CPU, m) { m.impl("masked_sgd", TORCH_BOX(&imgopt::masked_sgd)); }

// masked_sgd for torch on CUDA: a block of threads per block of 4096 entries, an entry per thread and round, with the
// arithmetic of the CPU, bit for bit. Where an entry's velocity is follows from the ones before it: those of earlier
// blocks are `offsets`, of earlier words a sum that the block makes once, of its own word a count of bits.
#include "../cuda.h"
#include "arithmetic.h"
#include "binding.h"

namespace imgopt {
namespace {

constexpr int kThreads = 256;
constexpr int kWords = MaskedSgd::kBlock / kWord;

// to[j]: the ones of the block's words before j.
__device__ inline void count_before(const MaskedSgd& p, int64_t first, int* to) {
    __shared__ int counts[kWords];
    const int word = threadIdx.x;
    const int64_t words = (p.entries + kWord - 1) / kWord - first;
    if (word < kWords) counts[word] = word < words ? set_bits(p.bits[first + word]) : 0;
    __syncthreads();
    if (word < kWords) {
        int sum = 0;
        for (int i = 0; i < word; ++i) sum += counts[i];
        to[word] = sum;
    }
    __syncthreads();
}

template <bool kVelocity, bool kNesterov>
__global__ void __launch_bounds__(kThreads) step_blocks(const MaskedSgd p) {
    __shared__ int before[kWords];
    const int64_t first = int64_t{blockIdx.x} * MaskedSgd::kBlock, kept = p.offsets[blockIdx.x];
    count_before(p, first / kWord, before);
    for (int i = threadIdx.x; i < MaskedSgd::kBlock && first + i < p.entries; i += kThreads) {
        const uint64_t bits = p.bits[first / kWord + i / kWord], mine = uint64_t{1} << i % kWord;
        if (!(bits & mine)) continue;
        const int64_t entry = kept + before[i / kWord] + set_bits(bits & (mine - 1));
        float* weight = p.weight + first + i;
        step<kVelocity, kNesterov>(p, weight, kVelocity ? p.velocity + entry : nullptr, p.grad[first + i]);
        for (int side = 0; side < 2; ++side)
            if (p.values[side]) p.values[side][p.places[side][entry]] = *weight;
    }
}

void step_weight(Tensor weight, std::optional<Tensor> velocity, Tensor grad, Tensor bits, Tensor offsets, double rate,
                 double factor, double gain, double decay, bool first, bool nesterov, std::optional<Tensor> values,
                 std::optional<Tensor> places, std::optional<Tensor> transposed_values,
                 std::optional<Tensor> transposed_places) {
    for (const Tensor& t : {weight, grad, bits, offsets}) check_device(t, "weight, grad, bits and offsets");
    for (const auto* t : {&velocity, &values, &places, &transposed_values, &transposed_places})
        if (*t) check_device(**t, "velocity, values and places");
    const Launcher launch(weight);
    const int64_t kept = velocity ? velocity->numel() : places ? places->numel() : 0;  // the caller's word
    const MaskedSgd p = checked_step(weight, velocity, grad, bits, offsets, rate, factor, gain, decay, first, nesterov,
                                     values, places, transposed_values, transposed_places, kept);
    if (p.entries == 0) return;
    const auto kernel = !velocity  ? step_blocks<false, false>
                        : nesterov ? step_blocks<true, true>
                                   : step_blocks<true, false>;
    launch(kernel, static_cast<unsigned>(ceil_div(p.entries, MaskedSgd::kBlock)), kThreads, 0, p);
}

}  // namespace
}  // namespace imgopt

STABLE_TORCH_LIBRARY_IMPL(imgopt_fast, IMGOPT_CUDA_KEY, m) { m.impl("masked_sgd", TORCH_BOX(&imgopt::step_weight)); }

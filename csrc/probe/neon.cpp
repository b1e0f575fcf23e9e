// The machine's rates with 128-bit NEON vectors: fused multiply-add, and the signed dot product (sdot).
#include <arm_neon.h>

#include "../kernels.h"

namespace imgopt::neon {
namespace {

constexpr int kChains = 16;  // latency 4 times 4 a cycle on the widest cores

int64_t fma(int64_t rounds, const Probe::Operands& operands) {
    float32x4_t acc[kChains];
#pragma GCC unroll 16
    for (int i = 0; i < kChains; ++i) acc[i] = vld1q_f32(operands.zeros_f32 + 4 * i);
    const float32x4_t one = vld1q_f32(operands.ones_f32);
    // vfmaq adds to its first argument: acc = one + acc * one, so that the chains cannot merge.
    for (int64_t r = 0; r < rounds; ++r)
#pragma GCC unroll 16
        for (int i = 0; i < kChains; ++i) acc[i] = vfmaq_f32(one, acc[i], one);
    int64_t count = 0;
#pragma GCC unroll 16
    for (int i = 0; i < kChains; ++i) {
        float lanes[4];
        vst1q_f32(lanes, acc[i]);
        for (float lane : lanes) count += static_cast<int64_t>(lane);
    }
    return count;
}

int64_t int8_dot(int64_t rounds, const Probe::Operands& operands) {
    int32x4_t acc[kChains];
#pragma GCC unroll 16
    for (int i = 0; i < kChains; ++i) acc[i] = vreinterpretq_s32_f32(vld1q_f32(operands.zeros_f32 + 4 * i));
    const int8x16_t weight = vld1q_s8(operands.ones_s8);
    for (int64_t r = 0; r < rounds; ++r)
#pragma GCC unroll 16
        for (int i = 0; i < kChains; ++i) acc[i] = vdotq_s32(acc[i], weight, weight);
    int64_t count = 0;
#pragma GCC unroll 16
    for (int i = 0; i < kChains; ++i) count += vaddvq_s32(acc[i]);
    return count;
}

uint64_t read(const void* source, int64_t bytes) {
    const uint64_t* words = static_cast<const uint64_t*>(source);
    uint64x2_t sum[8];
#pragma GCC unroll 16
    for (int i = 0; i < 8; ++i) sum[i] = vdupq_n_u64(0);
    for (int64_t w = 0; w < bytes / 8; w += 16)
#pragma GCC unroll 16
        for (int i = 0; i < 8; ++i) sum[i] = vaddq_u64(sum[i], vld1q_u64(words + w + 2 * i));
    uint64_t total = 0;
#pragma GCC unroll 16
    for (int i = 0; i < 8; ++i) total += vaddvq_u64(sum[i]);
    return total;
}

void copy(const void* source, void* target, int64_t bytes) {
    const uint64_t* from = static_cast<const uint64_t*>(source);
    uint64_t* to = static_cast<uint64_t*>(target);
    for (int64_t w = 0; w < bytes / 8; w += 16)
#pragma GCC unroll 16
        for (int i = 0; i < 8; ++i) vst1q_u64(to + w + 2 * i, vld1q_u64(from + w + 2 * i));
}

}  // namespace

void probe(KernelTable& table) { table.probe = {fma, int8_dot, read, copy}; }

}  // namespace imgopt::neon

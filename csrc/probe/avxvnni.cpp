// The rate of vpdpbusd on 256-bit vectors, VEX-encoded.
#include <immintrin.h>

#include "../kernels.h"

namespace imgopt::avxvnni {
namespace {

constexpr int kChains = 12;  // more than latency 5 times 2 a cycle, and with the operands within 16 registers

int64_t int8_dot(int64_t rounds, const Probe::Operands& operands) {
    __m256i acc[kChains];
#pragma GCC unroll 16
    for (int i = 0; i < kChains; ++i)
        acc[i] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(operands.zeros_f32 + 8 * i));
    const __m256i pixels = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(operands.ones_u8));
    const __m256i weight = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(operands.ones_s8));
    for (int64_t r = 0; r < rounds; ++r)
#pragma GCC unroll 16
        for (int i = 0; i < kChains; ++i) acc[i] = _mm256_dpbusd_avx_epi32(acc[i], pixels, weight);
    int64_t count = 0;
#pragma GCC unroll 16
    for (int i = 0; i < kChains; ++i) {
        int32_t lanes[8];
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(lanes), acc[i]);
        for (int32_t lane : lanes) count += lane;
    }
    return count;
}

}  // namespace

void probe(KernelTable& table) { table.probe.int8_dot = int8_dot; }

}  // namespace imgopt::avxvnni

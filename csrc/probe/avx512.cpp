// The machine's rates with 512-bit vectors: FMA and vpdpbusd.
#include <immintrin.h>

#include "../kernels.h"

namespace imgopt::avx512 {
namespace {

constexpr int kChains = 12;  // more than latency 5 times 2 a cycle

int64_t fma(int64_t rounds, const Probe::Operands& operands) {
    __m512 acc[kChains];
#pragma GCC unroll 16
    for (int i = 0; i < kChains; ++i) acc[i] = _mm512_loadu_ps(operands.zeros_f32 + 16 * i);
    const __m512 one = _mm512_loadu_ps(operands.ones_f32);
    for (int64_t r = 0; r < rounds; ++r)
#pragma GCC unroll 16
        for (int i = 0; i < kChains; ++i) acc[i] = _mm512_fmadd_ps(acc[i], one, one);
    int64_t count = 0;
#pragma GCC unroll 16
    for (int i = 0; i < kChains; ++i) {
        float lanes[16];
        _mm512_storeu_ps(lanes, acc[i]);
        for (float lane : lanes) count += static_cast<int64_t>(lane);
    }
    return count;
}

int64_t int8_dot(int64_t rounds, const Probe::Operands& operands) {
    __m512i acc[kChains];
#pragma GCC unroll 16
    for (int i = 0; i < kChains; ++i) acc[i] = _mm512_loadu_si512(operands.zeros_f32 + 16 * i);
    const __m512i pixels = _mm512_loadu_si512(operands.ones_u8);
    const __m512i weight = _mm512_loadu_si512(operands.ones_s8);
    for (int64_t r = 0; r < rounds; ++r)
#pragma GCC unroll 16
        for (int i = 0; i < kChains; ++i) acc[i] = _mm512_dpbusd_epi32(acc[i], pixels, weight);
    int64_t count = 0;
#pragma GCC unroll 16
    for (int i = 0; i < kChains; ++i) {
        int32_t lanes[16];
        _mm512_storeu_si512(lanes, acc[i]);
        for (int32_t lane : lanes) count += lane;
    }
    return count;
}

}  // namespace

// Reading and copying stay those of AVX2: a copy is no faster by whole lines (238 GB/s in L2 on a Zen 5 core), and a
// read slower (120 to 170 against 240).
void probe(KernelTable& table) {
    table.probe.fma = fma;
    table.probe.int8_dot = int8_dot;
}

}  // namespace imgopt::avx512

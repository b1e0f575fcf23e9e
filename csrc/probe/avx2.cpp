// The machine's rates with 256-bit vectors. The int8 products are the exact ones that AVX2 allows: both factors
// widened to 16 bits, vpmaddwd, vpaddd; vpmaddubsw would do twice as many, but saturates.
#include <immintrin.h>

#include "../kernels.h"

namespace imgopt::avx2 {
namespace {

constexpr int kChains = 12;  // more than latency 4 times 2 a cycle, and with the operands within 16 registers

int64_t fma(int64_t rounds, const Probe::Operands& operands) {
    __m256 acc[kChains];
#pragma GCC unroll 16
    for (int i = 0; i < kChains; ++i) acc[i] = _mm256_loadu_ps(operands.zeros_f32 + 8 * i);
    const __m256 one = _mm256_loadu_ps(operands.ones_f32);
    for (int64_t r = 0; r < rounds; ++r)
#pragma GCC unroll 16
        for (int i = 0; i < kChains; ++i) acc[i] = _mm256_fmadd_ps(acc[i], one, one);
    int64_t count = 0;
#pragma GCC unroll 16
    for (int i = 0; i < kChains; ++i) {
        float lanes[8];
        _mm256_storeu_ps(lanes, acc[i]);
        for (float lane : lanes) count += static_cast<int64_t>(lane);
    }
    return count;
}

int64_t int8_dot(int64_t rounds, const Probe::Operands& operands) {
    __m256i acc[kChains];
#pragma GCC unroll 16
    for (int i = 0; i < kChains; ++i) acc[i] = _mm256_setzero_si256();
    const __m256i weight = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(operands.ones_s16));
    for (int64_t r = 0; r < rounds; ++r) {
#pragma GCC unroll 16
        for (int i = 0; i < kChains; ++i) {
            const __m256i pixels = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(operands.ones_s16) + i);
            acc[i] = _mm256_add_epi32(acc[i], _mm256_madd_epi16(pixels, weight));
            // The products must not move out of the loop, nor ahead of the sums: they would take all registers.
            asm volatile("" : "+x"(acc[i])::"memory");
        }
    }
    int64_t count = 0;
#pragma GCC unroll 16
    for (int i = 0; i < kChains; ++i) {
        int32_t lanes[8];
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(lanes), acc[i]);
        for (int32_t lane : lanes) count += lane;
    }
    return count;
}

uint64_t read(const void* source, int64_t bytes) {
    const __m256i* vectors = static_cast<const __m256i*>(source);
    __m256i sum[8];
#pragma GCC unroll 16
    for (int i = 0; i < 8; ++i) sum[i] = _mm256_setzero_si256();
    for (int64_t v = 0; v < bytes / 32; v += 8)
#pragma GCC unroll 16
        for (int i = 0; i < 8; ++i) sum[i] = _mm256_add_epi64(sum[i], _mm256_loadu_si256(vectors + v + i));
    uint64_t total = 0;
#pragma GCC unroll 16
    for (int i = 0; i < 8; ++i) {
        uint64_t lanes[4];
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(lanes), sum[i]);
        for (uint64_t lane : lanes) total += lane;
    }
    return total;
}

void copy(const void* source, void* target, int64_t bytes) {
    const __m256i* from = static_cast<const __m256i*>(source);
    __m256i* to = static_cast<__m256i*>(target);
    for (int64_t v = 0; v < bytes / 32; v += 8)
#pragma GCC unroll 16
        for (int i = 0; i < 8; ++i) _mm256_storeu_si256(to + v + i, _mm256_loadu_si256(from + v + i));
}

}  // namespace

void probe(KernelTable& table) { table.probe = {fma, int8_dot, read, copy}; }

}  // namespace imgopt::avx2

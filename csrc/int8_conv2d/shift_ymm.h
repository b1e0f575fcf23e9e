// Requantization by shifts, 8 channels at a time: the rule of contract.h in int64, half of them to a vector. A part of
// tile_ymm.h. AVX2 has no arithmetic shift, minimum or maximum of int64; a bias and comparisons take their place.
#pragma once

#include <immintrin.h>

#include "arithmetic.h"

namespace imgopt {
namespace {

struct ShiftEpilogueYmm {
    const Int8Conv2d& p;
    __m256i low, high, zero_point;

    explicit ShiftEpilogueYmm(const Int8Conv2d& conv)
        : p(conv),
          low(_mm256_set1_epi64x(static_cast<int64_t>(round_half_even(conv.low)))),
          high(_mm256_set1_epi64x(static_cast<int64_t>(round_half_even(conv.high)))),
          zero_point(_mm256_set1_epi32(conv.output_zero_point)) {}

    // The bytes of 8 sums, from output channel `channel` on; `residual` holds as many bytes, flipped.
    __m128i operator()(int64_t channel, __m256i sums, __m128i residual) const {
        const __m256i fields = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p.shift + channel));
        const __m256i right = _mm256_srai_epi32(_mm256_slli_epi32(fields, 24), 24);
        const __m256i sum_left = byte_of(fields, 8), residual_left = byte_of(fields, 16);
        __m256i t0 = _mm256_sllv_epi64(first_half(sums), first_half(sum_left));
        __m256i t1 = _mm256_sllv_epi64(second_half(sums), second_half(sum_left));
        if (p.residual) {
            const __m256i r =
                _mm256_sub_epi32(_mm256_cvtepu8_epi32(residual), _mm256_set1_epi32(p.residual_zero_point));
            t0 = _mm256_add_epi64(t0, _mm256_sllv_epi64(first_half(r), first_half(residual_left)));
            t1 = _mm256_add_epi64(t1, _mm256_sllv_epi64(second_half(r), second_half(residual_left)));
        }
        const __m256i q0 = shift_right(t0, first_half(right)), q1 = shift_right(t1, second_half(right));
        // The low dwords of both, then bytes: their values fit.
        const __m256i even = _mm256_setr_epi32(0, 2, 4, 6, 0, 2, 4, 6);
        const __m256i q =
            _mm256_blend_epi32(_mm256_permutevar8x32_epi32(q0, even), _mm256_permutevar8x32_epi32(q1, even), 0xf0);
        const __m256i bytes = _mm256_add_epi32(q, zero_point);
        const __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(bytes), _mm256_extracti128_si256(bytes, 1));
        return _mm_xor_si128(_mm_packus_epi16(words, words), _mm_set1_epi8(static_cast<char>(p.output_flip)));
    }

  private:
    static __m256i first_half(__m256i v) { return _mm256_cvtepi32_epi64(_mm256_castsi256_si128(v)); }
    static __m256i second_half(__m256i v) { return _mm256_cvtepi32_epi64(_mm256_extracti128_si256(v, 1)); }
    static __m256i byte_of(__m256i fields, int bit) {
        return _mm256_and_si256(_mm256_srli_epi32(fields, bit), _mm256_set1_epi32(0xff));
    }
    static __m256i least(__m256i a, __m256i b) { return _mm256_blendv_epi8(a, b, _mm256_cmpgt_epi64(a, b)); }
    static __m256i most(__m256i a, __m256i b) { return _mm256_blendv_epi8(b, a, _mm256_cmpgt_epi64(a, b)); }

    // t * 2^-right, half up, clamped. Vector shifts by more bits than there are, which negative counts are, give 0.
    // With the bias, a multiple of every 2^right, t becomes positive, so that a logical shift rounds it down.
    __m256i shift_right(__m256i t, __m256i right) const {
        const __m256i zero = _mm256_setzero_si256(), one = _mm256_set1_epi64x(1);
        const __m256i bias = _mm256_set1_epi64x(int64_t{1} << 62), limit = _mm256_set1_epi64x(int64_t{1} << 31);
        const __m256i half = _mm256_sllv_epi64(one, _mm256_sub_epi64(right, one)), down = most(right, zero);
        t = _mm256_srlv_epi64(_mm256_add_epi64(_mm256_add_epi64(t, half), bias), down);
        t = _mm256_sub_epi64(t, _mm256_srlv_epi64(bias, down));
        t = least(most(t, _mm256_sub_epi64(zero, limit)), limit);
        t = _mm256_sllv_epi64(t, most(_mm256_sub_epi64(zero, right), zero));
        return least(most(t, low), high);
    }
};

}  // namespace
}  // namespace imgopt

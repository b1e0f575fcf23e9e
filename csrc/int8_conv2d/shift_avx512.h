// Requantization by shifts, 16 channels at a time: the rule of contract.h in int64, half a vector each. A part of
// avx512.cpp.
#pragma once

#include <immintrin.h>

#include "arithmetic.h"

namespace imgopt::avx512 {
namespace {

struct ShiftEpilogue {
    const Int8Conv2d& p;
    __m512i low, high, zero_point;
    __m128i flip, residual_flip;

    explicit ShiftEpilogue(const Int8Conv2d& conv)
        : p(conv),
          low(_mm512_set1_epi32(static_cast<int32_t>(round_half_even(conv.low)))),
          high(_mm512_set1_epi32(static_cast<int32_t>(round_half_even(conv.high)))),
          zero_point(_mm512_set1_epi32(conv.output_zero_point)),
          flip(_mm_set1_epi8(static_cast<char>(conv.output_flip))),
          residual_flip(_mm_set1_epi8(static_cast<char>(conv.residual_flip))) {}

    // The bytes of the sums of channels `channel`.. of which `mask` has its bits set.
    __m128i operator()(int64_t pixel, int64_t channel, __m512i sums, __mmask16 mask) const {
        const __m512i fields = _mm512_loadu_si512(p.shift + channel);  // right, sum_left, residual_left
        const __m512i right = _mm512_srai_epi32(_mm512_slli_epi32(fields, 24), 24);
        const __m512i sum_left = byte_of(fields, 8), residual_left = byte_of(fields, 16);
        __m512i t0 = _mm512_sllv_epi64(first_half(sums), first_half(sum_left));
        __m512i t1 = _mm512_sllv_epi64(second_half(sums), second_half(sum_left));
        if (p.residual) {
            const uint8_t* from = p.residual + pixel * p.residual_stride + channel;
            const __m128i bytes = _mm_xor_si128(_mm_maskz_loadu_epi8(mask, from), residual_flip);
            const __m512i r = _mm512_sub_epi32(_mm512_cvtepu8_epi32(bytes), _mm512_set1_epi32(p.residual_zero_point));
            t0 = _mm512_add_epi64(t0, _mm512_sllv_epi64(first_half(r), first_half(residual_left)));
            t1 = _mm512_add_epi64(t1, _mm512_sllv_epi64(second_half(r), second_half(residual_left)));
        }
        const __m256i q0 = shift_right(t0, first_half(right)), q1 = shift_right(t1, second_half(right));
        const __m512i q = _mm512_inserti64x4(_mm512_castsi256_si512(q0), q1, 1);
        const __m512i clamped = _mm512_min_epi32(_mm512_max_epi32(q, low), high);
        return _mm_xor_si128(_mm512_cvtepi32_epi8(_mm512_add_epi32(clamped, zero_point)), flip);
    }

  private:
    static __m512i first_half(__m512i v) { return _mm512_cvtepi32_epi64(_mm512_castsi512_si256(v)); }
    static __m512i second_half(__m512i v) { return _mm512_cvtepi32_epi64(_mm512_extracti64x4_epi64(v, 1)); }
    static __m512i byte_of(__m512i fields, unsigned bit) {
        return _mm512_and_si512(_mm512_srli_epi32(fields, bit), _mm512_set1_epi32(0xff));
    }

    // t * 2^-right, half up, saturated to int32. A vector shift by more bits than there are, which negative counts
    // are, gives 0; so either of the two shifts and the half do nothing where the other sign of `right` is meant.
    static __m256i shift_right(__m512i t, __m512i right) {
        const __m512i zero = _mm512_setzero_si512(), one = _mm512_set1_epi64(1);
        const __m512i half = _mm512_sllv_epi64(one, _mm512_sub_epi64(right, one));
        const __m512i limit = _mm512_set1_epi64(int64_t{1} << 31);  // more would saturate as well
        t = _mm512_srav_epi64(_mm512_add_epi64(t, half), _mm512_max_epi64(right, zero));
        t = _mm512_min_epi64(_mm512_max_epi64(t, _mm512_sub_epi64(zero, limit)), limit);
        return _mm512_cvtsepi64_epi32(_mm512_sllv_epi64(t, _mm512_max_epi64(_mm512_sub_epi64(zero, right), zero)));
    }
};

}  // namespace
}  // namespace imgopt::avx512

// Columns of an image for the depthwise kernel of AVX-512: four rows, interleaved to dwords [r0 r1 r2 r3] of 64 lanes,
// the operand that vpdpbusd multiplies with four weights. unpack works within 128-bit lanes, so 4 loads, 8 shuffles and
// 4 stores make a column.
#pragma once

#include "igemm.h"

namespace imgopt::avx512 {
namespace {

constexpr int64_t kColumnBytes = 256;  // one column of 64 lanes, four rows

// Four rows of an image, from which one or two output rows come; one outside it is the padding, which has no step.
struct InputRows {
    const uint8_t* row[4];
    int64_t step[4], channel_step[4];
    int64_t real;  // of the four; the others count as zeros
};

// What is the same for every column of a strip.
struct ColumnRange {
    int64_t x0, count, in_w, stride, column_bytes;
    __mmask64 mask;  // of the block's channels
    __m512i flip, zero_point;
};

// What the lanes of a vector are: BYTES channels of a pixel, or, up to 32, of pixel x and of x + stride; with MASKED
// any smaller number of them. Masked stores of bytes are slow, and the common remainders of 64 are 16 and 32.
template <int BYTES, bool MASKED>
struct Lanes {
    static constexpr int kPixels = BYTES == 64 ? 1 : 2;
    static constexpr int kBytes = BYTES == 32 && !MASKED ? 32 : 0;  // of a half that another may follow in memory

    static __m256i load_half(const uint8_t* pixel, __mmask64 mask) {
        if constexpr (MASKED) return _mm256_maskz_loadu_epi8(static_cast<__mmask32>(mask), pixel);
        if constexpr (BYTES == 16)
            return _mm256_castsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(pixel)));
        return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(pixel));
    }
    static __m512i load_whole(const uint8_t* pixel, __mmask64 mask) {
        return MASKED ? _mm512_maskz_loadu_epi8(mask, pixel) : _mm512_loadu_si512(pixel);
    }
    static void store_half(uint8_t* pixel, __m256i bytes, __mmask64 mask) {
        if constexpr (MASKED)
            _mm256_mask_storeu_epi8(pixel, static_cast<__mmask32>(mask), bytes);
        else if constexpr (BYTES == 16)
            _mm_storeu_si128(reinterpret_cast<__m128i*>(pixel), _mm256_castsi256_si128(bytes));
        else
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(pixel), bytes);
    }
    static void store_whole(uint8_t* pixel, __m512i bytes, __mmask64 mask) {
        MASKED ? _mm512_mask_storeu_epi8(pixel, mask, bytes) : _mm512_storeu_si512(pixel, bytes);
    }
};

// Interleaves input columns into the strip; ROWS of the four are real.
template <int ROWS, class L>
void interleave_rows(const InputRows& in, int64_t channel, const ColumnRange& c, uint8_t* strip) {
    // Copies, because the compiler has to assume that the strip overlaps the originals.
    const __m512i flip = c.flip, zero_point = c.zero_point;
    const __mmask64 mask = c.mask;
    const int64_t in_w = c.in_w, stride = c.stride, column_bytes = c.column_bytes, end = c.x0 + c.count;
    const uint8_t* row[ROWS];
    int64_t step[ROWS];
    for (int i = 0; i < ROWS; ++i) {
        step[i] = in.step[i];
        row[i] = in.row[i] + channel * in.channel_step[i] + c.x0 * step[i];
    }
    const auto half = [&](const uint8_t* pixel, int64_t x) __attribute__((always_inline)) {
        return x < 0 || x >= in_w ? _mm512_castsi512_si256(_mm512_xor_si512(zero_point, flip))
                                  : L::load_half(pixel, mask);
    };
    const auto load = [&](int i, int64_t x) __attribute__((always_inline)) {
        if constexpr (L::kPixels == 1)
            return L::load_whole(row[i], mask);
        else if (stride * step[i] == L::kBytes && x >= 0 && x + stride < in_w)
            return _mm512_loadu_si512(row[i]);
        else
            return _mm512_inserti64x4(_mm512_castsi256_si512(half(row[i], x)),
                                      half(row[i] + stride * step[i], x + stride), 1);
    };
    for (int64_t x = c.x0; x < end; ++x, strip += column_bytes) {
        __m512i* out = reinterpret_cast<__m512i*>(strip);
        if (x < in_w && x + (L::kPixels - 1) * stride >= 0) {
            __m512i u[4] = {};
#pragma GCC unroll 4
            for (int i = 0; i < ROWS; ++i) u[i] = _mm512_xor_si512(load(i, x), flip);
            const __m512i low01 = _mm512_unpacklo_epi8(u[0], u[1]), high01 = _mm512_unpackhi_epi8(u[0], u[1]);
            const __m512i low23 = _mm512_unpacklo_epi8(u[2], u[3]), high23 = _mm512_unpackhi_epi8(u[2], u[3]);
            _mm512_store_si512(out + 0, _mm512_unpacklo_epi16(low01, low23));
            _mm512_store_si512(out + 1, _mm512_unpackhi_epi16(low01, low23));
            _mm512_store_si512(out + 2, _mm512_unpacklo_epi16(high01, high23));
            _mm512_store_si512(out + 3, _mm512_unpackhi_epi16(high01, high23));
        } else {
            for (int j = 0; j < 4; ++j) _mm512_store_si512(out + j, zero_point);
        }
        for (int i = 0; i < ROWS; ++i) row[i] += step[i];
    }
}

using Interleave = void (*)(const InputRows&, int64_t, const ColumnRange&, uint8_t*);

template <class L>
Interleave interleave_function(int64_t rows) {
    return rows == 1   ? interleave_rows<1, L>
           : rows == 2 ? interleave_rows<2, L>
           : rows == 3 ? interleave_rows<3, L>
                       : interleave_rows<4, L>;
}

}  // namespace
}  // namespace imgopt::avx512

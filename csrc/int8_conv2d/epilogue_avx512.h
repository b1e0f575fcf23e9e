// The epilogue of the AVX-512 tiles: sums become bytes in registers, four vectors of them at a time, and rows of few
// channels are stored together. Floats and shifts leave their sums in memory first.
#pragma once

#include <immintrin.h>

#include "igemm.h"
#include "shift_avx512.h"

namespace imgopt::avx512 {
namespace {

// What the epilogue of bytes needs, broadcast once. PLAIN: uint8 with zero point 0, of the residual too, and no
// narrower clamp, what follows a ReLU; half of the instructions behind the rounding do nothing then.
template <bool PLAIN>
struct ByteEpilogue {
    __m512i zero_point, low, high, flip;

    ByteEpilogue(const Int8Conv2d& p, ByteRange range)
        : zero_point(_mm512_set1_epi16(p.output_zero_point)),
          low(_mm512_set1_epi8(static_cast<char>(range.low))),
          high(_mm512_set1_epi8(static_cast<char>(range.high))),
          flip(_mm512_set1_epi8(static_cast<char>(p.output_flip))) {}

    // Two vectors of rounded values, saturated to words within 128-bit lanes, with the zero point.
    __m512i words(__m512i q0, __m512i q1) const {
        const __m512i words = _mm512_packs_epi32(q0, q1);
        return PLAIN ? words : _mm512_adds_epi16(words, zero_point);
    }

    // Dword 4L + j of the result holds channels 4L.. of vector j.
    __m512i bytes(__m512i q01, __m512i q23) const {
        const __m512i bytes = _mm512_packus_epi16(q01, q23);
        return PLAIN ? bytes : _mm512_xor_si512(_mm512_min_epu8(_mm512_max_epu8(bytes, low), high), flip);
    }
};

bool is_plain(const Int8Conv2d& p, ByteRange range) {
    const bool residual = !p.residual || (p.residual_zero_point == 0 && p.residual_flip == 0);
    return residual && p.output_zero_point == 0 && p.output_flip == 0 && range.low == 0 && range.high == 255;
}

// float(r - zero point) * multiplier of 16 channels; PLAIN: uint8 with zero point 0.
template <bool PLAIN>
struct ResidualTerm {
    __m128i flip;
    __m512i zero_point;
    __m512 multiplier;

    explicit ResidualTerm(const Int8Conv2d& p)
        : flip(_mm_set1_epi8(static_cast<char>(p.residual_flip))),
          zero_point(_mm512_set1_epi32(p.residual_zero_point)),
          multiplier(_mm512_set1_ps(p.residual_multiplier)) {}

    __m512 operator()(const uint8_t* residual, __mmask16 mask) const {
        const __m128i bytes = PLAIN ? _mm_loadu_si128(reinterpret_cast<const __m128i*>(residual))
                                    : _mm_xor_si128(_mm_maskz_loadu_epi8(mask, residual), flip);
        const __m512i r = _mm512_cvtepu8_epi32(bytes);
        return _mm512_mul_ps(_mm512_cvtepi32_ps(PLAIN ? r : _mm512_sub_epi32(r, zero_point)), multiplier);
    }
};

// Masked stores of bytes are slow, and the common remainders of a vector are halves of it.
inline void store_16(uint8_t* out, __m128i bytes, int64_t channels) {
    if (channels >= 16)
        _mm_storeu_si128(reinterpret_cast<__m128i*>(out), bytes);
    else if (channels == 8)
        _mm_storel_epi64(reinterpret_cast<__m128i*>(out), bytes);
    else
        _mm_mask_storeu_epi8(out, static_cast<__mmask16>((1u << channels) - 1), bytes);
}

// Float output, and multipliers that is_bounded refuses, a sum at a time; shifts in vectors.
[[gnu::noinline]] void store_rare(const Tile& t, int64_t pixel, const int32_t* sums, int64_t rows, int64_t width) {
    const Int8Conv2d& p = *t.conv;
    if (!p.shift || p.float_output) {
        for (int64_t i = 0; i < rows; ++i)
            for (int64_t c = 0; c < t.channels; ++c) store_sum(p, pixel + i, t.channel + c, sums[i * width + c]);
        return;
    }
    const ShiftEpilogue to_bytes(p);
    for (int64_t i = 0; i < rows; ++i)
        for (int64_t c = 0; c < t.channels; c += 16) {
            const int64_t left = t.channels - c, at = t.channel + c;
            const __mmask16 mask = static_cast<__mmask16>(left < 16 ? (1 << left) - 1 : -1);
            const __m128i bytes = to_bytes(pixel + i, at, _mm512_load_si512(sums + i * width + c), mask);
            store_16(static_cast<uint8_t*>(p.output) + (pixel + i) * p.output_stride + at, bytes, left);
        }
}

inline void store_32(uint8_t* out, __m256i bytes, int64_t channels) {
    if (channels >= 32) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), bytes);
    } else {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm256_castsi256_si128(bytes));
        store_16(out + 16, _mm256_extracti128_si256(bytes, 1), channels - 16);
    }
}

// A vector of bytes holds one row of the tile, two rows of at most 32 channels, or four of at most 16.
template <int NV, int ROWS>
[[gnu::always_inline]] inline void store_rows(uint8_t* out, int64_t stride, __m512i bytes, int64_t channels) {
    if constexpr (NV >= 3) {
        if (NV == 4 && channels == 64) {
            _mm512_storeu_si512(out, bytes);
        } else {
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm512_castsi512_si256(bytes));
            if (NV == 4 && channels > 48)
                store_32(out + 32, _mm512_extracti64x4_epi64(bytes, 1), channels - 32);
            else
                store_16(out + 32, _mm512_extracti32x4_epi32(bytes, 2), channels - 32);
        }
    } else if (ROWS * NV == 4 && channels == 16 * NV && stride == channels) {
        _mm512_storeu_si512(out, bytes);
    } else if constexpr (NV == 2) {
        store_32(out, _mm512_castsi512_si256(bytes), channels);
        if constexpr (ROWS > 1) store_32(out + stride, _mm512_extracti64x4_epi64(bytes, 1), channels);
    } else {
        store_16(out, _mm512_castsi512_si128(bytes), channels);
        if constexpr (ROWS > 1) store_16(out + stride, _mm512_extracti32x4_epi32(bytes, 1), channels);
        if constexpr (ROWS > 2) store_16(out + 2 * stride, _mm512_extracti32x4_epi32(bytes, 2), channels);
        if constexpr (ROWS > 3) store_16(out + 3 * stride, _mm512_extracti32x4_epi32(bytes, 3), channels);
    }
}

// What the epilogue of a tile needs beside its sums. Read once per run of tiles: stores of bytes may change anything,
// for all that a compiler knows, and reading it again for every vector was half of the instructions of a layer's
// residual.
template <int NV, bool RESIDUAL, bool PLAIN>
struct Rows {
    ByteEpilogue<PLAIN> to_bytes;
    ResidualTerm<PLAIN> term;
    const float* multiplier;
    uint8_t* out;
    const uint8_t* residual;
    int64_t out_stride, residual_stride, channels;
    __m512i order;  // dword 4L + j to 4j + L
    __mmask16 mask[NV];

    explicit Rows(const Tile& t)
        : to_bytes(*t.conv, t.range),
          term(*t.conv),
          multiplier(t.conv->multiplier + t.channel),
          out(static_cast<uint8_t*>(t.conv->output) + t.channel),
          residual(t.conv->residual + t.channel),
          out_stride(t.conv->output_stride),
          residual_stride(t.conv->residual_stride),
          channels(t.channels),
          order(_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15)) {
        for (int j = 0; j < NV; ++j) {
            const int64_t left = channels - 16 * j;
            mask[j] = static_cast<__mmask16>(left < 16 ? (1 << left) - 1 : -1);
        }
    }

    // Asks for the residual of a tile whose sums are yet to be made.
    template <int MR>
    [[gnu::always_inline]] void fetch(int64_t pixel) const {
        if constexpr (RESIDUAL) {
            const uint8_t* row = residual + pixel * residual_stride;
#pragma GCC unroll 16
            for (int i = 0; i < MR; ++i, row += residual_stride) __builtin_prefetch(row, 0, 3);
        }
    }
};

// `to` as loaded anew. But for the plain ones, constants that stay in registers while sums are made leave too few: gcc
// then stored a vector of weights in every step of that loop, 3 % of a 3 x 3 layer with a residual.
template <int NV, bool RESIDUAL, bool PLAIN>
[[gnu::always_inline]] inline Rows<NV, RESIDUAL, PLAIN> reloaded(const Rows<NV, RESIDUAL, PLAIN>& to) {
    const Rows<NV, RESIDUAL, PLAIN>* at = &to;
    if constexpr (RESIDUAL || !PLAIN) asm("" : "+r"(at));
    return *at;
}

// The epilogue of rows FIRST.. of a tile, in registers; `out` and `residual` point to the first of them.
template <int FIRST, int MR, int NV, bool RESIDUAL, bool PLAIN>
[[gnu::always_inline]] inline void store_from(const Rows<NV, RESIDUAL, PLAIN>& to, uint8_t* out,
                                              const uint8_t* residual, const __m512 (&multiplier)[NV],
                                              const __m512i (&sums)[MR][NV]) {
    constexpr int kRows = NV >= 3 ? 1 : 4 / NV, rows = FIRST + kRows <= MR ? kRows : MR - FIRST;
    __m512i q[4] = {};
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
        for (int j = 0; j < NV; ++j) {
            __m512 y = _mm512_mul_ps(_mm512_cvtepi32_ps(sums[FIRST + r][j]), multiplier[j]);
            if constexpr (RESIDUAL) y = _mm512_add_ps(y, to.term(residual + 16 * j, to.mask[j]));
            q[NV >= 3 ? j : r * NV + j] = _mm512_cvtps_epi32(y);
        }
        if constexpr (RESIDUAL) residual += to.residual_stride;
    }
    const __m512i bytes = to.to_bytes.bytes(to.to_bytes.words(q[0], q[1]), to.to_bytes.words(q[2], q[3]));
    store_rows<NV, rows>(out, to.out_stride, _mm512_permutexvar_epi32(to.order, bytes), to.channels);
    if constexpr (FIRST + rows < MR)
        store_from<FIRST + rows>(to, out + rows * to.out_stride, residual, multiplier, sums);
}

// The epilogue of a tile at output pixel `pixel`.
template <int MR, int NV, bool RESIDUAL, bool PLAIN>
[[gnu::always_inline]] inline void store_tile(const Rows<NV, RESIDUAL, PLAIN>& to, int64_t pixel,
                                              const __m512i (&sums)[MR][NV]) {
    __m512 multiplier[NV];
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) multiplier[j] = _mm512_loadu_ps(to.multiplier + 16 * j);
    uint8_t* out = to.out + pixel * to.out_stride;
    const uint8_t* residual = RESIDUAL ? to.residual + pixel * to.residual_stride : nullptr;
    asm("" : "+r"(out), "+r"(residual));  // or gcc keeps a pointer per row, in memory, and adds to each of them
    store_from<0>(to, out, residual, multiplier, sums);
}

}  // namespace
}  // namespace imgopt::avx512

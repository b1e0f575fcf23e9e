// Runs of pixels in AVX2: the hue of eight pixels at a time. Levels are looked up one by one, since no instruction
// shuffles bytes across more than sixteen.
#pragma once

#include <immintrin.h>

#include "passes.h"
#include "vectors.h"

namespace imgopt {
namespace {

struct Lanes256 {
    static constexpr int kCount = 8;
    using Floats = __m256;

    static Floats all(float x) { return _mm256_set1_ps(x); }
    static Floats add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
    static Floats subtract(Floats a, Floats b) { return _mm256_sub_ps(a, b); }
    static Floats multiply(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
    static Floats smaller(Floats a, Floats b) { return _mm256_min_ps(a, b); }
    static Floats larger(Floats a, Floats b) { return _mm256_max_ps(a, b); }
    static Floats magnitude(Floats a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
    static Floats same(Floats a, Floats b) { return _mm256_cmp_ps(a, b, _CMP_EQ_OQ); }
    static Floats choose(Floats mask, Floats yes, Floats no) { return _mm256_blendv_ps(no, yes, mask); }

    static __m256i rounded(Floats x) { return _mm256_cvtps_epi32(x); }

    static void load_planes(const uint8_t* from, int64_t channel, Floats (&rgb)[3]) {
        for (int c = 0; c < 3; ++c) {
            const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from + c * channel));
            rgb[c] = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes));
        }
    }
    static void store_planes(const Floats (&rgb)[3], uint8_t* to, int64_t channel) {
        for (int c = 0; c < 3; ++c) {
            const __m256i levels = rounded(rgb[c]);
            const __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(levels), _mm256_extracti128_si256(levels, 1));
            _mm_storel_epi64(reinterpret_cast<__m128i*>(to + c * channel), _mm_packus_epi16(words, words));
        }
    }
    static void load_planes(const float* from, int64_t channel, Floats (&rgb)[3]) {
        for (int c = 0; c < 3; ++c) rgb[c] = _mm256_loadu_ps(from + c * channel);
    }
    static void store_planes(const Floats (&rgb)[3], float* to, int64_t channel) {
        for (int c = 0; c < 3; ++c) _mm256_storeu_ps(to + c * channel, rgb[c]);
    }

    // 24 bytes in two halves that overlap: four pixels begin at byte 0 of the lower one, at byte 4 of the upper one.
    static void load_pixels(const uint8_t* from, Floats (&rgb)[3]) {
        const __m256i bytes =
            _mm256_loadu2_m128i(reinterpret_cast<const __m128i*>(from + 8), reinterpret_cast<const __m128i*>(from));
        const __m256i red = _mm256_setr_epi32(0x80808000, 0x80808003, 0x80808006, 0x80808009, 0x80808004, 0x80808007,
                                              0x8080800a, 0x8080800d);
        for (int c = 0; c < 3; ++c)
            rgb[c] = _mm256_cvtepi32_ps(_mm256_shuffle_epi8(bytes, _mm256_add_epi32(red, _mm256_set1_epi32(c))));
    }
    static void store_pixels(const Floats (&rgb)[3], uint8_t* to) {
        __m256i packed = _mm256_or_si256(rounded(rgb[0]), _mm256_slli_epi32(rounded(rgb[1]), 8));
        packed = _mm256_or_si256(packed, _mm256_slli_epi32(rounded(rgb[2]), 16));
        const __m256i kept = _mm256_setr_epi8(0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, -1, -1, -1, -1,  //
                                              0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, -1, -1, -1, -1);
        packed = _mm256_shuffle_epi8(packed, kept);
        packed = _mm256_permutevar8x32_epi32(packed, _mm256_setr_epi32(0, 1, 2, 4, 5, 6, 3, 7));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_castsi256_si128(packed));
        _mm_storel_epi64(reinterpret_cast<__m128i*>(to + 16), _mm256_extracti128_si256(packed, 1));
    }

    // 24 floats, four pixels in each half of three registers: x0 y0 z0 x1 | y1 z1 x2 y2 | z2 x3 y3 z3.
    static void load_pixels(const float* from, Floats (&rgb)[3]) {
        const Floats a = _mm256_loadu2_m128(from + 12, from), b = _mm256_loadu2_m128(from + 16, from + 4);
        const Floats c = _mm256_loadu2_m128(from + 20, from + 8);
        const Floats xy = _mm256_shuffle_ps(b, c, _MM_SHUFFLE(2, 1, 3, 2));  // x2 y2 x3 y3
        const Floats yz = _mm256_shuffle_ps(a, b, _MM_SHUFFLE(1, 0, 2, 1));  // y0 z0 y1 z1
        rgb[0] = _mm256_shuffle_ps(a, xy, _MM_SHUFFLE(2, 0, 3, 0));
        rgb[1] = _mm256_shuffle_ps(yz, xy, _MM_SHUFFLE(3, 1, 2, 0));
        rgb[2] = _mm256_shuffle_ps(yz, c, _MM_SHUFFLE(3, 0, 3, 1));
    }
    static void store_pixels(const Floats (&rgb)[3], float* to) {
        const Floats xy = _mm256_shuffle_ps(rgb[0], rgb[1], _MM_SHUFFLE(2, 0, 2, 0));  // x0 x2 y0 y2
        const Floats yz = _mm256_shuffle_ps(rgb[1], rgb[2], _MM_SHUFFLE(3, 1, 3, 1));  // y1 y3 z1 z3
        const Floats zx = _mm256_shuffle_ps(rgb[2], rgb[0], _MM_SHUFFLE(3, 1, 2, 0));  // z0 z2 x1 x3
        _mm256_storeu2_m128(to + 12, to, _mm256_shuffle_ps(xy, zx, _MM_SHUFFLE(2, 0, 2, 0)));
        _mm256_storeu2_m128(to + 16, to + 4, _mm256_shuffle_ps(yz, xy, _MM_SHUFFLE(3, 1, 2, 0)));
        _mm256_storeu2_m128(to + 20, to + 8, _mm256_shuffle_ps(zx, yz, _MM_SHUFFLE(3, 1, 3, 1)));
    }

    static constexpr int kWords = 16;

    static __m256i load(const uint16_t* from) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)); }
    static __m256i words(const uint8_t* from) {
        return _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
    }
    static void add_rows(const uint8_t* up, const uint8_t* middle, const uint8_t* down, uint16_t* sums) {
        const __m256i sum = _mm256_add_epi16(_mm256_add_epi16(words(up), words(middle)), words(down));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(sums), sum);
    }
    static void sharpen(const uint16_t* sums, int64_t step, const uint8_t* at, float weight, uint8_t* to) {
        const __m256i sides = _mm256_add_epi16(load(sums), load(sums + 2 * step));
        const __m256i square = _mm256_add_epi16(sides, load(sums + step)), middle = words(at);
        const __m256i sharp = _mm256_packus_epi32(sharpened(_mm256_unpacklo_epi16(square, middle), weight),
                                                  sharpened(_mm256_unpackhi_epi16(square, middle), weight));
        const __m256i bytes = _mm256_permute4x64_epi64(_mm256_packus_epi16(sharp, sharp), 0x08);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_castsi256_si128(bytes));
    }
    // Of the sum over a square, the lower word of each lane, and its middle, the upper one. Below 0 it saturates later.
    static __m256i sharpened(__m256i pairs, float weight) {
        const Floats excess = _mm256_cvtepi32_ps(_mm256_madd_epi16(pairs, _mm256_set1_epi32(kExcess)));
        const Floats middle = _mm256_cvtepi32_ps(_mm256_srli_epi32(pairs, 16));
        return rounded(smaller(all(255.0f), add(middle, multiply(all(weight), excess))));
    }
};

struct Avx2Runs : PlainRuns {
    template <int kStride, class T>
    static void hue(const T* from, T* to, int64_t channel, int64_t count, const Places& at) {
        turn_run<Lanes256, kStride>(from, to, channel, count, at);
    }

    static void sharpen_stretch(const uint8_t* at, uint8_t* to, int64_t row, int64_t step, int64_t count, float weight,
                                uint16_t* sums) {
        if (count < Lanes256::kWords) return PlainRuns::sharpen_stretch(at, to, row, step, count, weight, sums);
        sharpen_vectors<Lanes256>(at, to, row, step, count, weight, sums);
    }
};

}  // namespace
}  // namespace imgopt

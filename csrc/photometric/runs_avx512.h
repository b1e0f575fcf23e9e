// Runs of pixels in AVX-512. Hue: sixteen pixels at a time, whose channels one shuffle each spreads from their bytes;
// about 45 instructions, so that 64 images of 224 x 224 in the caches take a millisecond. Lookup: a table is four
// registers, of which two two-source byte shuffles read; in interleaved pixels each shuffle writes its channel's bytes.
#pragma once

#include <immintrin.h>

#include "passes.h"
#include "vectors.h"

namespace imgopt {
namespace {

struct Lanes512 {
    static constexpr int kCount = 16;
    using Floats = __m512;
    using Mask = __mmask16;

    static Floats all(float x) { return _mm512_set1_ps(x); }
    static Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
    static Floats subtract(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
    static Floats multiply(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
    static Floats smaller(Floats a, Floats b) { return _mm512_min_ps(a, b); }
    static Floats larger(Floats a, Floats b) { return _mm512_max_ps(a, b); }
    static Floats magnitude(Floats a) { return _mm512_abs_ps(a); }
    static Mask same(Floats a, Floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
    static Floats choose(Mask mask, Floats yes, Floats no) { return _mm512_mask_blend_ps(mask, no, yes); }

    static Floats widened(const uint8_t* from) {
        const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
        return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes));
    }
    static __m512i rounded(Floats x) { return _mm512_cvtps_epi32(x); }

    static void load_planes(const uint8_t* from, int64_t channel, Floats (&rgb)[3]) {
        for (int c = 0; c < 3; ++c) rgb[c] = widened(from + c * channel);
    }
    static void store_planes(const Floats (&rgb)[3], uint8_t* to, int64_t channel) {
        for (int c = 0; c < 3; ++c)
            _mm_storeu_si128(reinterpret_cast<__m128i*>(to + c * channel), _mm512_cvtepi32_epi8(rounded(rgb[c])));
    }
    static void load_planes(const float* from, int64_t channel, Floats (&rgb)[3]) {
        for (int c = 0; c < 3; ++c) rgb[c] = _mm512_loadu_ps(from + c * channel);
    }
    static void store_planes(const Floats (&rgb)[3], float* to, int64_t channel) {
        for (int c = 0; c < 3; ++c) _mm512_storeu_ps(to + c * channel, rgb[c]);
    }

    // The first 48 bytes: byte 3 i + c becomes the lowest of lane i of channel c, the other three are zeroed.
    static void spread(__m512i bytes, Floats (&rgb)[3]) {
        const __m512i red = _mm512_setr_epi32(0, 3, 6, 9, 12, 15, 18, 21, 24, 27, 30, 33, 36, 39, 42, 45);
        for (int c = 0; c < 3; ++c) {
            const __m512i place = _mm512_add_epi32(red, _mm512_set1_epi32(c));
            rgb[c] = _mm512_cvtepi32_ps(_mm512_maskz_permutexvar_epi8(kLowest, place, bytes));
        }
    }
    // Lane i has the bytes of pixel i, and a zero.
    static __m512i packed(const Floats (&rgb)[3]) {
        const __m512i two = _mm512_or_si512(rounded(rgb[0]), _mm512_slli_epi32(rounded(rgb[1]), 8));
        return _mm512_or_si512(two, _mm512_slli_epi32(rounded(rgb[2]), 16));
    }
    static void load_pixels(const uint8_t* from, Floats (&rgb)[3]) {
        spread(_mm512_maskz_loadu_epi8(kPixelBytes, from), rgb);
    }
    static void store_pixels(const Floats (&rgb)[3], uint8_t* to) {
        const __m512i kept = _mm512_set4_epi32(0, 0x0e0d0c0a, 0x09080605, 0x04020100);
        const __m512i pixels = _mm512_shuffle_epi8(packed(rgb), kept);  // twelve bytes a quarter
        _mm512_mask_storeu_epi8(
            to, kPixelBytes,
            _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, 0, 0, 0, 0), pixels));
    }

    // 48 floats: lane i of channel c is float 3 i + c. Numbers from 32 on are taken by the second shuffle.
    static void load_pixels(const float* from, Floats (&rgb)[3]) {
        const Floats a = _mm512_loadu_ps(from), b = _mm512_loadu_ps(from + 16), last = _mm512_loadu_ps(from + 32);
        const __m512i place[3] = {_mm512_setr_epi32(0, 3, 6, 9, 12, 15, 18, 21, 24, 27, 30, 0, 0, 0, 0, 0),
                                  _mm512_setr_epi32(1, 4, 7, 10, 13, 16, 19, 22, 25, 28, 31, 0, 0, 0, 0, 0),
                                  _mm512_setr_epi32(2, 5, 8, 11, 14, 17, 20, 23, 26, 29, 0, 0, 0, 0, 0, 0)};
        const __m512i rest[3] = {_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 17, 20, 23, 26, 29),
                                 _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 18, 21, 24, 27, 30),
                                 _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 19, 22, 25, 28, 31)};
        for (int c = 0; c < 3; ++c)
            rgb[c] = _mm512_permutex2var_ps(_mm512_permutex2var_ps(a, place[c], b), rest[c], last);
    }
    // The 16 floats from 16 k on: red and green first, then blue among them.
    static void store_pixels(const Floats (&rgb)[3], float* to) {
        const __m512i place[3] = {_mm512_setr_epi32(0, 16, 0, 1, 17, 0, 2, 18, 0, 3, 19, 0, 4, 20, 0, 5),
                                  _mm512_setr_epi32(21, 0, 6, 22, 0, 7, 23, 0, 8, 24, 0, 9, 25, 0, 10, 26),
                                  _mm512_setr_epi32(0, 11, 27, 0, 12, 28, 0, 13, 29, 0, 14, 30, 0, 15, 31, 0)};
        const __m512i rest[3] = {_mm512_setr_epi32(0, 1, 16, 3, 4, 17, 6, 7, 18, 9, 10, 19, 12, 13, 20, 15),
                                 _mm512_setr_epi32(0, 21, 2, 3, 22, 5, 6, 23, 8, 9, 24, 11, 12, 25, 14, 15),
                                 _mm512_setr_epi32(26, 1, 2, 27, 4, 5, 28, 7, 8, 29, 10, 11, 30, 13, 14, 31)};
        for (int k = 0; k < 3; ++k)
            _mm512_storeu_ps(to + 16 * k,
                             _mm512_permutex2var_ps(_mm512_permutex2var_ps(rgb[0], place[k], rgb[1]), rest[k], rgb[2]));
    }

    static constexpr int kWords = 32;

    static __m512i words(const uint8_t* from) {
        return _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
    }
    static void add_rows(const uint8_t* up, const uint8_t* middle, const uint8_t* down, uint16_t* sums) {
        _mm512_storeu_si512(sums, _mm512_add_epi16(_mm512_add_epi16(words(up), words(middle)), words(down)));
    }
    static void sharpen(const uint16_t* sums, int64_t step, const uint8_t* at, float weight, uint8_t* to) {
        const __m512i sides = _mm512_add_epi16(_mm512_loadu_si512(sums), _mm512_loadu_si512(sums + 2 * step));
        const __m512i square = _mm512_add_epi16(sides, _mm512_loadu_si512(sums + step)), middle = words(at);
        const __m512i sharp = _mm512_packus_epi32(sharpened(_mm512_unpacklo_epi16(square, middle), weight),
                                                  sharpened(_mm512_unpackhi_epi16(square, middle), weight));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi16_epi8(sharp));
    }
    // Of the sum over a square, the lower word of each lane, and its middle, the upper one. Below 0 it saturates later.
    static __m512i sharpened(__m512i pairs, float weight) {
        const Floats excess = _mm512_cvtepi32_ps(_mm512_madd_epi16(pairs, _mm512_set1_epi32(kExcess)));
        const Floats middle = _mm512_cvtepi32_ps(_mm512_srli_epi32(pairs, 16));
        return rounded(smaller(all(255.0f), add(middle, multiply(all(weight), excess))));
    }

    static constexpr __mmask64 kPixelBytes = (uint64_t{1} << 48) - 1;
    static constexpr __mmask64 kLowest = 0x1111111111111111;
};

struct Table {
    __m512i part[4];

    explicit Table(const uint8_t* from) {
        for (int i = 0; i < 4; ++i) part[i] = _mm512_loadu_si512(from + 64 * i);
    }
    __m512i of(__m512i index) const {
        const __m512i low = _mm512_permutex2var_epi8(part[0], index, part[1]);
        const __m512i high = _mm512_permutex2var_epi8(part[2], index, part[3]);
        return _mm512_mask_blend_epi8(_mm512_movepi8_mask(index), low, high);
    }
};

struct Joined {
    uint8_t place[3][64];
};
// Byte i of vector k of the result is that of channel j % 3 of pixel j / 3, j = 64 k + i; 16 pixels a source.
constexpr Joined joined() {
    Joined result{};
    for (int k = 0; k < 3; ++k)
        for (int i = 0; i < 64; ++i) {
            const int pixel = (64 * k + i) / 3 - 16 * k, c = (64 * k + i) % 3;
            result.place[k][i] = static_cast<uint8_t>(4 * pixel + c);
        }
    return result;
}
alignas(64) constexpr Joined kJoined = joined();

struct Avx512Runs : PlainRuns {
    template <int kStride, class T>
    static void hue(const T* from, T* to, int64_t channel, int64_t count, const Places& at) {
        int64_t done = 0;
        if constexpr (kStride == 3 && sizeof(T) == 1)
            for (; done + 64 <= count; done += 64) turn_block(from + 3 * done, to + 3 * done, at);
        turn_run<Lanes512, kStride>(from + done * kStride, to + done * kStride, channel, count - done, at);
    }

    // 64 pixels, 192 bytes: whole vectors are stored.
    static void turn_block(const uint8_t* from, uint8_t* to, const Places& at) {
        __m512i packed[4];
        for (int k = 0; k < 4; ++k) {
            const __m512i bytes = k < 3 ? _mm512_loadu_si512(from + 48 * k) : _mm512_loadu_si512(from + 128);
            Lanes512::Floats rgb[3];
            Lanes512::spread(k < 3 ? bytes : _mm512_alignr_epi32(bytes, bytes, 4), rgb);
            turn_lanes<Lanes512>(rgb, at);
            packed[k] = Lanes512::packed(rgb);
        }
        for (int k = 0; k < 3; ++k)
            _mm512_storeu_si512(
                to + 64 * k, _mm512_permutex2var_epi8(packed[k], _mm512_load_si512(kJoined.place[k]), packed[k + 1]));
    }

    static void sharpen_stretch(const uint8_t* at, uint8_t* to, int64_t row, int64_t step, int64_t count, float weight,
                                uint16_t* sums) {
        if (count < Lanes512::kWords) return PlainRuns::sharpen_stretch(at, to, row, step, count, weight, sums);
        sharpen_vectors<Lanes512>(at, to, row, step, count, weight, sums);
    }

    static void lookup(const uint8_t* from, uint8_t* to, int64_t count, const uint8_t* table) {
        const Table levels(table);
        int64_t i = 0;
        for (; i + 64 <= count; i += 64) _mm512_storeu_si512(to + i, levels.of(_mm512_loadu_si512(from + i)));
        if (i == count) return;
        const __mmask64 there = (uint64_t{1} << (count - i)) - 1;
        _mm512_mask_storeu_epi8(to + i, there, levels.of(_mm512_maskz_loadu_epi8(there, from + i)));
    }

    static void lookup_interleaved(const uint8_t* from, uint8_t* to, int64_t count, int64_t channels,
                                   const uint8_t* tables) {
        if (channels != 3) return PlainRuns::lookup_interleaved(from, to, count, channels, tables);
        const Table levels[3] = {Table(tables), Table(tables + 256), Table(tables + 512)};
        const int64_t blocks = count / 64;
        for (int64_t block = 0; block < blocks; ++block, from += 192, to += 192)
            for (int k = 0; k < 3; ++k)
                _mm512_storeu_si512(to + 64 * k, found(_mm512_loadu_si512(from + 64 * k), k, levels));
        PlainRuns::lookup_interleaved(from, to, count % 64, channels, tables);
    }

    // Vector k of 64 pixels looked up: its byte i belongs to channel (i + 64 k) % 3 = (i + k) % 3.
    static __m512i found(__m512i index, int k, const Table (&levels)[3]) {
        constexpr __mmask64 kThird = 0x9249249249249249;  // bits 0, 3, 6, ...
        constexpr __mmask64 kOf[3] = {kThird, kThird << 1, kThird << 2};
        const __mmask64 high = _mm512_movepi8_mask(index);
        __m512i result = index;
        for (int c = 0; c < 3; ++c) {
            const __mmask64 own = kOf[(c + 3 - k) % 3];
            const __m512i* part = levels[c].part;
            result = _mm512_mask2_permutex2var_epi8(part[0], result, own & ~high, part[1]);
            result = _mm512_mask2_permutex2var_epi8(part[2], result, own & high, part[3]);
        }
        return result;
    }
};

}  // namespace
}  // namespace imgopt

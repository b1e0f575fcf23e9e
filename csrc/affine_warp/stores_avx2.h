// The end of the AVX2 warp: samples of eight pixels, one register per channel, as levels or normalised values in either
// layout. No value is NaN (windowed.h sends what could become one to the portable kernel).
#pragma once

#include <immintrin.h>

#include "lanes_avx2.h"
#include "windowed.h"

namespace imgopt::avx2 {
namespace {

IMGOPT_INLINE __m128i bytes_at(const uint8_t* from) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from)); }
IMGOPT_INLINE void put_bytes(void* to, __m128i v) { _mm_storeu_si128(reinterpret_cast<__m128i*>(to), v); }

// Eight elements of a plane to consecutive places, or the first of them.
IMGOPT_INLINE void put_plane(float* to, __m256 v, int count) {
    if (count == kLanes) return _mm256_storeu_ps(to, v);
    alignas(32) float plane[kLanes];
    _mm256_store_ps(plane, v);
    for (int i = 0; i < count; ++i) to[i] = plane[i];
}
template <class T>
IMGOPT_INLINE void put_plane(T* to, __m128i v, int count) {
    if (count == kLanes) {
        if constexpr (sizeof(T) == 1)
            _mm_storel_epi64(reinterpret_cast<__m128i*>(to), v);
        else
            put_bytes(to, v);
        return;
    }
    alignas(16) T plane[16 / sizeof(T)];
    put_bytes(plane, v);
    for (int i = 0; i < count; ++i) to[i] = plane[i];
}

// Four pixels side by side, and four more.
template <int C>
IMGOPT_INLINE void put_pixels(uint8_t* to, const Target& at, __m128i first, __m128i second) {
    if (at.room * C >= 4 * C + 16) {
        put_bytes(to, first);
        put_bytes(to + 4 * C, second);
        return;
    }
    alignas(16) uint8_t pixels[32];
    put_bytes(pixels, first);
    put_bytes(pixels + 4 * C, second);
    __builtin_memcpy(to, pixels, static_cast<size_t>(at.count) * C);
}

template <int C, Values values>
IMGOPT_INLINE void store(uint8_t* to, const Target& at, const Epilogue<C>& e, const __m256* v) {
    __m256i level[4];
    for (int c = 0; c < 4; ++c) {
        const __m256 sample = v[c < C ? c : 0];
        level[c] =
            _mm256_cvtps_epi32(values == Values::colored ? sample : _mm256_mul_ps(sample, _mm256_set1_ps(e.levels)));
    }
    // Bytes c of pixels 0 .. 3 in dword c of the lower lane, those of pixels 4 .. 7 in the upper one.
    const __m256i packed =
        _mm256_packus_epi16(_mm256_packus_epi32(level[0], level[1]), _mm256_packus_epi32(level[2], level[3]));
    const __m128i low = _mm256_castsi256_si128(packed), high = _mm256_extracti128_si256(packed, 1);
    if (C == 1 || at.planar) {
        const __m128i planes[2] = {_mm_unpacklo_epi32(low, high), _mm_unpackhi_epi32(low, high)};
        for (int c = 0; c < C; ++c)
            put_plane(to + c * at.channel, c % 2 ? _mm_srli_si128(planes[c / 2], 8) : planes[c / 2], at.count);
        return;
    }
    const __m128i order = C == 4 ? _mm_set_epi8(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0)
                                 : _mm_set_epi8(-1, -1, -1, -1, 11, 7, 3, 10, 6, 2, 9, 5, 1, 8, 4, 0);
    put_pixels<C>(to, at, _mm_shuffle_epi8(low, order), _mm_shuffle_epi8(high, order));
}

// Pixels as they are, one per dword.
template <int C>
IMGOPT_INLINE void store_dwords(uint8_t* to, const Target& at, __m256i dwords) {
    const __m128i order = C == 4 ? _mm_set_epi8(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0)
                                 : _mm_set_epi8(-1, -1, -1, -1, 14, 13, 12, 10, 9, 8, 6, 5, 4, 2, 1, 0);
    put_pixels<C>(to, at, _mm_shuffle_epi8(_mm256_castsi256_si128(dwords), order),
                  _mm_shuffle_epi8(_mm256_extracti128_si256(dwords, 1), order));
}

IMGOPT_INLINE __m256 narrowed(__m256 v, const float*) { return v; }
IMGOPT_INLINE __m128i narrowed(__m256 v, const Half*) {
    return _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
IMGOPT_INLINE __m128i narrowed(__m256 v, const BFloat16*) {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
    const __m256i words = _mm256_srli_epi32(rounded, 16);
    return _mm256_castsi256_si128(_mm256_permute4x64_epi64(_mm256_packus_epi32(words, words), 0x08));
}

template <int C, Values values, class T>
IMGOPT_INLINE void store(T* to, const Target& at, const Epilogue<C>& e, const __m256* v) {
    __m256 value[C];
    for (int c = 0; c < C; ++c)
        value[c] = values == Values::colored
                       ? v[c]
                       : _mm256_fmadd_ps(v[c], _mm256_set1_ps(e.factor[c]), _mm256_set1_ps(e.add[c]));
    if (C == 1 || at.planar) {
        for (int c = 0; c < C; ++c) put_plane(to + c * at.channel, narrowed(value[c], to), at.count);
        return;
    }
    alignas(32) T planes[C][kLanes];
    for (int c = 0; c < C; ++c) put_plane(planes[c], narrowed(value[c], to), kLanes);
    for (int i = 0; i < at.count; ++i)
        for (int c = 0; c < C; ++c) to[i * C + c] = planes[c][i];
}

}  // namespace
}  // namespace imgopt::avx2

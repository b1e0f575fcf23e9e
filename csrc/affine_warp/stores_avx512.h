// The end of the AVX-512 warp: samples of 16 pixels, one register per channel, as levels or normalised values in either
// layout. No value is NaN (windowed.h sends what could become one to the portable kernel).
#pragma once

#include <immintrin.h>

#include "windowed.h"

namespace imgopt::avx512 {
namespace {

constexpr int kLanes = 16;

IMGOPT_INLINE __mmask16 lanes_below(int count) {
    return static_cast<__mmask16>(count >= kLanes ? 0xffff : count <= 0 ? 0 : (1u << count) - 1);
}

// vperm indices that interleave planes: element e of the output is channel e % C of pixel e / C. Channels 0 and 1 come
// by `pair`, the others one by one where their mask is set.
template <int C>
struct InterleaveIndices {
    alignas(64) int32_t pair[C][kLanes];
    uint16_t third[C], fourth[C];
    alignas(64) int16_t words[2][32];  // of 16-bit elements: channels 0, 1 in the first source, 2, 3 in the second
    alignas(64) uint8_t bytes[2][64];  // of the lowest bytes of dwords: channels 0 and 1, then each of the others
    uint64_t third_bytes, fourth_bytes;

    constexpr InterleaveIndices() : pair{}, third{}, fourth{}, words{}, bytes{}, third_bytes(0), fourth_bytes(0) {
        for (int e = 0; e < C * kLanes; ++e) {
            const int pixel = e / C, c = e % C, out = e / kLanes, lane = e % kLanes;
            pair[out][lane] = pixel + (c == 1 ? kLanes : 0);
            if (c == 2) third[out] = static_cast<uint16_t>(third[out] | 1 << lane);
            if (c == 3) fourth[out] = static_cast<uint16_t>(fourth[out] | 1 << lane);
            words[e / 32][e % 32] = static_cast<int16_t>(pixel + 16 * c);
            bytes[0][e] = static_cast<uint8_t>(4 * pixel + (c == 1 ? 64 : 0));
            bytes[1][e] = static_cast<uint8_t>(4 * pixel);
            if (c == 2) third_bytes |= uint64_t{1} << e;
            if (c == 3) fourth_bytes |= uint64_t{1} << e;
        }
    }
};

// Adding 1.5 · 2^23 rounds half to even and leaves the level in the lowest byte.
template <bool saturated>
IMGOPT_INLINE __m512i levels(__m512 v, float factor) {
    __m512 level = _mm512_mul_ps(v, _mm512_set1_ps(factor));
    if constexpr (saturated) level = _mm512_min_ps(_mm512_max_ps(level, _mm512_setzero_ps()), _mm512_set1_ps(255));
    return _mm512_castps_si512(_mm512_add_ps(level, _mm512_set1_ps(12582912.0f)));
}

// Sixteen pixels side by side.
template <int C>
IMGOPT_INLINE void put_pixels(uint8_t* to, const Target& at, __m512i pixels) {
    // Whole vectors avoid the mask: a masked byte store costs as much as the sampling.
    if (at.room * C >= 64) {
        _mm512_storeu_si512(to, pixels);
    } else if (at.count < kLanes || C == 4) {
        _mm512_mask_storeu_epi8(to, at.count * C < 64 ? (1ull << at.count * C) - 1 : ~0ull, pixels);
    } else {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_castsi512_si256(pixels));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 32), _mm512_extracti32x4_epi32(pixels, 2));
    }
}

template <int C, bool overshoots>
IMGOPT_INLINE void store(uint8_t* to, const Target& at, const Epilogue<C>& e, const __m512* v) {
    static constexpr InterleaveIndices<C> kIndices;
    __m512i level[C];
    for (int c = 0; c < C; ++c) level[c] = levels<overshoots>(v[c], e.levels);
    if (C == 1 || at.planar) {
        for (int c = 0; c < C; ++c) {
            const __m128i bytes = _mm512_cvtepi32_epi8(level[c]);
            if (at.count == kLanes)
                _mm_storeu_si128(reinterpret_cast<__m128i*>(to + c * at.channel), bytes);
            else
                _mm_mask_storeu_epi8(to + c * at.channel, lanes_below(at.count), bytes);
        }
        return;
    }
    const __m512i each = _mm512_load_si512(kIndices.bytes[1]);
    __m512i pixels = _mm512_permutex2var_epi8(level[0], _mm512_load_si512(kIndices.bytes[0]), level[C > 1]);
    if constexpr (C > 2) pixels = _mm512_mask_permutexvar_epi8(pixels, kIndices.third_bytes, each, level[2]);
    if constexpr (C > 3) pixels = _mm512_mask_permutexvar_epi8(pixels, kIndices.fourth_bytes, each, level[3]);
    put_pixels<C>(to, at, pixels);
}

// Pixels as they are, one per dword.
template <int C>
IMGOPT_INLINE void store_dwords(uint8_t* to, const Target& at, __m512i dwords) {
    struct Indices {
        alignas(64) uint8_t byte[64];

        constexpr Indices() : byte{} {
            for (int e = 0; e < 16 * C; ++e) byte[e] = static_cast<uint8_t>(e / C * 4 + e % C);
        }
    };
    static constexpr Indices kIndices;
    put_pixels<C>(to, at, C == 4 ? dwords : _mm512_permutexvar_epi8(_mm512_load_si512(kIndices.byte), dwords));
}

template <int C>
IMGOPT_INLINE void normalize(const Epilogue<C>& e, const __m512* v, __m512* to) {
    for (int c = 0; c < C; ++c) to[c] = _mm512_fmadd_ps(v[c], _mm512_set1_ps(e.factor[c]), _mm512_set1_ps(e.add[c]));
}

template <int C, bool overshoots>
IMGOPT_INLINE void store(float* to, const Target& at, const Epilogue<C>& e, const __m512* v) {
    static constexpr InterleaveIndices<C> kIndices;
    __m512 out[C];
    normalize(e, v, out);
    if (C == 1 || at.planar) {
        for (int c = 0; c < C; ++c)
            if (at.count == kLanes)
                _mm512_storeu_ps(to + c * at.channel, out[c]);
            else
                _mm512_mask_storeu_ps(to + c * at.channel, lanes_below(at.count), out[c]);
        return;
    }
    for (int i = 0; i < C; ++i) {
        const __m512i index = _mm512_load_si512(kIndices.pair[i]);
        __m512 pixels = _mm512_permutex2var_ps(out[0], index, out[C > 1]);
        if constexpr (C > 2) pixels = _mm512_mask_permutexvar_ps(pixels, kIndices.third[i], index, out[2]);
        if constexpr (C > 3) pixels = _mm512_mask_permutexvar_ps(pixels, kIndices.fourth[i], index, out[3]);
        if (at.count == kLanes)
            _mm512_storeu_ps(to + i * kLanes, pixels);
        else
            _mm512_mask_storeu_ps(to + i * kLanes, lanes_below(at.count * C - i * kLanes), pixels);
    }
}

IMGOPT_INLINE __m256i narrowed(__m512 v, const Half*) {
    return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
// Half to even: 0x7fff is added to an even upper half, 0x8000 to an odd one.
IMGOPT_INLINE __m256i narrowed(__m512 v, const BFloat16*) {
    const __m512i bits = _mm512_castps_si512(v);
    const __mmask16 odd = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(0x10000));
    const __m512i even = _mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff));
    const __m512i rounded = _mm512_mask_add_epi32(even, odd, bits, _mm512_set1_epi32(0x8000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
}

template <int C, bool overshoots, class T>
IMGOPT_INLINE void store(T* to, const Target& at, const Epilogue<C>& e, const __m512* v) {
    static_assert(sizeof(T) == 2);
    static constexpr InterleaveIndices<C> kIndices;
    __m512 wide[C];
    normalize(e, v, wide);
    __m256i out[4];
    for (int c = 0; c < 4; ++c) out[c] = narrowed(wide[c < C ? c : 0], to);
    if (C == 1 || at.planar) {
        for (int c = 0; c < C; ++c)
            if (at.count == kLanes)
                _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + c * at.channel), out[c]);
            else
                _mm256_mask_storeu_epi16(to + c * at.channel, lanes_below(at.count), out[c]);
        return;
    }
    const __m512i low = _mm512_inserti64x4(_mm512_castsi256_si512(out[0]), out[1], 1);
    const __m512i high = _mm512_inserti64x4(_mm512_castsi256_si512(out[2]), out[3], 1);
    const auto below = [&](int first) {
        const int n = at.count * C - first;
        return n >= 32 ? ~0u : n <= 0 ? 0u : (1u << n) - 1;
    };
    for (int i = 0; i < (C + 1) / 2; ++i)
        _mm512_mask_storeu_epi16(to + 32 * i, below(32 * i),
                                 _mm512_permutex2var_epi16(low, _mm512_load_si512(kIndices.words[i]), high));
}

}  // namespace
}  // namespace imgopt::avx512

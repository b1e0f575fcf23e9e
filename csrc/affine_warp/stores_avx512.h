// The end of the AVX-512 warp: samples of 16 pixels, one register per channel, as levels or normalised values in either
// layout. No value is NaN (windowed.h sends what could become one to the portable kernel).
#pragma once

#include <immintrin.h>

#include "lanes_avx512.h"
#include "windowed.h"

namespace imgopt::avx512 {
namespace {

IMGOPT_INLINE __mmask16 lanes_below(int count) {
    return static_cast<__mmask16>(count >= kLanes ? 0xffff : count <= 0 ? 0 : (1u << count) - 1);
}

// Where sixteen pixels go: eight to each place, one after the other in a row, or in two rows.
template <class T>
struct Places {
    T* to[2];
    int count[2];  // pixels to write, at most eight
    int64_t room;  // pixels that may be written from each place on, as later ones will be written over
};

// vperm indices that interleave planes: element e of the output is channel e % C of pixel e / C. Channels 0 and 1 come
// by `pair`, the others one by one where their mask is set. Bytes: each place's in a half of the register.
template <int C>
struct InterleaveIndices {
    alignas(64) int32_t pair[C][kLanes];
    uint16_t third[C], fourth[C];
    alignas(64) int16_t words[2][32];  // of 16-bit elements: channels 0, 1 in the first source, 2, 3 in the second
    alignas(64) uint8_t bytes[C][64];  // of the lowest bytes of dwords: channels 0 and 1, then these and one more

    constexpr InterleaveIndices() : pair{}, third{}, fourth{}, words{}, bytes{} {
        for (int e = 0; e < C * kLanes; ++e) {
            const int pixel = e / C, c = e % C, out = e / kLanes, lane = e % kLanes;
            pair[out][lane] = pixel + (c == 1 ? kLanes : 0);
            if (c == 2) third[out] = static_cast<uint16_t>(third[out] | 1 << lane);
            if (c == 3) fourth[out] = static_cast<uint16_t>(fourth[out] | 1 << lane);
            words[e / 32][e % 32] = static_cast<int16_t>(pixel + 16 * c);
            const int byte = pixel / 8 * 32 + e % (8 * C);
            for (int channel = 0; channel < C; ++channel)
                bytes[channel][byte] = static_cast<uint8_t>(c == channel  ? 64 + 4 * pixel
                                                            : channel < 2 ? 4 * pixel
                                                                          : byte);
        }
    }
};

// Adding 1.5 · 2^23 rounds half to even and leaves the level in the lowest byte.
template <Values values>
IMGOPT_INLINE __m512i levels(__m512 v, float factor) {
    __m512 level = values == Values::colored ? v : _mm512_mul_ps(v, _mm512_set1_ps(factor));
    if constexpr (values == Values::overshooting)
        level = _mm512_min_ps(_mm512_max_ps(level, _mm512_setzero_ps()), _mm512_set1_ps(255));
    return _mm512_castps_si512(_mm512_add_ps(level, _mm512_set1_ps(12582912.0f)));
}

// Eight elements of a plane, or the first of them.
IMGOPT_INLINE void put_eight(uint8_t* to, __m128i v, int count) {
    if (count == 8)
        _mm_storel_epi64(reinterpret_cast<__m128i*>(to), v);
    else
        _mm_mask_storeu_epi8(to, lanes_below(count), v);
}
template <class T>
IMGOPT_INLINE void put_eight(T* to, __m128i v, int count) {
    static_assert(sizeof(T) == 2);
    if (count == 8)
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to), v);
    else
        _mm_mask_storeu_epi16(to, static_cast<__mmask8>(lanes_below(count)), v);
}
IMGOPT_INLINE void put_eight(float* to, __m256 v, int count) {
    if (count == 8)
        _mm256_storeu_ps(to, v);
    else
        _mm256_mask_storeu_ps(to, static_cast<__mmask8>(lanes_below(count)), v);
}

// Pixels side by side: each place's in a half. Whole vectors avoid the mask: a masked byte store costs as much as the
// sampling.
template <int C>
IMGOPT_INLINE void put_pixels(const Places<uint8_t>& at, __m512i pixels) {
    const __m256i half[2] = {_mm512_castsi512_si256(pixels), _mm512_extracti64x4_epi64(pixels, 1)};
    for (int i = 0; i < 2; ++i) {
        if (at.count[i] < 8) {
            _mm256_mask_storeu_epi8(at.to[i], static_cast<__mmask32>((1ull << at.count[i] * C) - 1), half[i]);
        } else if (C == 4 || at.room * C >= 32) {
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(at.to[i]), half[i]);
        } else {
            _mm_storeu_si128(reinterpret_cast<__m128i*>(at.to[i]), _mm256_castsi256_si128(half[i]));
            _mm_storel_epi64(reinterpret_cast<__m128i*>(at.to[i] + 16), _mm256_extracti128_si256(half[i], 1));
        }
    }
}

template <int C, Values values>
IMGOPT_INLINE void store(const Places<uint8_t>& at, const Target& target, const Epilogue<C>& e, const __m512* v) {
    static constexpr InterleaveIndices<C> kIndices;
    __m512i level[C];
    for (int c = 0; c < C; ++c) level[c] = levels<values>(v[c], e.levels);
    if (C == 1 || target.planar) {
        for (int c = 0; c < C; ++c) {
            const __m128i bytes = _mm512_cvtepi32_epi8(level[c]);
            put_eight(at.to[0] + c * target.channel, bytes, at.count[0]);
            put_eight(at.to[1] + c * target.channel, _mm_unpackhi_epi64(bytes, bytes), at.count[1]);
        }
        return;
    }
    __m512i pixels = level[0];
    for (int c = 1; c < C; ++c)
        pixels = _mm512_permutex2var_epi8(pixels, _mm512_load_si512(kIndices.bytes[c]), level[c]);
    put_pixels<C>(at, pixels);
}

// Pixels as they are, one per dword.
template <int C>
IMGOPT_INLINE void store_dwords(const Places<uint8_t>& at, __m512i dwords) {
    struct Indices {
        alignas(64) uint8_t byte[64];

        constexpr Indices() : byte{} {
            for (int e = 0; e < 16 * C; ++e)
                byte[e / (8 * C) * 32 + e % (8 * C)] = static_cast<uint8_t>(e / C * 4 + e % C);
        }
    };
    static constexpr Indices kIndices;
    put_pixels<C>(at, C == 4 ? dwords : _mm512_permutexvar_epi8(_mm512_load_si512(kIndices.byte), dwords));
}

template <int C, Values values>
IMGOPT_INLINE void normalize(const Epilogue<C>& e, const __m512* v, __m512* to) {
    for (int c = 0; c < C; ++c)
        to[c] = values == Values::colored
                    ? v[c]
                    : _mm512_fmadd_ps(v[c], _mm512_set1_ps(e.factor[c]), _mm512_set1_ps(e.add[c]));
}

// Elements [8 piece, 8 piece + 8) of sixteen pixels side by side.
template <int C, class T, class V>
IMGOPT_INLINE void put_piece(const Places<T>& at, int piece, V v) {
    const int half = piece / C, first = 8 * (piece % C), rest = at.count[half] * C - first;
    put_eight(at.to[half] + first, v, rest > 8 ? 8 : rest);
}

template <int C, Values values>
IMGOPT_INLINE void store(const Places<float>& at, const Target& target, const Epilogue<C>& e, const __m512* v) {
    static constexpr InterleaveIndices<C> kIndices;
    __m512 out[C];
    normalize<C, values>(e, v, out);
    if (C == 1 || target.planar) {
        for (int c = 0; c < C; ++c) {
            put_eight(at.to[0] + c * target.channel, _mm512_castps512_ps256(out[c]), at.count[0]);
            put_eight(at.to[1] + c * target.channel, _mm512_extractf32x8_ps(out[c], 1), at.count[1]);
        }
        return;
    }
    for (int i = 0; i < C; ++i) {
        const __m512i index = _mm512_load_si512(kIndices.pair[i]);
        __m512 pixels = _mm512_permutex2var_ps(out[0], index, out[C > 1]);
        if constexpr (C > 2) pixels = _mm512_mask_permutexvar_ps(pixels, kIndices.third[i], index, out[2]);
        if constexpr (C > 3) pixels = _mm512_mask_permutexvar_ps(pixels, kIndices.fourth[i], index, out[3]);
        put_piece<C>(at, 2 * i, _mm512_castps512_ps256(pixels));
        put_piece<C>(at, 2 * i + 1, _mm512_extractf32x8_ps(pixels, 1));
    }
}

IMGOPT_INLINE __m256i narrowed(__m512 v, const Half*) {
    return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
// Half to even: 0x7fff is added to an even upper half, 0x8000 to an odd one. A word is that half's last bit, the other
// one 1, and a dot product with 1 and 0x7fff adds both in one instruction.
IMGOPT_INLINE __m256i narrowed(__m512 v, const BFloat16*) {
    struct Upper {
        alignas(64) int16_t index[32];

        constexpr Upper() : index{} {
            for (int i = 0; i < 32; ++i) index[i] = static_cast<int16_t>((2 * i + 1) % 32);
        }
    };
    static constexpr Upper kUpper;
    constexpr int kAndOr = 0xea;  // (a & b) | c
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i last = _mm512_ternarylogic_epi32(bits, _mm512_set1_epi32(0x10000), _mm512_set1_epi32(1), kAndOr);
    const __m512i rounded = _mm512_dpwssd_epi32(bits, last, _mm512_set1_epi32(0x17fff));
    return _mm512_castsi512_si256(_mm512_permutexvar_epi16(_mm512_load_si512(kUpper.index), rounded));
}

template <int C, Values values, class T>
IMGOPT_INLINE void store(const Places<T>& at, const Target& target, const Epilogue<C>& e, const __m512* v) {
    static constexpr InterleaveIndices<C> kIndices;
    __m512 wide[C];
    normalize<C, values>(e, v, wide);
    __m256i out[4];
    for (int c = 0; c < 4; ++c) out[c] = narrowed(wide[c < C ? c : 0], static_cast<const T*>(nullptr));
    if (C == 1 || target.planar) {
        for (int c = 0; c < C; ++c) {
            put_eight(at.to[0] + c * target.channel, _mm256_castsi256_si128(out[c]), at.count[0]);
            put_eight(at.to[1] + c * target.channel, _mm256_extracti128_si256(out[c], 1), at.count[1]);
        }
        return;
    }
    const __m512i low = _mm512_inserti64x4(_mm512_castsi256_si512(out[0]), out[1], 1);
    const __m512i high = _mm512_inserti64x4(_mm512_castsi256_si512(out[2]), out[3], 1);
    for (int i = 0; i < (C + 1) / 2; ++i) {
        const __m512i words = _mm512_permutex2var_epi16(low, _mm512_load_si512(kIndices.words[i]), high);
        const __m256i half[2] = {_mm512_castsi512_si256(words), _mm512_extracti64x4_epi64(words, 1)};
        for (int k = 0; k < 2 && 4 * i + 2 * k < 2 * C; ++k) {
            put_piece<C>(at, 4 * i + 2 * k, _mm256_castsi256_si128(half[k]));
            put_piece<C>(at, 4 * i + 2 * k + 1, _mm256_extracti128_si256(half[k], 1));
        }
    }
}

}  // namespace
}  // namespace imgopt::avx512

// affine_warp for AVX-512 with VBMI and VNNI. Thirty-two pixels at a time: coordinates in float32, weights in 16-bit
// words, one 16-byte load per pixel from the window (window.h), byte permutations that bring each channel's four taps
// together, and two vpdpbusd per channel and 16 pixels, one for the high and one for the low byte of the 15-bit
// weights. Sixteen bilinear RGB pixels take about 60 vector instructions besides their loads.
#include <immintrin.h>

#include "backward.h"
#include "windowed.h"

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC PR 105593: its own unmasked intrinsics
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#include "stores_avx512.h"

namespace imgopt::avx512 {
namespace {

// Bilinear weights are the unsigned operand of vpdpbusd, so pixels are signed: the window holds them less 128, and an
// accumulator that starts at half the weights' sum adds 128 times the sum when it is shifted by eight bits.
constexpr uint8_t kFlip = 0x80;
constexpr int kStart = kWeightSum / 2;

// --- packing -------------------------------------------------------------------------------------------------------

// vpermi2b indices that interleave 16 pixels of two rows into positions. A register holds 16 C bytes of one row: pixel
// by pixel, or plane by plane (16 bytes each).
template <int C, int taps, bool planar>
struct PackIndices {
    alignas(64) uint8_t index[2][64];

    constexpr PackIndices() : index{} {
        constexpr int bytes = position_bytes(C, taps);
        for (int i = 0; i < 128; ++i) {
            const int pixel = i / bytes % kLanes, byte = i % bytes, row = byte / C, c = byte % C;
            index[i / 64][i % 64] = static_cast<uint8_t>((row & 1) * 64 + (planar ? c * 16 + pixel : pixel * C + c));
        }
    }
};

// 16 pixels, of which `count` may be read; what lies behind the last one is not used.
template <int C>
IMGOPT_INLINE __m512i load_pixels(const Source<uint8_t>& source, const uint8_t* from, bool planar, int32_t count) {
    if (!planar) {
        if (count * C >= 64) return _mm512_loadu_si512(from);
        return _mm512_maskz_loadu_epi8((1ull << count * C) - 1, from);
    }
    const auto plane = [&](int c) {
        const uint8_t* at = from + c * source.channel;
        return count >= kLanes ? _mm_loadu_si128(reinterpret_cast<const __m128i*>(at))
                               : _mm_maskz_loadu_epi8(static_cast<__mmask16>((1u << count) - 1), at);
    };
    __m512i pixels = _mm512_castsi128_si512(plane(0));
    if constexpr (C > 1) {
        pixels = _mm512_inserti32x4(pixels, plane(1), 1);
        pixels = _mm512_inserti32x4(pixels, plane(2), 2);
        if constexpr (C > 3) pixels = _mm512_inserti32x4(pixels, plane(3), 3);
    }
    return pixels;
}

template <int C, int taps, bool planar>
void pack_pixels(const Source<uint8_t>& source, const uint8_t* first, const uint8_t* second, int32_t count,
                 uint8_t* to) {
    static constexpr PackIndices<C, taps, planar> kIndices;
    constexpr int bytes = position_bytes(C, taps) * kLanes;
    const __m512i flip = _mm512_set1_epi8(static_cast<char>(taps == 2 ? kFlip : 0));
    const __m512i low = _mm512_load_si512(kIndices.index[0]), high = _mm512_load_si512(kIndices.index[1]);
    for (int32_t i = 0; i < count; i += kLanes, to += bytes) {
        const int32_t n = count - i;
        const int64_t at = int64_t{i} * (planar ? 1 : C);
        __m512i a = load_pixels<C>(source, first + at, planar, n), b = a;
        if constexpr (taps == 2) {
            b = _mm512_xor_si512(load_pixels<C>(source, second + at, planar, n), flip);
            a = _mm512_xor_si512(a, flip);
        }
        if constexpr (bytes == 16) {
            _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_castsi512_si128(a));
        } else if constexpr (bytes == 32) {
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                                _mm512_castsi512_si256(_mm512_permutex2var_epi8(a, low, b)));
        } else {
            _mm512_storeu_si512(to, _mm512_permutex2var_epi8(a, low, b));
            if constexpr (bytes == 96)
                _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 64),
                                    _mm512_castsi512_si256(_mm512_permutex2var_epi8(a, high, b)));
            if constexpr (bytes == 128) _mm512_storeu_si512(to + 64, _mm512_permutex2var_epi8(a, high, b));
        }
    }
}

// --- coordinates ---------------------------------------------------------------------------------------------------

struct Points {
    __m512i x, y;  // floors
    __m512 fx, fy;
    __mmask16 finite;
};

struct Lanes {
    alignas(64) float index[kBlock];

    constexpr Lanes() : index{} {
        for (int i = 0; i < kBlock; ++i) index[i] = static_cast<float>(i);
    }
};
constexpr Lanes kLane;

IMGOPT_INLINE __m512 along(float step, float start, int lane) {
    return _mm512_fmadd_ps(_mm512_set1_ps(step), _mm512_load_ps(kLane.index + lane), _mm512_set1_ps(start));
}
IMGOPT_INLINE __m512 floored(__m512 v) { return _mm512_roundscale_ps(v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC); }

IMGOPT_INLINE Points affine_points(const Base<float>& base, int lane) {
    const __m512 far = _mm512_set1_ps(static_cast<float>(kFarInBlock)), near = _mm512_sub_ps(_mm512_setzero_ps(), far);
    const __m512 x = _mm512_min_ps(_mm512_max_ps(along(base.step_x, base.fx, lane), near), far);
    const __m512 y = _mm512_min_ps(_mm512_max_ps(along(base.step_y, base.fy, lane), near), far);
    const __m512 wx = floored(x), wy = floored(y);
    return {_mm512_add_epi32(_mm512_set1_epi32(base.x), _mm512_cvttps_epi32(wx)),
            _mm512_add_epi32(_mm512_set1_epi32(base.y), _mm512_cvttps_epi32(wy)), _mm512_sub_ps(x, wx),
            _mm512_sub_ps(y, wy), 0xffff};
}

struct HalfPoints {
    __m256i x, y;
    __m256 fx, fy;
    __mmask8 finite;
};

IMGOPT_INLINE HalfPoints perspective_half(const double* m, int64_t x, int64_t y) {
    const __m512d column = _mm512_add_pd(_mm512_set1_pd(static_cast<double>(x)), _mm512_set_pd(7, 6, 5, 4, 3, 2, 1, 0));
    const auto row = [&](int i) {
        return _mm512_add_pd(_mm512_mul_pd(_mm512_set1_pd(m[i]), column), _mm512_set1_pd(m[i + 1] * y + m[i + 2]));
    };
    const __m512d r = _mm512_div_pd(_mm512_set1_pd(1), row(6));
    const __m512d sx = _mm512_mul_pd(row(0), r), sy = _mm512_mul_pd(row(3), r);
    const __m512d zero = _mm512_setzero_pd();
    const __mmask8 finite = _mm512_cmp_pd_mask(_mm512_sub_pd(sx, sx), zero, _CMP_EQ_OQ) &
                            _mm512_cmp_pd_mask(_mm512_sub_pd(sy, sy), zero, _CMP_EQ_OQ);
    const __m512d far = _mm512_set1_pd(kFar), near = _mm512_set1_pd(-kFar);
    const __m512d cx = _mm512_min_pd(_mm512_max_pd(sx, near), far), cy = _mm512_min_pd(_mm512_max_pd(sy, near), far);
    const __m512d wx = _mm512_roundscale_pd(cx, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    const __m512d wy = _mm512_roundscale_pd(cy, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    return {_mm512_cvttpd_epi32(wx), _mm512_cvttpd_epi32(wy), _mm512_cvtpd_ps(_mm512_sub_pd(cx, wx)),
            _mm512_cvtpd_ps(_mm512_sub_pd(cy, wy)), finite};
}

IMGOPT_INLINE Points perspective_points(const double* m, int64_t x, int64_t y) {
    const HalfPoints a = perspective_half(m, x, y), b = perspective_half(m, x + 8, y);
    const auto joined = [](__m256i low, __m256i high) {
        return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
    };
    const auto joined_ps = [](__m256 low, __m256 high) {
        return _mm512_insertf32x8(_mm512_castps256_ps512(low), high, 1);
    };
    return {joined(a.x, b.x), joined(a.y, b.y), joined_ps(a.fx, b.fx), joined_ps(a.fy, b.fy),
            static_cast<__mmask16>(a.finite | b.finite << 8)};
}

// fold() of arithmetic.h. One mirroring serves coordinates within a period of the image; others are rare and go one by
// one. So do those that reflection brings to an outermost pixel: fold() reverses them in one direction only.
IMGOPT_INLINE void fold_axis(__m512i& i, __m512& f, int32_t n, Padding padding) {
    const __mmask16 outside = _mm512_cmpge_epu32_mask(i, _mm512_set1_epi32(n));
    if (!outside || n == 1) return;
    const int32_t below = padding == Padding::reflect ? 0 : -1,
                  above = padding == Padding::reflect ? 2 * n - 2 : 2 * n - 1;
    const __mmask16 negative = _mm512_movepi32_mask(i);
    const __m512i sum = _mm512_mask_mov_epi32(_mm512_set1_epi32(above), negative, _mm512_set1_epi32(below));
    const __m512i mirrored = _mm512_sub_epi32(sum, i);
    const int32_t edge = padding == Padding::reflect;
    const __m512i inner = _mm512_sub_epi32(mirrored, _mm512_set1_epi32(edge));
    const __mmask16 far = _mm512_mask_cmpge_epu32_mask(outside, inner, _mm512_set1_epi32(n - 2 * edge));
    if (far) {
        alignas(64) int32_t index[kLanes];
        alignas(64) float fraction[kLanes];
        _mm512_store_si512(index, i);
        _mm512_store_ps(fraction, f);
        for (int lane = 0; lane < kLanes; ++lane) fold(index[lane], fraction[lane], n, padding);
        i = _mm512_load_si512(index);
        f = _mm512_load_ps(fraction);
        return;
    }
    const __mmask16 between = _mm512_mask_cmp_ps_mask(outside, f, _mm512_setzero_ps(), _CMP_GT_OQ);
    i = _mm512_mask_mov_epi32(i, outside, mirrored);
    i = _mm512_mask_sub_epi32(i, between, i, _mm512_set1_epi32(1));
    f = _mm512_mask_sub_ps(f, between, _mm512_set1_ps(1), f);
}

IMGOPT_INLINE void round_to_nearest(Points& at) {
    const __m512 half = _mm512_set1_ps(0.5f);
    const __m512i one = _mm512_set1_epi32(1);
    at.x = _mm512_mask_add_epi32(at.x, _mm512_cmp_ps_mask(at.fx, half, _CMP_GE_OQ), at.x, one);
    at.y = _mm512_mask_add_epi32(at.y, _mm512_cmp_ps_mask(at.fy, half, _CMP_GE_OQ), at.y, one);
    at.fx = at.fy = _mm512_setzero_ps();
}

// --- offsets and weights -------------------------------------------------------------------------------------------

// Bytes, four to a dword: high · 256 + low is a tap's weight.
struct SplitWeights {
    __m512i high, low;
};

// Two vectors of pixels.
struct Group {
    alignas(64) int32_t offset[2 * kLanes];  // of the position in the window, bytes, from `origin`
    const uint8_t* origin;
    __m512 fx[2], fy[2];
    __mmask16 finite[2];
    SplitWeights weights[2];
    bool touched;  // or all of it is fill
    bool plain;    // no pixel is fill as a whole
};

// Written so that the compiler does not see the other end of it: it would move each offset through vpextrd, four times
// the cost of a load.
IMGOPT_INLINE void keep(int32_t* to, __m512i v) {
    __asm__("vmovdqa32 %1, %0" : "=m"(*reinterpret_cast<__m512i*>(to)) : "v"(v));
}

// What the offsets of an image have in common.
struct Steps {
    __m512 x, y, pitch;

    Steps(const float* step, int64_t bytes)
        : x(_mm512_set1_ps(step[0])), y(_mm512_set1_ps(step[1])), pitch(_mm512_set1_ps(static_cast<float>(bytes))) {}
};

// Offsets where every coordinate of the group lies inside the window. They are exact in float32: below 2^20.
template <int bytes, bool rounds>
IMGOPT_INLINE void locate_inside(const Steps& steps, __m512 fx, __m512 fy, int lane, Group& to, int half) {
    const __m512 index = _mm512_load_ps(kLane.index + lane);
    const __m512 x = _mm512_fmadd_ps(steps.x, index, fx), y = _mm512_fmadd_ps(steps.y, index, fy);
    __m512 wx = floored(x), wy = floored(y);
    to.fx[half] = _mm512_sub_ps(x, wx);
    to.fy[half] = _mm512_sub_ps(y, wy);
    if constexpr (rounds) {
        const __m512 middle = _mm512_set1_ps(0.5f), one = _mm512_set1_ps(1);
        wx = _mm512_mask_add_ps(wx, _mm512_cmp_ps_mask(to.fx[half], middle, _CMP_GE_OQ), wx, one);
        wy = _mm512_mask_add_ps(wy, _mm512_cmp_ps_mask(to.fy[half], middle, _CMP_GE_OQ), wy, one);
    }
    const __m512 along_x = bytes == 1 ? wx : _mm512_mul_ps(wx, _mm512_set1_ps(bytes));
    keep(to.offset + half * kLanes, _mm512_cvttps_epi32(_mm512_fmadd_ps(wy, steps.pitch, along_x)));
}

// Offsets of any coordinates. The clamp does the border's work and keeps every load inside.
IMGOPT_INLINE void locate_clamped(const Window& w, int bytes, int lead, const Points& at, Group& to, int half) {
    const auto cut = [](__m512i v, int32_t first, int32_t last) {
        v = _mm512_sub_epi32(v, _mm512_set1_epi32(first));
        return _mm512_min_epi32(_mm512_max_epi32(v, _mm512_setzero_si512()), _mm512_set1_epi32(last));
    };
    const __m512i x = cut(at.x, w.x0 + lead, w.x_last), y = cut(at.y, w.y0 + lead, w.y_last);
    to.origin = w.data;
    to.fx[half] = at.fx;
    to.fy[half] = at.fy;
    to.finite[half] = at.finite;
    keep(to.offset + half * kLanes,
         _mm512_add_epi32(_mm512_mullo_epi32(y, _mm512_set1_epi32(static_cast<int32_t>(w.pitch))),
                          _mm512_mullo_epi32(x, _mm512_set1_epi32(bytes))));
}

// Byte 4k + j of the result: byte 4k + {0, 2} of the first source, then of the second; `odd` 1: the high bytes.
struct SplitIndices {
    alignas(64) uint8_t index[2][64];

    constexpr SplitIndices() : index{} {
        for (int odd = 0; odd < 2; ++odd)
            for (int i = 0; i < 64; ++i)
                index[odd][i] = static_cast<uint8_t>(i / 4 * 4 + i % 2 * 2 + odd + (i % 4 / 2) * 64);
    }
};
constexpr SplitIndices kSplit;

// Words 0 and 1 of `left`, then those of `right`, by bytes.
IMGOPT_INLINE SplitWeights split(__m512i left_high, __m512i right_high, __m512i left, __m512i right) {
    return {_mm512_permutex2var_epi8(left_high, _mm512_load_si512(kSplit.index[1]), right_high),
            _mm512_permutex2var_epi8(left, _mm512_load_si512(kSplit.index[0]), right)};
}

// bilinear_weights() of arithmetic.h for 32 pixels, as words: packs leaves four of the first and four of the second
// vector in each 128 bits, which the unpacking takes apart again.
IMGOPT_INLINE void weigh_bilinear(Group& to) {
    const auto words = [](const __m512* f, float unit) {
        const __m512 factor = _mm512_set1_ps(unit);
        return _mm512_packs_epi32(_mm512_cvtps_epi32(_mm512_mul_ps(f[0], factor)),
                                  _mm512_cvtps_epi32(_mm512_mul_ps(f[1], factor)));
    };
    const __m512i right = words(to.fx, kWeightSum), below = words(to.fy, 32768);  // saturates at 32767
    const __m512i left = _mm512_sub_epi16(_mm512_set1_epi16(kWeightSum), right);
    const __m512i w11 = _mm512_mulhrs_epi16(right, below), w10 = _mm512_mulhrs_epi16(left, below);
    const __m512i w01 = _mm512_sub_epi16(right, w11), w00 = _mm512_sub_epi16(left, w10);
    const __m512i left0 = _mm512_unpacklo_epi16(w00, w10), left1 = _mm512_unpackhi_epi16(w00, w10);
    const __m512i right0 = _mm512_unpacklo_epi16(w01, w11), right1 = _mm512_unpackhi_epi16(w01, w11);
    to.weights[0] = split(left0, right0, left0, right0);
    to.weights[1] = split(left1, right1, left1, right1);
}

// bicubic_weights() of arithmetic.h.
IMGOPT_INLINE void bicubic_weights(__m512 f, __m512* to) {
    const __m512 one = _mm512_set1_ps(1), a = _mm512_set1_ps(static_cast<float>(kKeys)), g = _mm512_sub_ps(one, f);
    const auto near = [&](__m512 d) {
        const __m512 line = _mm512_fmadd_ps(_mm512_set1_ps(static_cast<float>(kKeys + 2)), d,
                                            _mm512_set1_ps(static_cast<float>(-kKeys - 3)));
        return _mm512_fmadd_ps(line, _mm512_mul_ps(d, d), one);
    };
    to[0] = _mm512_mul_ps(_mm512_mul_ps(a, f), _mm512_mul_ps(g, g));
    to[1] = near(f);
    to[2] = near(g);
    to[3] = _mm512_mul_ps(_mm512_mul_ps(a, g), _mm512_mul_ps(f, f));
}

// The columns' weights as signed bytes.
IMGOPT_INLINE void weigh_bicubic(Group& to) {
    const __m512 sum = _mm512_set1_ps(kWeightSum);
    const __m512i rounding = _mm512_set1_epi16(128);
    const auto pair = [](__m512i even, __m512i odd) {
        return _mm512_mask_mov_epi16(even, 0xaaaaaaaa, _mm512_slli_epi32(odd, 16));
    };
    for (int h = 0; h < 2; ++h) {
        __m512 w[4];
        bicubic_weights(to.fx[h], w);
        const __m512i w0 = _mm512_cvtps_epi32(_mm512_mul_ps(w[0], sum));
        const __m512i w2 = _mm512_cvtps_epi32(_mm512_mul_ps(w[2], sum));
        const __m512i w3 = _mm512_cvtps_epi32(_mm512_mul_ps(w[3], sum));
        const __m512i others = _mm512_add_epi32(w0, _mm512_add_epi32(w2, w3));
        const __m512i left = pair(w0, _mm512_sub_epi32(_mm512_set1_epi32(kWeightSum), others)), right = pair(w2, w3);
        to.weights[h] = split(_mm512_add_epi16(left, rounding), _mm512_add_epi16(right, rounding), left, right);
    }
}

// --- sampling ------------------------------------------------------------------------------------------------------

// A constant that the compiler does not know: it would make it anew, through a general register, at every use.
IMGOPT_INLINE __mmask16 kept_mask(__mmask16 mask) {
    __asm__("" : "+Yk"(mask));
    return mask;
}

// The 16 bytes at four positions, one per 128-bit lane.
IMGOPT_INLINE __m512i load_positions(const uint8_t* data, const int32_t* offset) {
    const auto at = [&](int i) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(data + offset[i])); };
    __m512i v = _mm512_castsi128_si512(at(0));
    v = _mm512_mask_broadcast_i32x4(v, kept_mask(0x00f0), at(1));
    v = _mm512_mask_broadcast_i32x4(v, kept_mask(0x0f00), at(2));
    return _mm512_mask_broadcast_i32x4(v, kept_mask(0xf000), at(3));
}

// The 4 bytes at each of 16 positions.
IMGOPT_INLINE __m512i load_dwords(const uint8_t* data, const int32_t* offset) {
    const auto quarter = [&](int i) {
        const auto at = [&](int k) {
            int32_t v;
            __builtin_memcpy(&v, data + offset[4 * i + k], 4);
            return v;
        };
        return _mm_insert_epi32(_mm_insert_epi32(_mm_insert_epi32(_mm_cvtsi32_si128(at(0)), at(1), 1), at(2), 2), at(3),
                                3);
    };
    const __m256i low = _mm256_inserti128_si256(_mm256_castsi128_si256(quarter(0)), quarter(1), 1);
    const __m256i high = _mm256_inserti128_si256(_mm256_castsi128_si256(quarter(2)), quarter(3), 1);
    return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
}

// vpermi2b indices that bring the four taps of a channel, C bytes apart, together: channels `first` and `second` of the
// eight pixels of two registers, 32 bytes each.
template <int C>
struct PlaneIndices {
    alignas(64) uint8_t index[2][64];

    constexpr PlaneIndices() : index{} {
        for (int pair = 0; pair < 2; ++pair)
            for (int i = 0; i < 64; ++i) {
                const int channel = 2 * pair + i / 32, pixel = i % 32 / 4, tap = i % 4;
                index[pair][i] = static_cast<uint8_t>(pixel * 16 + (channel < C ? tap * C + channel : 0));
            }
    }
};

// The 16 bytes at each of 16 positions as planes: dword i of plane c holds four taps of channel c of pixel i. In a
// bilinear window these are 00, 10, 01, 11, in a bicubic one the columns of a row.
template <int C>
IMGOPT_INLINE void load_planes(const uint8_t* data, const int32_t* offset, __m512i* planes) {
    if constexpr (C == 1) {
        planes[0] = load_dwords(data, offset);
        return;
    }
    static constexpr PlaneIndices<C> kIndices;
    __m512i pixels[4];
    for (int i = 0; i < 4; ++i) pixels[i] = load_positions(data, offset + 4 * i);
    for (int pair = 0; pair < (C + 1) / 2; ++pair) {
        const __m512i index = _mm512_load_si512(kIndices.index[pair]);
        const __m512i a = _mm512_permutex2var_epi8(pixels[0], index, pixels[1]);
        const __m512i b = _mm512_permutex2var_epi8(pixels[2], index, pixels[3]);
        planes[2 * pair] = _mm512_inserti64x4(a, _mm512_castsi512_si256(b), 1);
        planes[2 * pair + 1] = _mm512_shuffle_i64x2(a, b, 0xee);
    }
}

// Samples of 16 pixels: levels times kWeightSum, one register per channel.
template <int C>
IMGOPT_INLINE void bilinear_samples(const Group& at, int half, __m512* to) {
    const SplitWeights& w = at.weights[half];
    __m512i planes[4];
    load_planes<C>(at.origin, at.offset + half * kLanes, planes);
    for (int c = 0; c < C; ++c) {
        const __m512i high = _mm512_dpbusd_epi32(_mm512_set1_epi32(kStart), w.high, planes[c]);
        to[c] = _mm512_cvtepi32_ps(_mm512_dpbusd_epi32(_mm512_slli_epi32(high, 8), w.low, planes[c]));
    }
}

// Four rows of four columns: each row in exact integers like the bilinear taps, then the rows in float32.
template <int C>
IMGOPT_INLINE void bicubic_samples(const Window& w, const Group& at, int half, __m512* to) {
    const SplitWeights& columns = at.weights[half];
    __m512 rows[4];
    bicubic_weights(at.fy[half], rows);
    for (int row = 0; row < 4; ++row) {
        __m512i planes[4];
        load_planes<C>(at.origin + row * w.pitch, at.offset + half * kLanes, planes);
        for (int c = 0; c < C; ++c) {
            const __m512i high = _mm512_dpbusd_epi32(_mm512_setzero_si512(), planes[c], columns.high);
            const __m512i sum = _mm512_dpbusd_epi32(_mm512_slli_epi32(high, 8), planes[c], columns.low);
            const __m512 real = _mm512_cvtepi32_ps(sum);
            to[c] = row ? _mm512_fmadd_ps(rows[row], real, to[c]) : _mm512_mul_ps(rows[row], real);
        }
    }
}

template <int C>
IMGOPT_INLINE void nearest_samples(const Group& at, int half, __m512* to) {
    const __m512i pixels = load_dwords(at.origin, at.offset + half * kLanes), byte = _mm512_set1_epi32(255);
    for (int c = 0; c < C; ++c) to[c] = _mm512_cvtepi32_ps(_mm512_and_si512(_mm512_srli_epi32(pixels, 8 * c), byte));
}

IMGOPT_INLINE void apply_color(const float* m, float unit, __m512* v) {
    const __m512 factor = _mm512_set1_ps(unit);
    const __m512 r = _mm512_mul_ps(v[0], factor), g = _mm512_mul_ps(v[1], factor), b = _mm512_mul_ps(v[2], factor);
    for (int i = 0; i < 3; ++i, m += 4) {
        __m512 t = _mm512_fmadd_ps(_mm512_set1_ps(m[0]), r, _mm512_set1_ps(m[3]));
        t = _mm512_fmadd_ps(_mm512_set1_ps(m[1]), g, t);
        t = _mm512_fmadd_ps(_mm512_set1_ps(m[2]), b, t);
        v[i] = _mm512_min_ps(_mm512_set1_ps(1), _mm512_max_ps(_mm512_setzero_ps(), t));  // this order keeps a NaN
    }
}

// --- the steps of windowed.h ---------------------------------------------------------------------------------------

// A number per row of a strip, in the compiler's vectors; the halves as wide as the float64 they come from.
struct StripRows {
    typedef int32_t Ints __attribute__((vector_size(64)));
    typedef float Floats __attribute__((vector_size(64)));
    typedef int32_t HalfInts __attribute__((vector_size(32)));
    typedef float HalfFloats __attribute__((vector_size(32)));
    typedef int64_t Longs __attribute__((vector_size(64)));
    typedef double Doubles __attribute__((vector_size(64)));
};

struct Isa {
    using Vector = __m512;
    using Rows = StripRows;
    using Group = avx512::Group;
    using Steps = avx512::Steps;
    static constexpr int kLanes = avx512::kLanes;
    static constexpr uint8_t kFlip = avx512::kFlip;

    IMGOPT_INLINE static __m512 all(float v) { return _mm512_set1_ps(v); }
    IMGOPT_INLINE static bool all_finite(const Group& group) { return (group.finite[0] & group.finite[1]) == 0xffff; }
    template <int C, int taps>
    IMGOPT_INLINE static void locate_inside(const Steps& steps, __m512 fx, __m512 fy, int lane, Group& to, int half) {
        avx512::locate_inside<position_bytes(C, taps), taps == 1>(steps, fx, fy, lane, to, half);
    }
    template <int C, int taps>
    IMGOPT_INLINE static void locate(const Window& w, const Points& at, Group& to, int half) {
        locate_clamped(w, position_bytes(C, taps), taps == 4, at, to, half);
    }
    template <int taps>
    IMGOPT_INLINE static void weigh(Group& to) {
        if constexpr (taps == 2) weigh_bilinear(to);
        if constexpr (taps == 4) weigh_bicubic(to);
    }
    template <int C, int taps>
    IMGOPT_INLINE static void samples(const Window& w, const Group& at, int half, __m512* to) {
        if constexpr (taps == 1) nearest_samples<C>(at, half, to);
        if constexpr (taps == 2) bilinear_samples<C>(at, half, to);
        if constexpr (taps == 4) bicubic_samples<C>(w, at, half, to);
    }
    template <int C, int taps>
    static void pack(const Source<uint8_t>& source, const uint8_t* first, const uint8_t* second, int32_t count,
                     uint8_t* to) {
        if (source.column == C && source.channel == 1)
            pack_pixels<C, taps, false>(source, first, second, count, to);
        else
            pack_pixels<C, taps, true>(source, first, second, count, to);
    }
    IMGOPT_INLINE static Points affine(const Base<float>& base, int lane) { return affine_points(base, lane); }
    IMGOPT_INLINE static Points perspective(const double* m, int64_t x, int64_t y) {
        return perspective_points(m, x, y);
    }
    IMGOPT_INLINE static void round(Points& at) { round_to_nearest(at); }
    IMGOPT_INLINE static void fold(Points& at, const Source<uint8_t>& source, Padding padding) {
        fold_axis(at.x, at.fx, source.width, padding);
        fold_axis(at.y, at.fy, source.height, padding);
    }
    template <int C>
    IMGOPT_INLINE static void blend(const float* fill, const Group& at, int half, __m512* v) {
        for (int c = 0; c < C; ++c) v[c] = _mm512_mask_mov_ps(_mm512_set1_ps(fill[c]), at.finite[half], v[c]);
    }
    template <int C>
    IMGOPT_INLINE static void spread(const float* fill, __m512* v) {
        for (int c = 0; c < C; ++c) v[c] = _mm512_set1_ps(fill[c]);
    }
    IMGOPT_INLINE static void color(const float* m, float unit, __m512* v) { apply_color(m, unit, v); }
    template <int C>
    IMGOPT_INLINE static void copy(uint8_t* to, const Target& at, const Group& from, int half) {
        store_dwords<C>(to, at, load_dwords(from.origin, from.offset + half * kLanes));
    }
    template <int C, bool overshoots, class T>
    IMGOPT_INLINE static void put(T* to, const Target& at, const Epilogue<C>& epilogue, const __m512* v) {
        store<C, overshoots>(to, at, epilogue, v);
    }
};

}  // namespace

void affine_warp(KernelTable& table) {
    table.affine_warp = warp_vectorized<Isa>;
    table.affine_warp_backward = warp_backward;
}

}  // namespace imgopt::avx512

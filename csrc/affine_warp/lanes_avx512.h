// Points, weights and colours of sixteen pixels in AVX-512: arithmetic.h lane by lane.
#pragma once

#include <immintrin.h>

#include "points.h"

namespace imgopt::avx512 {
namespace {

constexpr int kLanes = 16;

// --- coordinates ----------------------------------------------------------------------------------------------------

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

// Eight points of a homography, the floors as they are.
struct HalfPoints {
    __m512d x, y;
    __m256 fx, fy;
    __mmask8 finite;
};

// `down`: what a row of the output adds to the rows of the matrix. `near`: it is known that all coordinates are finite
// and below kFar. A division of eight takes 4 cycles of Zen 5's divider, while the other units go on; Newton's steps to
// the same bits made the warp a fifth slower.
template <bool near>
IMGOPT_INLINE HalfPoints perspective_half(const double* m, const double* down, int64_t x) {
    const __m512d column = _mm512_add_pd(_mm512_set1_pd(static_cast<double>(x)), _mm512_set_pd(7, 6, 5, 4, 3, 2, 1, 0));
    const auto row = [&](int i) {
        return _mm512_add_pd(_mm512_mul_pd(_mm512_set1_pd(m[3 * i]), column), _mm512_set1_pd(down[i]));
    };
    const __m512d r = _mm512_div_pd(_mm512_set1_pd(1), row(2));
    __m512d sx = _mm512_mul_pd(row(0), r), sy = _mm512_mul_pd(row(1), r);
    __mmask8 finite = 0xff;
    if constexpr (!near) {
        const __m512d zero = _mm512_setzero_pd(), far = _mm512_set1_pd(kFar), least = _mm512_set1_pd(-kFar);
        finite = _mm512_cmp_pd_mask(_mm512_sub_pd(sx, sx), zero, _CMP_EQ_OQ) &
                 _mm512_cmp_pd_mask(_mm512_sub_pd(sy, sy), zero, _CMP_EQ_OQ);
        sx = _mm512_min_pd(_mm512_max_pd(sx, least), far);
        sy = _mm512_min_pd(_mm512_max_pd(sy, least), far);
    }
    const __m512d wx = _mm512_roundscale_pd(sx, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    const __m512d wy = _mm512_roundscale_pd(sy, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    return {wx, wy, _mm512_cvtpd_ps(_mm512_sub_pd(sx, wx)), _mm512_cvtpd_ps(_mm512_sub_pd(sy, wy)), finite};
}

IMGOPT_INLINE __m512 joined(__m256 low, __m256 high) {
    return _mm512_insertf32x8(_mm512_castps256_ps512(low), high, 1);
}
IMGOPT_INLINE Points points_of(const HalfPoints& a, const HalfPoints& b) {
    const auto whole = [](__m512d low, __m512d high) {
        return _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvttpd_epi32(low)), _mm512_cvttpd_epi32(high), 1);
    };
    return {whole(a.x, b.x), whole(a.y, b.y), joined(a.fx, b.fx), joined(a.fy, b.fy),
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

// --- weights --------------------------------------------------------------------------------------------------------

// Bytes, four to a dword: high · 256 + low is a tap's weight.
struct SplitWeights {
    __m512i high, low;
};

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

// Words 0 and 1 of `left`, then those of `right`, by bytes: rounded high ones, so that the low ones are signed.
IMGOPT_INLINE SplitWeights split(__m512i left, __m512i right) {
    const __m512i half = _mm512_set1_epi16(128);
    return {_mm512_permutex2var_epi8(_mm512_add_epi16(left, half), _mm512_load_si512(kSplit.index[1]),
                                     _mm512_add_epi16(right, half)),
            _mm512_permutex2var_epi8(left, _mm512_load_si512(kSplit.index[0]), right)};
}

// Words, two to a dword: the weights of a dword's even bytes, and those of its odd ones. Taking the bytes apart costs
// every channel an instruction more than weights in bytes do, and these cost all channels together four.
struct PairedWeights {
    __m512i even, odd;
};

// bilinear_weights() of arithmetic.h for 32 pixels, as words: packs leaves four of the first and four of the second
// vector in each 128 bits, which the unpacking takes apart again. Taps come in the order 00, 10, 01, 11.
IMGOPT_INLINE void weigh_bilinear(const __m512* fx, const __m512* fy, PairedWeights* to) {
    const auto words = [](const __m512* f, float unit) {
        const __m512 factor = _mm512_set1_ps(unit);
        return _mm512_packs_epi32(_mm512_cvtps_epi32(_mm512_mul_ps(f[0], factor)),
                                  _mm512_cvtps_epi32(_mm512_mul_ps(f[1], factor)));
    };
    const __m512i right = words(fx, kWeightSum), below = words(fy, 32768);  // saturates at 32767
    const __m512i left = _mm512_sub_epi16(_mm512_set1_epi16(kWeightSum), right);
    const __m512i w11 = _mm512_mulhrs_epi16(right, below), w10 = _mm512_mulhrs_epi16(left, below);
    const __m512i w01 = _mm512_sub_epi16(right, w11), w00 = _mm512_sub_epi16(left, w10);
    to[0] = {_mm512_unpacklo_epi16(w00, w01), _mm512_unpacklo_epi16(w10, w11)};
    to[1] = {_mm512_unpackhi_epi16(w00, w01), _mm512_unpackhi_epi16(w10, w11)};
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
IMGOPT_INLINE void weigh_bicubic(const __m512* fx, SplitWeights* to) {
    const __m512 sum = _mm512_set1_ps(kWeightSum);
    const auto pair = [](__m512i even, __m512i odd) {
        return _mm512_mask_mov_epi16(even, 0xaaaaaaaa, _mm512_slli_epi32(odd, 16));
    };
    for (int h = 0; h < 2; ++h) {
        __m512 w[4];
        bicubic_weights(fx[h], w);
        const __m512i w0 = _mm512_cvtps_epi32(_mm512_mul_ps(w[0], sum));
        const __m512i w2 = _mm512_cvtps_epi32(_mm512_mul_ps(w[2], sum));
        const __m512i w3 = _mm512_cvtps_epi32(_mm512_mul_ps(w[3], sum));
        const __m512i others = _mm512_add_epi32(w0, _mm512_add_epi32(w2, w3));
        const __m512i left = pair(w0, _mm512_sub_epi32(_mm512_set1_epi32(kWeightSum), others)), right = pair(w2, w3);
        to[h] = split(left, right);
    }
}

// The weighted sum of each dword's four pixels.
IMGOPT_INLINE __m512i weighted(__m512i pixels, const SplitWeights& w) {
    const __m512i high = _mm512_dpbusd_epi32(_mm512_setzero_si512(), pixels, w.high);
    return _mm512_dpbusd_epi32(_mm512_slli_epi32(high, 8), pixels, w.low);
}

IMGOPT_INLINE __m512i weighted(__m512i pixels, const PairedWeights& w) {
    const __m512i even = _mm512_and_si512(pixels, _mm512_set1_epi32(0x00ff00ff)), odd = _mm512_srli_epi16(pixels, 8);
    return _mm512_dpwssd_epi32(_mm512_madd_epi16(even, w.even), odd, w.odd);
}

// --- colours --------------------------------------------------------------------------------------------------------

IMGOPT_INLINE void apply_color(const ColorMap<float>& map, __m512* v) {
    const float* m = map.matrix;
    const __m512 r = v[0], g = v[1], b = v[2];
    for (int i = 0; i < 3; ++i, m += 4) {
        __m512 t = _mm512_fmadd_ps(_mm512_set1_ps(m[0]), r, _mm512_set1_ps(m[3]));
        t = _mm512_fmadd_ps(_mm512_set1_ps(m[1]), g, t);
        t = _mm512_fmadd_ps(_mm512_set1_ps(m[2]), b, t);
        v[i] = _mm512_min_ps(_mm512_set1_ps(map.high[i]), _mm512_max_ps(_mm512_set1_ps(map.low[i]), t));
    }
}

}  // namespace
}  // namespace imgopt::avx512

// Points, weights and colours of eight pixels in AVX2: arithmetic.h lane by lane.
#pragma once

#include <immintrin.h>

#include "points.h"

namespace imgopt::avx2 {
namespace {

constexpr int kLanes = 8;

// --- coordinates ----------------------------------------------------------------------------------------------------

struct Points {
    __m256i x, y;  // floors
    __m256 fx, fy;
    int finite;  // bit per lane
};

IMGOPT_INLINE __m256 lanes_from(int lane) {
    return _mm256_add_ps(_mm256_set1_ps(static_cast<float>(lane)), _mm256_set_ps(7, 6, 5, 4, 3, 2, 1, 0));
}
IMGOPT_INLINE __m256 along(float step, float start, int lane) {
    return _mm256_fmadd_ps(_mm256_set1_ps(step), lanes_from(lane), _mm256_set1_ps(start));
}

IMGOPT_INLINE Points affine_points(const Base<float>& base, int lane) {
    const __m256 far = _mm256_set1_ps(static_cast<float>(kFarInBlock)), near = _mm256_sub_ps(_mm256_setzero_ps(), far);
    const __m256 x = _mm256_min_ps(_mm256_max_ps(along(base.step_x, base.fx, lane), near), far);
    const __m256 y = _mm256_min_ps(_mm256_max_ps(along(base.step_y, base.fy, lane), near), far);
    const __m256 wx = _mm256_floor_ps(x), wy = _mm256_floor_ps(y);
    return {_mm256_add_epi32(_mm256_set1_epi32(base.x), _mm256_cvttps_epi32(wx)),
            _mm256_add_epi32(_mm256_set1_epi32(base.y), _mm256_cvttps_epi32(wy)), _mm256_sub_ps(x, wx),
            _mm256_sub_ps(y, wy), 0xff};
}

struct HalfPoints {
    __m128i x, y;
    __m128 fx, fy;
    int finite;
};

IMGOPT_INLINE HalfPoints perspective_half(const double* m, int64_t x, int64_t y) {
    const __m256d column = _mm256_add_pd(_mm256_set1_pd(static_cast<double>(x)), _mm256_set_pd(3, 2, 1, 0));
    const auto row = [&](int i) {
        return _mm256_add_pd(_mm256_mul_pd(_mm256_set1_pd(m[i]), column), _mm256_set1_pd(m[i + 1] * y + m[i + 2]));
    };
    const __m256d r = _mm256_div_pd(_mm256_set1_pd(1), row(6));
    const __m256d sx = _mm256_mul_pd(row(0), r), sy = _mm256_mul_pd(row(3), r);
    const __m256d zero = _mm256_setzero_pd();
    const int finite = _mm256_movemask_pd(_mm256_and_pd(_mm256_cmp_pd(_mm256_sub_pd(sx, sx), zero, _CMP_EQ_OQ),
                                                        _mm256_cmp_pd(_mm256_sub_pd(sy, sy), zero, _CMP_EQ_OQ)));
    const __m256d far = _mm256_set1_pd(kFar), near = _mm256_set1_pd(-kFar);
    const __m256d cx = _mm256_min_pd(_mm256_max_pd(sx, near), far), cy = _mm256_min_pd(_mm256_max_pd(sy, near), far);
    const __m256d wx = _mm256_floor_pd(cx), wy = _mm256_floor_pd(cy);
    return {_mm256_cvttpd_epi32(wx), _mm256_cvttpd_epi32(wy), _mm256_cvtpd_ps(_mm256_sub_pd(cx, wx)),
            _mm256_cvtpd_ps(_mm256_sub_pd(cy, wy)), finite};
}

IMGOPT_INLINE Points joined(const HalfPoints& a, const HalfPoints& b) {
    return {_mm256_set_m128i(b.x, a.x), _mm256_set_m128i(b.y, a.y), _mm256_set_m128(b.fx, a.fx),
            _mm256_set_m128(b.fy, a.fy), a.finite | b.finite << 4};
}

IMGOPT_INLINE void round_to_nearest(Points& at) {
    const __m256 half = _mm256_set1_ps(0.5f);
    at.x = _mm256_sub_epi32(at.x, _mm256_castps_si256(_mm256_cmp_ps(at.fx, half, _CMP_GE_OQ)));
    at.y = _mm256_sub_epi32(at.y, _mm256_castps_si256(_mm256_cmp_ps(at.fy, half, _CMP_GE_OQ)));
    at.fx = at.fy = _mm256_setzero_ps();
}

// fold() of arithmetic.h. One mirroring serves coordinates within a period of the image; others are rare and go one by
// one. So do those that reflection brings to an outermost pixel: fold() reverses them in one direction only.
IMGOPT_INLINE void fold_axis(__m256i& i, __m256& f, int32_t n, Padding padding) {
    const auto outside_of = [](__m256i v, int32_t first, int32_t last) {
        return _mm256_or_si256(_mm256_cmpgt_epi32(_mm256_set1_epi32(first), v),
                               _mm256_cmpgt_epi32(v, _mm256_set1_epi32(last)));
    };
    const __m256i outside = outside_of(i, 0, n - 1);
    if (_mm256_testz_si256(outside, outside) || n == 1) return;
    const int32_t below = padding == Padding::reflect ? 0 : -1;
    const int32_t above = padding == Padding::reflect ? 2 * n - 2 : 2 * n - 1;
    const __m256i sum =
        _mm256_blendv_epi8(_mm256_set1_epi32(above), _mm256_set1_epi32(below), _mm256_srai_epi32(i, 31));
    const __m256i mirrored = _mm256_sub_epi32(sum, i);
    const int32_t edge = padding == Padding::reflect;
    if (!_mm256_testz_si256(outside, outside_of(mirrored, edge, n - 1 - edge))) {
        alignas(32) int32_t index[kLanes];
        alignas(32) float fraction[kLanes];
        _mm256_store_si256(reinterpret_cast<__m256i*>(index), i);
        _mm256_store_ps(fraction, f);
        for (int lane = 0; lane < kLanes; ++lane) fold(index[lane], fraction[lane], n, padding);
        i = _mm256_load_si256(reinterpret_cast<const __m256i*>(index));
        f = _mm256_load_ps(fraction);
        return;
    }
    const __m256 positive = _mm256_cmp_ps(f, _mm256_setzero_ps(), _CMP_GT_OQ);
    const __m256i between = _mm256_and_si256(outside, _mm256_castps_si256(positive));
    i = _mm256_add_epi32(_mm256_blendv_epi8(i, mirrored, outside), between);
    f = _mm256_blendv_ps(f, _mm256_sub_ps(_mm256_set1_ps(1), f), _mm256_castsi256_ps(between));
}

// --- weights --------------------------------------------------------------------------------------------------------

// Weights of eight pixels, two 16-bit ones per dword: taps 0 and 1, taps 2 and 3.
struct PairedWeights {
    __m256i first, second;
};

// bilinear_weights() of arithmetic.h for 16 pixels, as words: packs leaves four of the first and four of the second
// vector in each 128 bits, which the unpacking takes apart again.
IMGOPT_INLINE void weigh_bilinear(const __m256* fx, const __m256* fy, PairedWeights* to) {
    const auto words = [](const __m256* f, float unit) {
        const __m256 factor = _mm256_set1_ps(unit);
        return _mm256_packs_epi32(_mm256_cvtps_epi32(_mm256_mul_ps(f[0], factor)),
                                  _mm256_cvtps_epi32(_mm256_mul_ps(f[1], factor)));
    };
    const __m256i right = words(fx, kWeightSum), below = words(fy, 32768);  // saturates at 32767
    const __m256i left = _mm256_sub_epi16(_mm256_set1_epi16(kWeightSum), right);
    const __m256i w11 = _mm256_mulhrs_epi16(right, below), w10 = _mm256_mulhrs_epi16(left, below);
    const __m256i w01 = _mm256_sub_epi16(right, w11), w00 = _mm256_sub_epi16(left, w10);
    to[0] = {_mm256_unpacklo_epi16(w00, w10), _mm256_unpacklo_epi16(w01, w11)};
    to[1] = {_mm256_unpackhi_epi16(w00, w10), _mm256_unpackhi_epi16(w01, w11)};
}

// bicubic_weights() of arithmetic.h.
IMGOPT_INLINE void bicubic_weights(__m256 f, __m256* to) {
    const __m256 one = _mm256_set1_ps(1), a = _mm256_set1_ps(static_cast<float>(kKeys)), g = _mm256_sub_ps(one, f);
    const auto near = [&](__m256 d) {
        const __m256 line = _mm256_fmadd_ps(_mm256_set1_ps(static_cast<float>(kKeys + 2)), d,
                                            _mm256_set1_ps(static_cast<float>(-kKeys - 3)));
        return _mm256_fmadd_ps(line, _mm256_mul_ps(d, d), one);
    };
    to[0] = _mm256_mul_ps(_mm256_mul_ps(a, f), _mm256_mul_ps(g, g));
    to[1] = near(f);
    to[2] = near(g);
    to[3] = _mm256_mul_ps(_mm256_mul_ps(a, g), _mm256_mul_ps(f, f));
}

// The columns' weights.
IMGOPT_INLINE void weigh_bicubic(const __m256* fx, PairedWeights* to) {
    const __m256 sum = _mm256_set1_ps(kWeightSum);
    const auto pair = [](__m256i even, __m256i odd) {
        return _mm256_blend_epi16(even, _mm256_slli_epi32(odd, 16), 0xaa);
    };
    for (int h = 0; h < 2; ++h) {
        __m256 w[4];
        bicubic_weights(fx[h], w);
        const __m256i w0 = _mm256_cvtps_epi32(_mm256_mul_ps(w[0], sum));
        const __m256i w2 = _mm256_cvtps_epi32(_mm256_mul_ps(w[2], sum));
        const __m256i w3 = _mm256_cvtps_epi32(_mm256_mul_ps(w[3], sum));
        const __m256i others = _mm256_add_epi32(w0, _mm256_add_epi32(w2, w3));
        to[h] = {pair(w0, _mm256_sub_epi32(_mm256_set1_epi32(kWeightSum), others)), pair(w2, w3)};
    }
}

// --- colours --------------------------------------------------------------------------------------------------------

IMGOPT_INLINE void apply_color(const ColorMap<float>& map, __m256* v) {
    const float* m = map.matrix;
    const __m256 r = v[0], g = v[1], b = v[2];
    for (int i = 0; i < 3; ++i, m += 4) {
        __m256 t = _mm256_fmadd_ps(_mm256_set1_ps(m[0]), r, _mm256_set1_ps(m[3]));
        t = _mm256_fmadd_ps(_mm256_set1_ps(m[1]), g, t);
        t = _mm256_fmadd_ps(_mm256_set1_ps(m[2]), b, t);
        v[i] = _mm256_min_ps(_mm256_set1_ps(map.high[i]), _mm256_max_ps(_mm256_set1_ps(map.low[i]), t));
    }
}

}  // namespace
}  // namespace imgopt::avx2

// The points of a block of pixels, and bilinear samples of some of them at a time: loops without branches over a
// coordinate, a tap or a channel, which the compiler turns into the vectors of the unit that includes this. Floating
// images, for which there is no window, are sampled this way.
#pragma once

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "epilogue.h"
#include "prepare.h"

namespace imgopt {
namespace {

// --- coordinates ---------------------------------------------------------------------------------------------------

// The points of a block, coordinate by coordinate, so that the loops over them become vector code.
template <class R>
struct Points {
    int32_t x[kBlock], y[kBlock];
    R fx[kBlock], fy[kBlock];
    bool finite[kBlock];

    Point<R> operator[](int i) const { return {x[i], y[i], fx[i], fy[i], finite[i]}; }
};

// affine_point() of whole block.
template <class R>
void affine_points(const Base<R>& base, Points<R>& to) {
    const R far = static_cast<R>(kFarInBlock);
    const auto along = [&](R step, R start, int32_t floor, int32_t* whole, R* fraction) {
        R at[kBlock];
        for (int i = 0; i < kBlock; ++i) at[i] = fused(step, static_cast<R>(i), start);
        if (!(at[kBlock - 1] < far && at[kBlock - 1] > -far))  // the last is the farthest
            for (int i = 0; i < kBlock; ++i) at[i] = clamped(at[i], -far, far);
        for (int i = 0; i < kBlock; ++i) {
            const R below = floor_of(at[i]);
            whole[i] = floor + static_cast<int32_t>(below);
            fraction[i] = at[i] - below;
        }
    };
    along(base.step_x, base.fx, base.x, to.x, to.fx);
    along(base.step_y, base.fy, base.y, to.y, to.fy);
    for (int i = 0; i < kBlock; ++i) to.finite[i] = base.finite;
}

template <class R>
void round_axis(int32_t* whole, R* fraction) {
    for (int i = 0; i < kBlock; ++i) {
        whole[i] += fraction[i] >= static_cast<R>(0.5);
        fraction[i] = 0;
    }
}

template <class R>
void fold_axis(int32_t* whole, R* fraction, int32_t n, Padding padding) {
    if (padding < Padding::reflect) return;
    int outside = 0;
    for (int i = 0; i < kBlock; ++i) outside |= (whole[i] < 0) | (whole[i] >= n);
    for (int i = 0; outside && i < kBlock; ++i) fold(whole[i], fraction[i], n, padding);
}

// The points of the block at column x0 of row y, mirrored where the padding does that.
template <class R>
void locate_points(const AffineWarp& p, const Map& map, int32_t width, int32_t height, int64_t x0, int64_t y, int count,
                   Points<R>& to) {
    if (map.affine) {
        affine_points(affine_base<R>(map.m, x0, y), to);
    } else {
        for (int i = 0; i < kBlock; ++i) {
            const Point<R> at = perspective_point<R>(map.m, x0 + (i < count ? i : 0), y);
            to.x[i] = at.x;
            to.y[i] = at.y;
            to.fx[i] = at.fx;
            to.fy[i] = at.fy;
            to.finite[i] = at.finite;
        }
    }
    if (p.interpolation == Interpolation::nearest) {
        round_axis(to.x, to.fx);
        round_axis(to.y, to.fy);
    }
    fold_axis(to.x, to.fx, width, p.padding);
    fold_axis(to.y, to.fy, height, p.padding);
}

// --- bilinear samples ----------------------------------------------------------------------------------------------

// Bilinear samples of some points at a time, without a branch per tap: taps beyond the image read a pixel inside, and
// are fill afterwards where the padding says so.
// The two taps of each point along one axis, of coordinates that are mirrored already.
struct AxisTaps {
    int32_t at[2][kSome], kept[2][kSome];

    AxisTaps(const int32_t* whole, int32_t n, Padding padding) {
        const int32_t past = padding == Padding::reflect && n > 1 ? n - 2 : n - 1;
        const int32_t always = padding != Padding::constant;
        for (int k = 0; k < 2; ++k)
            for (int i = 0; i < kSome; ++i) {
                const int32_t v = whole[i] + k, least = v < 0 ? 0 : v;
                at[k][i] = least < n ? least : past;
                kept[k][i] = ((v >= 0) & (v < n)) | always;
            }
    }
};

template <class R>
struct FractionWeights {
    const R *fx, *fy;

    R blended(int i, R p00, R p01, R p10, R p11) const {
        const R above = fused(fx[i], p01 - p00, p00), below = fused(fx[i], p11 - p10, p10);
        return fused(fy[i], below - above, above);
    }
};
template <class R>
struct IntegerWeights {
    BilinearWeights w[kSome];

    IntegerWeights(const R* fx, const R* fy) {
        for (int i = 0; i < kSome; ++i) w[i] = bilinear_weights(fx[i], fy[i]);
    }
    R blended(int i, R p00, R p01, R p10, R p11) const {
        return static_cast<R>(static_cast<int32_t>(p00) * w[i].w00 + static_cast<int32_t>(p01) * w[i].w01 +
                              static_cast<int32_t>(p10) * w[i].w10 + static_cast<int32_t>(p11) * w[i].w11);
    }
};
template <class R>
IntegerWeights<R> weights_of(const uint8_t*, const R* fx, const R* fy) {
    return {fx, fy};
}
template <class T, class R>
FractionWeights<R> weights_of(const T*, const R* fx, const R* fy) {
    return {fx, fy};
}

// One tap of kSome points.
template <class T, class Index, class R>
IMGOPT_INLINE void gather(const T* data, const Index* at, R* to) {
    for (int i = 0; i < kSome; ++i) to[i] = static_cast<R>(widened(data[at[i]]));
}
#if defined(__AVX512F__)
IMGOPT_INLINE void gather(const float* data, const int32_t* at, float* to) {
    const __m512 zero = _mm512_setzero_ps();
    _mm512_storeu_ps(to, _mm512_mask_i32gather_ps(zero, 0xffff, _mm512_loadu_si512(at), data, 4));
}
#elif defined(__AVX2__)
IMGOPT_INLINE void gather(const float* data, const int32_t* at, float* to) {
    for (int i = 0; i < kSome; i += 8) {
        const __m256i offset = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at + i));
        _mm256_storeu_ps(to + i, _mm256_i32gather_ps(data, offset, 4));
    }
}
#endif
#if defined(__F16C__)
// The conversion of arithmetic.h takes six instructions. A signalling NaN, which this one quiets, the blend would
// quiet.
template <class Index>
IMGOPT_INLINE void gather(const Half* data, const Index* at, float* to) {
    alignas(16) uint16_t bits[kSome];
    for (int i = 0; i < kSome; ++i) bits[i] = data[at[i]].bits;
    for (int i = 0; i < kSome; i += 8)
        _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_load_si128(reinterpret_cast<const __m128i*>(bits + i))));
}
#endif

template <class T, class R>
bool all_inside(const Source<T>& source, const Points<R>& points, int first) {
    int inside = 1;
    for (int i = first; i < first + kSome; ++i)
        inside &= (points.x[i] >= 0) & (points.y[i] >= 0) & (points.x[i] < source.width - 1) &
                  (points.y[i] < source.height - 1);
    return inside != 0;
}

// Index: 32 bits where they reach, which is what the gathers of vector units take.
template <class Index, class T, class R>
void bilinear_some(const AffineWarp& p, const Source<T>& source, const Points<R>& points, int first, int64_t c0,
                   int channels, R* to) {
    const auto weights = weights_of(source.data, points.fx + first, points.fy + first);
    const Index row = static_cast<Index>(source.row), column = static_cast<Index>(source.column);
    const auto blend = [&](int c, const R(*taps)[kSome]) {
        for (int i = 0; i < kSome; ++i)
            to[c * kBlock + first + i] = weights.blended(i, taps[0][i], taps[1][i], taps[2][i], taps[3][i]);
    };
    R taps[4][kSome];
    Index at[4][kSome];
    if (all_inside(source, points, first)) {
        for (int i = 0; i < kSome; ++i) at[0][i] = points.y[first + i] * row + points.x[first + i] * column;
        for (int c = 0; c < channels; ++c) {
            const T* data = source.data + (c0 + c) * source.channel;
            for (int k = 0; k < 4; ++k) gather(data + k / 2 * source.row + k % 2 * source.column, at[0], taps[k]);
            blend(c, taps);
        }
        return;
    }
    const AxisTaps x(points.x + first, source.width, p.padding), y(points.y + first, source.height, p.padding);
    for (int k = 0; k < 4; ++k)
        for (int i = 0; i < kSome; ++i) at[k][i] = y.at[k / 2][i] * row + x.at[k % 2][i] * column;
    for (int c = 0; c < channels; ++c) {
        const R fill = static_cast<R>(p.fill[c0 + c]);
        for (int k = 0; k < 4; ++k) {
            gather(source.data + (c0 + c) * source.channel, at[k], taps[k]);
            for (int i = 0; i < kSome; ++i) taps[k][i] = y.kept[k / 2][i] & x.kept[k % 2][i] ? taps[k][i] : fill;
        }
        blend(c, taps);
    }
}

// Whether offsets within a channel fit into 32 bits.
template <class T>
bool near_offsets(const Source<T>& source) {
    const auto size = [](int64_t step) { return step < 0 ? -step : step; };
    return size(source.row) < (1 << 30) / source.height && size(source.column) < (1 << 30) / source.width;
}

}  // namespace
}  // namespace imgopt

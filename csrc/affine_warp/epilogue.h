// The end of a sample's way (contract.h, "Epilogue") for a block of pixels: colour matrix, scale and offset, the
// output's type and layout. Values are computed sixteen at a time, whatever part of these the image has, in loops that
// become vectors of the unit that includes this; only placing them counts.
#pragma once

#if defined(__F16C__)
#include <immintrin.h>
#endif

#include "arithmetic.h"

namespace imgopt {
namespace {

constexpr int kSome = 16;  // pixels that the loops over a block take together

template <class Body>
IMGOPT_INLINE void for_each_some(int count, const Body& body) {
    for (int first = 0; first < count; first += kSome)
        for (int i = first; i < first + kSome; ++i) body(i);
}

// --- colours -------------------------------------------------------------------------------------------------------

// Factor that takes a sample to units of [0, 1].
inline double to_unit(const AffineWarp& p, double whole) { return p.images_dtype == DType::u8 ? 1 / (255 * whole) : 1; }

// The colour matrix with all that is linear before and after it: from samples to what is narrowed to the output's type.
template <class R>
struct ColorMap {
    R matrix[12] = {};
    R low[3] = {}, high[3] = {};  // what 0 and 1 become

    ColorMap() = default;
    ColorMap(const AffineWarp& p, int64_t image, double whole) {
        const double* m = p.color_matrix + image * p.color_stride;
        const bool levels = p.output_dtype == DType::u8;
        for (int i = 0; i < 3; ++i) {
            const double scale = levels ? 255 : p.scale[i], offset = levels ? 0 : p.offset[i];
            for (int j = 0; j < 3; ++j) matrix[4 * i + j] = static_cast<R>(scale * m[4 * i + j] * to_unit(p, whole));
            matrix[4 * i + 3] = static_cast<R>(scale * m[4 * i + 3] + offset);
            const R zero = static_cast<R>(scale * 0 + offset), one = static_cast<R>(scale + offset);
            low[i] = zero < one ? zero : one;
            high[i] = zero < one ? one : zero;
        }
    }
};

template <class R>
void color_block(const ColorMap<R>& map, int count, R* values) {
    for_each_some(count, [&](int i) __attribute__((always_inline)) {
        const R rgb[3] = {values[i], values[kBlock + i], values[2 * kBlock + i]};
        for (int c = 0; c < 3; ++c) {
            const R* m = map.matrix + 4 * c;
            const R sum = fused(m[2], rgb[2], fused(m[1], rgb[1], fused(m[0], rgb[0], m[3])));
            values[c * kBlock + i] = clamped(sum, map.low[c], map.high[c]);
        }
    });
}

// --- types and layout ----------------------------------------------------------------------------------------------

template <class T, class R>
void narrow_block(const R* values, R factor, R add, int count, T* to) {
    for_each_some(count, [&](int i) __attribute__((always_inline)) { narrow(fused(values[i], factor, add), to + i); });
}
#if defined(__F16C__)
inline void narrow_block(const float* values, float factor, float add, int count, Half* to) {
    const __m256 by = _mm256_set1_ps(factor), offset = _mm256_set1_ps(add);
    for (int i = 0; i < count; i += 8) {
        const __m256 v = _mm256_fmadd_ps(_mm256_loadu_ps(values + i), by, offset);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
    }
}
#endif

template <int channels, class T>
void interleave(const T (*planes)[kBlock], int count, T* to) {
    for (int i = 0; i < count; ++i)
        for (int c = 0; c < channels; ++c) to[i * channels + c] = planes[c][i];
}

// `count` pixels of up to four channels, whose elements lie `channel` and `pixel` apart.
template <class T>
void place_block(const T (*planes)[kBlock], int channels, int count, int64_t channel, int64_t pixel, T* to) {
    if (channel == 1 && pixel == 3 && channels == 3) return interleave<3>(planes, count, to);
    if (channel == 1 && pixel == 4 && channels == 4) return interleave<4>(planes, count, to);
    for (int c = 0; c < channels; ++c, to += channel) {
        if (pixel == 1)
            __builtin_memcpy(to, planes[c], static_cast<size_t>(count) * sizeof(T));
        else
            for (int i = 0; i < count; ++i) to[i * pixel] = planes[c][i];
    }
}

// Channels [c0, c0 + channels), each at its own kBlock values; `offset`: of the first element of the output.
template <class R>
void store_block(const AffineWarp& p, double whole, int64_t offset, int count, int64_t c0, int channels,
                 const R* values) {
    const auto store = [&]<class T>(T*, const auto& narrowed) {
        T planes[4][kBlock];
        for (int c = 0; c < channels; ++c) narrowed(values + c * kBlock, c0 + c, planes[c]);
        T* to = static_cast<T*>(p.output) + offset;
        place_block(planes, channels, count, p.output_stride[1], p.output_stride[3], to);
    };
    const bool colored = p.color_matrix != nullptr;  // and hence scaled
    const auto scaled = [&](const R* from, int64_t c, auto* to) {
        const double factor = colored ? 1 : p.scale[c] * to_unit(p, whole), add = colored ? -0.0 : p.offset[c];
        narrow_block(from, static_cast<R>(factor), static_cast<R>(add), count, to);
    };
    const auto levels = [&](const R* from, int64_t, uint8_t* to) {
        const R factor = static_cast<R>(colored ? 1 : p.images_dtype == DType::u8 ? 1 / whole : 255);
        for_each_some(count, [&](int i) __attribute__((always_inline)) { to[i] = level(from[i] * factor); });
    };
    switch (p.output_dtype) {
        case DType::u8: return store(static_cast<uint8_t*>(nullptr), levels);
        case DType::f16: return store(static_cast<Half*>(nullptr), scaled);
        case DType::bf16: return store(static_cast<BFloat16*>(nullptr), scaled);
        case DType::f32: return store(static_cast<float*>(nullptr), scaled);
        default: return store(static_cast<double*>(nullptr), scaled);
    }
}

}  // namespace
}  // namespace imgopt

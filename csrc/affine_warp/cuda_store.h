// affine_warp on CUDA, behind the samples: the colour matrix, the factors of mean and std, the conversion, and vector
// stores wherever the output's strides allow them.
#pragma once

#include <type_traits>

#include "cuda_plan.h"

namespace imgopt {
namespace {

// How the elements of a thread's pixels lie: each somewhere, or channel by channel, or pixel by pixel, side by side and
// aligned to vectors.
enum class Order : int { scattered, planes, pixels };

// Of threads that write `pixels` neighbours, from a multiple of that on, and `count` of the channels at once.
inline Order order_of(const AffineWarp& p, int64_t element, int64_t pixels, int64_t count) {
    const int64_t* stride = p.output_stride;
    const int64_t vector = pixels * element < 16 ? pixels * element : 16;
    const auto aligned = [&](int64_t step) { return step * element % vector == 0; };
    if (reinterpret_cast<uintptr_t>(p.output) % static_cast<uintptr_t>(vector) != 0 || !aligned(stride[0]) ||
        !aligned(stride[2]))
        return Order::scattered;
    if (stride[3] == 1 && aligned(stride[1])) return Order::planes;
    return stride[1] == 1 && stride[3] == count && p.channels == count ? Order::pixels : Order::scattered;
}

// rgb in units of [0, 1] through the colour matrix; not yet clamped. As colored() of rows.h.
template <class R, class M>
__device__ inline void color_pixel(const M* m, const R (&rgb)[3], R (&to)[3]) {
#pragma unroll
    for (int i = 0; i < 3; ++i, m += 4) {
        const R red = fused(static_cast<R>(m[0]), rgb[0], static_cast<R>(m[3]));
        to[i] = fused(static_cast<R>(m[2]), rgb[2], fused(static_cast<R>(m[1]), rgb[1], red));
    }
}

// Samples through an image's matrix, and clamped.
template <class R, int pixels>
__device__ inline void color_pixels(const MatrixView& color, R unit, int64_t image, R (&values)[pixels][3]) {
    R m[12];
#pragma unroll
    for (int i = 0; i < 12; ++i) m[i] = static_cast<R>(color.at(image, i));
#pragma unroll
    for (int i = 0; i < pixels; ++i) {
        R rgb[3], to[3];
#pragma unroll
        for (int c = 0; c < 3; ++c) rgb[c] = values[i][c] * unit;
        color_pixel(m, rgb, to);
#pragma unroll
        for (int c = 0; c < 3; ++c) values[i][c] = clamped<R>(to[c], 0, 1);
    }
}

template <class R>
__device__ inline void put(R v, uint8_t& to) {
    to = level(v);
}
// level() without a conversion: the last byte of a sum whose last bit is worth 1.
__device__ inline void put(float v, uint8_t& to) {
    v = v > 0 ? v : 0;  // NaN too
    to = static_cast<uint8_t>(bits_of_float((v < 255 ? v : 255) + kOnes));
}
__device__ inline void put(float v, Half& to) { to.bits = half_of_float(v); }
__device__ inline void put(float v, BFloat16& to) { to.bits = bfloat16_of_float(v); }
template <class R, class Out>
__device__ inline void put(R v, Out& to) {
    if constexpr (sizeof(Out) == 2)
        put(static_cast<float>(v), to);
    else
        to = static_cast<Out>(v);
}

// Elements as one store of 4, 8 or 16 bytes. As words: a compiler takes a store of small elements apart again.
template <class Out, int count, class R>
__device__ inline void put_vector(const R (&v)[count], Out* to) {
    constexpr int bytes = count * sizeof(Out);
    uint32_t words[bytes / 4];
    if constexpr (sizeof(Out) == 2) {
#pragma unroll
        for (int i = 0; i < count / 2; ++i) {
            const float low = static_cast<float>(v[2 * i]), high = static_cast<float>(v[2 * i + 1]);
            words[i] = std::is_same_v<Out, Half> ? halves_of_floats(low, high) : bfloat16s_of_floats(low, high);
        }
    } else {
        Out made[count];
#pragma unroll
        for (int e = 0; e < count; ++e) put(v[e], made[e]);
        __builtin_memcpy(words, made, bytes);
    }
    if constexpr (bytes == 16)
        *reinterpret_cast<uint4*>(to) = make_uint4(words[0], words[1], words[2], words[3]);
    else if constexpr (bytes == 8)
        *reinterpret_cast<uint2*>(to) = {words[0], words[1]};
    else
        *reinterpret_cast<uint32_t*>(to) = words[0];
}

// `count` channels of neighbouring pixels, `left` of which are in the output, from element `offset` on; the channels'
// numbers start at n0.
template <class Out, class R, int pixels, int count>
__device__ inline void store_pixels(const AffineWarp& p, Order order, const WarpNumbers<R>& n,
                                    const R (&values)[pixels][count], int64_t offset, int left, int n0) {
    constexpr int most = 16 / sizeof(Out), wide = pixels < most ? pixels : most;  // of a vector
    const int64_t channel = p.output_stride[1];
    Out* to = static_cast<Out*>(p.output) + offset;
    const auto made = [&](int i, int c) {
        return sizeof(Out) == 1 ? values[i][c] * n.levels : fused(values[i][c], n.factor[n0 + c], n.add[n0 + c]);
    };
    if (order == Order::planes && left >= pixels) {
#pragma unroll
        for (int c = 0; c < count; ++c)
#pragma unroll
            for (int first = 0; first < pixels; first += wide) {
                R next[wide];
#pragma unroll
                for (int e = 0; e < wide; ++e) next[e] = made(first + e, c);
                put_vector(next, to + c * channel + first);
            }
    } else if (order == Order::pixels && left >= pixels) {
#pragma unroll
        for (int first = 0; first < pixels * count; first += wide) {
            R next[wide];
#pragma unroll
            for (int e = 0; e < wide; ++e) next[e] = made((first + e) / count, (first + e) % count);
            put_vector(next, to + first);
        }
    } else {
#pragma unroll
        for (int i = 0; i < pixels; ++i)
#pragma unroll
            for (int c = 0; c < count; ++c)
                if (i < left) put(made(i, c), to[i * p.output_stride[3] + c * channel]);
    }
}

template <class R, int pixels, int count>
__device__ inline void finish_pixels(const AffineWarp& p, Order order, const WarpNumbers<R>& n,
                                     const R (&values)[pixels][count], int64_t offset, int left, int n0) {
    if constexpr (sizeof(R) == 8) {
        if (p.output_dtype == DType::f64) return store_pixels<double>(p, order, n, values, offset, left, n0);
    }
    switch (p.output_dtype) {
        case DType::u8: return store_pixels<uint8_t>(p, order, n, values, offset, left, n0);
        case DType::f16: return store_pixels<Half>(p, order, n, values, offset, left, n0);
        case DType::bf16: return store_pixels<BFloat16>(p, order, n, values, offset, left, n0);
        default: return store_pixels<float>(p, order, n, values, offset, left, n0);
    }
}

}  // namespace
}  // namespace imgopt

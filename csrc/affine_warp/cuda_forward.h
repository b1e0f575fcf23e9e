// affine_warp on CUDA, forward: one kernel reads the images and writes what the network takes. A thread has four
// neighbouring output pixels, which share the float64 part of their coordinates and leave as one vector store per
// channel; a block has 32 × 32, whose rotated footprint stays in the first-level cache.
//
// A box filter (antialias) is a pass of its own before it, over the images that have one: its size is known on the
// device only, so both launches are always the same.
#pragma once

#include <type_traits>

#include "cuda_sample.h"

namespace imgopt {
namespace {

constexpr int kPixels = 4;  // per thread
constexpr int kTileSide = 32;
constexpr int kTilesDown =
    4;  // of a block, where there are blocks enough: what an image's pixels share is prepared once
constexpr int kWarpThreads = kTileSide * kTileSide / kPixels;

// --- plans ---------------------------------------------------------------------------------------------------------

// A small float32 or float64 matrix per image, as torch has it.
struct MatrixView {
    const void* data;  // or null
    int64_t stride[3];
    int rows;
    bool wide;

    __device__ double at(int64_t image, int row, int column) const {
        const int64_t i = image * stride[0] + row * stride[1] + column * stride[2];
        return wide ? static_cast<const double*>(data)[i] : static_cast<const float*>(data)[i];
    }
};

// By the adjugate; every entry NaN where the determinant vanishes or is not finite.
__device__ inline void invert(const double* m, double* to) {
    const double c0 = m[4] * m[8] - m[5] * m[7], c1 = m[5] * m[6] - m[3] * m[8], c2 = m[3] * m[7] - m[4] * m[6];
    const double r = 1 / (m[0] * c0 + m[1] * c1 + m[2] * c2);
    const double adjugate[9] = {c0, m[2] * m[7] - m[1] * m[8], m[1] * m[5] - m[2] * m[4],
                                c1, m[0] * m[8] - m[2] * m[6], m[2] * m[3] - m[0] * m[5],
                                c2, m[1] * m[6] - m[0] * m[7], m[0] * m[4] - m[1] * m[3]};
    for (int i = 0; i < 9; ++i) to[i] = finite(r) ? adjugate[i] * r : r - r;
}

__global__ void plan_images(AffineWarp p, const MatrixView matrix, const MatrixView color, ImagePlan* plans) {
    const int64_t step = int64_t{gridDim.x} * blockDim.x;
    for (int64_t image = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; image < p.batch; image += step) {
        double m[9] = {0, 0, 0, 0, 0, 0, 0, 0, 1};
        for (int i = 0; i < 3 * matrix.rows; ++i) m[i] = matrix.at(image, i / 3, i % 3);
        AffineWarp own = p;
        own.matrix = m;
        own.matrix_stride = 0;
        ImagePlan plan{};
        plan.map = map_of(own, 0);
        invert(plan.map.m, plan.inverse);
        for (int i = 0; color.data && i < 12; ++i) plan.color[i] = color.at(image, i / 4, i % 4);
        plans[image] = plan;
    }
}

// --- box filter ----------------------------------------------------------------------------------------------------

__device__ inline int64_t boxes(int64_t side, int64_t box) { return (side + box - 1) / box; }

// Elements of scratch per image: a box takes at least two pixels along one axis.
__host__ inline int64_t boxed_elements(const AffineWarp& p) {
    const int64_t half_width = (p.width + 1) / 2 * p.height, half_height = (p.height + 1) / 2 * p.width;
    return (half_width > half_height ? half_width : half_height) * p.channels;
}

__device__ inline void put_mean(uint64_t sum, int64_t count, uint8_t* to) {
    *to = static_cast<uint8_t>((2 * sum + static_cast<uint64_t>(count)) / (2 * static_cast<uint64_t>(count)));
}
template <class T>
__device__ void put_mean(double sum, int64_t count, T* to) {
    narrow(sum / static_cast<double>(count), to);
}

template <class T>
__device__ Pixels<T> image_pixels(const AffineWarp& p, int64_t image) {
    const uint8_t* table = p.table ? p.table + image * p.table_stride : nullptr;
    return {static_cast<const T*>(p.images) + image * p.images_stride[0],
            p.images_stride[2],
            p.images_stride[3],
            p.images_stride[1],
            static_cast<int32_t>(p.height),
            static_cast<int32_t>(p.width),
            table};
}

// The image behind the box filter, where it has one.
template <class T>
__device__ Pixels<T> sampled_pixels(const AffineWarp& p, const Map& map, const T* boxed, int64_t boxed_stride,
                                    int64_t image) {
    if (map.box_x == 1 && map.box_y == 1) return image_pixels<T>(p, image);
    const int64_t width = boxes(p.width, map.box_x);
    return {boxed + image * boxed_stride,
            width * p.channels,
            p.channels,
            1,
            static_cast<int32_t>(boxes(p.height, map.box_y)),
            static_cast<int32_t>(width),
            nullptr};
}

// Blocks (along y) of one image (along x, grid-stride).
template <class T>
__global__ void box_filter(const AffineWarp p, const ImagePlan* plans, T* boxed, int64_t boxed_stride) {
    using Sum = std::conditional_t<sizeof(T) == 1, uint64_t, double>;
    for (int64_t image = blockIdx.x; image < p.batch; image += gridDim.x) {
        const int32_t box_x = plans[image].map.box_x, box_y = plans[image].map.box_y;
        if (box_x == 1 && box_y == 1) continue;
        const Pixels<T> s = image_pixels<T>(p, image);
        const int64_t width = boxes(p.width, box_x), count = boxes(p.height, box_y) * width * p.channels;
        const int64_t step = int64_t{gridDim.y} * blockDim.x;
        for (int64_t i = int64_t{blockIdx.y} * blockDim.x + threadIdx.x; i < count; i += step) {
            const int64_t c = i % p.channels, x = i / p.channels % width, y = i / p.channels / width;
            const int64_t y0 = y * box_y, y1 = y0 + box_y < p.height ? y0 + box_y : p.height;
            const int64_t x0 = x * box_x, x1 = x0 + box_x < p.width ? x0 + box_x : p.width;
            Sum sum = 0;
            for (int64_t v = y0; v < y1; ++v)
                for (int64_t u = x0; u < x1; ++u)
                    sum += static_cast<Sum>(
                        value_at(s, v * s.row + u * s.column + c * s.channel, static_cast<int>(c), 0.0));
            put_mean(sum, (y1 - y0) * (x1 - x0), boxed + image * boxed_stride + i);
        }
    }
}

// --- points --------------------------------------------------------------------------------------------------------

// The sampling point of output pixel (x, y), folded into the source where its padding mirrors; `base` is that of x's
// block of columns, for an affine map.
template <class R, Interpolation interpolation>
__device__ inline Point<R> sampling_point(const Map& map, const Base<R>& base, int64_t x, int64_t y, int32_t height,
                                          int32_t width, Padding padding) {
    Point<R> at = map.affine ? affine_point(base, static_cast<int>(x % kBlock)) : perspective_point<R>(map.m, x, y);
    if (interpolation == Interpolation::nearest) {
        at.x += at.fx >= static_cast<R>(0.5);
        at.y += at.fy >= static_cast<R>(0.5);
        at.fx = at.fy = 0;
    }
    fold(at.x, at.fx, width, padding);
    fold(at.y, at.fy, height, padding);
    return at;
}

// --- epilogue ------------------------------------------------------------------------------------------------------

// rgb in units of [0, 1] through the colour matrix; not yet clamped. As colored() of rows.h.
template <class R>
__device__ inline void color_pixel(const double* m, const R (&rgb)[3], R (&to)[3]) {
#pragma unroll
    for (int i = 0; i < 3; ++i, m += 4) {
        const R red = fused(static_cast<R>(m[0]), rgb[0], static_cast<R>(m[3]));
        to[i] = fused(static_cast<R>(m[2]), rgb[2], fused(static_cast<R>(m[1]), rgb[1], red));
    }
}

template <class R>
__device__ inline void put(R v, uint8_t& to) {
    to = level(v);
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

// Four elements as one store.
template <class Out>
struct alignas(4 * sizeof(Out) > 16 ? 16 : 4 * sizeof(Out)) Four {
    Out of[4];
};

// The thread's pixels of channels [c0, c0 + count): vectors where they lie side by side and aligned.
template <class Out, class R, int count>
__device__ inline void store_pixels(const AffineWarp& p, const WarpNumbers<R>& n, const R (&values)[kPixels][count],
                                    int64_t image, int64_t y, int64_t x0, int64_t c0, int n0) {
    const int64_t channel = p.output_stride[1], column = p.output_stride[3];
    Out* to =
        static_cast<Out*>(p.output) + image * p.output_stride[0] + y * p.output_stride[2] + x0 * column + c0 * channel;
    Out made[kPixels][count];
#pragma unroll
    for (int i = 0; i < kPixels; ++i)
#pragma unroll
        for (int c = 0; c < count; ++c)
            if constexpr (sizeof(Out) == 1)
                put(values[i][c] * n.levels, made[i][c]);
            else
                put(fused(values[i][c], n.factor[n0 + c], n.add[n0 + c]), made[i][c]);
    const bool whole = x0 + kPixels <= p.output_width;
    const uintptr_t address = reinterpret_cast<uintptr_t>(to);
    constexpr uintptr_t unaligned = alignof(Four<Out>) - 1;
    if (whole && column == 1 && ((address | channel * sizeof(Out)) & unaligned) == 0) {
#pragma unroll
        for (int c = 0; c < count; ++c)
            *reinterpret_cast<Four<Out>*>(to + c * channel) = {made[0][c], made[1][c], made[2][c], made[3][c]};
    } else if (whole && channel == 1 && column == count && (address & unaligned) == 0) {
        Four<Out>* vectors = reinterpret_cast<Four<Out>*>(to);
#pragma unroll
        for (int v = 0; v < count; ++v) {
            Four<Out> four;
#pragma unroll
            for (int e = 0; e < 4; ++e) four.of[e] = made[(4 * v + e) / count][(4 * v + e) % count];
            vectors[v] = four;
        }
    } else {
#pragma unroll
        for (int i = 0; i < kPixels; ++i)
#pragma unroll
            for (int c = 0; c < count; ++c)
                if (x0 + i < p.output_width) to[i * column + c * channel] = made[i][c];
    }
}

template <class R, int count>
__device__ inline void finish_pixels(const AffineWarp& p, const WarpNumbers<R>& n, const double* color,
                                     R (&values)[kPixels][count], int64_t image, int64_t y, int64_t x0, int64_t c0,
                                     int n0) {
    if constexpr (count == 3)
        if (color) {
#pragma unroll
            for (int i = 0; i < kPixels; ++i) {
                R rgb[3], to[3];
#pragma unroll
                for (int c = 0; c < 3; ++c) rgb[c] = values[i][c] * n.unit;
                color_pixel(color, rgb, to);
#pragma unroll
                for (int c = 0; c < 3; ++c) values[i][c] = clamped<R>(to[c], 0, 1);
            }
        }
    if constexpr (sizeof(R) == 8) {
        if (p.output_dtype == DType::f64) return store_pixels<double>(p, n, values, image, y, x0, c0, n0);
    }
    switch (p.output_dtype) {
        case DType::u8: return store_pixels<uint8_t>(p, n, values, image, y, x0, c0, n0);
        case DType::f16: return store_pixels<Half>(p, n, values, image, y, x0, c0, n0);
        case DType::bf16: return store_pixels<BFloat16>(p, n, values, image, y, x0, c0, n0);
        default: return store_pixels<float>(p, n, values, image, y, x0, c0, n0);
    }
}

// --- the kernel ----------------------------------------------------------------------------------------------------

// C channels at once; with C = 1 any number, one after the other, numbers[0] being channel `first`.
struct WarpCall {
    AffineWarp p;
    const ImagePlan* plans;
    const void* boxed;
    int64_t boxed_stride;
    int64_t first, count;  // channels of this launch
    bool colored;
};

// Interleaved uint8 pixels under an affine map, if all taps of all of them are inside: then nothing is folded, and
// without branches the loads of all pixels are under way together. `lane` is the first pixel's place in its block of
// columns.
template <int C>
__device__ inline bool sample_packed_pixels(const Pixels<uint8_t>& s, const Base<float>& base, int lane,
                                            float (&values)[kPixels][C]) {
    Point<float> points[kPixels];
    bool inside = base.finite;
#pragma unroll
    for (int i = 0; i < kPixels; ++i) {
        points[i] = affine_point(base, lane + i);
        inside = inside && is_inside(s, points[i].x, points[i].y);
    }
    if (!inside) return false;
    const PackedPixels packed = packed_pixels(s);
#pragma unroll
    for (int i = 0; i < kPixels; ++i)
        sample_packed(packed, points[i].x, points[i].y, split_weights(points[i].fx, points[i].fy), values[i]);
    return true;
}

// Arrays here stay in registers: every index is a constant once the loops are unrolled. The general samples are too
// long to be written out four times; their loop puts its result where a comparison says.
template <class T, class R, int C, Interpolation interpolation>
__global__ void __launch_bounds__(kWarpThreads) warp_images(const WarpCall call, const WarpNumbers<R> n) {
    const AffineWarp& p = call.p;
    const int64_t x0 = int64_t{blockIdx.x} * kTileSide + threadIdx.x % (kTileSide / kPixels) * kPixels;
    if (x0 >= p.output_width) return;
    const int64_t first_row = blockIdx.y * int64_t{kTileSide} + threadIdx.x / (kTileSide / kPixels);
    for (int64_t image = blockIdx.z; image < p.batch; image += gridDim.z) {
        const ImagePlan& plan = call.plans[image];
        const Pixels<T> s = sampled_pixels(p, plan.map, static_cast<const T*>(call.boxed), call.boxed_stride, image);
        bool packed = false;
        if constexpr (can_be_packed<T, R, C>()) packed = is_packed<C>(s) && plan.map.affine;
        for (int64_t y = first_row; y < p.output_height; y += gridDim.y * int64_t{kTileSide}) {
            Base<R> base{};
            if (plan.map.affine) base = affine_base<R>(plan.map.m, x0 / kBlock * kBlock, y);
            const auto point = [&](int i) {
                return sampling_point<R, interpolation>(plan.map, base, x0 + i, y, s.height, s.width, p.padding);
            };
            for (int64_t c = call.first; c < call.first + call.count; c += C) {
                const int channel = static_cast<int>(c), number = static_cast<int>(c - call.first);
                R values[kPixels][C];
                bool done = false;
                if constexpr (can_be_packed<T, R, C>() && interpolation == Interpolation::bilinear)
                    done = packed && sample_packed_pixels(s, base, static_cast<int>(x0 % kBlock), values);
                if (!done) {
#pragma unroll 1
                    for (int i = 0; i < kPixels; ++i) {
                        R one[C];
                        const Point<R> at = point(i);
                        if (interpolation == Interpolation::bilinear && at.finite && is_inside(s, at.x, at.y))
                            sample_inside(s, at, channel, one);
                        else
                            sample_anywhere<T, R, C, interpolation>(s, at, p.padding, n, channel, number, one);
#pragma unroll
                        for (int k = 0; k < kPixels * C; ++k)
                            if (i == k / C) values[k / C][k % C] = one[k % C];
                    }
                }
                finish_pixels(p, n, call.colored ? plan.color : nullptr, values, image, y, x0, c, number);
            }
        }
    }
}

}  // namespace
}  // namespace imgopt

// affine_warp on CUDA, forward: one kernel reads the images and writes what the network takes. A block has a tile of
// 32 × 32 output pixels, a thread four or eight neighbours in a row, which share the float64 part of their coordinates
// and leave as vector stores.
//
// A box filter (antialias) is a pass of its own before it, over the images that have one: its size is known on the
// device only, so the launches are always the same.
#pragma once

#include <type_traits>

#include "cuda_plan.h"
#include "cuda_tile.h"

namespace imgopt {
namespace {

// --- points --------------------------------------------------------------------------------------------------------

// The sampling point of output pixel (x, y), folded into the source where its padding mirrors; `base` is that of x's
// block of columns, for an affine map.
template <class R, Interpolation interpolation>
__device__ inline Point<R> sampling_point(const Map& map, const Base<R>& base, int64_t x, int64_t y, int32_t height,
                                          int32_t width, Padding padding) {
    Point<R> at = map.affine ? affine_point(base, static_cast<int>(x % kBlock)) : perspective_point<R>(map.m, x, y);
    round_nearest<interpolation>(at);
    fold(at.x, at.fx, width, padding);
    fold(at.y, at.fy, height, padding);
    return at;
}

// --- epilogue ------------------------------------------------------------------------------------------------------

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

// A run of pixels of a row: where its first element goes, and how many pixels of it there are.
struct Run {
    int64_t offset;
    int64_t left;
};

// `count` channels from `n0` on of a run: vectors where elements lie side by side and aligned.
template <class Out, class R, int pixels, int count>
__device__ inline void store_pixels(const AffineWarp& p, const WarpNumbers<R>& n, const R (&values)[pixels][count],
                                    const Run& run, int n0) {
    constexpr int most = 16 / sizeof(Out), wide = pixels < most ? pixels : most;  // of a vector
    const int64_t channel = p.output_stride[1], column = p.output_stride[3];
    Out* to = static_cast<Out*>(p.output) + run.offset;
    R made[pixels][count];
#pragma unroll
    for (int i = 0; i < pixels; ++i)
#pragma unroll
        for (int c = 0; c < count; ++c)
            made[i][c] =
                sizeof(Out) == 1 ? values[i][c] * n.levels : fused(values[i][c], n.factor[n0 + c], n.add[n0 + c]);
    const uintptr_t address = reinterpret_cast<uintptr_t>(to);
    constexpr uintptr_t unaligned = wide * sizeof(Out) - 1;
    if (run.left >= pixels && column == 1 && ((address | channel * sizeof(Out)) & unaligned) == 0) {
#pragma unroll
        for (int c = 0; c < count; ++c)
#pragma unroll
            for (int first = 0; first < pixels; first += wide) {
                R next[wide];
#pragma unroll
                for (int e = 0; e < wide; ++e) next[e] = made[first + e][c];
                put_vector(next, to + c * channel + first);
            }
    } else if (run.left >= pixels && channel == 1 && column == count && (address & unaligned) == 0) {
#pragma unroll
        for (int first = 0; first < pixels * count; first += wide) {
            R next[wide];
#pragma unroll
            for (int e = 0; e < wide; ++e) next[e] = made[(first + e) / count][(first + e) % count];
            put_vector(next, to + first);
        }
    } else {
#pragma unroll
        for (int i = 0; i < pixels; ++i)
#pragma unroll
            for (int c = 0; c < count; ++c)
                if (i < run.left) put(made[i][c], to[i * column + c * channel]);
    }
}

template <class R, int pixels, int count>
__device__ inline void finish_pixels(const AffineWarp& p, const WarpNumbers<R>& n, const R (&values)[pixels][count],
                                     const Run& run, int n0) {
    if constexpr (sizeof(R) == 8) {
        if (p.output_dtype == DType::f64) return store_pixels<double>(p, n, values, run, n0);
    }
    switch (p.output_dtype) {
        case DType::u8: return store_pixels<uint8_t>(p, n, values, run, n0);
        case DType::f16: return store_pixels<Half>(p, n, values, run, n0);
        case DType::bf16: return store_pixels<BFloat16>(p, n, values, run, n0);
        default: return store_pixels<float>(p, n, values, run, n0);
    }
}

// --- the kernel ----------------------------------------------------------------------------------------------------

// C channels at once; with C = 1 any number, one after the other, numbers[0] being channel `first`.
struct WarpCall {
    AffineWarp p;
    MatrixView matrix, color;  // color.data is null where there is none
    const ImagePlan* plans;    // where there is a box filter, else null
    const void* boxed;
    int64_t boxed_stride;
    int64_t first, count;  // channels of this launch
};

// One image as a thread sees it.
template <class T>
struct Source {
    Map map;
    Pixels<T> pixels;
};

template <class T>
__device__ inline Source<T> source_of(const WarpCall& call, int64_t image) {
    Source<T> s;
    if (call.plans) {
        s.map = call.plans[image].map;
    } else {
        read_matrix(call.matrix, image, s.map.m);
        s.map.affine = is_affine(s.map.m);
        s.map.box_x = s.map.box_y = 1;
    }
    s.pixels = sampled_pixels(call.p, s.map, static_cast<const T*>(call.boxed), call.boxed_stride, image);
    return s;
}

// A thread's pixels: those from (x, y) of the output on.
struct Place {
    int64_t image, x, y;
};

template <class R>
__device__ inline Base<R> base_at(const Map& map, const Place& at) {
    return map.affine ? base_of<R>(map.m, at.x / kBlock * kBlock, at.y) : Base<R>{};
}

// Through the epilogue, to where they belong.
template <class R, int pixels, int count>
__device__ inline void put_pixels(const WarpCall& call, const WarpNumbers<R>& n, R (&values)[pixels][count],
                                  const Place& at, int channel, int number) {
    const AffineWarp& p = call.p;
    if constexpr (count == 3)
        if (call.color.data) color_pixels(call.color, n.unit, at.image, values);
    const int64_t* stride = p.output_stride;
    finish_pixels(
        p, n, values,
        Run{at.image * stride[0] + channel * stride[1] + at.y * stride[2] + at.x * stride[3], p.output_width - at.x},
        number);
}

// Its pixels from the staged region.
template <Interpolation interpolation, int pixels, int C>
__device__ inline void sample_region(const Region& region, const Base<float>& base, int lane, int32_t height,
                                     int32_t width, Padding padding, const uint32_t* staged,
                                     float (&values)[pixels][C]) {
    const float first = static_cast<float>(lane);
#pragma unroll
    for (int half = 0; half < pixels; half += 4) {  // what four need at once stays in registers
        Point<float> at[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            at[i] = near_point(base, first + static_cast<float>(half + i));
            round_nearest<interpolation>(at[i]);
        }
        if (region.folds)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                fold(at[i].x, at[i].fx, width, padding);
                fold(at[i].y, at[i].fy, height, padding);
            }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int place = (at[i].y - region.y) * kRegionPitch + (at[i].x - region.x);
            sample_staged<interpolation>(staged + place, at[i].fx, at[i].fy, values[half + i]);
        }
    }
}

// A thread's pixels from the image, four at a time. The general samples are too long to be written out four times;
// their loop puts its result where a comparison says, so that every index of an array is a constant and the array stays
// in registers.
template <class T, class R, int C, Interpolation interpolation>
__device__ inline void warp_from_image(const WarpCall& call, const WarpNumbers<R>& n, const Source<T>& source, Place at,
                                       int channel, int number) {
    const AffineWarp& p = call.p;
    const Pixels<T>& s = source.pixels;
    const Base<R> base = base_at<R>(source.map, at);
#pragma unroll 1
    for (int from = 0; from < kPixels<T, R, C> && at.x < p.output_width; from += 4, at.x += 4) {
        R values[4][C];
#pragma unroll 1
        for (int i = 0; i < 4; ++i) {
            R one[C];
            const Point<R> point =
                sampling_point<R, interpolation>(source.map, base, at.x + i, at.y, s.height, s.width, p.padding);
            if (interpolation == Interpolation::bilinear && point.finite && is_inside(s, point.x, point.y))
                sample_inside(s, point, channel, one);
            else
                sample_anywhere<T, R, C, interpolation>(s, point, p.padding, n, channel, number, one);
#pragma unroll
            for (int k = 0; k < 4 * C; ++k)
                if (i == k / C) values[k / C][k % C] = one[k % C];
        }
        put_pixels(call, n, values, at, channel, number);
    }
}

// The same where it is the exception: out of line, so that its registers are not the rule's.
template <class T, class R, int C, Interpolation interpolation>
__device__ __noinline__ void warp_by_exception(const WarpCall& call, const WarpNumbers<R>& n, Place at, int channel,
                                               int number) {
    warp_from_image<T, R, C, interpolation>(call, n, source_of<T>(call, at.image), at, channel, number);
}

// By all threads of a block; `mine`: this one's pixels are in the output.
template <class T, int C, Interpolation interpolation>
__device__ inline void warp_from_region(const WarpCall& call, const WarpNumbers<float>& n, const Source<T>& source,
                                        const Region& region, const Place& at, int channel, int number, bool mine) {
    constexpr int pixels = kPixels<T, float, C>;
    uint32_t* staged = dynamic_shared<uint32_t>();
    const AffineWarp& p = call.p;
    Pixels<T> s = source.pixels;
    s.data += channel * s.channel;
    if (s.table) s.table += channel * 256;
    uint32_t fill = 0;
#pragma unroll
    for (int k = 0; k < C; ++k) fill |= static_cast<uint32_t>(n.fill[number + k]) << (8 * k);
    const Base<float> base = near_base(source.map.m, at.x / kBlock * kBlock, at.y);
    stage_region<C, kTileThreads<T, float, C>>(s, region, p.padding, fill, staged);
    __syncthreads();
    if (!mine) return;
    float values[pixels][C];
    sample_region<interpolation>(region, base, static_cast<int>(at.x % kBlock), s.height, s.width, p.padding, staged,
                                 values);
    put_pixels(call, n, values, at, channel, number);
}

template <class T, class R, int C, Interpolation interpolation>
__global__ void __launch_bounds__(kTileThreads<T, R, C>, can_be_staged<T, R, C>() ? 8 : 1)
    warp_images(const __grid_constant__ WarpCall call, const __grid_constant__ WarpNumbers<R> n) {
    constexpr int across = kTileSide / kPixels<T, R, C>;  // threads
    const AffineWarp& p = call.p;
    const int row = static_cast<int>(threadIdx.x) / across, column = static_cast<int>(threadIdx.x) % across;
    const int64_t tile_x = int64_t{blockIdx.x} * kTileSide;
    for (int64_t image = blockIdx.z; image < p.batch; image += gridDim.z) {
        for (int64_t tile_y = int64_t{blockIdx.y} * kTileSide; tile_y < p.output_height;
             tile_y += gridDim.y * int64_t{kTileSide}) {
            const Source<T> source = source_of<T>(call, image);  // not kept from tile to tile: few blocks have two
            const Place at{image, tile_x + column * kPixels<T, R, C>, tile_y + row};
            const bool mine = at.x < p.output_width && at.y < p.output_height;
            bool staged = false;
            Region region{};
            if constexpr (can_be_staged<T, R, C>())
                staged =
                    source.map.affine && plan_region<interpolation>(source.map.m, tile_x, tile_y, source.pixels.height,
                                                                    source.pixels.width, p.padding, region);
            int number = 0;
            do {
                const int channel = static_cast<int>(call.first) + number;
                if constexpr (can_be_staged<T, R, C>()) {
                    if (staged) {
                        warp_from_region<T, C, interpolation>(call, n, source, region, at, channel, number, mine);
                        __syncthreads();  // done with for all
                    } else if (mine) {
                        warp_by_exception<T, R, C, interpolation>(call, n, at, channel, number);
                    }
                } else if (mine) {
                    warp_from_image<T, R, C, interpolation>(call, n, source, at, channel, number);
                }
            } while (C == 1 && ++number < call.count);
        }
    }
}

}  // namespace
}  // namespace imgopt

// affine_warp on CUDA, forward: one kernel reads the images and writes what the network takes. A block has a tile of
// the output, 32 × 32 pixels; a thread has runs of eight or four neighbours in a row, which leave as vector stores.
// What all pixels of a row share, in float64, is computed once for the row.
//
// A box filter (antialias) is a pass of its own before it, over the images that have one: its size is known on the
// device only, so the launches are always the same.
#pragma once

#include "cuda_stage.h"
#include "cuda_store.h"

namespace imgopt {
namespace {

// --- points --------------------------------------------------------------------------------------------------------

// The sampling point of output pixel (x, y), folded into the source where its padding mirrors; `base` is that of x's
// block of columns, for an affine map.
template <class R, Interpolation interpolation>
__device__ inline Point<R> sampling_point(const Map& map, const Base<R>& base, int32_t x, int32_t y, int32_t height,
                                          int32_t width, Padding padding) {
    Point<R> at = map.affine ? affine_point(base, x % kBlock) : perspective_point<R>(map.m, x, y);
    round_nearest<interpolation>(at);
    fold(at.x, at.fx, width, padding);
    fold(at.y, at.fy, height, padding);
    return at;
}

// --- one call as its threads see it --------------------------------------------------------------------------------

// C channels at once; with C = 1 any number, one after the other, numbers[0] being channel `first`.
struct WarpCall {
    AffineWarp p;
    MatrixView matrix, color;  // color.data is null where there is none
    const ImagePlan* plans;    // where there is a box filter, else null
    const void* boxed;
    int64_t boxed_stride;
    int64_t first, count;   // channels of this launch
    int32_t first_row = 0;  // of the grid's pixels
    Order order = Order::scattered;
    bool words = false, planar = false;  // what stage_words() can load, where there is no box
};

// With a box filter, `matrix` is that of the plans.
__device__ inline Map map_of_image(const WarpCall& call, int64_t image) {
    Map map;
    map.affine = read_matrix(call.matrix, image, map.m);
    map.box_x = call.plans ? call.plans[image].map.box_x : 1;
    map.box_y = call.plans ? call.plans[image].map.box_y : 1;
    return map;
}
template <class T>
__device__ inline Pixels<T> pixels_of(const WarpCall& call, const Map& map, int64_t image) {
    return sampled_pixels(call.p, map, static_cast<const T*>(call.boxed), call.boxed_stride, image);
}

// A thread's pixels: those from (x, y) of the output on.
struct Place {
    uint32_t image;
    int32_t x, y;
};
// Of tiles of 32 × `rows`, a thread to every `pixels` neighbours.
template <int pixels, int rows>
__device__ inline Place place_of(const WarpCall& call) {
    constexpr uint32_t across = kTileSide / pixels;  // threads
    return {blockIdx.z, static_cast<int32_t>(blockIdx.x * kTileSide + threadIdx.x % across * pixels),
            call.first_row + static_cast<int32_t>(blockIdx.y * rows + threadIdx.x / across)};
}

__device__ inline bool is_in_output(const AffineWarp& p, const Place& at) {
    return at.x < static_cast<int32_t>(p.output_width) && at.y < static_cast<int32_t>(p.output_height);
}

// Through the epilogue, to where they belong.
template <class R, int pixels, int count>
__device__ inline void put_pixels(const WarpCall& call, const WarpNumbers<R>& n, R (&values)[pixels][count],
                                  const Place& at, int64_t channel, int number) {
    const AffineWarp& p = call.p;
    if constexpr (count == 3)
        if (call.color.data) color_pixels(call.color, n.unit, at.image, values);
    const int64_t* stride = p.output_stride;
    finish_pixels(p, call.order, n, values,
                  at.image * stride[0] + channel * stride[1] + at.y * stride[2] + at.x * stride[3],
                  static_cast<int>(p.output_width) - at.x, number);
}

// --- from the image ------------------------------------------------------------------------------------------------

// A thread's pixels, four at a time. The general samples are too long to be written out four times; their loop puts its
// result where a comparison says, so that every index of an array is a constant and the array stays in registers.
template <class T, class R, int C, Interpolation interpolation, int pixels>
__device__ inline void warp_from_image(const WarpCall& call, const WarpNumbers<R>& n, Place at, int64_t channel,
                                       int number) {
    const AffineWarp& p = call.p;
    const Map map = map_of_image(call, at.image);
    const Pixels<T> s = pixels_of<T>(call, map, at.image);
    const Base<R> base = map.affine ? base_of<R>(map.m, at.x / kBlock * kBlock, at.y) : Base<R>{};
#pragma unroll 1
    for (int from = 0; from < pixels && at.x < p.output_width; from += 4, at.x += 4) {
        R values[4][C];
#pragma unroll 1
        for (int i = 0; i < 4; ++i) {
            R one[C];
            const Point<R> point =
                sampling_point<R, interpolation>(map, base, at.x + i, at.y, s.height, s.width, p.padding);
            if (interpolation == Interpolation::bilinear && point.finite && is_inside(s, point.x, point.y))
                sample_inside(s, point, static_cast<int>(channel), one);
            else
                sample_anywhere<T, R, C, interpolation>(s, point, p.padding, n, static_cast<int>(channel), number, one);
#pragma unroll
            for (int k = 0; k < 4 * C; ++k)
                if (i == k / C) values[k / C][k % C] = one[k % C];
        }
        put_pixels(call, n, values, at, channel, number);
    }
}

constexpr int kImagePixels = 4;  // of a thread
constexpr int kImageThreads = kTileSide * kTileSide / kImagePixels;

template <class T, class R, int C, Interpolation interpolation>
__global__ void __launch_bounds__(kImageThreads)
    warp_images(const __grid_constant__ WarpCall call, const __grid_constant__ WarpNumbers<R> n) {
    const Place at = place_of<kImagePixels, kTileSide>(call);
    if (!is_in_output(call.p, at)) return;
    int number = 0;
    do {
        warp_from_image<T, R, C, interpolation, kImagePixels>(call, n, at, call.first + number, number);
    } while (C == 1 && ++number < call.count);
}

// --- from a staged tile --------------------------------------------------------------------------------------------

// Where tiles that cannot be staged are the exception: out of line, so that its registers are not the rule's.
template <int C, Interpolation interpolation>
__device__ __noinline__ void warp_by_exception(const WarpCall& call, const WarpNumbers<float>& n, Place at,
                                               int32_t bottom) {
    for (; at.y < bottom; at.y += kRowsAtOnce) {
        int number = 0;
        do {
            warp_from_image<uint8_t, float, C, interpolation, kTilePixels>(call, n, at, call.first + number, number);
        } while (C == 1 && ++number < call.count);
    }
}

// By all threads.
template <int C>
__device__ inline void stage(const WarpCall& call, const Map& map, int64_t image, int32_t height, int32_t width,
                             const Region& region, int64_t channel, uint32_t fill, uint32_t* staged) {
    const AffineWarp& p = call.p;
    const bool words = call.words && map.box_x == 1 && map.box_y == 1;
    if (words) {
        const uint8_t* from = static_cast<const uint8_t*>(p.images) + image * p.images_stride[0] +
                              (C == 1 ? channel * p.images_stride[1] : 0);
        const uint32_t down = static_cast<uint32_t>(p.images_stride[2]);
        const uint32_t plane = static_cast<uint32_t>(p.images_stride[1]);
        if (call.planar)
            stage_words<C, true, kTileThreads>(from, down, plane, height, width, region, p.padding, fill, staged);
        else
            stage_words<C, false, kTileThreads>(from, down, plane, height, width, region, p.padding, fill, staged);
        if (!any_left(region, height, width, p.padding)) return;
    }
    Pixels<uint8_t> s = pixels_of<uint8_t>(call, map, image);
    s.data += channel * s.channel;
    if (s.table) s.table += channel * 256;
    stage_groups<C, kTileThreads>(s, region, p.padding, fill, !words, staged);
}

template <int C, Interpolation interpolation>
__global__ void __launch_bounds__(kTileThreads, kTileBlocks)
    warp_tiles(const __grid_constant__ WarpCall call, const __grid_constant__ WarpNumbers<float> n) {
    const AffineWarp& p = call.p;
    __shared__ RowBase bases[kTileRows];
    uint32_t* staged = dynamic_shared<uint32_t>();
    Place at = place_of<kTilePixels, kTileRows>(call);
    const int32_t left = static_cast<int32_t>(blockIdx.x * kTileSide);
    const int32_t below = static_cast<int32_t>(p.output_height);
    int32_t top = call.first_row + static_cast<int32_t>(blockIdx.y * kTileRows);
    const int32_t bottom = below - top < kTileRows ? below : top + kTileRows;
    const Map map = map_of_image(call, at.image);
    const int32_t height = boxes(p.height, map.box_y), width = boxes(p.width, map.box_x);
    int32_t rows = map.affine ? kTileRows : 0;  // that a region serves
    for (;;) {
        Region region;
        const int32_t end = bottom - top < rows ? bottom : top + rows;
        if (rows >= kLeastRows &&
            !plan_region<interpolation>(map.m, left, top, end - top, height, width, p.padding, region)) {
            rows /= 2;
            continue;
        }
        if (rows < kLeastRows) return warp_by_exception<C, interpolation>(call, n, at, bottom);
        for (int row = static_cast<int>(threadIdx.x); row < end - top; row += kTileThreads)
            bases[row] = row_base(map.m, left / kBlock * kBlock, top + row);
        const float step_x = static_cast<float>(map.m[0]), step_y = static_cast<float>(map.m[3]);
        int number = 0;
        do {
            const int64_t channel = call.first + number;
            uint32_t fill = 0;
            if constexpr (C == 1)
                fill = n.fill_bytes[number];
            else
                __builtin_memcpy(&fill, n.fill_bytes, C);
            stage<C>(call, map, at.image, height, width, region, channel, fill, staged);
            __syncthreads();
#pragma unroll 1
            for (Place here = at; here.y < end; here.y += kRowsAtOnce) {
                if (here.x >= static_cast<int32_t>(p.output_width)) break;
                const RowBase base = bases[here.y - top];
                float values[kTilePixels][C];
                sample_region<interpolation>(region, base, step_x, step_y, here.x % kBlock, height, width, p.padding,
                                             staged, values);
                put_pixels(call, n, values, here, channel, number);
            }
            if (C > 1 && end == bottom) return;
            __syncthreads();  // done with the region for all
        } while (C == 1 && ++number < call.count);
        if (end == bottom) return;
        at.y += rows;
        top = end;
    }
}

}  // namespace
}  // namespace imgopt

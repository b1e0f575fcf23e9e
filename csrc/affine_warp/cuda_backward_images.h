// Gradient of affine_warp's images on CUDA.
//
//   gather   a source pixel looks up the output pixels whose taps may touch it, by the inverse map, and adds their
//            weights in row-major order, which is the order of the CPU. That needs a fill that takes no gradient.
//   scatter  where a border pixel serves many taps (edge, reflect, symmetric): 64-bit fixed-point sums; integer
//   addition
//            has one result in any order
//
// A map without inverse makes every output pixel a candidate: slow, and right.
#pragma once

#include "cuda_backward.h"

namespace imgopt {
namespace {

constexpr int kGatherChannels = 4;    // summed in registers at once
constexpr double kReachSlack = 1e-3;  // more than float32 coordinates are off, in source pixels at unit scale
constexpr double kSteep = 1 << 17;    // steps of a map beyond which coordinates inside a block are clamped

// The entry of a small array at a place that only the device knows, without sending the array through memory.
template <int taps, class R>
__device__ inline R picked(const R (&w)[taps], int i) {
    R found = w[0];
    for (int k = 1; k < taps; ++k) found = i == k ? w[k] : found;
    return found;
}

// --- gather --------------------------------------------------------------------------------------------------------

// Output pixels that may touch a source pixel.
struct Candidates {
    int64_t x0, x1, y0, y1;  // inclusive
    bool near;               // by an inverse: few of them, and coordinates far from any clamp
};

__device__ inline int64_t floor_within(double v, int64_t side) {
    return v <= 0 ? 0 : v >= static_cast<double>(side - 1) ? side - 1 : static_cast<int64_t>(v);
}
__device__ inline int64_t ceil_within(double v, int64_t side) { return floor_within(-floor_of(-v), side); }

template <int taps>
__device__ inline Candidates candidates(const AffineWarp& p, const ImagePlan& plan, int64_t qx, int64_t qy) {
    const double* m = plan.map.m;
    const double steep = __builtin_fabs(m[0]) + __builtin_fabs(m[3]);
    const double reach = (taps == 1 ? 0.5 : taps == 2 ? 1.0 : 2.0) + kReachSlack * (1 + steep);
    const double* v = plan.inverse;
    double low[2] = {__builtin_inf(), __builtin_inf()}, high[2] = {-__builtin_inf(), -__builtin_inf()};
    bool positive = true, negative = true, usable = steep < kSteep || !plan.map.affine;
    for (int axis = 0; axis < 2 && plan.map.affine; ++axis, v += 3) {
        const double at = v[0] * qx + v[1] * qy + v[2];
        const double spread = reach * (size_of(v[0]) + size_of(v[1])) +
                              1e-9 * (size_of(v[0]) * (qx + reach) + size_of(v[1]) * (qy + reach) + size_of(v[2]));
        usable = usable && finite(at) && finite(spread);
        low[axis] = at - spread;
        high[axis] = at + spread;
    }
    for (int corner = 0; corner < 4 && !plan.map.affine; ++corner) {
        const double x = qx + (corner & 1 ? reach : -reach), y = qy + (corner & 2 ? reach : -reach);
        const double w = v[6] * x + v[7] * y + v[8];
        const double size = 1e-9 * (size_of(v[6] * x) + size_of(v[7] * y) + size_of(v[8]));
        positive = positive && w > size;
        negative = negative && -w > size;
        for (int axis = 0; axis < 2; ++axis) {
            const double at = (v[3 * axis] * x + v[3 * axis + 1] * y + v[3 * axis + 2]) / w;
            const double slack = 1e-9 *
                                 (size_of(v[3 * axis] * x) + size_of(v[3 * axis + 1] * y) + size_of(v[3 * axis + 2])) /
                                 size_of(w);
            usable = usable && finite(at) && finite(slack);
            low[axis] = at - slack < low[axis] ? at - slack : low[axis];
            high[axis] = at + slack > high[axis] ? at + slack : high[axis];
        }
    }
    if (!usable || (!positive && !negative)) return {0, p.output_width - 1, 0, p.output_height - 1, false};
    if (high[0] < 0 || high[1] < 0 || low[0] > p.output_width - 1 || low[1] > p.output_height - 1)
        return {1, 0, 1, 0, true};
    return {ceil_within(low[0], p.output_width), floor_within(high[0], p.output_width),
            ceil_within(low[1], p.output_height), floor_within(high[1], p.output_height), true};
}

// Sums over the candidates of a source pixel, by the coordinates that the forward pass takes.
template <class G, class R, int taps>
__device__ inline void gather_exactly(const Map& map, const Candidates& box, const Pixels<G>& flow, int64_t qx,
                                      int64_t qy, int64_t c0, int64_t count, R (&sums)[kGatherChannels]) {
    constexpr int first = taps == 4 ? -1 : 0;
    for (int64_t y = box.y0; y <= box.y1; ++y) {
        Base<R> base = backward_base<R>(map, box.x0, y);
        for (int64_t x = box.x0; x <= box.x1; ++x) {
            if (x % kBlock == 0) base = backward_base<R>(map, x, y);
            const Point<R> at = backward_point<R, taps>(map, base, x, y);
            const int64_t dx = qx - at.x - first, dy = qy - at.y - first;
            if (!at.finite || dx < 0 || dx >= taps || dy < 0 || dy >= taps) continue;
            R wx[taps], wy[taps], slope[taps];
            axis_weights(at.fx, wx, slope);
            axis_weights(at.fy, wy, slope);
            const R weight = picked(wy, static_cast<int>(dy)) * picked(wx, static_cast<int>(dx));
            const int64_t from = y * flow.row + x * flow.column;
            for (int c = 0; c < kGatherChannels; ++c)
                if (c < count) sums[c] += weight * value_at(flow, from + (c0 + c) * flow.channel, 0, R(0));
        }
    }
}

// The same for bilinear weights, which are hats around the source pixel: continuous, so that coordinates relative to
// it, more exact than the forward pass's, give them without a floor.
template <class G>
__device__ inline void gather_hats(const Map& map, const Candidates& box, const Pixels<G>& flow, int64_t qx, int64_t qy,
                                   int64_t c0, int64_t count, float (&sums)[kGatherChannels]) {
    const double* m = map.m;
    const float first_x = static_cast<float>(m[0] * box.x0 + (m[1] * box.y0 + (m[2] - qx)));
    const float first_y = static_cast<float>(m[3] * box.x0 + (m[4] * box.y0 + (m[5] - qy)));
    const float right_x = static_cast<float>(m[0]), right_y = static_cast<float>(m[3]);
    const float down_x = static_cast<float>(m[1]), down_y = static_cast<float>(m[4]);
    const G* row = flow.data + box.y0 * flow.row + box.x0 * flow.column + c0 * flow.channel;
    const float across = static_cast<float>(box.x1 - box.x0), rows = static_cast<float>(box.y1 - box.y0);
    for (float j = 0; j <= rows; j += 1, row += flow.row) {
        const float row_x = fused(down_x, j, first_x), row_y = fused(down_y, j, first_y);
        const G* from = row;
        for (float i = 0; i <= across; i += 1, from += flow.column) {
            const float wx = 1 - size_of(fused(right_x, i, row_x)), wy = 1 - size_of(fused(right_y, i, row_y));
            if (!(wx > 0 && wy > 0)) continue;
            const Pixels<G> here{from, 0, 0, flow.channel, 0, 0, nullptr};
#pragma unroll
            for (int c = 0; c < kGatherChannels; ++c)
                if (c < count) sums[c] += wx * wy * value_at(here, c * flow.channel, 0, 0.0f);
        }
    }
}

template <class R>
__device__ inline void put_gradient(R v, DType dtype, void* to, int64_t at) {
    switch (dtype) {
        case DType::f16: return put(v, static_cast<Half*>(to)[at]);
        case DType::bf16: return put(v, static_cast<BFloat16*>(to)[at]);
        case DType::f32: return put(v, static_cast<float*>(to)[at]);
        default: return put(v, static_cast<double*>(to)[at]);
    }
}

// Where sums go: elements of the dtype by strides, n, c, y, x; packed as the images behind the box filter are.
struct Sums {
    void* data;
    DType dtype;
    int64_t stride[4];
    bool packed;
};

// Constant padding. A warp has 8 × 4 source pixels, a block 32 × 8, so that neighbours look up the same lines; tiles of
// an image along y of the grid.
template <class G, class R, int taps>
__global__ void __launch_bounds__(kBackwardThreads)
    gather_flow(const BackwardCall call, const WarpNumbers<R> n, const Flow<G> flow, int64_t first, int64_t count,
                const Sums to) {
    const AffineWarp& p = call.p;
    const uint32_t thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
    const uint32_t in_x = warp % 4 * 8 + lane % 8, in_y = warp / 4 * 4 + lane / 8;
    for (int64_t image = blockIdx.x; image < p.batch; image += gridDim.x) {
        const ImagePlan& plan = call.plans[image];
        const int64_t width = boxes(p.width, plan.map.box_x), height = boxes(p.height, plan.map.box_y);
        const uint32_t across = static_cast<uint32_t>((width + 31) / 32);
        const uint32_t tiles = across * static_cast<uint32_t>((height + 7) / 8);
        const Pixels<G> flows = flow.of(image);
        for (uint32_t tile = blockIdx.y; tile < tiles; tile += gridDim.y) {
            const int64_t qx = tile % across * 32 + in_x, qy = tile / across * 8 + in_y;
            if (qx >= width || qy >= height) continue;
            const Candidates box = candidates<taps>(p, plan, qx, qy);
            for (int64_t c0 = first; c0 < first + count; c0 += kGatherChannels) {
                const int64_t left = first + count - c0;
                R sums[kGatherChannels] = {};
                bool done = false;
                if constexpr (taps == 2 && sizeof(R) == 4) {
                    done = plan.map.affine && box.near;
                    if (done) gather_hats(plan.map, box, flows, qx, qy, c0, left, sums);
                }
                if (!done) gather_exactly<G, R, taps>(plan.map, box, flows, qx, qy, c0, left, sums);
                const int64_t down = to.packed ? width * p.channels : to.stride[2];
                const int64_t at = image * to.stride[0] + c0 * to.stride[1] + qy * down + qx * to.stride[3];
#pragma unroll
                for (int c = 0; c < kGatherChannels; ++c)
                    if (c < left)
                        put_gradient(sums[c] * n.factor[c0 - first + c], to.dtype, to.data, at + c * to.stride[1]);
            }
        }
    }
}

// --- scatter in fixed point --------------------------------------------------------------------------------

// Power of two that takes every sum of an image into 62 bits: at most `count` terms of weight 2.25 in all, each below
// `largest`; 0 where that is not finite.
__device__ inline double fixed_scale(uint32_t largest, int64_t count) {
    if (largest >= 0x7f800000u) return 0;
    int bits = 2;
    while (count >> bits > 0) ++bits;
    const int exponent = static_cast<int>(largest >> 23) - 126;  // largest < 2^exponent
    return __builtin_scalbn(1.0, 60 - bits - exponent);
}

template <class R, int taps>
__global__ void __launch_bounds__(kBackwardThreads)
    scatter_flow(const BackwardCall call, const R* flow, const uint32_t* largest, unsigned long long* sums) {
    const AffineWarp& p = call.p;
    const int64_t pixels = p.output_height * p.output_width, step = int64_t{gridDim.y} * kBackwardThreads;
    for (int64_t image = blockIdx.x; image < p.batch; image += gridDim.x) {
        const ImagePlan& plan = call.plans[image];
        const int32_t width = static_cast<int32_t>(boxes(p.width, plan.map.box_x));
        const int32_t height = static_cast<int32_t>(boxes(p.height, plan.map.box_y));
        const double scale = fixed_scale(largest[image], pixels);
        for (int64_t i = int64_t{blockIdx.y} * kBackwardThreads + threadIdx.x; i < pixels; i += step) {
            const OutputPixel o(p, i);
            Point<R> at = backward_point<R, taps>(plan.map, backward_base<R>(plan.map, o.x, o.y), o.x, o.y);
            if (!at.finite || scale == 0) continue;
            fold(at.x, at.fx, width, p.padding);
            fold(at.y, at.fy, height, p.padding);
            const TapIndices<taps> t(height, width, at.x, at.y, p.padding);
            R wx[taps], wy[taps], slope[taps];
            axis_weights(at.fx, wx, slope);
            axis_weights(at.fy, wy, slope);
            const R* from = flow + (image * pixels + i) * p.channels;
            for (int k = 0; k < taps; ++k)
                for (int j = 0; j < taps; ++j) {
                    if (t.row[k] < 0 || t.column[j] < 0) continue;
                    unsigned long long* to =
                        sums + (image * p.height * p.width + int64_t{t.row[k]} * width + t.column[j]) * p.channels;
                    for (int64_t c = 0; c < p.channels; ++c) {
                        const double v = __builtin_rint(static_cast<double>(wy[k] * wx[j] * from[c]) * scale);
                        atomicAdd(to + c, static_cast<unsigned long long>(static_cast<long long>(v)));
                    }
                }
        }
    }
}

// --- out of the workspace ----------------------------------------------------------------------------------

__device__ inline int64_t covered(int64_t i, int64_t box, int64_t side) {
    if (box == 1) return 1;
    const int64_t first = i / box * box;
    return (first + box < side ? first + box : side) - first;
}

// A box shares the gradient of its mean among its pixels. Exactly one of `source` and `sums` is given.
template <class T, class R>
__global__ void __launch_bounds__(kBackwardThreads)
    store_gradient(const BackwardCall call, const R* source, const unsigned long long* sums, const uint32_t* largest,
                   const AffineWarp to) {
    const AffineWarp& p = call.p;
    const int64_t count = p.height * p.width * p.channels, step = int64_t{gridDim.y} * kBackwardThreads;
    for (int64_t image = blockIdx.x; image < p.batch; image += gridDim.x) {
        const Map& map = call.plans[image].map;
        const int64_t width = boxes(p.width, map.box_x);
        const double scale = sums ? fixed_scale(largest[image], p.output_height * p.output_width) : 1;
        for (int64_t i = int64_t{blockIdx.y} * kBackwardThreads + threadIdx.x; i < count; i += step) {
            const auto [pixel, c] = split(i, p.channels);
            const auto [y, x] = split(pixel, p.width);
            const int64_t box = map.box_x == 1 && map.box_y == 1 ? pixel : y / map.box_y * width + x / map.box_x;
            const int64_t from = (image * p.height * p.width + box) * p.channels + c;
            R value;
            if (source)
                value = source[from];
            else
                value = static_cast<R>(scale == 0 ? __builtin_nan("")
                                                  : static_cast<double>(static_cast<long long>(sums[from])) / scale);
            const R area = static_cast<R>(covered(y, map.box_y, p.height) * covered(x, map.box_x, p.width));
            T* out = static_cast<T*>(to.output) + image * to.output_stride[0] + c * to.output_stride[1] +
                     y * to.output_stride[2] + x * to.output_stride[3];
            put(value / area, *out);
        }
    }
}

}  // namespace
}  // namespace imgopt

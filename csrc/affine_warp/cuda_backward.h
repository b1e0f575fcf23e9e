// Gradients of affine_warp on CUDA, deterministic without floating-point atomics.
//
//   flow     d loss / d sample of every output value: the incoming gradient times a factor per channel, read where it
//            lies; behind a colour matrix, and for fixed-point sums, which need its largest magnitude, a pass makes it
//   images   cuda_backward_images.h
//   matrix   cuda_backward_matrix.h
#pragma once

#include "cuda_forward.h"

namespace imgopt {
namespace {

constexpr int kBackwardThreads = 256;

struct BackwardCall {
    AffineWarp p;  // output_* describe the gradient that comes in
    const ImagePlan* plans;
    const void* boxed;
    int64_t boxed_stride;
    bool colored;
};

// d loss / d sample, up to the factors of a launch's channels.
template <class G>
struct Flow {
    const G* data;
    int64_t stride[4];  // n, c, y, x

    __device__ Pixels<G> of(int64_t image) const {
        return {data + image * stride[0], stride[2], stride[3], stride[1], 0, 0, nullptr};
    }
};

// Output pixel i of an image.
struct OutputPixel {
    int64_t x, y;
    __device__ OutputPixel(const AffineWarp& p, int64_t i) : OutputPixel(split(i, p.output_width)) {}
    __device__ explicit OutputPixel(const Split& s) : x(s.rest), y(s.quotient) {}
};

template <class R, int taps>
__device__ inline Point<R> backward_point(const Map& map, const Base<R>& base, int64_t x, int64_t y) {
    Point<R> at = map.affine ? affine_point(base, static_cast<int>(x % kBlock)) : perspective_point<R>(map.m, x, y);
    if (taps == 1) {
        at.x += at.fx >= static_cast<R>(0.5);
        at.y += at.fy >= static_cast<R>(0.5);
        at.fx = at.fy = 0;
    }
    return at;
}
template <class R>
__device__ inline Base<R> backward_base(const Map& map, int64_t x, int64_t y) {
    return map.affine ? base_of<R>(map.m, x / kBlock * kBlock, y) : Base<R>{};
}

// --- flow, made ----------------------------------------------------------------------------------------------------

__device__ inline uint32_t max_of(uint32_t a, uint32_t b) { return a > b ? a : b; }

// A float32 at least as large as |v|, as the integer that orders like it.
__device__ inline uint32_t magnitude_bits(double v) {
    const float size = static_cast<float>(v < 0 ? -v : v) * 1.000001f;
    return bits_of_float(size) & 0x7fffffffu;
}

// flow[n][y][x][c], and per image the largest magnitude in it. Blocks of an image along y.
template <class T, class R, int taps>
__global__ void __launch_bounds__(kBackwardThreads)
    make_flow(const BackwardCall call, const WarpNumbers<R> n, const void* grad, int64_t first, int64_t count, R* flow,
              uint32_t* largest) {
    const AffineWarp& p = call.p;
    const int64_t pixels = p.output_height * p.output_width, step = int64_t{gridDim.y} * kBackwardThreads;
    for (int64_t image = blockIdx.x; image < p.batch; image += gridDim.x) {
        const ImagePlan& plan = call.plans[image];
        const Pixels<T> s = sampled_pixels(p, plan.map, static_cast<const T*>(call.boxed), call.boxed_stride, image);
        const auto grad_at = [&](int64_t c, const OutputPixel& o) {
            const int64_t at = image * p.output_stride[0] + c * p.output_stride[1] + o.y * p.output_stride[2] +
                               o.x * p.output_stride[3];
            switch (p.output_dtype) {
                case DType::f16: return static_cast<R>(float_of_half(static_cast<const uint16_t*>(grad)[at]));
                case DType::bf16: return static_cast<R>(widened(static_cast<const BFloat16*>(grad)[at]));
                case DType::f32: return static_cast<R>(static_cast<const float*>(grad)[at]);
                default: return static_cast<R>(static_cast<const double*>(grad)[at]);
            }
        };
        uint32_t most = 0;
        for (int64_t i = int64_t{blockIdx.y} * kBackwardThreads + threadIdx.x; i < pixels; i += step) {
            const OutputPixel o(p, i);
            R* to = flow + (image * pixels + i) * p.channels;
            if (!call.colored) {
                for (int64_t c = first; c < first + count; ++c) {
                    to[c] = grad_at(c, o) * n.factor[c - first];
                    most = max_of(most, magnitude_bits(to[c]));
                }
                continue;
            }
            Point<R> at = backward_point<R, taps>(plan.map, backward_base<R>(plan.map, o.x, o.y), o.x, o.y);
            R samples[3] = {}, rgb[3], through[3] = {};
            if (at.finite) {
                fold(at.x, at.fx, s.width, p.padding);
                fold(at.y, at.fy, s.height, p.padding);
                const TapIndices<taps> t(s.height, s.width, at.x, at.y, p.padding);
                R wx[taps], wy[taps], slope[taps];
                axis_weights(at.fx, wx, slope);
                axis_weights(at.fy, wy, slope);
                for (int c = 0; c < 3; ++c)
                    for (int k = 0; k < taps; ++k)
                        for (int j = 0; j < taps; ++j)
                            samples[c] += wy[k] * wx[j] * tap_value(s, t, k, j, c, n.fill[c]);
                color_pixel(plan.color, samples, rgb);
                for (int k = 0; k < 3; ++k)
                    if (rgb[k] >= 0 && rgb[k] <= 1)
                        for (int j = 0; j < 3; ++j)
                            through[j] =
                                fused(static_cast<R>(plan.color[4 * k + j]), grad_at(k, o) * n.factor[k], through[j]);
            }
            for (int c = 0; c < 3; ++c) {
                to[c] = through[c];
                most = max_of(most, magnitude_bits(through[c]));
            }
        }
        for (int mask = 16; mask > 0; mask /= 2) most = max_of(most, __shfl_xor_sync(~0u, most, mask));
        if (threadIdx.x % 32 == 0) atomicMax(largest + image, most);
    }
}

}  // namespace
}  // namespace imgopt

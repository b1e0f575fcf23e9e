// Gradients of affine_warp on CUDA, deterministic without floating-point atomics.
//
//   flow     d loss / d sample of every output value: the epilogue backwards
//   images   gather: a source pixel looks up the output pixels whose taps may touch it, by the inverse map, and adds
//            their weights in row-major order, which is the order of the CPU. That needs a fill that takes no gradient:
//            where a border pixel serves many taps (edge, reflect, symmetric), 64-bit fixed-point sums scatter instead;
//            integer addition has one result in any order. A map without inverse makes every output pixel a candidate:
//            slow, and right.
//   matrix   two stages of float64 sums, both in a fixed order
#pragma once

#include "cuda_forward.h"

namespace imgopt {
namespace {

constexpr int kBackwardThreads = 256;
constexpr int kGatherChannels = 4;    // summed in registers at once
constexpr double kReachSlack = 1e-3;  // more than float32 coordinates are off, in source pixels at unit scale
constexpr double kSteep = 1 << 17;    // steps of a map beyond which coordinates inside a block are clamped
constexpr int kMatrixEntries = 9;

__device__ inline uint32_t max_of(uint32_t a, uint32_t b) { return a > b ? a : b; }

struct BackwardCall {
    AffineWarp p;  // output_* describe the gradient that comes in
    const ImagePlan* plans;
    const void* boxed;
    int64_t boxed_stride;
    bool colored;
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

// The entry of a small array at a place that only the device knows, without sending the array through memory.
template <int taps, class R>
__device__ inline R picked(const R (&w)[taps], int i) {
    R found = w[0];
    for (int k = 1; k < taps; ++k) found = i == k ? w[k] : found;
    return found;
}

// --- flow ----------------------------------------------------------------------------------------------------------

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

// --- images: gather ------------------------------------------------------------------------------------------------

// Output pixels that may touch a source pixel.
struct Candidates {
    int64_t x0, x1, y0, y1;  // inclusive
};

__device__ inline int64_t floor_within(double v, int64_t side) {
    return v <= 0 ? 0 : v >= static_cast<double>(side - 1) ? side - 1 : static_cast<int64_t>(v);
}

template <int taps>
__device__ inline Candidates candidates(const AffineWarp& p, const ImagePlan& plan, int64_t qx, int64_t qy) {
    const double* m = plan.map.m;
    const double steep = __builtin_fabs(m[0]) + __builtin_fabs(m[3]);
    const double reach = (taps == 1 ? 0.5 : taps == 2 ? 1.0 : 2.0) + kReachSlack * (1 + steep);
    const double* v = plan.inverse;
    const auto size_of = [](double a) { return __builtin_fabs(a); };
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
    if (!usable || (!positive && !negative)) return {0, p.output_width - 1, 0, p.output_height - 1};
    if (high[0] < 0 || high[1] < 0 || low[0] > p.output_width - 1 || low[1] > p.output_height - 1) return {1, 0, 1, 0};
    return {floor_within(low[0], p.output_width), floor_within(high[0] + 1, p.output_width),
            floor_within(low[1], p.output_height), floor_within(high[1] + 1, p.output_height)};
}

// Constant padding: source[n][y][x][c] = the sum over output pixels. Blocks of an image along y.
template <class R, int taps>
__global__ void __launch_bounds__(kBackwardThreads) gather_flow(const BackwardCall call, const R* flow, R* source) {
    const AffineWarp& p = call.p;
    const int64_t step = int64_t{gridDim.y} * kBackwardThreads;
    constexpr int first = taps == 4 ? -1 : 0;
    for (int64_t image = blockIdx.x; image < p.batch; image += gridDim.x) {
        const ImagePlan& plan = call.plans[image];
        const int64_t width = boxes(p.width, plan.map.box_x), height = boxes(p.height, plan.map.box_y);
        const R* flow_image = flow + image * p.output_height * p.output_width * p.channels;
        for (int64_t i = int64_t{blockIdx.y} * kBackwardThreads + threadIdx.x; i < width * height; i += step) {
            const auto [qy, qx] = split(i, width);
            const Candidates box = candidates<taps>(p, plan, qx, qy);
            for (int64_t c0 = 0; c0 < p.channels; c0 += kGatherChannels) {
                R sums[kGatherChannels] = {};
                for (int64_t y = box.y0; y <= box.y1; ++y) {
                    Base<R> base = backward_base<R>(plan.map, box.x0, y);
                    for (int64_t x = box.x0; x <= box.x1; ++x) {
                        if (x % kBlock == 0) base = backward_base<R>(plan.map, x, y);
                        const Point<R> at = backward_point<R, taps>(plan.map, base, x, y);
                        const int64_t dx = qx - at.x - first, dy = qy - at.y - first;
                        if (!at.finite || dx < 0 || dx >= taps || dy < 0 || dy >= taps) continue;
                        R wx[taps], wy[taps], slope[taps];
                        axis_weights(at.fx, wx, slope);
                        axis_weights(at.fy, wy, slope);
                        const R weight = picked(wy, static_cast<int>(dy)) * picked(wx, static_cast<int>(dx));
                        const R* from = flow_image + (y * p.output_width + x) * p.channels + c0;
                        for (int c = 0; c < kGatherChannels; ++c)
                            if (c0 + c < p.channels) sums[c] += weight * from[c];
                    }
                }
                R* to = source + (image * p.height * p.width + i) * p.channels + c0;
                for (int c = 0; c < kGatherChannels; ++c)
                    if (c0 + c < p.channels) to[c] = sums[c];
            }
        }
    }
}

// --- images: scatter in fixed point --------------------------------------------------------------------------------

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

// --- images: out of the workspace ----------------------------------------------------------------------------------

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

// --- matrix --------------------------------------------------------------------------------------------------------

// partial[n][chunk][9]: sums over every chunks-th group of pixels of an image. Block: (image, chunk).
template <class T, class R, int taps>
__global__ void __launch_bounds__(kBackwardThreads)
    matrix_partial(const BackwardCall call, const WarpNumbers<R> n, const R* flow, int64_t first, int64_t count,
                   double* partial) {
    __shared__ double shared[kBackwardThreads];
    const AffineWarp& p = call.p;
    const int64_t pixels = p.output_height * p.output_width, step = int64_t{gridDim.y} * kBackwardThreads;
    for (int64_t image = blockIdx.x; image < p.batch; image += gridDim.x) {
        const Map& map = call.plans[image].map;
        const double* m = map.m;
        const Pixels<T> s = sampled_pixels(p, map, static_cast<const T*>(call.boxed), call.boxed_stride, image);
        double own[kMatrixEntries] = {};
        for (int64_t i = int64_t{blockIdx.y} * kBackwardThreads + threadIdx.x; i < pixels; i += step) {
            const OutputPixel o(p, i);
            Point<R> at = backward_point<R, taps>(map, backward_base<R>(map, o.x, o.y), o.x, o.y);
            if (!at.finite) continue;
            const double sx = at.x + static_cast<double>(at.fx), sy = at.y + static_cast<double>(at.fy);
            const int sign_x = fold(at.x, at.fx, s.width, p.padding);
            const int sign_y = fold(at.y, at.fy, s.height, p.padding);
            const TapIndices<taps> t(s.height, s.width, at.x, at.y, p.padding);
            R wx[taps], wy[taps], slope_x[taps], slope_y[taps], gx = 0, gy = 0;
            axis_weights(at.fx, wx, slope_x);
            axis_weights(at.fy, wy, slope_y);
            const R* from = flow + (image * pixels + i) * p.channels;
            for (int64_t c = first; c < first + count; ++c)
                for (int k = 0; k < taps; ++k)
                    for (int j = 0; j < taps; ++j) {
                        const R v = tap_value(s, t, k, j, static_cast<int>(c), n.fill[c - first]) * from[c];
                        gx += v * slope_x[j] * wy[k];
                        gy += v * slope_y[k] * wx[j];
                    }
            const double r = map.affine ? 1 : 1 / (m[6] * o.x + (m[7] * o.y + m[8]));
            const double gxr = gx * r * sign_x, gyr = gy * r * sign_y;
            const double terms[3] = {gxr, gyr, -(gxr * sx + gyr * sy)};
            for (int k = 0; k < 3; ++k) {
                own[3 * k] += terms[k] * o.x;
                own[3 * k + 1] += terms[k] * o.y;
                own[3 * k + 2] += terms[k];
            }
        }
        for (int e = 0; e < kMatrixEntries; ++e) {
            shared[threadIdx.x] = own[e];
            __syncthreads();
            for (int half = kBackwardThreads / 2; half > 0; half /= 2) {
                if (static_cast<int>(threadIdx.x) < half) shared[threadIdx.x] += shared[threadIdx.x + half];
                __syncthreads();
            }
            // Several launches share the channels among them: one after the other, on one stream.
            double* to = partial + (image * gridDim.y + blockIdx.y) * kMatrixEntries + e;
            if (threadIdx.x == 0) *to = first == 0 ? shared[0] : *to + shared[0];
            __syncthreads();
        }
    }
}

// grad[count][entries]: images in order, chunks in order, each carried back through its box filter.
__global__ void matrix_total(const BackwardCall call, const double* partial, int chunks, int64_t count, int entries,
                             double* grad) {
    const int64_t step = int64_t{gridDim.x} * blockDim.x;
    for (int64_t matrix = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; matrix < count; matrix += step) {
        double total[kMatrixEntries] = {};
        const int64_t first = count > 1 ? matrix : 0, last = count > 1 ? matrix + 1 : call.p.batch;
        for (int64_t image = first; image < last; ++image) {
            double of[kMatrixEntries] = {};
            for (int chunk = 0; chunk < chunks; ++chunk)
                for (int e = 0; e < kMatrixEntries; ++e)
                    of[e] += partial[(image * chunks + chunk) * kMatrixEntries + e];
            const int32_t box[2] = {call.plans[image].map.box_x, call.plans[image].map.box_y};
            for (int i = 0; i < 2; ++i)
                for (int j = 0; j < 3; ++j) {
                    of[3 * i + j] /= box[i];
                    of[6 + j] -= (box[i] - 1) * 0.5 * of[3 * i + j];
                }
            for (int e = 0; e < kMatrixEntries; ++e) total[e] += of[e];
        }
        for (int e = 0; e < entries; ++e) grad[matrix * entries + e] = total[e];
    }
}

}  // namespace
}  // namespace imgopt

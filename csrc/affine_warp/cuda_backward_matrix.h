// Gradient of affine_warp's matrices on CUDA: two stages of float64 sums, both in a fixed order. Within a tile of 32 ×
// 64 output pixels a thread has eight of a column; their bilinear gradients are added in float32 as moments about the
// tile's corner, which float64 then takes on.
#pragma once

#include "cuda_backward.h"

namespace imgopt {
namespace {

constexpr int kMatrixEntries = 9;
constexpr int kMatrixTile = 64;  // rows; its columns are a warp

// d loss / d (x, y) of one sampling point.
template <class R>
struct Slope {
    R x, y;
};

template <class T, class G, class R, int taps>
__device__ inline Slope<R> slope_at(const Pixels<T>& s, const Point<R>& at, Padding padding, const Pixels<G>& flow,
                                    int64_t from, const WarpNumbers<R>& n, int64_t first, int64_t count) {
    const TapIndices<taps> t(s.height, s.width, at.x, at.y, padding);
    R wx[taps], wy[taps], slope_x[taps], slope_y[taps];
    axis_weights(at.fx, wx, slope_x);
    axis_weights(at.fy, wy, slope_y);
    Slope<R> sum{0, 0};
    for (int64_t c = 0; c < count; ++c) {
        const R g = value_at(flow, from + (first + c) * flow.channel, 0, R(0)) * n.factor[c];
        for (int k = 0; k < taps; ++k)
            for (int j = 0; j < taps; ++j) {
                const R v = tap_value(s, t, k, j, static_cast<int>(first + c), n.fill[c]) * g;
                sum.x += v * slope_x[j] * wy[k];
                sum.y += v * slope_y[k] * wx[j];
            }
    }
    return sum;
}

template <class T>
__device__ inline float element_at(const T* at) {
    return value_at(Pixels<T>{at, 0, 0, 0, 0, 0, nullptr}, 0, 0, 0.0f);
}

// The same where all four taps are inside the image.
template <class T, class G>
__device__ inline Slope<float> slope_inside(const Pixels<T>& s, const Point<float>& at, const Pixels<G>& flow,
                                            int64_t from, const WarpNumbers<float>& n, int64_t first, int64_t count) {
    const T* above = s.data + at.y * s.row + at.x * s.column + first * s.channel;
    const T* below = above + s.row;
    const G* in = flow.data + from + first * flow.channel;
    Slope<float> sum{0, 0};
#pragma unroll 4
    for (int c = 0; c < static_cast<int>(count); ++c) {
        const float p00 = element_at(above), p01 = element_at(above + s.column);
        const float p10 = element_at(below), p11 = element_at(below + s.column);
        const float g = element_at(in) * n.factor[c];
        const float across = p01 - p00, down = p10 - p00, twist = (p11 - p10) - across;
        sum.x = fused(g, fused(at.fy, twist, across), sum.x);
        sum.y = fused(g, fused(at.fx, twist, down), sum.y);
        above += s.channel;
        below += s.channel;
        in += flow.channel;
    }
    return sum;
}

// Adds a gradient at output pixel (x, y), whose sample is at (sx, sy), to the nine sums of the matrix.
__device__ inline void add_terms(double gx, double gy, double sx, double sy, double x, double y,
                                 double (&own)[kMatrixEntries]) {
    const double terms[3] = {gx, gy, -(gx * sx + gy * sy)};
#pragma unroll
    for (int k = 0; k < 3; ++k) {
        own[3 * k] += terms[k] * x;
        own[3 * k + 1] += terms[k] * y;
        own[3 * k + 2] += terms[k];
    }
}

// Any map and interpolation: a thread's pixels of a tile, one by one.
template <class T, class G, class R, int taps>
__device__ inline void add_column(const BackwardCall& call, const Map& map, const Pixels<T>& s, const Pixels<G>& flow,
                                  const WarpNumbers<R>& n, int64_t first, int64_t count, int64_t x, int64_t y,
                                  double (&own)[kMatrixEntries]) {
    const AffineWarp& p = call.p;
    const int64_t end = y + kMatrixTile < p.output_height ? y + kMatrixTile : p.output_height;
#pragma unroll 1
    for (y += threadIdx.x / 32; y < end; y += kBackwardThreads / 32) {
        Point<R> at = backward_point<R, taps>(map, backward_base<R>(map, x, y), x, y);
        if (!at.finite) continue;
        const double sx = at.x + static_cast<double>(at.fx), sy = at.y + static_cast<double>(at.fy);
        const int sign_x = fold(at.x, at.fx, s.width, p.padding);
        const int sign_y = fold(at.y, at.fy, s.height, p.padding);
        const int64_t from = y * flow.row + x * flow.column;
        const Slope<R> g = slope_at<T, G, R, taps>(s, at, p.padding, flow, from, n, first, count);
        const double r = map.affine ? 1 : 1 / (map.m[6] * x + (map.m[7] * y + map.m[8]));
        add_terms(g.x * r * sign_x, g.y * r * sign_y, sx, sy, static_cast<double>(x), static_cast<double>(y), own);
    }
}

__device__ inline float distance(int32_t a, int32_t b) {  // that of clamped coordinates may wrap around
    return static_cast<float>(static_cast<int32_t>(static_cast<uint32_t>(a) - static_cast<uint32_t>(b)));
}

// Bilinear samples of an affine map, in float32. `bases`: of the tile's rows.
template <class T, class G>
__device__ inline void add_column_by_moments(const BackwardCall& call, const Pixels<T>& s, const Pixels<G>& flow,
                                             const WarpNumbers<float>& n, int64_t first, int64_t count, int32_t x,
                                             int32_t y0, const Base<float>* bases, double (&own)[kMatrixEntries]) {
    const AffineWarp& p = call.p;
    const int32_t left = static_cast<int32_t>(p.output_height) - y0, rows = left < kMatrixTile ? left : kMatrixTile;
    const int32_t whole_x = bases[0].x, whole_y = bases[0].y;  // of the tile's corner
    float gx = 0, gy = 0, along_x = 0, along_y = 0, turned = 0, along_turned = 0;
#pragma unroll 1
    for (int32_t row = static_cast<int32_t>(threadIdx.x / 32); row < rows; row += kBackwardThreads / 32) {
        Point<float> at = affine_point(bases[row], x % kBlock);
        if (!at.finite) continue;
        const float dx = distance(at.x, whole_x) + at.fx, dy = distance(at.y, whole_y) + at.fy;
        const int sign_x = fold(at.x, at.fx, s.width, p.padding);
        const int sign_y = fold(at.y, at.fy, s.height, p.padding);
        const int64_t from = (y0 + row) * flow.row + x * flow.column;
        const Slope<float> g = is_inside(s, at.x, at.y)
                                   ? slope_inside(s, at, flow, from, n, first, count)
                                   : slope_at<T, G, float, 2>(s, at, p.padding, flow, from, n, first, count);
        const float sum_x = g.x * static_cast<float>(sign_x), sum_y = g.y * static_cast<float>(sign_y);
        const float turn = fused(sum_x, dx, sum_y * dy), down = static_cast<float>(row);
        gx += sum_x;
        gy += sum_y;
        turned += turn;
        along_x = fused(sum_x, down, along_x);
        along_y = fused(sum_y, down, along_y);
        along_turned = fused(turn, down, along_turned);
    }
    const double terms[3] = {gx, gy, -(turned + gx * static_cast<double>(whole_x) + gy * static_cast<double>(whole_y))};
    const double moments[3] = {
        along_x, along_y,
        -(along_turned + along_x * static_cast<double>(whole_x) + along_y * static_cast<double>(whole_y))};
#pragma unroll
    for (int k = 0; k < 3; ++k) {
        own[3 * k] += terms[k] * x;
        own[3 * k + 1] += terms[k] * y0 + moments[k];
        own[3 * k + 2] += terms[k];
    }
}

// partial[n][chunk][9]: sums over every chunks-th tile of an image. Block: (image, chunk).
template <class T, class G, class R, int taps>
__global__ void __launch_bounds__(kBackwardThreads, sizeof(R) == 4 ? 3 : 1)
    matrix_partial(const BackwardCall call, const WarpNumbers<R> n, const Flow<G> flow, int64_t first, int64_t count,
                   double* partial) {
    __shared__ double shared[kBackwardThreads / 32][kMatrixEntries];
    __shared__ Base<float> bases[kMatrixTile];
    constexpr bool moments = taps == 2 && sizeof(R) == 4;
    const AffineWarp& p = call.p;
    const int thread = static_cast<int>(threadIdx.x), lane = thread % 32;
    const uint32_t across = static_cast<uint32_t>((p.output_width + 31) / 32);
    const uint32_t tiles = across * static_cast<uint32_t>((p.output_height + kMatrixTile - 1) / kMatrixTile);
    for (int64_t image = blockIdx.x; image < p.batch; image += gridDim.x) {
        const Map& map = call.plans[image].map;
        const Pixels<T> s = sampled_pixels(p, map, static_cast<const T*>(call.boxed), call.boxed_stride, image);
        const Pixels<G> flows = flow.of(image);
        double own[kMatrixEntries] = {};
        for (uint32_t tile = blockIdx.y; tile < tiles; tile += gridDim.y) {
            const int64_t x = int64_t{tile % across} * 32 + lane, y = int64_t{tile / across} * kMatrixTile;
            bool done = false;
            if constexpr (moments) {
                done = map.affine;
                if (done) {
                    if (thread < kMatrixTile) bases[thread] = backward_base<float>(map, x - lane, y + thread);
                    __syncthreads();
                    if (x < p.output_width)
                        add_column_by_moments(call, s, flows, n, first, count, static_cast<int32_t>(x),
                                              static_cast<int32_t>(y), bases, own);
                    __syncthreads();
                }
            }
            if (!done && x < p.output_width) add_column<T, G, R, taps>(call, map, s, flows, n, first, count, x, y, own);
        }
#pragma unroll
        for (int e = 0; e < kMatrixEntries; ++e) {
            for (int mask = 16; mask > 0; mask /= 2) own[e] += __shfl_xor_sync(~0u, own[e], mask);
            if (lane == 0) shared[thread / 32][e] = own[e];
        }
        __syncthreads();
        if (thread < kMatrixEntries) {
            double sum = 0;
            for (int warp = 0; warp < kBackwardThreads / 32; ++warp) sum += shared[warp][thread];
            // Several launches share the channels among them: one after the other, on one stream.
            double* to = partial + (image * gridDim.y + blockIdx.y) * kMatrixEntries + thread;
            *to = first == 0 ? sum : *to + sum;
        }
        __syncthreads();
    }
}

// grad[count][entries]: images in order, chunks in order, each carried back through its box filter. A warp to a matrix,
// a thread to an entry.
__global__ void matrix_total(const BackwardCall call, const double* partial, int chunks, int64_t count, int entries,
                             double* grad) {
    __shared__ double of[kMatrixEntries];
    const int e = static_cast<int>(threadIdx.x);
    for (int64_t matrix = blockIdx.x; matrix < count; matrix += gridDim.x) {
        double total = 0;
        const int64_t first = count > 1 ? matrix : 0, last = count > 1 ? matrix + 1 : call.p.batch;
        for (int64_t image = first; image < last; ++image) {
            const int32_t box[2] = {call.plans[image].map.box_x, call.plans[image].map.box_y};
            double sum = 0;
            if (e < kMatrixEntries)
                for (int chunk = 0; chunk < chunks; ++chunk)
                    sum += partial[(image * chunks + chunk) * kMatrixEntries + e];
            if (e < 6) of[e] = sum /= e < 3 ? box[0] : box[1];
            __syncwarp();
            if (e >= 6 && e < kMatrixEntries)
                for (int i = 0; i < 2; ++i) sum -= (box[i] - 1) * 0.5 * of[3 * i + e - 6];
            total += sum;
            __syncwarp();
        }
        if (e < entries) grad[matrix * entries + e] = total;
    }
}

}  // namespace
}  // namespace imgopt

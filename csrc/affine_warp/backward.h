// Gradients of affine_warp, image by image. Each output pixel is visited once, in order, and adds to its taps: with an
// image as the unit of work that is deterministic without atomics, whatever the threads. Sums over the image's pixels
// for the matrix are float64.
#pragma once

#include "rows.h"

namespace imgopt {
namespace {

// Sums over one image for the matrix that was sampled with, then carried back through the box filter's part of it.
struct MatrixGradient {
    double of[9] = {};

    // Row sums: of g r, g r x and so on, where r = 1 / w.
    void add_row(double y, const double constant[3], const double along_x[3]) {
        for (int i = 0; i < 3; ++i) {
            of[3 * i] += along_x[i];
            of[3 * i + 1] += constant[i] * y;
            of[3 * i + 2] += constant[i];
        }
    }

    void store(const Map& map, double* to) {
        const int32_t box[2] = {map.box_x, map.box_y};
        for (int i = 0; i < 2; ++i)
            for (int j = 0; j < 3; ++j) {
                of[3 * i + j] /= box[i];
                of[6 + j] -= (box[i] - 1) * 0.5 * of[3 * i + j];
            }
        for (int i = 0; i < 9; ++i) to[i] = of[i];
    }
};

// d loss / d sample of one pixel from d loss / d output: the epilogue backwards. `samples` are the forward ones.
template <class R>
inline void epilogue_backward(const AffineWarp& p, const double* color, const R* samples, R* g) {
    for (int64_t c = 0; c < p.channels; ++c) g[c] *= static_cast<R>(p.scale[c]);
    if (!color) return;
    R rgb[3], through[3] = {0, 0, 0};
    colored(color, samples, rgb);
    for (int i = 0; i < 3; ++i)
        if (rgb[i] >= 0 && rgb[i] <= 1)
            for (int j = 0; j < 3; ++j) through[j] = fused(static_cast<R>(color[4 * i + j]), g[i], through[j]);
    for (int j = 0; j < 3; ++j) g[j] = through[j];
}

template <int taps, class T, class G, class R>
void image_backward(const AffineWarpBackward& b, const Map& map, const Source<T>& source, int64_t image, R* g,
                    R* grad_source, MatrixGradient* grad_matrix) {
    const AffineWarp& p = b.warp;
    const double* color = p.color_matrix ? p.color_matrix + image * p.color_stride : nullptr;
    const G* grad = static_cast<const G*>(b.grad) + image * p.output_stride[0];
    const double* m = map.m;
    for (int64_t y = 0; y < p.output_height; ++y) {
        double constant[3] = {}, along_x[3] = {};
        Base<R> base{};
        for (int64_t x = 0; x < p.output_width; ++x) {
            if (map.affine && x % kBlock == 0) base = affine_base<R>(m, x, y);
            Point<R> at = point_at(p, map, base, x - x % kBlock, static_cast<int>(x % kBlock), y);
            if (!at.finite) continue;
            const double sx = at.x + static_cast<double>(at.fx), sy = at.y + static_cast<double>(at.fy);
            const int sign_x = fold(at.x, at.fx, source.width, p.padding);
            const int sign_y = fold(at.y, at.fy, source.height, p.padding);
            const Taps<taps> t(source, at.x, at.y, p.padding);
            R wx[taps], wy[taps], slope_x[taps], slope_y[taps], samples[3];
            axis_weights<taps>(at.fx, wx, slope_x);
            axis_weights<taps>(at.fy, wy, slope_y);
            const auto value = [&](int64_t c, int i, int j) {
                return tap<T, R>(source.data + c * source.channel, t.y[i], t.x[j], p.fill[c]);
            };
            for (int64_t c = 0; c < p.channels; ++c) {
                g[c] = static_cast<R>(
                    widened(grad[c * p.output_stride[1] + y * p.output_stride[2] + x * p.output_stride[3]]));
                if (!color) continue;
                samples[c] = 0;
                for (int i = 0; i < taps; ++i)
                    for (int j = 0; j < taps; ++j) samples[c] += wy[i] * wx[j] * value(c, i, j);
            }
            epilogue_backward(p, color, samples, g);
            R gx = 0, gy = 0;
            for (int64_t c = 0; c < p.channels; ++c)
                for (int i = 0; i < taps; ++i)
                    for (int j = 0; j < taps; ++j) {
                        if (grad_source && t.row[i] >= 0 && t.column[j] >= 0)
                            grad_source[(int64_t{t.row[i]} * source.width + t.column[j]) * p.channels + c] +=
                                wy[i] * wx[j] * g[c];
                        if (!grad_matrix || taps == 1) continue;
                        const R v = value(c, i, j) * g[c];
                        gx += v * slope_x[j] * wy[i];
                        gy += v * slope_y[i] * wx[j];
                    }
            if (!grad_matrix || taps == 1) continue;
            const double r = map.affine ? 1 : 1 / (m[6] * x + (m[7] * y + m[8]));
            const double gxr = gx * r * sign_x, gyr = gy * r * sign_y;
            const double terms[3] = {gxr, gyr, -(gxr * sx + gyr * sy)};
            for (int i = 0; i < 3; ++i) {
                constant[i] += terms[i];
                along_x[i] += terms[i] * x;
            }
        }
        if (grad_matrix) grad_matrix->add_row(static_cast<double>(y), constant, along_x);
    }
}

// The gradient of the sampled source, H, W, C, as that of the image: a box shares it among its pixels.
template <class T, class R>
void store_image_gradient(const AffineWarpBackward& b, const Map& map, int64_t image, const R* grad_source) {
    const AffineWarp& p = b.warp;
    const int64_t width = boxes(p.width, map.box_x);
    T* to = static_cast<T*>(b.grad_images) + image * b.grad_images_stride[0];
    const auto covered = [](int64_t i, int64_t box, int64_t side) {
        const int64_t first = i / box * box;
        return (first + box < side ? first + box : side) - first;
    };
    for (int64_t y = 0; y < p.height; ++y)
        for (int64_t x = 0; x < p.width; ++x) {
            const int64_t from = (y / map.box_y * width + x / map.box_x) * p.channels;
            const R count = static_cast<R>(covered(y, map.box_y, p.height) * covered(x, map.box_x, p.width));
            for (int64_t c = 0; c < p.channels; ++c)
                narrow(grad_source[from + c] / count,
                       to + c * b.grad_images_stride[1] + y * b.grad_images_stride[2] + x * b.grad_images_stride[3]);
        }
}

template <class T, class G, class R>
void backward_images(const AffineWarpBackward& b, int64_t begin, int64_t end) {
    const AffineWarp& p = b.warp;
    for (int64_t image = begin; image < end; ++image) {
        const Map map = map_of(p, image);
        const auto rounded_up = [](int64_t bytes) { return (bytes + 63) / 64 * 64; };
        const int64_t for_source = rounded_up(prepared_bytes<T>(p, map));
        const int64_t for_pixel = rounded_up(p.channels * int64_t{sizeof(R)});
        const int64_t size = boxes(p.height, map.box_y) * boxes(p.width, map.box_x) * p.channels;
        char* scratch = static_cast<char*>(
            thread_scratch(for_source + for_pixel + (b.grad_images ? size * int64_t{sizeof(R)} : 0)));
        const Source<T> source = prepared<T>(p, map, image, scratch);
        R* g = reinterpret_cast<R*>(scratch + for_source);
        R* grad_source = b.grad_images ? reinterpret_cast<R*>(scratch + for_source + for_pixel) : nullptr;
        for (int64_t i = 0; grad_source && i < size; ++i) grad_source[i] = 0;
        MatrixGradient sums;
        MatrixGradient* grad_matrix = b.grad_matrix ? &sums : nullptr;
        if (p.interpolation == Interpolation::nearest)
            image_backward<1, T, G>(b, map, source, image, g, grad_source, grad_matrix);
        else if (p.interpolation == Interpolation::bilinear)
            image_backward<2, T, G>(b, map, source, image, g, grad_source, grad_matrix);
        else
            image_backward<4, T, G>(b, map, source, image, g, grad_source, grad_matrix);
        if (grad_source) store_image_gradient<T>(b, map, image, grad_source);
        if (grad_matrix) sums.store(map, b.grad_matrix + image * 9);
    }
}

template <class T>
void backward_of(const AffineWarpBackward& b, int64_t begin, int64_t end) {
    using Narrow = decltype(widened(T{}));
    switch (b.warp.output_dtype) {
        case DType::f16: return backward_images<T, Half, Narrow>(b, begin, end);
        case DType::bf16: return backward_images<T, BFloat16, Narrow>(b, begin, end);
        case DType::f32: return backward_images<T, float, Narrow>(b, begin, end);
        default: return backward_images<T, double, double>(b, begin, end);
    }
}

inline void warp_backward(const AffineWarpBackward& b, int64_t begin, int64_t end) {
    switch (b.warp.images_dtype) {
        case DType::f16: return backward_of<Half>(b, begin, end);
        case DType::bf16: return backward_of<BFloat16>(b, begin, end);
        case DType::f32: return backward_of<float>(b, begin, end);
        default: return backward_of<double>(b, begin, end);
    }
}

}  // namespace
}  // namespace imgopt

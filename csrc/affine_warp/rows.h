// affine_warp row by row for every dtype, mode and layout, on top of arithmetic.h. The scalar unit is this file; a
// vector unit calls warp_rows() for the cases that it does not accelerate.
#pragma once

#include "points.h"

namespace imgopt {
namespace {

// --- sampling ------------------------------------------------------------------------------------------------------

template <class R>
IMGOPT_INLINE Point<R> point_at(const AffineWarp& p, const Map& map, const Base<R>& base, int64_t x0, int lane,
                                int64_t y) {
    Point<R> point = map.affine ? affine_point(base, lane) : perspective_point<R>(map.m, x0 + lane, y);
    if (p.interpolation == Interpolation::nearest) {
        point.x += point.fx >= static_cast<R>(0.5);
        point.y += point.fy >= static_cast<R>(0.5);
        point.fx = point.fy = 0;
    }
    return point;
}

// Taps of one pixel along both axes, as indices and as offsets into the source; -1 is fill.
template <int taps>
struct Taps {
    int32_t column[taps], row[taps];
    int64_t x[taps], y[taps];

    template <class T>
    Taps(const Source<T>& source, int32_t ix, int32_t iy, Padding padding) {
        constexpr int first = taps == 4 ? -1 : 0;
        for (int i = 0; i < taps; ++i) {
            column[i] = tap_index(ix + first + i, source.width, padding);
            row[i] = tap_index(iy + first + i, source.height, padding);
            x[i] = column[i] < 0 ? -1 : column[i] * source.column;
            y[i] = row[i] < 0 ? -1 : row[i] * source.row;
        }
    }
};

template <class T, class R>
R tap(const T* data, int64_t y, int64_t x, double fill) {
    return y < 0 || x < 0 ? static_cast<R>(fill) : static_cast<R>(widened(data[y + x]));
}

// A sample before the epilogue: levels times unit<T>() for uint8, the value itself for floating images.
template <class T>
double unit(Interpolation) {
    return 1;
}
template <>
double unit<uint8_t>(Interpolation interpolation) {
    return interpolation == Interpolation::nearest ? 1 : kWeightSum;
}

template <class R>
R bicubic(const uint8_t* data, const Taps<4>& t, R fx, R fy, double fill) {
    int32_t wx[4];
    R wy[4], sum = 0;
    bicubic_integer_weights(fx, wx);
    bicubic_weights(fy, wy);
    for (int i = 0; i < 4; ++i) {
        int32_t row = 0;
        for (int j = 0; j < 4; ++j)
            row += static_cast<int32_t>(tap<uint8_t, float>(data, t.y[i], t.x[j], fill)) * wx[j];
        sum = i ? fused(wy[i], static_cast<R>(row), sum) : wy[i] * static_cast<R>(row);
    }
    return sum;
}
template <class T, class R>
R bicubic(const T* data, const Taps<4>& t, R fx, R fy, double fill) {
    R wx[4], wy[4], sum = 0;
    bicubic_weights(fx, wx);
    bicubic_weights(fy, wy);
    for (int i = 0; i < 4; ++i) {
        R row = 0;
        for (int j = 0; j < 4; ++j) {
            const R v = tap<T, R>(data, t.y[i], t.x[j], fill);
            row = j ? fused(wx[j], v, row) : wx[j] * v;
        }
        sum = i ? fused(wy[i], row, sum) : wy[i] * row;
    }
    return sum;
}

// `count` samples of channels [c0, c0 + channels), each channel at its own kBlock values of `to`.
template <class T, class R>
void sample_block(const AffineWarp& p, const Source<T>& source, const Points<R>& points, int count, int64_t c0,
                  int channels, R* to) {
    const R whole = static_cast<R>(unit<T>(p.interpolation));
    const bool in_groups = p.interpolation == Interpolation::bilinear, near = near_offsets(source);
    for (int i = 0; in_groups && i < count; i += kSome)
        near ? bilinear_some<int32_t>(p, source, points, i, c0, channels, to)
             : bilinear_some<int64_t>(p, source, points, i, c0, channels, to);
    for (int i = 0; i < count; ++i) {
        const Point<R> point = points[i];
        if (in_groups && point.finite) continue;
        const auto store = [&](auto&& sampler) {
            for (int c = 0; c < channels; ++c)
                to[c * kBlock + i] = sampler(source.data + (c0 + c) * source.channel, p.fill[c0 + c]);
        };
        if (!point.finite) {
            store([&](const T*, double fill) { return static_cast<R>(fill) * whole; });
        } else if (p.interpolation == Interpolation::nearest) {
            const Taps<1> t(source, point.x, point.y, p.padding);
            store([&](const T* data, double fill) { return tap<T, R>(data, t.y[0], t.x[0], fill); });
        } else {
            const Taps<4> t(source, point.x, point.y, p.padding);
            store([&](const T* data, double fill) { return bicubic(data, t, point.fx, point.fy, fill); });
        }
    }
}

// --- forward -------------------------------------------------------------------------------------------------------

// The next image comes from memory while this one is computed, a share of it with every row: the order in which a
// turned image is read is one that no processor foresees.
struct Ahead {
    const char *at, *end;  // the same: nothing is left
    int64_t share;         // whole lines: as many every time, which the processor foresees

    IMGOPT_INLINE void row() {
        const char *stop = end - at < share ? end : at + share, *line = at;
        for (; line < stop; line += 64) __builtin_prefetch(line, 0, 2);
        at = line;
    }
};

// The image after `image`, if it is within the units up to `end`, over `rows` rows.
template <class T>
Ahead ahead_of(const AffineWarp& p, int64_t image, int64_t rows, int64_t end) {
    const int64_t size = p.channels * p.height * p.width, bytes = size * int64_t{sizeof(T)};
    const bool more = image + 1 < p.batch && (image + 1) * p.output_height < end && p.images_stride[0] == size;
    const char* next = reinterpret_cast<const char*>(static_cast<const T*>(p.images) + (image + 1) * size);
    return {next, more ? next + bytes : next, (bytes / rows + 64) / 64 * 64};
}

// Rows [y0, y1) and columns [x0, x1) of one image; x0 is a multiple of kBlock.
template <class T, class R>
void warp_tile(const AffineWarp& p, const Map& map, const Source<T>& source, int64_t image, int64_t y0, int64_t y1,
               int64_t x0, int64_t x1, Ahead& ahead) {
    const double whole = unit<T>(p.interpolation);
    const ColorMap<R> color = p.color_matrix ? ColorMap<R>(p, image, whole) : ColorMap<R>();
    const int together = p.channels <= 4 ? static_cast<int>(p.channels) : 1;  // the colour matrix needs three
    Points<R> points;
    R values[4 * kBlock] = {};
    for (int64_t y = y0; y < y1; ++y) {
        ahead.row();
        for (int64_t x = x0; x < x1; x += kBlock) {
            const int count = static_cast<int>(x1 - x < kBlock ? x1 - x : kBlock);
            locate_points(p, map, source.width, source.height, x, y, count, points);
            const int64_t offset = image * p.output_stride[0] + y * p.output_stride[2] + x * p.output_stride[3];
            for (int64_t c0 = 0; c0 < p.channels; c0 += together) {
                sample_block(p, source, points, count, c0, together, values);
                if (p.color_matrix) color_block(color, count, values);
                store_block(p, whole, offset + c0 * p.output_stride[1], count, c0, together, values);
            }
        }
    }
}

// Calls body(image, y0, y1) for each image that the units [begin, end) touch.
template <class Body>
void for_each_image(const AffineWarp& p, int64_t begin, int64_t end, const Body& body) {
    while (begin < end) {
        const int64_t image = begin / p.output_height, y0 = begin - image * p.output_height;
        const int64_t rest = y0 + (end - begin), y1 = rest < p.output_height ? rest : p.output_height;
        body(image, y0, y1);
        begin += y1 - y0;
    }
}

template <class T, class R>
void warp_rows_of(const AffineWarp& p, int64_t begin, int64_t end) {
    for_each_image(p, begin, end, [&](int64_t image, int64_t y0, int64_t y1) {
        const Map map = map_of(p, image);
        const int64_t bytes = prepared_bytes<T>(p, map);
        const Source<T> source = prepared<T>(p, map, image, bytes ? thread_scratch(bytes) : nullptr);
        Ahead ahead = ahead_of<T>(p, image, y1 - y0, end);
        warp_tile<T, R>(p, map, source, image, y0, y1, 0, p.output_width, ahead);
    });
}

// In the arithmetic R: double where images or output are float64.
template <class R>
void warp_rows(const AffineWarp& p, int64_t begin, int64_t end) {
    switch (p.images_dtype) {
        case DType::u8: return warp_rows_of<uint8_t, R>(p, begin, end);
        case DType::f16: return warp_rows_of<Half, R>(p, begin, end);
        case DType::bf16: return warp_rows_of<BFloat16, R>(p, begin, end);
        case DType::f32: return warp_rows_of<float, R>(p, begin, end);
        default:
            if constexpr (sizeof(R) == sizeof(double)) warp_rows_of<double, double>(p, begin, end);
    }
}

}  // namespace
}  // namespace imgopt

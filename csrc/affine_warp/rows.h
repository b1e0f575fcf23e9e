// affine_warp row by row for every dtype, mode and layout, on top of arithmetic.h. The scalar unit is this file; a
// vector unit calls warp_rows() for the cases that it does not accelerate.
#pragma once

#include "arithmetic.h"

namespace imgopt {
namespace {

// One image as it is sampled; strides count elements.
template <class T>
struct Source {
    const T* data;
    int64_t row, column, channel;
    int32_t height, width;
};

// --- box filter and table ------------------------------------------------------------------------------------------

inline uint8_t box_mean(const uint8_t*, uint64_t sum, int64_t count) {
    return static_cast<uint8_t>((2 * sum + count) / (2 * count));
}
template <class T>
T box_mean(const T*, double sum, int64_t count) {
    T mean;
    narrow(sum / count, &mean);
    return mean;
}
inline uint64_t box_term(uint8_t v) { return v; }
template <class T>
double box_term(T v) {
    return widened(v);
}

inline uint8_t looked_up(const uint8_t* table, uint8_t v) { return table ? table[v] : v; }
template <class T>
T looked_up(const uint8_t*, T v) {
    return v;
}

inline int64_t boxes(int64_t side, int64_t box) { return (side + box - 1) / box; }

// Bytes of scratch that prepared() needs, 0 where it reads the image itself.
template <class T>
int64_t prepared_bytes(const AffineWarp& p, const Map& map) {
    if (!p.table && map.box_x == 1 && map.box_y == 1) return 0;
    return boxes(p.height, map.box_y) * boxes(p.width, map.box_x) * p.channels * int64_t{sizeof(T)};
}

// Boxes of one pixel: the look-up alone, without the division of a mean.
template <class T>
void look_up(const AffineWarp& p, const T* data, int64_t image, T* to) {
    const int64_t sc = p.images_stride[1], sy = p.images_stride[2], sx = p.images_stride[3];
    for (int64_t y = 0; y < p.height; ++y)
        for (int64_t c = 0; c < p.channels; ++c) {
            const uint8_t* table = p.table + image * p.table_stride + c * 256;
            const T* from = data + y * sy + c * sc;
            T* row = to + y * p.width * p.channels + c;
            for (int64_t x = 0; x < p.width; ++x) row[x * p.channels] = looked_up(table, from[x * sx]);
        }
}

// The image behind table and box filter, written to scratch as H, W, C where it has either.
template <class T>
Source<T> prepared(const AffineWarp& p, const Map& map, int64_t image, void* scratch) {
    const T* data = static_cast<const T*>(p.images) + image * p.images_stride[0];
    const int64_t sc = p.images_stride[1], sy = p.images_stride[2], sx = p.images_stride[3];
    if (!p.table && map.box_x == 1 && map.box_y == 1)
        return {data, sy, sx, sc, static_cast<int32_t>(p.height), static_cast<int32_t>(p.width)};
    const int64_t height = boxes(p.height, map.box_y), width = boxes(p.width, map.box_x);
    T* to = static_cast<T*>(scratch);
    if (map.box_x == 1 && map.box_y == 1) {
        look_up(p, data, image, to);
        return {to, width * p.channels, p.channels, 1, static_cast<int32_t>(height), static_cast<int32_t>(width)};
    }
    for (int64_t y = 0; y < height; ++y)
        for (int64_t x = 0; x < width; ++x) {
            const int64_t y0 = y * map.box_y, x0 = x * map.box_x;
            const int64_t y1 = y0 + map.box_y < p.height ? y0 + map.box_y : p.height;
            const int64_t x1 = x0 + map.box_x < p.width ? x0 + map.box_x : p.width;
            for (int64_t c = 0; c < p.channels; ++c) {
                const uint8_t* table = p.table ? p.table + image * p.table_stride + c * 256 : nullptr;
                decltype(box_term(T{})) sum = 0;
                for (int64_t v = y0; v < y1; ++v)
                    for (int64_t u = x0; u < x1; ++u) sum += box_term(looked_up(table, data[c * sc + v * sy + u * sx]));
                *to++ = box_mean(data, sum, (y1 - y0) * (x1 - x0));
            }
        }
    return {static_cast<T*>(scratch),     width * p.channels,         p.channels, 1,
            static_cast<int32_t>(height), static_cast<int32_t>(width)};
}

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
R bilinear(const uint8_t* data, const Taps<2>& t, R fx, R fy, double fill) {
    const BilinearWeights w = bilinear_weights(fx, fy);
    const int32_t outside = static_cast<int32_t>(fill);
    const auto at = [&](int i, int j) { return t.y[i] < 0 || t.x[j] < 0 ? outside : int32_t{data[t.y[i] + t.x[j]]}; };
    return static_cast<R>(at(0, 0) * w.w00 + at(0, 1) * w.w01 + at(1, 0) * w.w10 + at(1, 1) * w.w11);
}
template <class T, class R>
R bilinear(const T* data, const Taps<2>& t, R fx, R fy, double fill) {
    R row[2];
    for (int i = 0; i < 2; ++i) {
        const R left = tap<T, R>(data, t.y[i], t.x[0], fill);
        row[i] = fused(fx, tap<T, R>(data, t.y[i], t.x[1], fill) - left, left);
    }
    return fused(fy, row[1] - row[0], row[0]);
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

// Bilinear samples whose taps all lie inside the image, which most do: no branch per tap, offsets once for all
// channels.
constexpr int kInside = 16;

template <class T, class R>
bool all_inside(const Source<T>& source, const Point<R>* points) {
    bool inside = true;
    for (int i = 0; i < kInside; ++i) {
        const Point<R>& at = points[i];
        inside &= at.finite & (at.x >= 0) & (at.y >= 0) & (at.x < source.width - 1) & (at.y < source.height - 1);
    }
    return inside;
}

template <class R>
R bilinear_inside(const uint8_t* data, int64_t row, int64_t column, R fx, R fy) {
    const BilinearWeights w = bilinear_weights(fx, fy);
    return static_cast<R>(data[0] * w.w00 + data[column] * w.w01 + data[row] * w.w10 + data[row + column] * w.w11);
}
template <class T, class R>
R bilinear_inside(const T* data, int64_t row, int64_t column, R fx, R fy) {
    const R p00 = static_cast<R>(widened(data[0])), p10 = static_cast<R>(widened(data[row]));
    const R above = fused(fx, static_cast<R>(widened(data[column])) - p00, p00);
    const R below = fused(fx, static_cast<R>(widened(data[row + column])) - p10, p10);
    return fused(fy, below - above, above);
}

template <class T, class R>
void sample_inside(const Source<T>& source, const Point<R>* points, int64_t c0, int channels, R* to) {
    int64_t at[kInside];
    R fx[kInside], fy[kInside];
    for (int i = 0; i < kInside; ++i) {
        at[i] = points[i].y * source.row + points[i].x * source.column;
        fx[i] = points[i].fx;
        fy[i] = points[i].fy;
    }
    for (int c = 0; c < channels; ++c) {
        const T* data = source.data + (c0 + c) * source.channel;
        for (int i = 0; i < kInside; ++i)
            to[c * kBlock + i] = bilinear_inside(data + at[i], source.row, source.column, fx[i], fy[i]);
    }
}

// `count` samples of channels [c0, c0 + channels), each channel at its own kBlock values of `to`.
template <class T, class R>
void sample_block(const AffineWarp& p, const Source<T>& source, const Point<R>* points, int count, int64_t c0,
                  int channels, R* to) {
    const R whole = static_cast<R>(unit<T>(p.interpolation));
    const bool bilinear_wanted = p.interpolation == Interpolation::bilinear;
    for (int i = 0; i < count; ++i) {
        if (bilinear_wanted && i % kInside == 0 && i + kInside <= count && all_inside(source, points + i)) {
            sample_inside(source, points + i, c0, channels, to + i);
            i += kInside - 1;
            continue;
        }
        const Point<R>& point = points[i];
        const auto store = [&](auto&& sampler) {
            for (int c = 0; c < channels; ++c)
                to[c * kBlock + i] = sampler(source.data + (c0 + c) * source.channel, p.fill[c0 + c]);
        };
        if (!point.finite) {
            store([&](const T*, double fill) { return static_cast<R>(fill) * whole; });
        } else if (p.interpolation == Interpolation::nearest) {
            const Taps<1> t(source, point.x, point.y, p.padding);
            store([&](const T* data, double fill) { return tap<T, R>(data, t.y[0], t.x[0], fill); });
        } else if (bilinear_wanted) {
            const Taps<2> t(source, point.x, point.y, p.padding);
            store([&](const T* data, double fill) { return bilinear(data, t, point.fx, point.fy, fill); });
        } else {
            const Taps<4> t(source, point.x, point.y, p.padding);
            store([&](const T* data, double fill) { return bicubic(data, t, point.fx, point.fy, fill); });
        }
    }
}

// --- epilogue ------------------------------------------------------------------------------------------------------

// rgb of one pixel, in units of [0, 1], through the colour matrix; not yet clamped.
template <class R>
inline void colored(const double* m, const R rgb[3], R to[3]) {
    for (int i = 0; i < 3; ++i, m += 4) {
        const R red = fused(static_cast<R>(m[0]), rgb[0], static_cast<R>(m[3]));
        to[i] = fused(static_cast<R>(m[2]), rgb[2], fused(static_cast<R>(m[1]), rgb[1], red));
    }
}

// Factor that takes a sample to units of [0, 1].
inline double to_unit(const AffineWarp& p, double whole) { return p.images_dtype == DType::u8 ? 1 / (255 * whole) : 1; }

template <class R>
void color_block(const AffineWarp& p, const double* m, double whole, int count, R* values) {
    const R factor = static_cast<R>(to_unit(p, whole));
    for (int i = 0; i < count; ++i) {
        R rgb[3] = {values[i] * factor, values[kBlock + i] * factor, values[2 * kBlock + i] * factor}, to[3];
        colored(m, rgb, to);
        for (int c = 0; c < 3; ++c) values[c * kBlock + i] = clamped<R>(to[c], 0, 1);
    }
}

template <class R>
void store_block(const AffineWarp& p, double whole, int64_t offset, int count, int64_t c, const R* values) {
    const bool units = p.color_matrix || p.images_dtype != DType::u8;  // not levels times `whole`
    const int64_t step = p.output_stride[3];
    const auto store = [&](auto* to) {
        const R factor = static_cast<R>(p.scale[c] * (p.color_matrix ? 1 : to_unit(p, whole)));
        const R add = static_cast<R>(p.offset[c]);
        for (int i = 0; i < count; ++i) narrow(fused(values[i], factor, add), to + offset + i * step);
    };
    switch (p.output_dtype) {
        case DType::u8: {
            const R factor = static_cast<R>(units ? 255 : 1 / whole);
            uint8_t* to = static_cast<uint8_t*>(p.output) + offset;
            for (int i = 0; i < count; ++i) to[i * step] = level(values[i] * factor);
            break;
        }
        case DType::f16: store(static_cast<Half*>(p.output)); break;
        case DType::bf16: store(static_cast<BFloat16*>(p.output)); break;
        case DType::f32: store(static_cast<float*>(p.output)); break;
        default: store(static_cast<double*>(p.output)); break;
    }
}

// --- forward -------------------------------------------------------------------------------------------------------

// Rows [y0, y1) and columns [x0, x1) of one image; x0 is a multiple of kBlock.
template <class T, class R>
void warp_tile(const AffineWarp& p, const Map& map, const Source<T>& source, int64_t image, int64_t y0, int64_t y1,
               int64_t x0, int64_t x1) {
    const double whole = unit<T>(p.interpolation);
    const double* color = p.color_matrix ? p.color_matrix + image * p.color_stride : nullptr;
    const int group = color ? 3 : 1;  // channels that the epilogue needs together
    Point<R> points[kBlock];
    R values[3 * kBlock];
    for (int64_t y = y0; y < y1; ++y) {
        for (int64_t x = x0; x < x1; x += kBlock) {
            const int count = static_cast<int>(x1 - x < kBlock ? x1 - x : kBlock);
            Base<R> base{};
            if (map.affine) base = affine_base<R>(map.m, x, y);
            for (int i = 0; i < count; ++i) {
                points[i] = point_at(p, map, base, x, i, y);
                fold(points[i].x, points[i].fx, source.width, p.padding);
                fold(points[i].y, points[i].fy, source.height, p.padding);
            }
            const int64_t offset = image * p.output_stride[0] + y * p.output_stride[2] + x * p.output_stride[3];
            for (int64_t c0 = 0; c0 < p.channels; c0 += group) {
                sample_block(p, source, points, count, c0, group, values);
                if (color) color_block(p, color, whole, count, values);
                for (int c = 0; c < group; ++c)
                    store_block(p, whole, offset + (c0 + c) * p.output_stride[1], count, c0 + c, values + c * kBlock);
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
        warp_tile<T, R>(p, map, source, image, y0, y1, 0, p.output_width);
    });
}

inline void warp_rows(const AffineWarp& p, int64_t begin, int64_t end) {
    const bool wide = p.output_dtype == DType::f64;
    switch (p.images_dtype) {
        case DType::u8:
            return wide ? warp_rows_of<uint8_t, double>(p, begin, end) : warp_rows_of<uint8_t, float>(p, begin, end);
        case DType::f16:
            return wide ? warp_rows_of<Half, double>(p, begin, end) : warp_rows_of<Half, float>(p, begin, end);
        case DType::bf16:
            return wide ? warp_rows_of<BFloat16, double>(p, begin, end) : warp_rows_of<BFloat16, float>(p, begin, end);
        case DType::f32:
            return wide ? warp_rows_of<float, double>(p, begin, end) : warp_rows_of<float, float>(p, begin, end);
        default: return warp_rows_of<double, double>(p, begin, end);
    }
}

}  // namespace
}  // namespace imgopt

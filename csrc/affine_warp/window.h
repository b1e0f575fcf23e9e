// The working copy from which the vector units sample uint8 images with 1, 3 or 4 channels: the touched part of the
// source with its border written out as pixels, so that the inner loop has no inside and outside. For bilinear sampling
// a position holds the pixel of row y and the one of row y + 1, so that one 16-byte load at a position brings all four
// taps of all channels. Copying costs 0.25 cycles per pixel; OpenCV's tap-by-tap collection costs 8.
#pragma once

#include "rows.h"

namespace imgopt {
namespace {

constexpr int64_t kWindowBytes = 640 << 10;  // most of a 1 MiB L2 cache
constexpr int64_t kTile = 128;               // output tile where a whole image's window does not fit
constexpr int64_t kSparse = 8;               // positions per output pixel beyond which copying does not pay
constexpr int64_t kSlack = 128;              // a vector may read or write this far past the last position

struct Window {
    uint8_t* data;
    int64_t pitch;           // bytes per row of positions
    int32_t x0, y0;          // source pixel of the first position
    int32_t width, height;   // positions
    int32_t x_last, y_last;  // last position that a sample may start from, counted from the first one
};

constexpr int position_bytes(int channels, int taps) {
    return taps == 2 ? 2 * channels : taps == 4 ? channels : channels == 1 ? 1 : 4;
}

// Positions from which samples of the output tile may start, along one axis: those between `low` and `high` (floors of
// coordinates), cut to where the border still changes.
struct Span {
    int32_t first, last;
};

inline Span span_of(double low, double high, int32_t n, Padding padding, int taps) {
    // Beyond these all taps are alike: fill, or one border pixel.
    const int margin = (padding == Padding::constant) + (taps == 4 && padding < Padding::reflect);
    const double least = -1 - margin, most = n - 1 + margin;
    const bool mirrored = padding >= Padding::reflect && !(low >= 0 && high < n);
    if (mirrored || !(low <= high)) return {static_cast<int32_t>(least), static_cast<int32_t>(most)};  // NaN too
    return {static_cast<int32_t>(clamped(low, least, most)), static_cast<int32_t>(clamped(high, least, most))};
}

// What the tile's samples may touch. The extremes of a line's image are at its ends, those of a rectangle's at its
// corners, as long as w does not vanish in between; the slack covers the rounding of float32 coordinates.
inline void tile_spans(const Map& map, const Source<uint8_t>& source, Padding padding, int taps, int64_t y0, int64_t y1,
                       int64_t x0, int64_t x1, Span* columns, Span* rows) {
    const double* m = map.m;
    double low[2] = {__builtin_inf(), __builtin_inf()}, high[2] = {-__builtin_inf(), -__builtin_inf()};
    bool positive = true, negative = true;
    for (int corner = 0; corner < 4; ++corner) {
        const double x = corner & 1 ? x1 - 1 : x0, y = corner & 2 ? y1 - 1 : y0;
        const double w = map.affine ? 1 : m[6] * x + m[7] * y + m[8];
        // Relative to its terms, w is at least 1e-9: far from where rounding would decide its sign.
        const double size = 1e-9 * (__builtin_fabs(m[6] * x) + __builtin_fabs(m[7] * y) + __builtin_fabs(m[8]));
        positive = positive && w > size;
        negative = negative && -w > size;
        for (int axis = 0; axis < 2; ++axis) {
            const double* row = m + 3 * axis;
            const double v = (row[0] * x + row[1] * y + row[2]) / w;
            low[axis] = v < low[axis] ? v : low[axis];
            high[axis] = v > high[axis] ? v : high[axis];
            if (!finite(v)) positive = negative = false;
        }
    }
    if (!map.affine && !positive && !negative) low[0] = low[1] = __builtin_nan("");  // whole axes
    const double slack[2] = {1 + __builtin_fabs(m[0]) * 1e-4, 1 + __builtin_fabs(m[3]) * 1e-4};
    *columns = span_of(floor_of(low[0] - slack[0]), floor_of(high[0] + slack[0] + 1), source.width, padding, taps);
    *rows = span_of(floor_of(low[1] - slack[1]), floor_of(high[1] + slack[1] + 1), source.height, padding, taps);
}

// One row of positions. Isa::pack writes the pixels of two rows, given where each starts, as positions; the columns
// beyond the image and the rows that are fill go pixel by pixel.
template <int C, int taps, class Isa>
void fill_window_row(const AffineWarp& p, const Source<uint8_t>& source, const uint8_t* fill, const Window& window,
                     int32_t row, uint8_t* to) {
    constexpr int bytes = position_bytes(C, taps);
    const int32_t first = tap_index(window.y0 + row, source.height, p.padding);
    const int32_t second = taps == 2 ? tap_index(window.y0 + row + 1, source.height, p.padding) : first;
    const auto put = [&](int32_t i) {
        const int32_t x = tap_index(window.x0 + i, source.width, p.padding);
        for (int half = 0; half < (taps == 2 ? 2 : 1); ++half) {
            const int32_t y = half ? second : first;
            for (int c = 0; c < C; ++c)
                to[i * bytes + half * C + c] =
                    x < 0 || y < 0 ? fill[c] : source.data[y * source.row + x * source.column + c * source.channel];
        }
    };
    const int32_t left = window.x0 < 0 ? -window.x0 : 0;  // first position inside the image
    const int32_t inside = source.width - window.x0;      // first beyond it
    int32_t right = inside < window.width ? inside : window.width;
    if (first < 0 || second < 0 || right < left) right = left;
    if (right > left) {
        const int64_t at = (window.x0 + left) * source.column;
        Isa::template pack<C, taps>(source, source.data + first * source.row + at,
                                    source.data + second * source.row + at, right - left, to + left * bytes);
    }
    for (int32_t i = 0; i < left; ++i) put(i);
    for (int32_t i = right; i < window.width; ++i) put(i);
}

// Whether the vector units serve this call.
inline bool has_window(const AffineWarp& p) {
    const int64_t* in = p.images_stride;
    const int64_t* out = p.output_stride;
    const int64_t c = p.channels;
    const bool in_dense = in[3] == 1 || (in[1] == 1 && in[3] == c);
    const bool out_dense = out[3] == 1 || (out[1] == 1 && out[3] == c);
    return p.images_dtype == DType::u8 && p.output_dtype != DType::f64 && (c == 1 || c == 3 || c == 4) && in_dense &&
           out_dense && p.width < (1 << 24) && p.height < (1 << 24);
}

// --- one tile ------------------------------------------------------------------------------------------------------

template <int C>
struct Epilogue {
    float fill[C];  // a sample that is fill
    float unit;     // takes a sample to [0, 1], before the colour matrix
    float color[12];
    float factor[C], add[C];  // floating output
    float levels;             // uint8 output
    bool colored;

    Epilogue(const AffineWarp& p, int64_t image, double whole) : color{}, colored(p.color_matrix != nullptr) {
        unit = static_cast<float>(to_unit(p, whole));
        levels = static_cast<float>(colored ? 255 : 1 / whole);
        for (int c = 0; c < C; ++c) {
            fill[c] = static_cast<float>(p.fill[c]) * static_cast<float>(whole);
            factor[c] = static_cast<float>(p.scale[c] * (colored ? 1 : to_unit(p, whole)));
            add[c] = static_cast<float>(p.offset[c]);
        }
        for (int i = 0; colored && i < 12; ++i)
            color[i] = static_cast<float>(p.color_matrix[image * p.color_stride + i]);
    }
};

// Where a vector of pixels goes. `planar`: channel by channel, `channel` elements apart; otherwise pixel by pixel.
struct Target {
    int64_t channel;
    bool planar;
    int count;
};

// What sampling needs of the pixels of one block. Written in one loop and read in the next: a compiler that sees both
// ends of an offset moves it through vpextrd, four times the cost of a load.
struct BlockTaps {
    alignas(64) int32_t offset[kBlock];       // of the position in the window, bytes
    alignas(64) int32_t weight[2][kBlock];    // of the columns, as the unit multiplies them
    alignas(64) float row_weight[4][kBlock];  // bicubic
    uint32_t finite[kBlock / 4];              // a bit per lane, one number per vector
};

// The vector loop. Isa brings the steps on Isa::kLanes pixels at a time.
template <class Isa, int C, int taps, class T>
void warp_window(const AffineWarp& p, const Map& map, const Source<uint8_t>& source, const Window& w, int64_t image,
                 int64_t y0, int64_t y1, int64_t x0, int64_t x1, const uint8_t* next) {
    constexpr int lanes = Isa::kLanes;
    const Epilogue<C> epilogue(p, image, taps > 1 ? kWeightSum : 1);
    const bool mirrored = p.padding >= Padding::reflect;
    Target target{p.output_stride[1], p.output_stride[3] == 1, lanes};
    BlockTaps block_taps;
    for (int64_t y = y0; y < y1; ++y) {
        T* row = static_cast<T*>(p.output) + image * p.output_stride[0] + y * p.output_stride[2];
        if (next) {
            const int64_t bytes = source.height * int64_t{source.width} * C;
            const int64_t from = (y - y0) * bytes / (y1 - y0), to = (y - y0 + 1) * bytes / (y1 - y0);
            for (int64_t i = from; i < to; i += 64) __builtin_prefetch(next + i, 0, 2);
        }
        for (int64_t block = x0; block < x1; block += kBlock) {
            Base<float> base{};
            if (map.affine) base = affine_base<float>(map.m, block, y);
            const int count = static_cast<int>(x1 - block < kBlock ? x1 - block : kBlock);
            for (int i = 0; i < count; i += lanes) {
                auto at = map.affine ? Isa::affine(base, i) : Isa::perspective(map.m, block + i, y);
                if constexpr (taps == 1) Isa::round(at);
                if (mirrored) Isa::fold(at, source, p.padding);
                Isa::template locate<C, taps>(w, at, block_taps, i);
            }
            for (int i = 0; i < count; i += lanes) {
                typename Isa::Vector samples[C];
                Isa::template samples<C, taps>(w, block_taps, i, samples);
                const auto finite = block_taps.finite[i / lanes];
                if (finite != Isa::kAllFinite)
                    for (int c = 0; c < C; ++c) Isa::blend(epilogue.fill[c], finite, samples[c]);
                if constexpr (C == 3)
                    if (epilogue.colored) Isa::color(epilogue.color, epilogue.unit, samples);
                target.count = count - i < lanes ? count - i : lanes;
                Isa::template put<C>(row + (block + i) * p.output_stride[3], target, epilogue, samples);
            }
        }
    }
}

template <class Isa, int C, int taps, class... Rest>
void warp_window_to(const AffineWarp& p, const Rest&... rest) {
    switch (p.output_dtype) {
        case DType::u8: return warp_window<Isa, C, taps, uint8_t>(p, rest...);
        case DType::f16: return warp_window<Isa, C, taps, Half>(p, rest...);
        case DType::bf16: return warp_window<Isa, C, taps, BFloat16>(p, rest...);
        default: return warp_window<Isa, C, taps, float>(p, rest...);
    }
}

// --- images and tiles ----------------------------------------------------------------------------------------------

template <int C, int taps, class Isa>
void warp_windowed(const AffineWarp& p, int64_t begin, int64_t end) {
    constexpr int bytes = position_bytes(C, taps);
    uint8_t fill[C];
    for (int c = 0; c < C; ++c) fill[c] = static_cast<uint8_t>(p.fill[c]);
    for_each_image(p, begin, end, [&](int64_t image, int64_t y_begin, int64_t y_end) {
        const Map map = map_of(p, image);
        const int64_t before = (prepared_bytes<uint8_t>(p, map) + 63) / 64 * 64;
        uint8_t* scratch = static_cast<uint8_t*>(thread_scratch(before + kWindowBytes + kSlack));
        const Source<uint8_t> source = prepared<uint8_t>(p, map, image, scratch);
        // The next image comes from memory while this one is computed.
        const bool more = image + 1 < p.batch && (image + 1) * p.output_height < end && before == 0;
        const uint8_t* next = more ? source.data + p.images_stride[0] : nullptr;
        const auto window_of = [&](int64_t y0, int64_t y1, int64_t x0, int64_t x1) {
            Span columns, rows;
            tile_spans(map, source, p.padding, taps, y0, y1, x0, x1, &columns, &rows);
            constexpr int lead = taps == 4;
            Window w{};
            w.data = scratch + before;
            w.x0 = columns.first - lead;
            w.y0 = rows.first - lead;
            w.x_last = columns.last - columns.first;
            w.y_last = rows.last - rows.first;
            w.width = w.x_last + taps;
            w.height = w.y_last + (taps == 4 ? 4 : 1);
            w.pitch = (int64_t{w.width} * bytes + 31) / 32 * 32;
            return w;
        };
        const auto fits = [&](const Window& w, int64_t outputs) {
            return w.pitch * w.height <= kWindowBytes && int64_t{w.width} * w.height <= kSparse * outputs + 4096;
        };
        const auto warp = [&](int64_t y0, int64_t y1, int64_t x0, int64_t x1) {
            const Window w = window_of(y0, y1, x0, x1);
            if (!fits(w, (y1 - y0) * (x1 - x0))) return false;
            for (int32_t row = 0; row < w.height; ++row)
                fill_window_row<C, taps, Isa>(p, source, fill, w, row, w.data + row * w.pitch);
            warp_window_to<Isa, C, taps>(p, map, source, w, image, y0, y1, x0, x1, next);
            return true;
        };
        if (warp(y_begin, y_end, 0, p.output_width)) return;
        for (int64_t y0 = y_begin; y0 < y_end; y0 += kTile)
            for (int64_t x0 = 0; x0 < p.output_width; x0 += kTile) {
                const int64_t y1 = y0 + kTile < y_end ? y0 + kTile : y_end;
                const int64_t x1 = x0 + kTile < p.output_width ? x0 + kTile : p.output_width;
                if (!warp(y0, y1, x0, x1)) warp_tile<uint8_t, float>(p, map, source, image, y0, y1, x0, x1);
            }
    });
}

template <int C, class Isa>
void warp_channels(const AffineWarp& p, int64_t begin, int64_t end) {
    switch (p.interpolation) {
        case Interpolation::nearest: return warp_windowed<C, 1, Isa>(p, begin, end);
        case Interpolation::bilinear: return warp_windowed<C, 2, Isa>(p, begin, end);
        default: return warp_windowed<C, 4, Isa>(p, begin, end);
    }
}

template <class Isa>
void warp_vectorized(const AffineWarp& p, int64_t begin, int64_t end) {
    if (!has_window(p)) return warp_rows(p, begin, end);
    switch (p.channels) {
        case 1: return warp_channels<1, Isa>(p, begin, end);
        case 3: return warp_channels<3, Isa>(p, begin, end);
        default: return warp_channels<4, Isa>(p, begin, end);
    }
}

}  // namespace
}  // namespace imgopt

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

// --- what a tile touches -------------------------------------------------------------------------------------------

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
template <class T>
void tile_spans(const Map& map, const Source<T>& source, Padding padding, int taps, int64_t y0, int64_t y1, int64_t x0,
                int64_t x1, Span* columns, Span* rows) {
    const double* m = map.m;
    double low[2] = {__builtin_inf(), __builtin_inf()}, high[2] = {-__builtin_inf(), -__builtin_inf()};
    bool positive = true, negative = true;
    for (int corner = 0; corner < 4; ++corner) {
        const double x = static_cast<double>(corner & 1 ? x1 - 1 : x0),
                     y = static_cast<double>(corner & 2 ? y1 - 1 : y0);
        double w = 1;
        if (!map.affine) {
            // Relative to its terms, w is at least 1e-9: far from where rounding would decide its sign.
            w = m[6] * x + m[7] * y + m[8];
            const double size = 1e-9 * (__builtin_fabs(m[6] * x) + __builtin_fabs(m[7] * y) + __builtin_fabs(m[8]));
            positive = positive && w > size;
            negative = negative && -w > size;
        }
        for (int axis = 0; axis < 2; ++axis) {
            const double* row = m + 3 * axis;
            const double at = row[0] * x + row[1] * y + row[2], v = map.affine ? at : at / w;
            low[axis] = v < low[axis] ? v : low[axis];
            high[axis] = v > high[axis] ? v : high[axis];
            if (!finite(v)) positive = negative = false;
        }
    }
    if (!positive && !negative) low[0] = low[1] = __builtin_nan("");  // whole axes
    const double slack[2] = {1 + __builtin_fabs(m[0]) * 1e-4, 1 + __builtin_fabs(m[3]) * 1e-4};
    *columns = span_of(floor_of(low[0] - slack[0]), floor_of(high[0] + slack[0] + 1), source.width, padding, taps);
    *rows = span_of(floor_of(low[1] - slack[1]), floor_of(high[1] + slack[1] + 1), source.height, padding, taps);
}

// `bytes`: of a position; `stacked`: it holds two rows.
template <class T>
Window window_of(const Map& map, const Source<T>& source, Padding padding, int taps, int bytes, bool stacked,
                 int64_t y0, int64_t y1, int64_t x0, int64_t x1) {
    Span columns, rows;
    tile_spans(map, source, padding, taps, y0, y1, x0, x1, &columns, &rows);
    const int lead = taps == 4;
    Window w{};
    w.x0 = columns.first - lead;
    w.y0 = rows.first - lead;
    w.x_last = columns.last - columns.first;
    w.y_last = rows.last - rows.first;
    w.width = w.x_last + taps;
    w.height = w.y_last + (stacked ? 1 : taps);
    w.pitch = (int64_t{w.width} * bytes + 31) / 32 * 32;
    return w;
}

// Whether a window fits, and copying pays: by positions that are copied per pixel of output.
inline bool pays(const Window& w, int64_t planes, int64_t outputs) {
    return planes * w.pitch * w.height <= kWindowBytes && int64_t{w.width} * w.height <= kSparse * outputs + 4096;
}

// --- filling it ----------------------------------------------------------------------------------------------------

// Bytes that the fill replaces, over 24 of them: a multiple of every size of a position and of a word.
struct Paint {
    uint64_t keep[3], set[3];

    void over(uint8_t* to, int64_t bytes) const {
        for (int64_t i = 0; i < bytes; i += 24)
            for (int k = 0; k < 3; ++k) {
                uint64_t word;
                __builtin_memcpy(&word, to + i + 8 * k, 8);
                word = (word & keep[k]) | set[k];
                __builtin_memcpy(to + i + 8 * k, &word, 8);
            }
    }
};

template <int C, int taps>
Paint paint_of(const uint8_t* fill, bool upper, bool lower) {
    constexpr int bytes = position_bytes(C, taps);
    uint8_t keep[24], set[24];
    for (int i = 0; i < 24; ++i) {
        const bool painted = taps == 2 && i % bytes >= C ? lower : upper;
        keep[i] = painted ? 0 : 255;
        set[i] = painted ? fill[i % bytes % C] : 0;
    }
    Paint paint;
    __builtin_memcpy(paint.keep, keep, 24);
    __builtin_memcpy(paint.set, set, 24);
    return paint;
}

// The columns of a window: [left, right) lie inside the image, each of the others is a copy of one of them, or fill.
struct Columns {
    static constexpr int kMost = 8;
    int32_t left, right;
    int outside;                     // columns beyond the image; more than kMost, or unlike any inside: -1
    int32_t to[kMost], from[kMost];  // from -1: fill

    Columns(const Window& w, int32_t n, Padding padding) : left(w.x0 < 0 ? -w.x0 : 0), right(w.width), outside(0) {
        if (n - w.x0 < right) right = n - w.x0;
        if (right <= left || left + w.width - right > kMost) {
            outside = -1;
            return;
        }
        for (int32_t i = 0; i < w.width; ++i) {
            if (i == left) i = right;
            if (i >= w.width) break;
            const int32_t x = tap_index(w.x0 + i, n, padding), at = x - w.x0;
            if (x >= 0 && (at < left || at >= right)) {
                outside = -1;
                return;
            }
            to[outside] = i;
            from[outside++] = x < 0 ? -1 : at;
        }
    }
};

// A row of positions pixel by pixel, for windows that hardly touch the image.
template <int C, int taps>
void fill_row_slowly(const Source<uint8_t>& source, const uint8_t* fill, const Window& w, Padding padding,
                     int32_t first, int32_t second, uint8_t* to) {
    for (int32_t i = 0; i < w.width; ++i, to += position_bytes(C, taps)) {
        const int32_t x = tap_index(w.x0 + i, source.width, padding);
        for (int half = 0; half < (taps == 2 ? 2 : 1); ++half) {
            const int32_t y = half ? second : first;
            for (int c = 0; c < C; ++c) {
                const bool outside = x < 0 || y < 0;
                const int64_t at = y * source.row + x * source.column + c * source.channel;
                to[half * C + c] = outside ? fill[c] : source.data[at];
            }
        }
    }
}

// Isa::pack of the units that pack four pixels of two rows at a time, sixteen where there is one channel.
template <class Packing, int C, int taps>
void pack_pixels(const Source<uint8_t>& source, const uint8_t* first, const uint8_t* second, int32_t count,
                 uint8_t* to) {
    constexpr int bytes = position_bytes(C, taps);
    const bool planar = !(source.column == C && source.channel == 1);
    const int64_t column = planar ? 1 : C, channel = planar ? source.channel : 1;
    int32_t i = 0;
    if constexpr (C == 1) {
        for (; i + 16 <= count; i += 16) Packing::template put_sixteen<taps>(to + i * bytes, first + i, second + i);
    } else {
        const int ahead = planar || C == 4 ? 4 : 6;  // pixels that a 16-byte load of interleaved RGB touches
        for (; i + ahead <= count; i += 4)
            Packing::template put_four<C, taps>(to + i * bytes, source, first + i * column, second + i * column,
                                                planar);
    }
    for (; i < count; ++i)
        for (int c = 0; c < C; ++c) {
            to[i * bytes + c] = first[i * column + c * channel];
            if (taps == 2) to[i * bytes + C + c] = second[i * column + c * channel];
        }
}

// Isa::pack writes the pixels of two rows, given where each starts, as positions; it may write a vector too far, so the
// rest of a row follows it, and the rows go upwards.
template <int C, int taps, class Isa>
void fill_window(const Source<uint8_t>& source, const uint8_t* fill, const Window& w, Padding padding) {
    constexpr int bytes = position_bytes(C, taps);
    const Columns columns(w, source.width, padding);
    const Paint both = paint_of<C, taps>(fill, true, true);
    const int64_t at = (w.x0 + columns.left) * source.column;
    for (int32_t row = 0; row < w.height; ++row) {
        uint8_t* to = w.data + row * w.pitch;
        const int32_t first = tap_index(w.y0 + row, source.height, padding);
        const int32_t second = taps == 2 ? tap_index(w.y0 + row + 1, source.height, padding) : first;
        if (first < 0 && second < 0) {
            both.over(to, w.width * bytes);
            continue;
        }
        if (columns.outside < 0) {
            fill_row_slowly<C, taps>(source, fill, w, padding, first, second, to);
            continue;
        }
        Isa::template pack<C, taps>(source, source.data + (first < 0 ? second : first) * source.row + at,
                                    source.data + (second < 0 ? first : second) * source.row + at,
                                    columns.right - columns.left, to + columns.left * bytes);
        for (int i = 0; i < columns.outside; ++i) {
            const void* from = columns.from[i] < 0 ? static_cast<const void*>(both.set) : to + columns.from[i] * bytes;
            __builtin_memcpy(to + columns.to[i] * bytes, from, bytes);
        }
        if (first < 0 || second < 0) paint_of<C, taps>(fill, first < 0, second < 0).over(to, w.width * bytes);
    }
}

}  // namespace
}  // namespace imgopt

// The gradient of the images. Every output pixel adds its flow, weighted, to its taps: in a band of source rows of one
// image, a copy in scratch whose positions hold up to four channels side by side, so that the taps of one row are one
// vector read, added to and written back. A vector that overlaps one just written would have to wait for it to reach
// the cache: so there is a plane for each remainder of the first tap's column, in which these vectors coincide or are
// apart; the planes are added up at the end. Around the band lie margins that take what falls outside: taps need no
// test, and where a border pixel serves outer taps too, it gets its margin's sums at the end.
//
// Each source pixel meets its contributions in the order of the output's pixels, plane by plane, whatever band it lies
// in: so a band may be what a thread is given, or as much of it as stays in the cache, without a change of any bit.
#pragma once

#include "backward_block.h"

namespace imgopt {
namespace {

constexpr int64_t kBandBytes = 640 << 10;  // leaves room in a 1 MiB L2 cache for what flows in and out

// Two vectors side by side; a list of their lanes is what every compiler makes one instruction of.
template <int... i>
struct Indices {
    template <class V, class W>
    IMGOPT_INLINE static void join(const V& a, const V& b, W& to) {
        constexpr int n = sizeof...(i) / 2;
        to = W{(i < n ? a[i % n] : b[i % n])...};
    }
};
template <int n, int... i>
struct Lanes : Lanes<n - 1, n - 1, i...> {};
template <int... i>
struct Lanes<0, i...> : Indices<i...> {};

// The flow `g` of a pixel times the weights [first, first + count) of its columns, side by side.
template <int count, class R, int lanes>
struct Shares {
    typedef R Vector __attribute__((vector_size(count * lanes * sizeof(R))));

    template <class Position, class Weights>
    IMGOPT_INLINE static void of(const Position& g, const Weights& weights, int first, int i, Vector& to) {
        if constexpr (count == 1) {
            to = g * weights[first][i];
        } else {
            using Part = Shares<count / 2, R, lanes>;
            typename Part::Vector left, right;
            Part::of(g, weights, first, i, left);
            Part::of(g, weights, first + count / 2, i, right);
            Lanes<count * lanes>::join(left, right, to);
        }
    }
};

// Rows [first, end) of the sampled source of one image, which a band owns, as positions of `lanes` channels.
template <int taps, int lanes, class R>
struct Band {
    typedef R Position __attribute__((vector_size(lanes * sizeof(R))));

    R* data;
    int32_t width, height;  // of the sampled source
    int32_t first, end;
    int32_t low, high;  // with the outer rows whose taps these rows serve; taps more on either side are never read
    Padding padding;

    Band(int32_t w, int32_t h, int32_t from, int32_t to, Padding mode)
        : data(nullptr), width(w), height(h), first(from), end(to), low(from), high(to), padding(mode) {
        for (int32_t k = 1; k <= taps; ++k) {
            if (owns(tap_index(-k, h, mode))) low = -k;
            if (owns(tap_index(h - 1 + k, h, mode))) high = h + k;
        }
    }

    // Positions of a row of a plane, whole vectors of them. The planes of a row lie side by side; in numbers that would
    // not fit 32 bits they would not fit a memory either.
    static int32_t columns(int32_t width) { return (width + 3 * taps - 1) / taps * taps; }
    static int64_t row_bytes(int32_t width) { return taps * int64_t{columns(width)} * lanes * int64_t{sizeof(R)}; }

    bool owns(int32_t row) const { return row >= first && row < end; }
    int64_t pitch() const { return taps * int64_t{columns(width)} * lanes; }
    R* row(int32_t y) const { return data + (y - low + taps) * pitch() + taps * lanes; }

    void clear() const { __builtin_memset(data, 0, static_cast<size_t>((high - low + 2 * taps) * row_bytes(width))); }

    // Adds pixels [from, to) of a block. A coordinate that is not finite, or that lies elsewhere, goes to the margin.
    void scatter(const Points<R>& at, const BlockWeights<taps, R>& weights, const Flow<R>& flow, int from,
                 int to) const {
        using Row = Shares<taps, R, lanes>;
        int32_t column[kBlock], line[kBlock];
        place(at, column, line);
        const int64_t step = pitch();
        R* const origin = data;
        for (int i = from; i < to; ++i) {
            Position g;
            typename Row::Vector share, sum;
            __builtin_memcpy(&g, flow.of[i], sizeof g);
            Row::of(g, weights.x, 0, i, share);
            R* tap = origin + (at.finite[i] ? line[i] : 0) * step + int64_t{column[i]} * lanes;
            for (int k = 0; k < taps; ++k, tap += step) {
                __builtin_memcpy(&sum, tap, sizeof sum);
                sum += share * weights.y[k][i];
                __builtin_memcpy(tap, &sum, sizeof sum);
            }
        }
    }

    // Where the first tap of each point lies: for a column of remainder q, that column less q of plane q.
    void place(const Points<R>& at, int32_t* column, int32_t* line) const {
        constexpr int lead = taps == 4 ? -1 : 0;
        const int32_t above = low - taps, apart = columns(width) - 1, right = width, bottom = height, last = high;
        for (int i = 0; i < kBlock; ++i) {
            const int32_t x = cut(at.x[i] + lead, -taps, right) + taps;
            column[i] = x + (x & (taps - 1)) * apart;
        }
        for (int i = 0; i < kBlock; ++i) line[i] = cut(cut(at.y[i] + lead, -taps, bottom), above, last) - above;
    }

    static int32_t cut(int32_t v, int32_t least, int32_t most) {
        const int32_t raised = v < least ? least : v;
        return raised < most ? raised : most;
    }

    void add_planes() const {
        const int64_t plane = pitch() / taps;
        for (int32_t y = low - taps; y < high + taps; ++y)
            for (int q = 1; q < taps; ++q) {
                R *to = row(y) - taps * lanes + q * lanes, *from = row(y) - taps * lanes + q * plane;
                for (int64_t i = 0; i < plane - q * lanes; ++i) to[i] += from[i];
            }
    }

    // Gives border pixels the sums of the outer taps that they serve, in ascending order.
    void gather_margins() const {
        if (padding == Padding::constant) return;
        for (int32_t y = low; y < high; ++y) {
            const int32_t inner = y < 0 || y >= height ? tap_index(y, height, padding) : -1;
            if (!owns(inner)) continue;
            R *to = row(inner) - taps * lanes, *from = row(y) - taps * lanes;
            for (int64_t i = 0; i < (int64_t{width} + 2 * taps) * lanes; ++i) to[i] += from[i];
        }
        for (int32_t y = first; y < end; ++y)
            for (int32_t x = -taps; x < width + taps; ++x) {
                if (x == 0) x = width;
                R* to = row(y) + int64_t{tap_index(x, width, padding)} * lanes;
                for (int c = 0; c < lanes; ++c) to[c] += row(y)[int64_t{x} * lanes + c];
            }
    }
};

// Adds the flow of channels [c0, c0 + lanes) of all output pixels that reach the band.
template <int taps, int lanes, class T, class R>
void fill_band(const Backward<T, R>& of, const Band<taps, lanes, R>& band, int64_t c0) {
    const AffineWarp& p = of.p;
    band.clear();
    // Where every tap outside is fill, columns count too; a border row takes whatever lies beyond it.
    constexpr int lead = taps == 4 ? -1 : 0;
    const bool bounded = of.map.affine && !of.is_mirrored(), fills = p.padding == Padding::constant;
    const double far = __builtin_inf(), low = band.low > 0 || fills ? band.low + 1 - taps - lead : -far,
                 high = band.high < band.height || fills ? band.high - lead : far;
    Points<R> at;
    R direction[kBlock];
    Flow<R> flow;
    for (int64_t y = 0; y < p.output_height; ++y) {
        Reach reach{0, p.output_width};
        if (bounded) reach = reach_of(of.map.m + 3, y, low, high, reach);
        if (bounded && fills) reach = reach_of(of.map.m, y, 1 - taps - lead, band.width - lead, reach);
        for (int64_t x0 = reach.first / kBlock * kBlock; x0 < reach.end; x0 += kBlock) {
            const int count = static_cast<int>(p.output_width - x0 < kBlock ? p.output_width - x0 : kBlock);
            const int from = static_cast<int>(reach.first > x0 ? reach.first - x0 : 0);
            const int to = static_cast<int>(reach.end - x0 < count ? reach.end - x0 : count);
            of.locate(x0, y, count, at);
            fold_axis(at.x, at.fx, direction, band.width, p.padding);
            fold_axis(at.y, at.fy, direction, band.height, p.padding);
            const BlockWeights<taps, R> weights(at);
            flow_of<taps>(of, at, weights, x0, y, from, to, c0, flow);
            flow.interleave();
            band.scatter(at, weights, flow, from, to);
        }
    }
    band.add_planes();
    band.gather_margins();
}

// One row of the gradient: values of positions, each a box of `box` columns and `covered` rows.
template <int lanes, class T, class R>
void store_gradient_row(const R* from, int64_t count, int64_t box, int64_t covered, int channels, T* to, int64_t column,
                        int64_t channel) {
    int64_t x = 0;
    if (box == 1 && covered == 1 && column == 1)
        for (; x + kSome <= count; x += kSome) {
            R planes[lanes][kSome];
            for (int i = 0; i < kSome; ++i)
                for (int c = 0; c < lanes; ++c) planes[c][i] = from[(x + i) * lanes + c];
            for (int c = 0; c < channels; ++c)
                for (int i = 0; i < kSome; ++i) narrow(planes[c][i], to + c * channel + x + i);
        }
    for (; x < count; ++x) {
        const R pixels = static_cast<R>(covered * box_length(x / box, box, count));
        for (int c = 0; c < channels; ++c) narrow(from[x / box * lanes + c] / pixels, to + x * column + c * channel);
    }
}

// Rows [y0, y1) of the gradient of one image.
template <int taps, int lanes, class T, class R>
void image_rows_backward(const Backward<T, R>& of, int64_t y0, int64_t y1, void* scratch) {
    const AffineWarp& p = of.p;
    const Map& map = of.map;
    Band<taps, lanes, R> band(of.source.width, of.source.height, static_cast<int32_t>(y0 / map.box_y),
                              static_cast<int32_t>((y1 - 1) / map.box_y + 1), p.padding);
    band.data = static_cast<R*>(scratch);
    T* to = static_cast<T*>(of.b.grad_images) + of.image * of.b.grad_images_stride[0];
    const int64_t* step = of.b.grad_images_stride;
    for (int64_t c0 = 0; c0 < p.channels; c0 += lanes) {
        fill_band(of, band, c0);
        const int channels = static_cast<int>(p.channels - c0 < lanes ? p.channels - c0 : lanes);
        for (int64_t y = y0; y < y1; ++y) {
            const int64_t boxed = y / map.box_y;
            store_gradient_row<lanes>(band.row(static_cast<int32_t>(boxed)), p.width, map.box_x,
                                      box_length(boxed, map.box_y, p.height), channels, to + c0 * step[1] + y * step[2],
                                      step[3], step[1]);
        }
    }
}

// Source rows [begin, end) of the batch.
template <int taps, int lanes, class T, class R>
void images_backward(const AffineWarpBackward& b, int64_t begin, int64_t end) {
    const AffineWarp& p = b.warp;
    while (begin < end) {
        const int64_t image = begin / p.height, y0 = begin - image * p.height;
        const int64_t y1 = y0 + (end - begin) < p.height ? y0 + (end - begin) : p.height;
        const Map map = map_of(p, image);
        const int64_t box = map.box_y;
        const int32_t width = static_cast<int32_t>(boxes(p.width, map.box_x));
        const int32_t height = static_cast<int32_t>(boxes(p.height, box));
        // Bands of rows that stay in the cache, but of a homography or a mirrored axis, where each would have to look
        // at every output pixel.
        const int64_t row_bytes = Band<taps, lanes, R>::row_bytes(width);
        const int64_t fitting = kBandBytes / row_bytes > 8 * taps ? kBandBytes / row_bytes : 8 * taps;
        const bool whole = !map.affine || p.padding >= Padding::reflect || fitting * box > y1 - y0;
        const int64_t rows = whole ? y1 - y0 : fitting * box, most = rows / box + 2 + 6 * taps;
        const int64_t for_source = p.color_matrix ? (prepared_bytes<T>(p, map) + 63) / 64 * 64 : 0;
        char* scratch = static_cast<char*>(thread_scratch(for_source + most * row_bytes));
        Source<T> source{nullptr, 0, 0, 0, height, width};
        if (p.color_matrix) source = prepared<T>(p, map, image, scratch);
        const Backward<T, R> of(b, image, map, source);
        for (int64_t y = y0; y < y1; y += rows)
            image_rows_backward<taps, lanes>(of, y, y + rows < y1 ? y + rows : y1, scratch + for_source);
        begin += y1 - y0;
    }
}

}  // namespace
}  // namespace imgopt

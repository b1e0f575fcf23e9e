// The gradient of the images. Every output pixel adds its flow, weighted, to its taps: in a band of source rows of one
// image, a copy in scratch whose positions hold up to four channels side by side, so that a tap is one vector read,
// added to and written back. Around the band lie margins that take what falls outside: taps need no test, and where a
// border pixel serves outer taps too, it gets its margin's sums at the end.
//
// Each source pixel meets its contributions in the order of the output's pixels, whatever band it lies in: so a band
// may be what a thread is given, or as much of it as stays in the cache, without a change of any bit.
#pragma once

#include "backward_block.h"

namespace imgopt {
namespace {

constexpr int64_t kBandBytes = 384 << 10;  // leaves room in a 1 MiB L2 cache for what flows in and out

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

    bool owns(int32_t row) const { return row >= first && row < end; }
    int64_t pitch() const { return (int64_t{width} + 2 * taps) * lanes; }
    int64_t bytes() const { return (high - low + 2 * taps) * pitch() * int64_t{sizeof(R)}; }
    R* row(int32_t y) const { return data + (y - low + taps) * pitch() + taps * lanes; }

    void clear() const { __builtin_memset(data, 0, static_cast<size_t>(bytes())); }

    // Adds pixels [from, to) of a block. A coordinate that is not finite, or that lies elsewhere, goes to the margin.
    void scatter(const Points<R>& at, const BlockWeights<taps, R>& weights, const Flow<R>& flow, int from,
                 int to) const {
        constexpr int lead = taps == 4 ? -1 : 0;
        const int32_t above = low - taps;
        int32_t column[kBlock], line[kBlock];
        place(at.x, lead, -taps, width, column);
        place(at.y, lead, -taps, height, line);
        place(line, 0, above, high, line);
        const int64_t step = pitch();
        for (int i = from; i < to; ++i) {
            Position g;
            __builtin_memcpy(&g, flow.of[i], sizeof g);
            const int32_t y = at.finite[i] ? line[i] : above, x = column[i];
            R* tap = data + (y - above) * step + int64_t{x + taps} * lanes;
            for (int k = 0; k < taps; ++k, tap += step) {
                const Position share = g * weights.y[k][i];
                for (int j = 0; j < taps; ++j) {
                    Position sum;
                    __builtin_memcpy(&sum, tap + j * lanes, sizeof sum);
                    sum += share * weights.x[j][i];
                    __builtin_memcpy(tap + j * lanes, &sum, sizeof sum);
                }
            }
        }
    }

    // The positions of first taps, cut to [least, most].
    static void place(const int32_t* whole, int32_t lead, int32_t least, int32_t most, int32_t* to) {
        for (int i = 0; i < kBlock; ++i) {
            const int32_t v = whole[i] + lead, cut = v < least ? least : v;
            to[i] = cut < most ? cut : most;
        }
    }

    // Gives border pixels the sums of the outer taps that they serve, in ascending order.
    void gather_margins() const {
        if (padding == Padding::constant) return;
        for (int32_t y = low; y < high; ++y) {
            const int32_t inner = y < 0 || y >= height ? tap_index(y, height, padding) : -1;
            if (!owns(inner)) continue;
            R *to = row(inner) - taps * lanes, *from = row(y) - taps * lanes;
            for (int64_t i = 0; i < pitch(); ++i) to[i] += from[i];
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
            band.scatter(at, weights, flow, from, to);
        }
    }
    band.gather_margins();
}

// One row of the gradient: values of positions, each a box of `box` columns and `covered` rows.
template <int lanes, class T, class R>
void store_gradient_row(const R* from, int64_t count, int64_t box, int64_t covered, int channels, T* to, int64_t column,
                        int64_t channel) {
    if (box == 1 && covered == 1 && column == 1) {
        for (int64_t x0 = 0; x0 < count; x0 += kBlock) {
            const int rest = static_cast<int>(count - x0 < kBlock ? count - x0 : kBlock);
            R planes[lanes][kBlock];
            for (int i = 0; i < rest; ++i)
                for (int c = 0; c < lanes; ++c) planes[c][i] = from[(x0 + i) * lanes + c];
            for (int c = 0; c < channels; ++c)
                for (int i = 0; i < rest; ++i) narrow(planes[c][i], to + c * channel + x0 + i);
        }
        return;
    }
    for (int64_t x = 0; x < count; ++x) {
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
        const int64_t row_bytes = (int64_t{width} + 2 * taps) * lanes * int64_t{sizeof(R)};
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

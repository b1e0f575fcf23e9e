// What both gradients of affine_warp do to a block of output pixels of a row: where its samples lie, their weights, and
// the flow, d loss / d sample of every channel, which is the epilogue backwards. Loops over kBlock pixels, which the
// compiler turns into the vectors of the unit that includes this; nothing is fused, so that every unit has the same
// bits.
#pragma once

#include "rows.h"

namespace imgopt {
namespace {

constexpr int kFlowChannels = 4;  // of a group; those that the image lacks flow nothing

// --- which pixels --------------------------------------------------------------------------------------------------

// Columns [first, end) of an output row.
struct Reach {
    int64_t first, end;
};

// Those columns of output row y whose coordinate along one axis (`m`, its row of an affine matrix) lies between `low`
// and `high`, and perhaps a few more: it rises or falls along the row. The slack covers rounding, of nearest too;
// coordinates so large that arithmetic.h clamps them keep all columns.
inline Reach reach_of(const double* m, int64_t y, double low, double high, const Reach& within) {
    constexpr double kLargest = 1 << 20;
    const double start = m[1] * static_cast<double>(y) + m[2], slack = 0.5 + 1e-3 * __builtin_fabs(m[0]);
    low -= slack + start;
    high += slack - start;
    if (!(__builtin_fabs(m[0]) < kLargest && __builtin_fabs(start) < kLargest * 256)) return within;
    if (m[0] == 0) return low <= 0 && high >= 0 ? within : Reach{within.first, within.first};
    const double a = (m[0] > 0 ? low : high) / m[0], b = (m[0] > 0 ? high : low) / m[0];
    const double least = static_cast<double>(within.first), most = static_cast<double>(within.end);
    const Reach found{static_cast<int64_t>(floor_of(clamped(a, least, most))),
                      static_cast<int64_t>(floor_of(clamped(b + 1, least, most)))};
    return found.first < found.end ? found : Reach{within.first, within.first};
}

// --- where the samples lie -----------------------------------------------------------------------------------------

// The weights of a block's taps along both axes, and their slopes.
template <int taps, class R>
struct BlockWeights {
    alignas(64) R x[taps][kBlock], y[taps][kBlock], slope_x[taps][kBlock], slope_y[taps][kBlock];

    explicit BlockWeights(const Points<R>& at) {
        along(at.fx, x, slope_x);
        along(at.fy, y, slope_y);
    }

  private:
    static void along(const R* fraction, R (&weight)[taps][kBlock], R (&slope)[taps][kBlock]) {
        for (int i = 0; i < kBlock; ++i) {
            R w[taps], s[taps];
            axis_weights<taps>(fraction[i], w, s);
            for (int k = 0; k < taps; ++k) {
                weight[k][i] = w[k];
                slope[k][i] = s[k];
            }
        }
    }
};

// Mirrors the coordinates of an axis; `direction` becomes -1 where that reverses it.
template <class R>
void fold_axis(int32_t* whole, R* fraction, R* direction, int32_t n, Padding padding) {
    for (int i = 0; i < kBlock; ++i) direction[i] = 1;
    if (padding < Padding::reflect) return;
    for (int i = 0; i < kBlock; ++i) direction[i] = static_cast<R>(fold(whole[i], fraction[i], n, padding));
}

// --- taps ----------------------------------------------------------------------------------------------------------

// Taps of one row of one channel, side by side; four whatever the taps, as loads of two are no faster.
template <class R>
struct TapRow {
    static constexpr int kLanes = 4;
    typedef R Vector __attribute__((vector_size(kLanes * sizeof(R))));
};

inline const float* as_is(const float* from, float) { return from; }
inline const double* as_is(const double* from, double) { return from; }
template <class T, class R>
const R* as_is(const T*, R) {
    return nullptr;
}

// The taps of single points: where they lie if that is as rows of their own type, otherwise copied.
template <int taps, class T, class R>
struct Taker {
    using Row = typename TapRow<R>::Vector;
    static constexpr int kLead = taps == 4 ? -1 : 0, kLanes = TapRow<R>::kLanes;

    const AffineWarp& p;
    const Source<T>& source;
    const bool direct;
    alignas(64) R copy[kFlowChannels][taps][kLanes] = {};

    // Row k of channel c of the group.
    struct Place {
        const R* from;
        int64_t channel, row;

        IMGOPT_INLINE void load(int c, int k, Row& to) const {
            __builtin_memcpy(&to, from + c * channel + k * row, sizeof to);
        }
        IMGOPT_INLINE Place moved(int32_t x, int32_t y) const { return {from + y * row + x, channel, row}; }
    };

    Taker(const AffineWarp& call, const Source<T>& pixels)
        : p(call), source(pixels), direct(pixels.data && as_is(pixels.data, R{}) && pixels.column == 1) {}

    IMGOPT_INLINE Place operator()(const Points<R>& at, int i, int64_t c0) {
        const int32_t x = at.x[i] + kLead, y = at.y[i] + kLead;
        if (direct && x >= 0 && y >= 0 && x <= source.width - kLanes && y <= source.height - taps)
            return origin(c0).moved(at.x[i], at.y[i]);
        take(at.x[i], at.y[i], c0);
        return {copy[0][0], taps * kLanes, kLanes};
    }

    // Whether the taps of the pixels [first, end) all lie as rows of their own type.
    IMGOPT_INLINE bool all_within(const Points<R>& at, int first, int end) const {
        const int32_t most_x = source.width - kLanes, most_y = source.height - taps;
        int32_t outside = 0;
        for (int i = 0; i < kBlock; ++i) {
            const int32_t x = at.x[i] + kLead, y = at.y[i] + kLead;
            outside |= ((x < 0) | (y < 0) | (x > most_x) | (y > most_y)) & (i >= first) & (i < end);
        }
        return direct && !outside;
    }

    // The taps of a point at (0, 0), where those within the image count from.
    IMGOPT_INLINE Place origin(int64_t c0) const {
        const T* from = source.data + c0 * source.channel + kLead * (source.row + 1);
        return {as_is(from, R{}), source.channel, source.row};
    }

  private:
    [[gnu::noinline]] void take(int32_t x, int32_t y, int64_t c0) {
        const Taps<taps> t(source, x, y, p.padding);
        for (int64_t c = c0; c < p.channels && c < c0 + kFlowChannels; ++c)
            for (int k = 0; k < taps; ++k)
                for (int j = 0; j < taps; ++j)
                    copy[c - c0][k][j] = tap<T, R>(source.data + c * source.channel, t.y[k], t.x[j], p.fill[c]);
    }
};

// --- flow ----------------------------------------------------------------------------------------------------------

// One image, and what arrives at its pixels.
template <class T, class R>
struct Backward {
    const AffineWarpBackward& b;
    const AffineWarp& p;
    AffineWarp unfolded;  // p, but locate_points() leaves coordinates unmirrored
    int64_t image;
    Map map;
    Source<T> source;  // read for the matrix and behind a colour matrix
    const double* color;

    // `scratch`: of prepared(), where the pixels of the source matter.
    Backward(const AffineWarpBackward& call, int64_t index, const Map& of_image, const Source<T>& pixels)
        : b(call),
          p(call.warp),
          unfolded(call.warp),
          image(index),
          map(of_image),
          source(pixels),
          color(p.color_matrix ? p.color_matrix + index * p.color_stride : nullptr) {
        unfolded.padding = Padding::constant;
    }

    // How far apart the samples of a pixel and of the one `rows` rows below it lie, about.
    int64_t below(int rows) const {
        const auto steps = [&](double v) { return finite(v) ? static_cast<int64_t>(clamped(v * rows, -4e3, 4e3)) : 0; };
        return steps(map.m[4]) * source.row + steps(map.m[1]) * source.column;
    }

    bool is_mirrored() const { return p.padding >= Padding::reflect; }

    // The points of columns [x0, x0 + kBlock) of output row y, of which `count` exist.
    void locate(int64_t x0, int64_t y, int count, Points<R>& to) const {
        locate_points(unfolded, map, source.width, source.height, x0, y, count, to);
    }
};

// The flow of some pixels of a block, channel by channel, and pixel by pixel. Channels that do not exist stay zero.
template <class R>
struct Flow {
    alignas(64) R planes[kFlowChannels][kBlock] = {}, of[kBlock][kFlowChannels];

    void interleave() {
        for (int i = 0; i < kBlock; ++i)
            for (int c = 0; c < kFlowChannels; ++c) of[i][c] = planes[c][i];
    }
};

// The rows below are fetched ahead: a row's part of a block is too short for the processor to foresee the next one.
template <class G, class R>
void load_grad(const G* from, int64_t step, int64_t below, int count, R factor, R* to) {
    constexpr int kRows = 3, kLine = 64 / sizeof(G);
    for (int i = 0; i < count; i += kLine) __builtin_prefetch(from + kRows * below + i * step);
    if (step == 1 && count == kBlock) {
        for (int i = 0; i < kBlock; ++i) to[i] = static_cast<R>(widened(from[i])) * factor;
    } else if (step == 1) {
        for (int i = 0; i < count; ++i) to[i] = static_cast<R>(widened(from[i])) * factor;
    } else {
        for (int i = 0; i < count; ++i) to[i] = static_cast<R>(widened(from[i * step])) * factor;
    }
}

// The incoming gradient of `count` pixels of one channel, times its factor.
template <class R>
void load_grad(const AffineWarpBackward& b, int64_t at, int count, R factor, R* to) {
    const int64_t step = b.warp.output_stride[3], below = b.warp.output_stride[2];
    switch (b.warp.output_dtype) {
        case DType::f16: return load_grad(static_cast<const Half*>(b.grad) + at, step, below, count, factor, to);
        case DType::bf16: return load_grad(static_cast<const BFloat16*>(b.grad) + at, step, below, count, factor, to);
        case DType::f32: return load_grad(static_cast<const float*>(b.grad) + at, step, below, count, factor, to);
        default: return load_grad(static_cast<const double*>(b.grad) + at, step, below, count, factor, to);
    }
}

// rgb of one pixel, in units of [0, 1], through the colour matrix; not clamped.
template <class R>
inline void colored(const double* m, const R rgb[3], R to[3]) {
    for (int i = 0; i < 3; ++i, m += 4) {
        const R red = fused(static_cast<R>(m[0]), rgb[0], static_cast<R>(m[3]));
        to[i] = fused(static_cast<R>(m[2]), rgb[2], fused(static_cast<R>(m[1]), rgb[1], red));
    }
}

// Through the colour matrix: what was clamped passes nothing.
template <int taps, class T, class R>
void color_backward(const Backward<T, R>& of, const Points<R>& at, const BlockWeights<taps, R>& weights, int first,
                    int end, R (&planes)[kFlowChannels][kBlock]) {
    using Row = typename TapRow<R>::Vector;
    Taker<taps, T, R> take(of.p, of.source);
    for (int i = first; i < end; ++i) {
        R samples[3], rgb[3], through[3] = {};
        const auto place = take(at, i, 0);
        for (int c = 0; c < 3; ++c) {
            Row row, down{};
            for (int k = 0; k < taps; ++k) {
                place.load(c, k, row);
                down += row * weights.y[k][i];
            }
            samples[c] = 0;
            for (int k = 0; k < taps; ++k) samples[c] += down[k] * weights.x[k][i];
        }
        colored(of.color, samples, rgb);
        for (int k = 0; k < 3; ++k)
            if (rgb[k] >= 0 && rgb[k] <= 1)
                for (int c = 0; c < 3; ++c) through[c] += static_cast<R>(of.color[4 * k + c]) * planes[k][i];
        for (int c = 0; c < 3; ++c) planes[c][i] = through[c];
    }
}

// The flow of channels [c0, c0 + kFlowChannels) of the pixels [first, end) of the block at column x0 of output row y.
template <int taps, class T, class R>
void flow_of(const Backward<T, R>& of, const Points<R>& at, const BlockWeights<taps, R>& weights, int64_t x0, int64_t y,
             int first, int end, int64_t c0, Flow<R>& to) {
    const AffineWarp& p = of.p;
    const int64_t* step = p.output_stride;
    for (int64_t c = c0; c < p.channels && c < c0 + kFlowChannels; ++c)
        load_grad(of.b, of.image * step[0] + c * step[1] + y * step[2] + (x0 + first) * step[3], end - first,
                  static_cast<R>(p.scale[c]), to.planes[c - c0] + first);
    if (of.color) color_backward<taps>(of, at, weights, first, end, to.planes);
}

}  // namespace
}  // namespace imgopt

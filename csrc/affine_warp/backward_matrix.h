// The gradient of the matrix. Each pixel's taps are first summed over the channels, weighted by their flow, which
// leaves one small square of numbers; its slopes along both axes are d loss / d coordinate. The sums over the pixels
// are float64, row by row in lanes that no instruction set changes; who calls adds the rows up in order.
#pragma once

#include "backward_block.h"

namespace imgopt {
namespace {

constexpr int kSumLanes = 8, kRowsTogether = 16;

// d loss / d sampled coordinate of a block, in the directions of the source, and where its samples lie before
// mirroring.
template <class R>
struct CoordinateFlow {
    alignas(64) R x[kBlock], y[kBlock];
    alignas(64) double at_x[kBlock], at_y[kBlock];
};

// Sums over one output row: of the flow g into the three rows of the matrix, and of g x; times 1 / w.
struct RowSums {
    typedef double Lanes __attribute__((vector_size(kSumLanes * sizeof(double))));
    Lanes constant[3] = {}, along_x[3] = {};

    template <class R>
    void add(const CoordinateFlow<R>& flow, const Map& map, int64_t x0, int64_t y) {
        const double* m = map.m;
        for (int first = 0; first < kBlock; first += kSumLanes) {
            typedef R Narrow __attribute__((vector_size(kSumLanes * sizeof(R))));
            const Lanes x = static_cast<double>(x0 + first) + Lanes{0, 1, 2, 3, 4, 5, 6, 7};
            Narrow narrow_x, narrow_y;
            Lanes at_x, at_y;
            __builtin_memcpy(&narrow_x, flow.x + first, sizeof narrow_x);
            __builtin_memcpy(&narrow_y, flow.y + first, sizeof narrow_y);
            __builtin_memcpy(&at_x, flow.at_x + first, sizeof at_x);
            __builtin_memcpy(&at_y, flow.at_y + first, sizeof at_y);
            Lanes gx = __builtin_convertvector(narrow_x, Lanes), gy = __builtin_convertvector(narrow_y, Lanes);
            if (!map.affine) {
                const Lanes w = m[6] * x + (m[7] * static_cast<double>(y) + m[8]);
                // A pixel without flow may have no coordinate.
                gx = (gx != 0) ? gx / w : gx;
                gy = (gy != 0) ? gy / w : gy;
            }
            const Lanes terms[3] = {gx, gy, -(gx * at_x + gy * at_y)};
            for (int i = 0; i < 3; ++i) {
                constant[i] += terms[i];
                along_x[i] += terms[i] * x;
            }
        }
    }

    // The row's share of the gradient of the matrix; its box filter's part is carried back first.
    void store(const Map& map, int64_t y, double* to) const {
        const int32_t box[2] = {map.box_x, map.box_y};
        for (int i = 0; i < 3; ++i) {
            to[3 * i] = sum_of(along_x[i]);
            to[3 * i + 2] = sum_of(constant[i]);
            to[3 * i + 1] = to[3 * i + 2] * static_cast<double>(y);
        }
        for (int i = 0; i < 2; ++i)
            for (int j = 0; j < 3; ++j) {
                to[3 * i + j] /= box[i];
                to[6 + j] -= (box[i] - 1) * 0.5 * to[3 * i + j];
            }
    }

  private:
    static double sum_of(const Lanes& v) {
        double sum = v[0];
        for (int k = 1; k < kSumLanes; ++k) sum += v[k];
        return sum;
    }
};

// The square of taps of each pixel, summed over the channels times their flow: row by row in vectors of four, which for
// bilinear is all of it.
template <int taps, class R>
struct TapSums {
    static constexpr int kVectors = taps * taps / TapRow<R>::kLanes;
    using Row = typename TapRow<R>::Vector;

    alignas(64) R of[kBlock][taps * taps];

    template <class T>
    void add(const Backward<T, R>& of_image, const Points<R>& at, const Flow<R>& flow, int first, int end, int64_t c0) {
        switch (of_image.p.channels - c0) {
            case 1: return add<1>(of_image, at, flow, first, end, c0);
            case 2: return add<2>(of_image, at, flow, first, end, c0);
            case 3: return add<3>(of_image, at, flow, first, end, c0);
            default: return add<kFlowChannels>(of_image, at, flow, first, end, c0);
        }
    }

    template <int channels, class T>
    void add(const Backward<T, R>& of_image, const Points<R>& at, const Flow<R>& flow, int first, int end, int64_t c0) {
        Taker<taps, T, R> take(of_image.p, of_image.source);
        const int64_t ahead = of_image.below(kRowsTogether);
        const auto each = [&](const auto& place_of) {
            for (int i = first; i < end; ++i) {
                Row sums[kVectors] = {}, square[kVectors];
                if (c0) __builtin_memcpy(sums, of[i], sizeof sums);
                const auto place = place_of(i);
                for (int c = 0; c < channels; ++c) __builtin_prefetch(place.from + c * place.channel + ahead);
                for (int c = 0; c < channels; ++c) {
                    load(place, c, square);
                    for (int k = 0; k < kVectors; ++k) sums[k] += square[k] * flow.planes[c][i];
                }
                __builtin_memcpy(of[i], sums, sizeof sums);
            }
        };
        if (take.all_within(at, first, end)) {
            const auto origin = take.origin(c0);
            each([&, origin](int i) { return origin.moved(at.x[i], at.y[i]); });
        } else {
            each([&](int i) { return take(at, i, c0); });
        }
    }

    // d loss / d coordinate of pixels [first, end), which comes with the directions; nothing for the others.
    void finish(const Points<R>& at, const BlockWeights<taps, R>& weights, int first, int end,
                CoordinateFlow<R>& to) const {
        alignas(64) R planes[taps * taps][kBlock];
        for (int i = 0; i < kBlock; ++i)
            for (int t = 0; t < taps * taps; ++t) planes[t][i] = of[i][t];
        for (int i = 0; i < kBlock; ++i) {
            R x = 0, y = 0;
            for (int k = 0; k < taps; ++k) {
                R across = 0, along = 0;
                for (int j = 0; j < taps; ++j) {
                    across += weights.slope_x[j][i] * planes[taps * k + j][i];
                    along += weights.x[j][i] * planes[taps * k + j][i];
                }
                x += weights.y[k][i] * across;
                y += weights.slope_y[k][i] * along;
            }
            to.x[i] *= x;
            to.y[i] *= y;
        }
        for (int i = first; i < end; ++i)
            if (!at.finite[i]) to.x[i] = to.y[i] = 0;
        for (int i = 0; i < first; ++i) to.x[i] = to.y[i] = 0;
        for (int i = end; i < kBlock; ++i) to.x[i] = to.y[i] = 0;
    }

  private:
    template <class Place>
    IMGOPT_INLINE static void load(const Place& place, int c, Row (&to)[kVectors]) {
        if constexpr (taps == 2)
            load_square(place.from + c * place.channel, place.row, to[0]);
        else
            for (int k = 0; k < kVectors; ++k)
                __builtin_memcpy(to + k, place.from + c * place.channel + k * place.row, sizeof to[k]);
    }

    // Two pairs, as two loads.
    IMGOPT_INLINE static void load_square(const float* from, int64_t row, Row& to) {
        typedef int64_t Pairs __attribute__((vector_size(16)));
        int64_t above, below;
        __builtin_memcpy(&above, from, sizeof above);
        __builtin_memcpy(&below, from + row, sizeof below);
        const Pairs pairs = {above, below};
        __builtin_memcpy(&to, &pairs, sizeof to);
    }
    IMGOPT_INLINE static void load_square(const double* from, int64_t row, Row& to) {
        to = Row{from[0], from[1], from[row], from[row + 1]};
    }
};

// Output rows [y0, y1) of one image, at most kRowsTogether. Block by block down the rows: what neighbouring rows read
// is then still in the first cache, 45 KB for one turned row of 224 pixels of three planes.
template <int taps, class T, class R>
void matrix_rows_backward(const Backward<T, R>& of, int64_t y0, int64_t y1, double* to) {
    constexpr int kLead = taps == 4 ? -1 : 0;
    const AffineWarp& p = of.p;
    const int32_t side[2] = {of.source.width, of.source.height};
    Reach reach[kRowsTogether];
    for (int64_t y = y0; y < y1; ++y) {
        Reach& row = reach[y - y0] = {0, p.output_width};
        // Fill all around has no slope.
        for (int axis = 0; of.map.affine && p.padding == Padding::constant && axis < 2; ++axis)
            row = reach_of(of.map.m + 3 * axis, y, 1 - taps - kLead, side[axis] - kLead, row);
    }
    RowSums sums[kRowsTogether];
    Points<R> at;
    CoordinateFlow<R> coordinates;
    Flow<R> flow;
    TapSums<taps, R> taps_of{};
    for (int64_t x0 = 0; x0 < p.output_width; x0 += kBlock)
        for (int64_t y = y0; y < y1; ++y) {
            const Reach& row = reach[y - y0];
            const int count = static_cast<int>(p.output_width - x0 < kBlock ? p.output_width - x0 : kBlock);
            const int first = static_cast<int>(row.first > x0 ? row.first - x0 : 0);
            const int end = static_cast<int>(row.end - x0 < count ? row.end - x0 : count);
            if (first >= end) continue;
            of.locate(x0, y, count, at);
            for (int i = 0; i < kBlock; ++i) {
                coordinates.at_x[i] = at.x[i] + static_cast<double>(at.fx[i]);
                coordinates.at_y[i] = at.y[i] + static_cast<double>(at.fy[i]);
            }
            fold_axis(at.x, at.fx, coordinates.x, side[0], p.padding);
            fold_axis(at.y, at.fy, coordinates.y, side[1], p.padding);
            const BlockWeights<taps, R> weights(at);
            for (int64_t c0 = 0; c0 < p.channels; c0 += kFlowChannels) {
                flow_of<taps>(of, at, weights, x0, y, first, end, c0, flow);
                taps_of.add(of, at, flow, first, end, c0);
            }
            taps_of.finish(at, weights, first, end, coordinates);
            sums[y - y0].add(coordinates, of.map, x0, y);
        }
    for (int64_t y = y0; y < y1; ++y) sums[y - y0].store(of.map, y, to + (y - y0) * 9);
}

// Output rows [begin, end) of the batch.
template <int taps, class T, class R>
void matrix_backward(const AffineWarpBackward& b, int64_t begin, int64_t end) {
    const AffineWarp& p = b.warp;
    for_each_image(p, begin, end, [&](int64_t image, int64_t y0, int64_t y1) {
        const Map map = map_of(p, image);
        const int64_t bytes = prepared_bytes<T>(p, map);
        const Source<T> source = prepared<T>(p, map, image, bytes ? thread_scratch(bytes) : nullptr);
        const Backward<T, R> of(b, image, map, source);
        for (int64_t y = y0; y < y1; y += kRowsTogether) {
            const int64_t most = y + kRowsTogether < y1 ? y + kRowsTogether : y1;
            matrix_rows_backward<taps>(of, y, most, b.grad_matrix + (image * p.output_height + y) * 9);
        }
    });
}

}  // namespace
}  // namespace imgopt

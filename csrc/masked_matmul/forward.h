// The forward product with vectors. A panel of samples passes over a block of columns at a time, which is meant to stay
// in the first-level cache while all quads of rows use it, so the sums of a panel wait in memory between blocks; those
// of a window of rows are transposed back as soon as its last block is done.
#pragma once

#include "few.h"
#include "quads.h"

namespace imgopt {
namespace {

constexpr int64_t kAhead = 512;        // values whose place in the weight is asked for before they are gathered
constexpr int64_t kRowsAtOnce = 1024;  // rows whose sums wait in memory: 256 KiB of the second-level cache

template <class Lanes>
struct ForwardKernel : Panels<Lanes> {
    using Base = Panels<Lanes>;
    using Steps = QuadSteps<Lanes>;
    using Reg = typename Lanes::Reg;
    static constexpr int kWidth = Lanes::kWidth;

    template <class Storage>
    static Reg bias_of(const MaskedMatmul& p, int64_t row) {
        const bool present = p.bias && row < p.weight.rows;
        return Lanes::splat(present ? widened(static_cast<const Storage*>(p.bias)[row]) : 0.0f);
    }

    // The sums of the first block start from the bias.
    template <class Storage, int P, class Column>
    static void add_quad(const MaskedMatmul& p, const Quad& quad, const float* x, float* sums, int64_t first_row,
                         bool start) {
        typename Steps::template Sums<P> acc;
        float* at[4];
#pragma GCC unroll 4
        for (int r = 0; r < 4; ++r) {
            at[r] = sums + (quad.rows[r] - first_row) * kWidth * P;
            const Reg bias = start ? bias_of<Storage>(p, quad.rows[r]) : Lanes::zero();
#pragma GCC unroll 4
            for (int i = 0; i < P; ++i) {
                acc.chain[0][r][i] = start ? bias : Lanes::load(at[r] + i * kWidth);
                if constexpr (P == 1) acc.chain[1][r][i] = Lanes::zero();
            }
        }
        Steps::template add<P>(acc, quad, x, static_cast<const Column*>(p.weight.columns),
                               static_cast<const float*>(p.values));
#pragma GCC unroll 4
        for (int r = 0; r < 4; ++r)
#pragma GCC unroll 4
            for (int i = 0; i < P; ++i) Lanes::store(at[r] + i * kWidth, acc.total(r, i));
    }

    // One block of columns for the rows of a window; sums are those of the rows from `row` on.
    template <class Storage, int P>
    static void window(const MaskedMatmul& p, int64_t b, int64_t begin, int64_t end, const float* x, float* sums,
                       int64_t row) {
        const RowQuads& w = p.weight;
        for (int64_t q = begin / 4; q < (end + 3) / 4; ++q)
            if (w.wide)
                add_quad<Storage, P, int32_t>(p, Quad(w, b, q), x, sums, row, b == 0);
            else
                add_quad<Storage, P, uint8_t>(p, Quad(w, b, q), x, sums, row, b == 0);
    }

    // Asks for the lines that a window of rows will be written to, while its last block of columns is multiplied.
    template <class Storage>
    static void announce(const MaskedMatmul& p, int64_t first, int64_t samples, int64_t row, int64_t rows) {
        constexpr int64_t kLine = 64 / sizeof(Storage);
        const Storage* output = static_cast<const Storage*>(p.output) + first * p.weight.rows + row;
        for (int64_t n = 0; n < samples; ++n, output += p.weight.rows)
            for (int64_t o = 0; o < rows; o += kLine) __builtin_prefetch(output + o, 1);
    }

    // Windows [begin, end) of rows for the samples from `first` on, at most kWidth * P of them.
    template <class Storage, int P>
    static void panel(const MaskedMatmul& p, int64_t first, int64_t begin, int64_t end) {
        if constexpr (P == 1)
            if (FewSamples<Lanes>::serves(p, p.x.samples - first))
                return FewSamples<Lanes>::template matmul<Storage>(p, first, p.x.samples, begin, end);
        const RowQuads& w = p.weight;
        constexpr int64_t kLine = kWidth * P, kWindow = RowQuads::kWindow;
        const int64_t columns = columns_of(p.x);
        const int64_t first_row = begin * kWindow, last_row = min_of(w.rows, end * kWindow);
        const int64_t at_once = min_of(w.blocks == 1 ? kWindow : kRowsAtOnce, last_row - first_row);
        const bool whole = at_once < last_row - first_row;  // otherwise a block is transposed when it is needed
        const int64_t held = whole ? columns : min_of(w.block, columns);
        float* x = static_cast<float*>(thread_scratch((held + at_once + kWidth) * kLine * sizeof(float)));
        float* sums = x + held * kLine;
        const typename Base::template Samples<P> samples(p.x, first);
        if (whole) Base::template pack<Storage, P>(p.x, samples, 0, columns, x);
        for (int64_t row = first_row; row < last_row; row += at_once) {
            const int64_t stop = row + min_of(at_once, last_row - row);
            if (w.blocks == 0) {
                for (int64_t o = row; o < stop; ++o)
                    for (int i = 0; i < P; ++i)
                        Lanes::store(sums + (o - row) * kLine + i * kWidth, bias_of<Storage>(p, o));
                Base::template unpack<Storage, P>(p, first, row, stop - row, sums);
            }
            for (int64_t b = 0; b < w.blocks; ++b) {
                const int64_t from = b * w.block;
                if (!whole) Base::template pack<Storage, P>(p.x, samples, from, min_of(columns, from + w.block), x);
                const float* block = whole ? x + from * kLine : x;
                for (int64_t o = row; o < stop; o += kWindow) {
                    const int64_t until = min_of(stop, o + kWindow);
                    const bool last = b == w.blocks - 1;
                    if (last) announce<Storage>(p, first, samples.count, o, until - o);
                    window<Storage, P>(p, b, o, until, block, sums, row);
                    if (last) Base::template unpack<Storage, P>(p, first, o, until - o, sums + (o - row) * kLine);
                }
            }
        }
    }

    template <class Storage>
    static void matmul(const MaskedMatmul& p, int64_t begin, int64_t end) {
        Base::for_each_panel(p.weight, p.x.samples, begin, end,
                             [&]<class Size>(Size, int64_t first, int64_t from, int64_t to) {
                                 panel<Storage, Size::kRegs>(p, first, from, to);
                             });
    }

    // Values in visiting order from a dense weight, whose lines are asked for in time: of a weight that lies in the
    // last-level cache that costs a third more than it saves (88 and 59 us for 1024 x 1024 at 90 %), of one that other
    // work has driven out, as in training, it saves half (16 M weights: 6.5 ms and 3.5).
    static void gather(const MaskedValues& p, int64_t begin, int64_t end) {
        float* values = static_cast<float*>(p.values);
        int64_t i = begin;
        const float* weight = static_cast<const float*>(p.weight);
        for (; i + kWidth <= end; i += kWidth) {
            for (int64_t ahead = i + kAhead; ahead < min_of(end, i + kAhead + kWidth); ++ahead)
                __builtin_prefetch(weight + p.source[ahead]);
            Lanes::store(values + i, Lanes::gather(weight, p.source + i));
        }
        plain_values<float, float>(p, i, end);
    }
};

}  // namespace
}  // namespace imgopt

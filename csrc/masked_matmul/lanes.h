// The vector algorithm of masked_matmul, once for all instruction sets: each unit names its registers and lanes (struct
// Lanes) and instantiates this. Everything is local to the unit that includes it.
//
// A panel of kRegs * kWidth samples is transposed, so that a column of x is kRegs registers; a quad keeps four rows of
// sums in 4 * kRegs registers, and a step is four values spread and 4 * kRegs multiply-adds with x from memory. A block
// of columns of the panel is meant to stay in the first-level cache while all quads pass over it, so the sums of a
// panel wait in memory between blocks and are transposed back at the end.
//
// Sixteen independent sums hide the latency of a multiply-add (4 cycles, two at a time), which is why a step works on
// four rows even where they share no column: one row at a time reached half the rate.
//
// struct Lanes has
//   * Reg, kWidth (lanes), kRegs (registers of a panel), zero, splat, load, store, add, mul, fma(a, b, c) = a * b + c;
//   * load_four(values), whatever keeps the four values of a step, and spread(four, i), value i in all lanes;
//   * load_part(from, count), the other lanes zero, and store_part(to, x, count), for every storage type;
//   * transpose(tile), kWidth x kWidth in place, and join<kCount>(a, b), which turns sums of kCount / 2 values each
//     into sums of kCount;
//   * sum_steps(x, sums), which adds lane i to sums[i % 4] of four;
//   * gather(from, index), 0 where the index is -1; and what few.h asks for.
#pragma once

#include "arithmetic.h"
#include "few.h"

namespace imgopt {
namespace {

constexpr int64_t kAhead = 512;        // values whose place in the weight is asked for before they are gathered
constexpr int64_t kRowsAtOnce = 1024;  // rows whose sums wait in memory: 256 KiB of the second-level cache

template <class Lanes>
struct RowQuadKernel {
    using Reg = typename Lanes::Reg;
    static constexpr int kWidth = Lanes::kWidth;
    static constexpr int kSamples = kWidth * Lanes::kRegs;

    // --- transposition -----------------------------------------------------------------------------------------------
    // panel[c * kWidth * P + s] = channel c of what sample `first + s` sees through each tap.
    template <class Storage, int P>
    static void pack(const MaskedInput& x, int64_t first, int64_t channel, int64_t channels, float* panel) {
        const int count = static_cast<int>(min_of(x.samples - first, kWidth * P));
        Position at[kWidth * P];
        at[0] = position(x, first);
        for (int s = 1; s < count; ++s) advance(x, at[s] = at[s - 1]);
        for (int64_t ty = 0; ty < x.taps[0]; ++ty)
            for (int64_t tx = 0; tx < x.taps[1]; ++tx, panel += channels * kWidth * P)
                for (int p = 0; p < P; ++p) {
                    const Storage* from[kWidth];
                    bool complete = true;
                    for (int s = 0; s < kWidth; ++s) {
                        const int n = p * kWidth + s;
                        from[s] = n < count ? pixel<Storage>(x, at[n], ty, tx) : nullptr;
                        complete = complete && from[s];
                    }
                    for (int64_t c = 0; c < channels; c += kWidth) {
                        const int part = static_cast<int>(min_of(kWidth, channels - c));
                        float* to = panel + (c * P + p) * kWidth;
                        Reg tile[kWidth];
                        if (complete && part == kWidth) {
#pragma GCC unroll 16
                            for (int s = 0; s < kWidth; ++s) {
                                __builtin_prefetch(from[s] + channel + c + 4 * kWidth);
                                tile[s] = Lanes::load_part(from[s] + channel + c, kWidth);
                            }
                            Lanes::transpose(tile);
#pragma GCC unroll 16
                            for (int s = 0; s < kWidth; ++s) Lanes::store(to + s * P * kWidth, tile[s]);
                            continue;
                        }
#pragma GCC unroll 16
                        for (int s = 0; s < kWidth; ++s)
                            tile[s] = from[s] ? Lanes::load_part(from[s] + channel + c, part) : Lanes::zero();
                        Lanes::transpose(tile);
                        for (int s = 0; s < part; ++s) Lanes::store(to + s * P * kWidth, tile[s]);
                    }
                }
    }

    // output[(first + s) * rows + row + o] = sums[o * kWidth * P + s], by way of a few lines per sample: sixteen stores
    // a power of two apart share one set of the cache, and took twice as long. Reads sums up to a multiple of kWidth
    // rows.
    template <class Storage, int P>
    static void unpack(const MaskedMatmul& p, int64_t first, int64_t row, int64_t rows, const float* sums) {
        constexpr int kRun = 64;  // rows
        const int64_t count = min_of(p.x.samples - first, kWidth * P);
        alignas(64) Storage lines[kWidth][kRun];
        for (int64_t s = 0; s < count; s += kWidth)
            for (int64_t from = 0; from < rows; from += kRun) {
                const int64_t run = min_of(kRun, rows - from);
                for (int64_t o = 0; o < run; o += kWidth) {
                    Reg tile[kWidth];
#pragma GCC unroll 16
                    for (int i = 0; i < kWidth; ++i) tile[i] = Lanes::load(sums + (from + o + i) * kWidth * P + s);
                    Lanes::transpose(tile);
#pragma GCC unroll 16
                    for (int i = 0; i < kWidth; ++i) Lanes::store_part(&lines[i][o], tile[i], kWidth);
                }
                Storage* to = static_cast<Storage*>(p.output) + (first + s) * p.weight.rows + row + from;
                for (int64_t i = 0; i < min_of(kWidth, count - s); ++i, to += p.weight.rows)
                    if (run == kRun)  // a copy of constant size is sixteen instructions at most
                        memcpy(to, lines[i], sizeof lines[i]);
                    else
                        memcpy(to, lines[i], static_cast<size_t>(run) * sizeof(Storage));
            }
    }

    // --- forward -----------------------------------------------------------------------------------------------------
    template <class Storage>
    static Reg bias_of(const MaskedMatmul& p, int64_t row) {
        const bool present = p.bias && row < p.weight.rows;
        return Lanes::splat(present ? widen(static_cast<const Storage*>(p.bias)[row]) : 0.0f);
    }

    // Where the rows of x are that a step's columns name. Loads bound a step (two of 512 bits per cycle, narrow ones
    // count alike), so bytes are read at once, and the four values as well: 18 loads instead of 24 took 0.8 of the
    // time.
    template <int P, int kDistinct>
    static IMGOPT_INLINE void offsets(const uint8_t* columns, int64_t (&at)[kDistinct]) {
        uint32_t word = 0;
        memcpy(&word, columns, kDistinct);  // the first column is the lowest byte: every target is little-endian
#pragma GCC unroll 4
        for (int d = 0; d < kDistinct; ++d) at[d] = static_cast<int64_t>(word >> 8 * d & 255) * kWidth * P;
    }

    template <int P, int kDistinct>
    static IMGOPT_INLINE void offsets(const int32_t* columns, int64_t (&at)[kDistinct]) {
#pragma GCC unroll 4
        for (int d = 0; d < kDistinct; ++d) at[d] = static_cast<int64_t>(columns[d]) * kWidth * P;
    }

    // kDistinct columns serve four rows: `steps` times acc[r] += value[r] * x[column of r].
    template <int P, int kDistinct, class Column>
    static void steps(Reg (&acc)[4][P], const float* x, const Column*& columns, const float*& values, int64_t steps) {
        for (int64_t s = 0; s < steps; ++s, columns += kDistinct, values += 4) {
            const auto four = Lanes::load_four(values);
            int64_t at[kDistinct];
            offsets<P, kDistinct>(columns, at);
#pragma GCC unroll 4
            for (int r = 0; r < 4; ++r) {
                const float* column = x + at[r * kDistinct / 4];
                const Reg value = Lanes::spread(four, r);
#pragma GCC unroll 4
                for (int p = 0; p < P; ++p) acc[r][p] = Lanes::fma(value, Lanes::load(column + p * kWidth), acc[r][p]);
            }
        }
    }

    // The sums of the first block start from the bias.
    template <class Storage, int P, class Column>
    static void add_quad(const MaskedMatmul& p, const Quad& quad, const float* x, float* sums, int64_t first_row,
                         bool start) {
        Reg acc[4][P];
        float* at[4];
#pragma GCC unroll 4
        for (int r = 0; r < 4; ++r) {
            at[r] = sums + (quad.rows[r] - first_row) * kWidth * P;
            const Reg bias = start ? bias_of<Storage>(p, quad.rows[r]) : Lanes::zero();
#pragma GCC unroll 4
            for (int i = 0; i < P; ++i) acc[r][i] = start ? bias : Lanes::load(at[r] + i * kWidth);
        }
        const Column* columns = static_cast<const Column*>(p.weight.columns) + quad.first_column;
        const float* values = static_cast<const float*>(p.values) + quad.first_step * 4;
        steps<P, 1>(acc, x, columns, values, quad.steps[0]);
        steps<P, 2>(acc, x, columns, values, quad.steps[1]);
        steps<P, 4>(acc, x, columns, values, quad.steps[2]);
#pragma GCC unroll 4
        for (int r = 0; r < 4; ++r)
#pragma GCC unroll 4
            for (int i = 0; i < P; ++i) Lanes::store(at[r] + i * kWidth, acc[r][i]);
    }

    // Windows [begin, end) of rows for the samples from `first` on, at most kWidth * P of them.
    template <class Storage, int P>
    static void panel(const MaskedMatmul& p, int64_t first, int64_t begin, int64_t end) {
        if constexpr (P == 1 && Lanes::kFew > 0)
            if (FewSamples<Lanes>::serves(p.weight, p.x.samples - first))
                return FewSamples<Lanes>::template matmul<Storage>(p, first, p.x.samples, begin, end);
        const RowQuads& w = p.weight;
        const int64_t columns = columns_of(p.x), line = kWidth * P;
        const int64_t first_row = begin * RowQuads::kWindow, last_row = min_of(w.rows, end * RowQuads::kWindow);
        const int64_t at_once = min_of(kRowsAtOnce, last_row - first_row);
        float* x = static_cast<float*>(thread_scratch((columns + at_once + kWidth) * line * sizeof(float)));
        float* sums = x + columns * line;
        pack<Storage, P>(p.x, first, 0, p.x.channels, x);
        for (int64_t row = first_row; row < last_row; row += at_once) {
            const int64_t rows = min_of(at_once, last_row - row), quads = (row + rows + 3) / 4;
            for (int64_t o = 0; w.blocks == 0 && o < rows; ++o)
                for (int i = 0; i < P; ++i) Lanes::store(sums + o * line + i * kWidth, bias_of<Storage>(p, row + o));
            for (int64_t b = 0; b < w.blocks; ++b)
                for (int64_t q = row / 4; q < quads; ++q) {
                    const float* block = x + b * w.block * line;
                    if (w.wide)
                        add_quad<Storage, P, int32_t>(p, Quad(w, b, q), block, sums, row, b == 0);
                    else
                        add_quad<Storage, P, uint8_t>(p, Quad(w, b, q), block, sums, row, b == 0);
                }
            unpack<Storage, P>(p, first, row, rows, sums);
        }
    }

    template <class Storage>
    static void matmul(const MaskedMatmul& p, int64_t begin, int64_t end) {
        for_each_panel(p.weight, p.x.samples, begin, end,
                       [&]<int P>(Registers<P>, int64_t first, int64_t from, int64_t to) {
                           panel<Storage, P>(p, first, from, to);
                       });
    }

    template <int P>
    struct Registers {};

    // Calls body(Registers<P>, first sample, first window, last window) for the runs of windows that belong to one
    // panel, with the P that holds the samples left.
    template <class Body>
    static void for_each_panel(const RowQuads& w, int64_t samples, int64_t begin, int64_t end, const Body& body) {
        const int64_t windows = windows_of(w);
        while (begin < end) {
            const int64_t panel = begin / windows, stop = min_of(end, (panel + 1) * windows);
            const int64_t from = begin - panel * windows, to = stop - panel * windows;
            const int64_t last = min_of(samples, (panel + 1) * MaskedMatmul::kPanel);
            for (int64_t first = panel * MaskedMatmul::kPanel; first < last; first += kSamples) {
                const int64_t left = last - first;
                if (left <= kWidth) {
                    body(Registers<1>{}, first, from, to);
                } else if (left <= 2 * kWidth || Lanes::kRegs == 2) {
                    body(Registers<2>{}, first, from, to);
                } else if constexpr (Lanes::kRegs == 4) {
                    if (left <= 3 * kWidth)
                        body(Registers<3>{}, first, from, to);
                    else
                        body(Registers<4>{}, first, from, to);
                }
            }
            begin = stop;
        }
    }

    // --- int8 --------------------------------------------------------------------------------------------------------
    template <int P>
    static void add_int8_quad(const Int8MaskedMatmul& p, const Quad& quad, const float* x, int32_t* sums,
                              int64_t first_row) {
        Reg acc[4][P];
#pragma GCC unroll 4
        for (int r = 0; r < 4; ++r)
#pragma GCC unroll 4
            for (int i = 0; i < P; ++i) acc[r][i] = Lanes::zero();
        const uint8_t* columns = static_cast<const uint8_t*>(p.weight.columns) + quad.first_column;
        const float* values = p.values + quad.first_step * 4;
        steps<P, 1>(acc, x, columns, values, quad.steps[0]);
        steps<P, 2>(acc, x, columns, values, quad.steps[1]);
        steps<P, 4>(acc, x, columns, values, quad.steps[2]);
#pragma GCC unroll 4
        for (int r = 0; r < 4; ++r)
#pragma GCC unroll 4
            for (int i = 0; i < P; ++i)
                Lanes::add_integers(sums + ((quad.rows[r] - first_row) * P + i) * kWidth, acc[r][i]);
    }

    // Subtracts the zero point from what pack() has brought; lanes beyond the last sample are never read.
    static void centre(float* x, int64_t count, float zero_point) {
        const Reg shift = Lanes::splat(-zero_point);
        for (int64_t i = 0; i < count; i += kWidth) Lanes::store(x + i, Lanes::add(Lanes::load(x + i), shift));
    }

    template <class Input, class Output, int P>
    static void int8_panel(const Int8MaskedMatmul& p, int64_t first, int64_t begin, int64_t end) {
        const RowQuads& w = p.weight;
        const int64_t line = kWidth * P, first_row = begin * RowQuads::kWindow;
        const int64_t last_row = min_of(w.rows, end * RowQuads::kWindow);
        const int64_t at_once = min_of(kRowsAtOnce, (last_row - first_row + 3) / 4 * 4);
        float* x = static_cast<float*>(thread_scratch((p.channels + at_once + kWidth) * line * 4));
        int32_t* sums = reinterpret_cast<int32_t*>(x + p.channels * line);
        const MaskedInput rows_of_x{p.x,    p.input, p.samples, p.channels, p.channels, {1, 1},
                                    {1, 1}, {1, 1},  {1, 1},    {0, 0},     {1, 1},     {1, 1}};
        pack<Input, P>(rows_of_x, first, 0, p.channels, x);
        centre(x, p.channels * line, static_cast<float>(p.zero_point));
        const int64_t count = min_of(p.samples - first, line);
        for (int64_t row = first_row; row < last_row; row += at_once) {
            const int64_t rows = min_of(at_once, last_row - row), quads = (row + rows + 3) / 4;
            memset(sums, 0, static_cast<size_t>(at_once * line) * 4);
            for (int64_t b = 0; b < w.blocks; ++b)
                for (int64_t q = row / 4; q < quads; ++q)
                    add_int8_quad<P>(p, Quad(w, b, q), x + b * w.block * line, sums, row);
            for (int64_t s = 0; s < count; s += kWidth)
                for (int64_t o = 0; o < rows; o += kWidth) {
                    const int part = static_cast<int>(min_of(kWidth, rows - o));
                    Reg tile[kWidth];
#pragma GCC unroll 16
                    for (int i = 0; i < kWidth; ++i)
                        tile[i] = Lanes::load(reinterpret_cast<float*>(sums) + (o + i) * line + s);
                    Lanes::transpose(tile);  // moves bits: the integers pass as they are
                    for (int i = 0; i < min_of(kWidth, count - s); ++i) {
                        int32_t integers[kWidth];
                        Lanes::store(reinterpret_cast<float*>(integers), tile[i]);
                        Output* to = static_cast<Output*>(p.result) + (first + s + i) * w.rows + row + o;
                        if (part == kWidth)
                            requantize(p, integers, row + o, kWidth, to);
                        else
                            requantize(p, integers, row + o, part, to);
                    }
                }
        }
    }

    template <class Input, class Output>
    static void int8_matmul(const Int8MaskedMatmul& p, int64_t begin, int64_t end) {
        for_each_panel(p.weight, p.samples, begin, end,
                       [&]<int P>(Registers<P>, int64_t first, int64_t from, int64_t to) {
                           int8_panel<Input, Output, P>(p, first, from, to);
                       });
    }

    // --- gradient of the weight --------------------------------------------------------------------------------------
    // A value's gradient is a register of products over the samples; a tree of additions turns kWidth such registers
    // into one whose lanes are their sums.
    template <int kCount, class Leaf>
    static IMGOPT_INLINE Reg tree(const Leaf& leaf, int i) {
        if constexpr (kCount == 1)
            return leaf(i);
        else
            return Lanes::template join<kCount>(tree<kCount / 2>(leaf, i), tree<kCount / 2>(leaf, i + kCount / 2));
    }

    // What value r of a step collects from one panel, a lane per sample modulo kWidth.
    template <int P, int kDistinct, class Column>
    static IMGOPT_INLINE Reg products(const Reg (&grad)[4][P], const float* x, const Column* columns, int r) {
        int64_t at[kDistinct];
        offsets<P, kDistinct>(columns, at);
        const float* column = x + at[r * kDistinct / 4];
        Reg sum = Lanes::mul(grad[r][0], Lanes::load(column));
#pragma GCC unroll 4
        for (int p = 1; p < P; ++p) sum = Lanes::fma(grad[r][p], Lanes::load(column + p * kWidth), sum);
        return sum;
    }

    // The value gradients of `steps` steps, stored or added to what the panels before have left. Inlined, so that the
    // rows of the gradient stay in registers from one step to the next.
    template <int P, int kDistinct, class Column>
    static IMGOPT_INLINE void grad_steps(const Reg (&grad)[4][P], const float* x, const Column*& columns, float*& sums,
                                         int64_t steps, bool add) {
        constexpr int kAtOnce = kWidth / 4;
        for (; steps >= kAtOnce; steps -= kAtOnce, columns += kAtOnce * kDistinct, sums += kWidth) {
            const Reg total = tree<kWidth>(
                [&](int i) __attribute__((always_inline)) {
                    return products<P, kDistinct>(grad, x, columns + i / 4 * kDistinct, i % 4);
                },
                0);
            Lanes::store(sums, add ? Lanes::add(Lanes::load(sums), total) : total);
        }
        for (; steps > 0; --steps, columns += kDistinct, sums += 4) {  // fewer than a register holds
            float total[4];
            Lanes::sum_steps(
                tree<4>([&](int r)
                            __attribute__((always_inline)) { return products<P, kDistinct>(grad, x, columns, r); },
                        0),
                total);
            for (int r = 0; r < 4; ++r) sums[r] = add ? sums[r] + total[r] : total[r];
        }
    }

    template <int P, class Column>
    static void grad_quad(const MaskedWeightGrad& p, const Quad& quad, const float* x, const float* grad,
                          int64_t first_row, bool add) {
        Reg rows[4][P];
#pragma GCC unroll 4
        for (int r = 0; r < 4; ++r)
#pragma GCC unroll 4
            for (int i = 0; i < P; ++i) rows[r][i] = Lanes::load(grad + ((quad.rows[r] - first_row) * P + i) * kWidth);
        const Column* columns = static_cast<const Column*>(p.weight.columns) + quad.first_column;
        float* sums = static_cast<float*>(p.sums) + quad.first_step * 4;
        grad_steps<P, 1>(rows, x, columns, sums, quad.steps[0], add);
        grad_steps<P, 2>(rows, x, columns, sums, quad.steps[1], add);
        grad_steps<P, 4>(rows, x, columns, sums, quad.steps[2], add);
    }

    // The last panel is padded with samples of zero, so there is one size.
    template <class Storage>
    static void weight_grad(const MaskedWeightGrad& p, int64_t begin, int64_t end) {
        constexpr int P = Lanes::kRegs;
        const RowQuads& w = p.weight;
        const int64_t columns = columns_of(p.x), first_row = begin * RowQuads::kWindow;
        const int64_t rows = min_of(w.rows, end * RowQuads::kWindow) - first_row;
        const int64_t first_quad = first_row / 4, last_quad = (first_row + rows + 3) / 4;
        const MaskedInput grad_rows{p.x.dtype, p.grad, p.x.samples, w.rows, p.grad_stride, {1, 1},
                                    {1, 1},    {1, 1}, {1, 1},      {0, 0}, {1, 1},        {1, 1}};
        float* x = static_cast<float*>(thread_scratch((columns + rows + 3) * kSamples * sizeof(float)));
        float* grad = x + columns * kSamples;
        for (int64_t i = rows * kSamples; i < (rows + 3) * kSamples; ++i) grad[i] = 0;  // rows that pad the last quad
        for (int64_t first = 0; first < p.x.samples; first += kSamples) {
            pack<Storage, P>(p.x, first, 0, p.x.channels, x);
            pack<Storage, P>(grad_rows, first, first_row, rows, grad);
            for (int64_t b = 0; b < w.blocks; ++b)
                for (int64_t q = first_quad; q < last_quad; ++q) {
                    const float* block = x + b * w.block * kSamples;
                    if (w.wide)
                        grad_quad<P, int32_t>(p, Quad(w, b, q), block, grad, first_row, first > 0);
                    else
                        grad_quad<P, uint8_t>(p, Quad(w, b, q), block, grad, first_row, first > 0);
                }
        }
        write_gradients<Storage, float>(p, begin, end);
    }

    // --- values ------------------------------------------------------------------------------------------------------
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

// --- what a unit exports: the vector algorithm for the types that sum in float32, plain C for float64 ---------------
template <class Lanes>
struct Exports {
    static void matmul(const MaskedMatmul& p, int64_t begin, int64_t end) {
        by_dtype(p.x.dtype, [&]<class Storage, class Sum>(Types<Storage, Sum>) {
            if constexpr (sizeof(Sum) == 8)
                plain_matmul<Storage, Sum>(p, begin, end);
            else
                RowQuadKernel<Lanes>::template matmul<Storage>(p, begin, end);
        });
    }

    static void weight_grad(const MaskedWeightGrad& p, int64_t begin, int64_t end) {
        by_dtype(p.x.dtype, [&]<class Storage, class Sum>(Types<Storage, Sum>) {
            if constexpr (sizeof(Sum) == 8)
                plain_weight_grad<Storage, Sum>(p, begin, end);
            else
                RowQuadKernel<Lanes>::template weight_grad<Storage>(p, begin, end);
        });
    }

    static void values(const MaskedValues& p, int64_t begin, int64_t end) {
        if (p.dtype == DType::f32 && p.source) return RowQuadKernel<Lanes>::gather(p, begin, end);
        any_values(p, begin, end);
    }

    static void int8_matmul(const Int8MaskedMatmul& p, int64_t begin, int64_t end) {
        by_int8(p, [&]<class Input, class Output>(Types<Input, Output>) {
            RowQuadKernel<Lanes>::template int8_matmul<Input, Output>(p, begin, end);
        });
    }

    static constexpr Masked kTable{matmul, weight_grad, values, int8_matmul};
};

}  // namespace
}  // namespace imgopt

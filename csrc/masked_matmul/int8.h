// Int8 products with vectors: the columns of a panel are groups of four bytes per sample, a value is a group of four
// weights, and a multiply-add is the instruction that adds four products to an int32 without an intermediate of 16
// bits. Everything else is the forward product; a panel takes a quarter of its bytes.
//
// struct Lanes::Dot has what quads.h asks of Ops, for int32 lanes; splat, store; and kSigned: whether the instruction
// wants signed inputs. Inputs of the other kind are moved by 128, and the zero point with them.
#pragma once

#include "quads.h"

namespace imgopt {
namespace {

template <class Lanes>
struct Int8Kernel : Panels<Lanes> {
    using Base = Panels<Lanes>;
    using Dot = typename Lanes::Dot;
    using Steps = QuadSteps<Dot>;
    static constexpr int kWidth = Lanes::kWidth;
    static constexpr int64_t kWindow = RowQuads::kWindow, kRowsOnce = 1024;

    // Adds 128 to every byte, modulo 256.
    static void move_bytes(float* x, int64_t count) {
        for (int64_t i = 0; i < count; ++i) {
            uint32_t word;
            memcpy(&word, x + i, 4);
            word ^= 0x80808080u;
            memcpy(x + i, &word, 4);
        }
    }

    template <int P>
    static void add_quad(const Int8MaskedMatmul& p, const Quad& quad, const float* x, float* sums, int64_t first_row,
                         const int32_t* start) {
        typename Steps::template Sums<P> acc;
        float* at[4];
#pragma GCC unroll 4
        for (int r = 0; r < 4; ++r) {
            const int64_t row = quad.rows[r] - first_row;
            at[r] = sums + row * kWidth * P;
#pragma GCC unroll 4
            for (int i = 0; i < P; ++i) {
                acc.chain[0][r][i] = start ? Dot::splat(start[row]) : Dot::load(at[r] + i * kWidth);
                if constexpr (P == 1) acc.chain[1][r][i] = Dot::zero();
            }
        }
        Steps::template add<P>(acc, quad, x, static_cast<const uint8_t*>(p.weight.columns),
                               reinterpret_cast<const int32_t*>(p.values));
#pragma GCC unroll 4
        for (int r = 0; r < 4; ++r)
#pragma GCC unroll 4
            for (int i = 0; i < P; ++i) Dot::store(at[r] + i * kWidth, acc.total(r, i));
    }

    // The rows [row, row + rows) of the samples from `first` on, from sums as the quads left them.
    template <class Output, int P>
    static void finish(const Int8MaskedMatmul& p, int64_t first, int64_t row, int64_t rows, const float* sums) {
        const int64_t count = min_of(p.samples - first, kWidth * P);
        for (int64_t s = 0; s < count; s += kWidth)
            for (int64_t o = 0; o < rows; o += kWidth) {
                const int part = static_cast<int>(min_of(kWidth, rows - o));
                typename Lanes::Reg tile[kWidth];
#pragma GCC unroll 16
                for (int i = 0; i < kWidth; ++i) tile[i] = Lanes::load(sums + (o + i) * kWidth * P + s);
                Lanes::transpose(tile);  // moves bits: the integers pass as they are
                for (int i = 0; i < min_of(kWidth, count - s); ++i) {
                    int32_t integers[kWidth];
                    Lanes::store(reinterpret_cast<float*>(integers), tile[i]);
                    Output* to = static_cast<Output*>(p.result) + (first + s + i) * p.weight.rows + row + o;
                    if (part == kWidth)
                        requantize(p, integers, row + o, kWidth, to);
                    else
                        requantize(p, integers, row + o, part, to);
                }
            }
    }

    // Windows [begin, end) of rows for the samples from `first` on, at most kWidth * P of them.
    template <class Output, int P>
    static void panel(const Int8MaskedMatmul& p, int64_t first, int64_t begin, int64_t end) {
        const RowQuads& w = p.weight;
        constexpr int64_t kLine = kWidth * P;
        const int64_t groups = p.channels / p.kGroup, first_row = begin * kWindow;
        const int64_t last_row = min_of(w.rows, end * kWindow), at_once = min_of(kRowsOnce, last_row - first_row);
        float* x = static_cast<float*>(thread_scratch((groups + at_once + kWidth) * kLine * 4 + kRowsOnce * 4 + 16));
        float* sums = x + groups * kLine;
        int32_t* start = reinterpret_cast<int32_t*>(sums + (at_once + kWidth) * kLine);
        const MaskedInput rows_of_x{DType::f32, p.input, p.samples, groups, groups, {1, 1},
                                    {1, 1},     {1, 1},  {1, 1},    {0, 0}, {1, 1}, {1, 1}};
        Base::template pack<float, P>(rows_of_x, typename Base::template Samples<P>(rows_of_x, first), 0, groups, x);
        const bool moved = (p.x == DType::i8) != Dot::kSigned;
        if (moved) move_bytes(x, groups * kLine);
        const int32_t zero_point = p.zero_point + (!moved ? 0 : Dot::kSigned ? -128 : 128);
        for (int64_t row = first_row; row < last_row; row += at_once) {
            const int64_t rows = min_of(at_once, last_row - row);
            for (int64_t o = 0; o < rows; ++o) start[o] = first_sum(p, row + o, zero_point);
            for (int64_t o = rows; o < (rows + 3) / 4 * 4; ++o) start[o] = 0;
            for (int64_t o = 0; w.blocks == 0 && o < rows * P; ++o)
                Dot::store(sums + o * kWidth, Dot::splat(start[o / P]));
            for (int64_t b = 0; b < w.blocks; ++b)
                for (int64_t q = row / 4; q < (row + rows + 3) / 4; ++q)
                    add_quad<P>(p, Quad(w, b, q), x + b * w.block * kLine, sums, row, b == 0 ? start : nullptr);
            finish<Output, P>(p, first, row, rows, sums);
        }
    }

    template <class Output>
    static void matmul(const Int8MaskedMatmul& p, int64_t begin, int64_t end) {
        Base::for_each_panel(p.weight, p.samples, begin, end,
                             [&]<class Size>(Size, int64_t first, int64_t from, int64_t to) {
                                 panel<Output, Size::kRegs>(p, first, from, to);
                             });
    }
};

}  // namespace
}  // namespace imgopt

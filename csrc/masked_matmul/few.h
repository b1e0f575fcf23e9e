// masked_matmul for a few samples: one sample at a time against sixteen values (the width of a register) at once.
//
// With one sample in a panel of sixteen, fifteen lanes do nothing. Here the lanes are values instead: a register holds
// those of several steps, four rows side by side, and the columns are looked up in the sample. Weights are read once
// and in order. 512 x 512 at 50 %, one sample, from 52 us to 11. Where most weights exist, looking up takes longer than
// multiplying the others with zero: for those the packed weight holds a dense copy, and the lanes are its columns.
//
// struct Lanes adds to what lanes.h names
//   * kFew, up to how many samples this is the faster way; 0 where it never is, and the rest is not needed then;
//   * kNearColumns, the largest block that a Table holds, and look_up(table, columns): x[column];
//   * columns<kDistinct>(from, steps), the column of every lane (lane i is row i % 4 of step i / 4), 0 beyond `steps`.
#pragma once

#include "panels.h"

namespace imgopt {
namespace {

template <class Lanes>
struct LookedUp {
    using Reg = typename Lanes::Reg;
    static constexpr int kWidth = Lanes::kWidth, kAtOnce = kWidth / 4;

    template <int kDistinct>
    static IMGOPT_INLINE void add_steps(Reg& acc, const typename Lanes::Table& x, const uint8_t*& columns,
                                        const float*& values, int64_t steps) {
        for (; steps >= kAtOnce; steps -= kAtOnce, columns += kAtOnce * kDistinct, values += kWidth) {
            const auto at = Lanes::template columns<kDistinct>(columns, kAtOnce);
            acc = Lanes::fma(Lanes::load(values), Lanes::look_up(x, at), acc);
        }
        if (steps == 0) return;
        const int left = static_cast<int>(steps);
        const auto at = Lanes::template columns<kDistinct>(columns, left);
        acc = Lanes::fma(Lanes::load_part(values, left * 4), Lanes::look_up(x, at), acc);
        columns += left * kDistinct;
        values += left * 4;
    }

    // sums[row - first_row] += what the quads [begin, end) of block b make of x, the sample from the block's first
    // column on.
    static void add_block(const MaskedMatmul& p, int64_t b, int64_t begin, int64_t end, const float* x, float* sums,
                          int64_t first_row) {
        const typename Lanes::Table table(x);
        for (int64_t q = begin; q < end; ++q) {
            const Quad quad(p.weight, b, q);
            const uint8_t* columns = static_cast<const uint8_t*>(p.weight.columns) + quad.first_column;
            const float* values = static_cast<const float*>(p.values) + quad.first_step * 4;
            Reg acc = Lanes::zero();
            add_steps<1>(acc, table, columns, values, quad.steps[0]);
            add_steps<2>(acc, table, columns, values, quad.steps[1]);
            add_steps<4>(acc, table, columns, values, quad.steps[2]);
            float of_rows[4];
            Lanes::sum_steps(acc, of_rows);
            for (int r = 0; r < 4; ++r) sums[quad.rows[r] - first_row] += of_rows[r];
        }
    }
};

template <class Lanes>
struct FewSamples {
    using Reg = typename Lanes::Reg;
    static constexpr int kWidth = Lanes::kWidth;
    static constexpr int64_t kFewDense = 4;  // samples: with more, a panel is as fast

    static bool serves(const MaskedMatmul& p, int64_t samples) {
        const RowQuads& w = p.weight;
        if (p.dense && samples <= kFewDense) return true;
        if constexpr (Lanes::kFew > 0) return samples <= Lanes::kFew && !w.wide && w.block <= Lanes::kNearColumns;
        return false;
    }

    // Zeros that follow a sample, so that registers and tables are read whole.
    static constexpr int64_t padding() {
        if constexpr (Lanes::kFew > 0) return Lanes::kNearColumns;
        return kWidth;
    }

    // sums[o - first_row] += dense[o] . x for the rows [first_row, last_row); x is padded with zeros to whole
    // registers.
    template <class Storage>
    static void add_dense(const MaskedMatmul& p, const float* x, float* sums, int64_t first_row, int64_t last_row) {
        const int64_t columns = columns_of(p.x);
        for (int64_t o = first_row; o < last_row; o += 4) {
            const Storage* row[4];
            for (int r = 0; r < 4; ++r)  // rows past the end repeat the last one
                row[r] = static_cast<const Storage*>(p.dense) + min_of(o + r, last_row - 1) * columns;
            Reg acc[4][2];
#pragma GCC unroll 4
            for (int r = 0; r < 4; ++r) acc[r][0] = acc[r][1] = Lanes::zero();
            int64_t c = 0;
            for (; c + 2 * kWidth <= columns; c += 2 * kWidth)
#pragma GCC unroll 2
                for (int i = 0; i < 2; ++i) {
                    const Reg values = Lanes::load(x + c + i * kWidth);
#pragma GCC unroll 4
                    for (int r = 0; r < 4; ++r)
                        acc[r][i] = Lanes::fma(Lanes::load_part(row[r] + c + i * kWidth, kWidth), values, acc[r][i]);
                }
            for (; c < columns; c += kWidth) {
                const int part = static_cast<int>(min_of(kWidth, columns - c));
#pragma GCC unroll 4
                for (int r = 0; r < 4; ++r)
                    acc[r][0] = Lanes::fma(Lanes::load_part(row[r] + c, part), Lanes::load(x + c), acc[r][0]);
            }
            float of_rows[4];
            Reg total[4];
#pragma GCC unroll 4
            for (int r = 0; r < 4; ++r) total[r] = Lanes::add(acc[r][0], acc[r][1]);
            Lanes::sum_steps(Lanes::template join<4>(Lanes::template join<2>(total[0], total[1]),
                                                     Lanes::template join<2>(total[2], total[3])),
                             of_rows);
            for (int r = 0; r < 4 && o + r < last_row; ++r) sums[o + r - first_row] += of_rows[r];
        }
    }

    template <class Storage>
    static void add(const MaskedMatmul& p, const float* x, float* sums, int64_t first_row, int64_t last_row) {
        if (p.dense) return add_dense<Storage>(p, x, sums, first_row, last_row);
        if constexpr (Lanes::kFew > 0)
            for (int64_t b = 0; b < p.weight.blocks; ++b)
                LookedUp<Lanes>::add_block(p, b, first_row / 4, (last_row + 3) / 4, x + b * p.weight.block, sums,
                                           first_row);
    }

    // Windows [begin, end) of rows for the samples [first, last).
    template <class Storage>
    static void matmul(const MaskedMatmul& p, int64_t first, int64_t last, int64_t begin, int64_t end) {
        const RowQuads& w = p.weight;
        const int64_t columns = columns_of(p.x), padded = columns + padding();
        const int64_t first_row = begin * RowQuads::kWindow, last_row = min_of(w.rows, end * RowQuads::kWindow);
        float* x = static_cast<float*>(thread_scratch((padded + last_row - first_row + 4) * sizeof(float)));
        float* sums = x + padded;
        for (int64_t i = columns; i < padded; ++i) x[i] = 0;
        for (int64_t n = first; n < last; ++n) {
            gather_row<Storage>(p.x, n, x);
            for (int64_t o = first_row; o < last_row; ++o)
                sums[o - first_row] = p.bias ? widened(static_cast<const Storage*>(p.bias)[o]) : 0.0f;
            add<Storage>(p, x, sums, first_row, last_row);
            Storage* output = static_cast<Storage*>(p.output) + n * w.rows;
            for (int64_t o = first_row; o < last_row; ++o) narrow(clamped(p, sums[o - first_row]), &output[o]);
        }
    }
};

}  // namespace
}  // namespace imgopt

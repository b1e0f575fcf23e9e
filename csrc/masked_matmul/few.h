// masked_matmul for a few samples: one sample at a time against sixteen values (the width of a register) at once.
//
// With one sample in a panel of sixteen, fifteen lanes do nothing. Here the lanes are values instead: a register holds
// those of several steps, four rows side by side, and the columns are looked up in the sample. Weights are read once
// and in order. 512 x 512 at 50 %, one sample, from 52 us to 11.
//
// struct Lanes adds to what lanes.h names
//   * kFew, up to how many samples this is the faster way; 0 where it never is, and the rest is not needed then;
//   * kNearColumns, the largest block that a Table holds, and look_up(table, columns): x[column];
//   * columns<kDistinct>(from, steps), the column of every lane (lane i is row i % 4 of step i / 4), 0 beyond `steps`.
#pragma once

#include "arithmetic.h"

// Left to itself, the compiler passes a tile of registers to a function through memory.
#define IMGOPT_INLINE __attribute__((always_inline)) inline

namespace imgopt {
namespace {

template <class Lanes>
struct FewSamples {
    using Reg = typename Lanes::Reg;
    static constexpr int kWidth = Lanes::kWidth, kAtOnce = kWidth / 4;

    static bool serves(const RowQuads& w, int64_t samples) {
        return samples <= Lanes::kFew && !w.wide && w.block <= Lanes::kNearColumns;
    }

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

    // Windows [begin, end) of rows for the samples [first, last).
    template <class Storage>
    static void matmul(const MaskedMatmul& p, int64_t first, int64_t last, int64_t begin, int64_t end) {
        const RowQuads& w = p.weight;
        const int64_t columns = columns_of(p.x), padded = columns + Lanes::kNearColumns;  // a table is read whole
        const int64_t first_row = begin * RowQuads::kWindow, last_row = min_of(w.rows, end * RowQuads::kWindow);
        const int64_t first_quad = first_row / 4, last_quad = (last_row + 3) / 4;
        float* x = static_cast<float*>(thread_scratch((padded + last_row - first_row + 4) * sizeof(float)));
        float* sums = x + padded;
        for (int64_t i = columns; i < padded; ++i) x[i] = 0;
        for (int64_t n = first; n < last; ++n) {
            gather_row<Storage>(p.x, n, x);
            for (int64_t o = first_row; o < last_row; ++o)
                sums[o - first_row] = p.bias ? widen(static_cast<const Storage*>(p.bias)[o]) : 0.0f;
            for (int64_t b = 0; b < w.blocks; ++b)
                add_block(p, b, first_quad, last_quad, x + b * w.block, sums, first_row);
            Storage* output = static_cast<Storage*>(p.output) + n * w.rows;
            for (int64_t o = first_row; o < last_row; ++o) narrow(sums[o - first_row], output[o]);
        }
    }
};

}  // namespace
}  // namespace imgopt

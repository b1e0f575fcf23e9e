// The inner loop of masked_matmul, for float32 and int8 alike: the steps of a quad, each of which multiplies four
// values, one per row, with 1, 2 or 4 columns of a panel. struct Ops has Reg, kWidth, zero, add, load(panel),
// load_four(values), whatever keeps the four values of a step, spread(four, i), value i in all lanes, and fma(value, x,
// sum).
//
// Sixteen independent sums hide the latency of a multiply-add (4 cycles, two at a time), which is why a step works on
// four rows even where they share no column: one row at a time reached half the rate. A panel of one register has four
// only, so two steps in turn add to sums of their own.
#pragma once

#include "panels.h"

namespace imgopt {
namespace {

template <class Ops>
struct QuadSteps {
    using Reg = typename Ops::Reg;
    static constexpr int kWidth = Ops::kWidth;
    template <int P>
    static constexpr int kChains = P == 1 ? 2 : 1;

    template <int P>
    struct Sums {
        Reg chain[kChains<P>][4][P];

        IMGOPT_INLINE Reg total(int row, int i) const {
            if constexpr (kChains<P> == 2) return Ops::add(chain[0][row][i], chain[1][row][i]);
            return chain[0][row][i];
        }
    };

    // Where the columns of a step's four values lie in a panel. Loads bound a step (two of 512 bits per cycle, narrow
    // ones count alike), so bytes are read at once, and the four values as well: 18 loads instead of 24 took 0.8 of the
    // time.
    template <int P, int kDistinct, class Column>
    static IMGOPT_INLINE void find(const float* x, const Column* columns, const float* (&column)[4]) {
        const char* panel = reinterpret_cast<const char*>(x);  // in bytes, an offset is one shift
        uint32_t word = 0;  // the first column is the lowest byte: every target is little-endian
        if constexpr (sizeof(Column) == 1) memcpy(&word, columns, kDistinct);
#pragma GCC unroll 4
        for (int r = 0; r < 4; ++r) {
            const int d = r * kDistinct / 4;
            const int64_t at = sizeof(Column) == 1 ? static_cast<int64_t>(word >> 8 * d & 255) : columns[d];
            column[r] = reinterpret_cast<const float*>(panel + at * (kWidth * P * static_cast<int>(sizeof(float))));
        }
    }

    template <int P, int kDistinct, class Column, class Value>
    static IMGOPT_INLINE void step(Reg (&sums)[4][P], const float* x, const Column*& columns, const Value*& values) {
        const auto four = Ops::load_four(values);
        const float* column[4];
        find<P, kDistinct>(x, columns, column);
#pragma GCC unroll 4
        for (int r = 0; r < 4; ++r) {
            // From memory a value comes spread, which costs a load, and spreading a port of the multiply-adds: with
            // one column or two there are loads to spare (2.5 % of the time of 4 x 1 blocks, 5 of two columns).
            const Reg value = kDistinct <= 2 ? Ops::splat(values[r]) : Ops::spread(four, r);
#pragma GCC unroll 4
            for (int p = 0; p < P; ++p) sums[r][p] = Ops::fma(value, Ops::load(column[r] + p * kWidth), sums[r][p]);
        }
        columns += kDistinct;
        values += 4;
    }

    template <int P, int kDistinct, class Column, class Value>
    static IMGOPT_INLINE void steps(Sums<P>& sums, const float* x, const Column*& columns, const Value*& values,
                                    int64_t count) {
        for (; count >= kChains<P>; count -= kChains<P>)
#pragma GCC unroll 2
            for (int c = 0; c < kChains<P>; ++c) step<P, kDistinct>(sums.chain[c], x, columns, values);
        if (kChains<P> > 1 && count > 0) step<P, kDistinct>(sums.chain[0], x, columns, values);
    }

    // Adds the products of one quad with the block of columns that begins at x.
    template <int P, class Column, class Value>
    static IMGOPT_INLINE void add(Sums<P>& sums, const Quad& quad, const float* x, const Column* columns,
                                  const Value* values) {
        columns += quad.first_column;
        values += quad.first_step * 4;
        steps<P, 1>(sums, x, columns, values, quad.steps[0]);
        steps<P, 2>(sums, x, columns, values, quad.steps[1]);
        steps<P, 4>(sums, x, columns, values, quad.steps[2]);
    }
};

}  // namespace
}  // namespace imgopt

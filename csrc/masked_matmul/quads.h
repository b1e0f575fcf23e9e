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

// kCount columns side by side in memory. Loads bound a step (two of 512 bits per cycle, narrow ones count alike), so
// bytes are read at once, and the four values as well: 18 loads instead of 24 took 0.8 of the time.
template <int kCount, class Column>
struct Columns {
    Column at[kCount];

    explicit IMGOPT_INLINE Columns(const Column* from) { memcpy(at, from, sizeof at); }
    IMGOPT_INLINE int64_t operator[](int i) const { return at[i]; }
};

template <int kCount>
struct Columns<kCount, uint8_t> {
    static constexpr int kWord = kCount < 8 ? kCount : 8;
    uint64_t words[(kCount + 7) / 8];  // the first column is the lowest byte: every target is little-endian

    explicit IMGOPT_INLINE Columns(const uint8_t* from) {
#pragma GCC unroll 2
        for (int i = 0; i < (kCount + 7) / 8; ++i) words[i] = word(from + 8 * i);
    }
    static IMGOPT_INLINE uint64_t word(const uint8_t* from) {
        if constexpr (kCount == 1) return *from;
        if constexpr (kCount == 2) return read<uint16_t>(from);
        if constexpr (kCount == 4) return read<uint32_t>(from);
        return read<uint64_t>(from);
    }
    template <class Word>
    static IMGOPT_INLINE Word read(const uint8_t* from) {
        Word word;
        memcpy(&word, from, sizeof word);
        return word;
    }
    IMGOPT_INLINE int64_t operator[](int i) const { return static_cast<int64_t>(words[i / 8] >> 8 * (i % 8) & 255); }
};

// The columns of `count` > 0 turns of kCount each.
template <int kCount, class Column>
struct ColumnsInTurn {
    const Column* next;

    IMGOPT_INLINE ColumnsInTurn(const Column* from, int64_t) : next(from) {}

    IMGOPT_INLINE Columns<kCount, Column> take() {
        const Columns<kCount, Column> taken(next);
        next += kCount;
        return taken;
    }
};

// Read two turns before they are asked for: as if a processor started its loads oldest first, the one for the columns
// waits behind those of the turns before and comes late by its own latency, which took a seventh of the time of weight
// gradients and up to a tenth of products. With fewer columns a turn has loads to spare; integers fill the registers.
template <int kCount>
    requires(kCount >= 4)
struct ColumnsInTurn<kCount, uint8_t> {
    const uint8_t *next, *last;
    Columns<kCount, uint8_t> first, second;

    IMGOPT_INLINE ColumnsInTurn(const uint8_t* from, int64_t count)
        : next(count > 1 ? from + kCount : from), last(from + (count - 1) * kCount), first(from), second(next) {}

    IMGOPT_INLINE Columns<kCount, uint8_t> take() {
        const Columns<kCount, uint8_t> taken = first;
        first = second;
        next = next < last ? next + kCount : last;  // never read beyond
        second = Columns<kCount, uint8_t>(next);
        return taken;
    }
};

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

    // Where the columns of a step's four values lie in a panel.
    template <int P, int kDistinct, class Columns>
    static IMGOPT_INLINE void find(const float* x, const Columns& columns, int first, const float* (&column)[4]) {
        const char* panel = reinterpret_cast<const char*>(x);  // in bytes, an offset is one shift
#pragma GCC unroll 4
        for (int r = 0; r < 4; ++r) {
            const int64_t at = columns[first + r * kDistinct / 4];
            column[r] = reinterpret_cast<const float*>(panel + at * (kWidth * P * static_cast<int>(sizeof(float))));
        }
    }

    template <int P, int kDistinct, class Column, class Value>
    static IMGOPT_INLINE void step(Reg (&sums)[4][P], const float* x, ColumnsInTurn<kDistinct, Column>& columns,
                                   const Value*& values) {
        const auto four = Ops::load_four(values);
        const float* column[4];
        find<P, kDistinct>(x, columns.take(), 0, column);
#pragma GCC unroll 4
        for (int r = 0; r < 4; ++r) {
            // From memory a value comes spread, which costs a load, and spreading a port of the multiply-adds: with
            // one column or two there are loads to spare (2.5 % of the time of 4 x 1 blocks, 5 of two columns).
            const Reg value = kDistinct <= 2 ? Ops::splat(values[r]) : Ops::spread(four, r);
#pragma GCC unroll 4
            for (int p = 0; p < P; ++p) sums[r][p] = Ops::fma(value, Ops::load(column[r] + p * kWidth), sums[r][p]);
        }
        values += 4;
    }

    template <int P, int kDistinct, class Column, class Value>
    static IMGOPT_INLINE void steps(Sums<P>& sums, const float* x, const Column*& columns, const Value*& values,
                                    int64_t count) {
        if (count == 0) return;
        ColumnsInTurn<kDistinct, Column> turns(columns, count);
        columns += count * kDistinct;
        for (; count >= kChains<P>; count -= kChains<P>)
#pragma GCC unroll 2
            for (int c = 0; c < kChains<P>; ++c) step<P, kDistinct>(sums.chain[c], x, turns, values);
        if (kChains<P> > 1 && count > 0) step<P, kDistinct>(sums.chain[0], x, turns, values);
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

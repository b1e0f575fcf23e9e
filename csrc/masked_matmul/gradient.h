// The gradient of the weight with vectors: a value's gradient is a register of products over the samples, and a tree of
// additions turns kWidth such registers into one whose lanes are their sums.
#pragma once

#include "quads.h"

namespace imgopt {
namespace {

template <class Lanes>
struct WeightGradKernel : Panels<Lanes> {
    using Base = Panels<Lanes>;
    using Steps = QuadSteps<Lanes>;
    using Reg = typename Lanes::Reg;
    using Base::kSamples;
    using Base::kWidth;

    // What the values of a step collect from one panel: lane i is value i % 4, of a quarter of the samples. Sample by
    // sample, so that four sums run side by side: value by value took 1.3 times as long.
    template <int P, int kDistinct, class Columns>
    static IMGOPT_INLINE Reg step_sums(const Reg (&grad)[4][P], const float* x, const Columns& columns, int first) {
        const float* column[4];
        Steps::template find<P, kDistinct>(x, columns, first, column);
        Reg sum[4];
#pragma GCC unroll 4
        for (int r = 0; r < 4; ++r) sum[r] = Lanes::mul(grad[r][0], Lanes::load(column[r]));
#pragma GCC unroll 4
        for (int p = 1; p < P; ++p)
#pragma GCC unroll 4
            for (int r = 0; r < 4; ++r) sum[r] = Lanes::fma(grad[r][p], Lanes::load(column[r] + p * kWidth), sum[r]);
        return Lanes::template join<4>(Lanes::template join<2>(sum[0], sum[1]),
                                       Lanes::template join<2>(sum[2], sum[3]));
    }

    // The same of kSteps steps: lane i is value i % (4 * kSteps).
    template <int P, int kDistinct, int kSteps, class Columns>
    static IMGOPT_INLINE Reg tree(const Reg (&grad)[4][P], const float* x, const Columns& columns, int first = 0) {
        if constexpr (kSteps == 1)
            return step_sums<P, kDistinct>(grad, x, columns, first);
        else
            return Lanes::template join<4 * kSteps>(
                tree<P, kDistinct, kSteps / 2>(grad, x, columns, first),
                tree<P, kDistinct, kSteps / 2>(grad, x, columns, first + kSteps / 2 * kDistinct));
    }

    // The value gradients of `steps` steps, stored or added to what the panels before have left. Inlined, so that the
    // rows of the gradient stay in registers from one step to the next.
    template <int P, int kDistinct, class Column>
    static IMGOPT_INLINE void grad_steps(const Reg (&grad)[4][P], const float* x, const Column*& columns, float*& sums,
                                         int64_t steps, bool add) {
        constexpr int kAtOnce = kWidth / 4;
        if (const int64_t trees = steps / kAtOnce; trees > 0) {
            ColumnsInTurn<kAtOnce * kDistinct, Column> turns(columns, trees);
            for (int64_t t = 0; t < trees; ++t, sums += kWidth) {
                const Reg total = tree<P, kDistinct, kAtOnce>(grad, x, turns.take());
                Lanes::store(sums, add ? Lanes::add(Lanes::load(sums), total) : total);
            }
            columns += trees * kAtOnce * kDistinct;
            steps -= trees * kAtOnce;
        }
        for (; steps > 0; --steps, columns += kDistinct, sums += 4) {  // fewer than a register holds
            float total[4];
            Lanes::sum_steps(step_sums<P, kDistinct>(grad, x, Columns<kDistinct, Column>(columns), 0), total);
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
        const int64_t held = min_of(w.block, columns);
        float* x = static_cast<float*>(thread_scratch((held + rows + 3) * kSamples * sizeof(float)));
        float* grad = x + held * kSamples;
        for (int64_t i = rows * kSamples; i < (rows + 3) * kSamples; ++i) grad[i] = 0;  // rows that pad the last quad
        for (int64_t first = 0; first < p.x.samples; first += kSamples) {
            const typename Base::template Samples<P> samples(p.x, first);
            Base::template pack<Storage, P>(grad_rows, typename Base::template Samples<P>(grad_rows, first), first_row,
                                            first_row + rows, grad);
            for (int64_t b = 0; b < w.blocks; ++b) {
                const int64_t from = b * w.block;
                Base::template pack<Storage, P>(p.x, samples, from, min_of(columns, from + w.block), x);
                for (int64_t q = first_quad; q < last_quad; ++q)
                    if (w.wide)
                        grad_quad<P, int32_t>(p, Quad(w, b, q), x, grad, first_row, first > 0);
                    else
                        grad_quad<P, uint8_t>(p, Quad(w, b, q), x, grad, first_row, first > 0);
            }
        }
        write_gradients<Storage, float>(p, begin, end);
    }
};

}  // namespace
}  // namespace imgopt

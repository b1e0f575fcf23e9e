// The vector algorithms of masked_matmul, once for all instruction sets: each unit names its registers and lanes
// (struct Lanes) and instantiates these. Everything is local to the unit that includes it.
//
// A panel of kRegs * kWidth samples is transposed (panels.h), so that a column of x is kRegs registers; a quad keeps
// four rows of sums in 4 * kRegs registers, and a step is four values spread and 4 * kRegs multiply-adds with x from
// memory (quads.h). forward.h, gradient.h and int8.h build on it; few.h is for a few samples.
//
// struct Lanes has
//   * Reg, kWidth (lanes), kRegs (registers of a panel), zero, splat, load, store, add, mul, min, max,
//     fma(a, b, c) = a * b + c;
//   * load_four(values), whatever keeps the four values of a step, and spread(four, i), value i in all lanes;
//   * load_part(from, count), the other lanes zero, and store_part(to, x, count), for every storage type;
//   * transpose(tile), kWidth x kWidth in place, and join<kCount>(a, b), which turns sums of kCount / 2 values each
//     into sums of kCount;
//   * sum_steps(x, sums), which adds lane i to sums[i % 4] of four;
//   * gather(from, index), 0 where the index is -1; what few.h asks for; and Dot, which is what int8.h asks for.
#pragma once

#include "forward.h"
#include "gradient.h"
#include "int8.h"

namespace imgopt {
namespace {

// What a unit exports: the vector algorithms for the types that sum in float32, plain C for float64.
template <class Lanes>
struct Exports {
    static void matmul(const MaskedMatmul& p, int64_t begin, int64_t end) {
        by_dtype(p.x.dtype, [&]<class Storage, class Sum>(Types<Storage, Sum>) {
            if constexpr (sizeof(Sum) == 8)
                plain_matmul<Storage, Sum>(p, begin, end);
            else
                ForwardKernel<Lanes>::template matmul<Storage>(p, begin, end);
        });
    }

    static void weight_grad(const MaskedWeightGrad& p, int64_t begin, int64_t end) {
        by_dtype(p.x.dtype, [&]<class Storage, class Sum>(Types<Storage, Sum>) {
            if constexpr (sizeof(Sum) == 8)
                plain_weight_grad<Storage, Sum>(p, begin, end);
            else
                WeightGradKernel<Lanes>::template weight_grad<Storage>(p, begin, end);
        });
    }

    static void values(const MaskedValues& p, int64_t begin, int64_t end) {
        if (p.dtype == DType::f32 && p.source) return ForwardKernel<Lanes>::gather(p, begin, end);
        any_values(p, begin, end);
    }

    static void int8_matmul(const Int8MaskedMatmul& p, int64_t begin, int64_t end) {
        by_output<uint8_t>(p.output, [&]<class Input, class Output>(Types<Input, Output>) {
            Int8Kernel<Lanes>::template matmul<Output>(p, begin, end);
        });
    }

    static constexpr Masked kTable{matmul, weight_grad, values, int8_matmul};
};

}  // namespace
}  // namespace imgopt

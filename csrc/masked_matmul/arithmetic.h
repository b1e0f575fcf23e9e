// The arithmetic of masked_matmul in plain C: what scalar.cpp exports as the specification, and what the vector units
// fall back on (float64, values of half precision). Everything is local to the unit that includes it.
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "../element_types.h"

namespace imgopt {
namespace {

// --- where the rows of x lie -----------------------------------------------------------------------------------------
IMGOPT_HD inline int64_t columns_of(const MaskedInput& x) { return x.channels * x.taps[0] * x.taps[1]; }

// Where sample n stands: its image, and what an offset of zero reads. Stepping from one sample to the next saves the
// divisions of position(), which would cost more than the gathering of a few channels.
struct Position {
    int64_t image, out_y, out_x;
};

IMGOPT_HD inline Position position(const MaskedInput& x, int64_t n) {
    const int64_t row = n / x.out[1];
    return {row / x.out[0], row % x.out[0], n % x.out[1]};
}

inline void advance(const MaskedInput& x, Position& at) {
    if (++at.out_x < x.out[1]) return;
    at.out_x = 0;
    if (++at.out_y < x.out[0]) return;
    at.out_y = 0;
    ++at.image;
}

// Input coordinate that a tap reads, -1 for none.
IMGOPT_HD inline int64_t coordinate(const MaskedInput& x, int axis, int64_t out, int64_t tap) {
    const int64_t at = out * x.step[axis] + x.offset[axis] + tap * x.per_tap[axis];
    if (at < 0 || at >= x.in[axis] * x.divide[axis]) return -1;
    if (x.divide[axis] == 1) return at;
    return at % x.divide[axis] == 0 ? at / x.divide[axis] : -1;
}

// First channel of what a sample sees through a tap; null where that lies outside.
template <class Storage>
IMGOPT_HD const Storage* pixel(const MaskedInput& x, const Position& at, int64_t tap_y, int64_t tap_x) {
    const int64_t iy = coordinate(x, 0, at.out_y, tap_y), ix = coordinate(x, 1, at.out_x, tap_x);
    if (iy < 0 || ix < 0) return nullptr;
    return static_cast<const Storage*>(x.data) + ((at.image * x.in[0] + iy) * x.in[1] + ix) * x.stride;
}

// Row n of x, all columns, widened.
template <class Storage, class Sum>
void gather_row(const MaskedInput& x, int64_t n, Sum* row) {
    const Position at = position(x, n);
    for (int64_t ty = 0; ty < x.taps[0]; ++ty)
        for (int64_t tx = 0; tx < x.taps[1]; ++tx, row += x.channels) {
            const Storage* from = pixel<Storage>(x, at, ty, tx);
            for (int64_t c = 0; c < x.channels; ++c) row[c] = from ? widened(from[c]) : Sum(0);
        }
}

// --- one quad of one block -------------------------------------------------------------------------------------------
struct Quad {
    const int32_t* rows;
    int64_t first_step, first_column;
    int64_t steps[3];  // with 1, 2 and 4 columns

    IMGOPT_HD Quad(const RowQuads& w, int64_t block, int64_t quad)
        : rows(w.quads + (block * ((w.rows + 3) / 4) + quad) * RowQuads::kFields),
          first_step(rows[4]),
          first_column(rows[5]),
          steps{rows[6], rows[7], rows[8]} {}
};

IMGOPT_HD inline int64_t column_at(const RowQuads& w, int64_t i) {
    return w.wide ? static_cast<const int32_t*>(w.columns)[i] : static_cast<const uint8_t*>(w.columns)[i];
}

// Calls body(i, row, column) for every value of a quad, in visiting order; the column counts from the block's first.
template <class Body>
void for_each_value(const RowQuads& w, const Quad& quad, const Body& body) {
    int64_t i = quad.first_step * 4, at = quad.first_column;
    for (int kind = 0; kind < 3; ++kind) {
        const int distinct = 1 << kind;
        for (int64_t s = 0; s < quad.steps[kind]; ++s, at += distinct)
            for (int r = 0; r < 4; ++r, ++i) body(i, quad.rows[r], column_at(w, at + r * distinct / 4));
    }
}

// --- the three kernels -----------------------------------------------------------------------------------------------
inline int64_t windows_of(const RowQuads& w) { return (w.rows + RowQuads::kWindow - 1) / RowQuads::kWindow; }
inline int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }

inline bool is_clamped(const MaskedMatmul& p) { return p.low > -__builtin_inf() || p.high < __builtin_inf(); }

template <class Sum>
Sum clamped(const MaskedMatmul& p, Sum y) {
    y = y < static_cast<Sum>(p.low) ? static_cast<Sum>(p.low) : y;
    return y > static_cast<Sum>(p.high) ? static_cast<Sum>(p.high) : y;
}

template <class Storage, class Sum>
void plain_matmul(const MaskedMatmul& p, int64_t begin, int64_t end) {
    constexpr int64_t kQuads = RowQuads::kWindow / 4;
    const int64_t windows = windows_of(p.weight), quads = (p.weight.rows + 3) / 4;
    Sum* row = static_cast<Sum*>(thread_scratch(columns_of(p.x) * sizeof(Sum)));
    for (int64_t unit = begin; unit < end; ++unit) {
        const int64_t panel = unit / windows, window = unit % windows, first = window * RowQuads::kWindow;
        const int64_t last = min_of(p.weight.rows, first + RowQuads::kWindow);
        for (int64_t n = panel * p.kPanel; n < min_of(p.x.samples, (panel + 1) * p.kPanel); ++n) {
            gather_row<Storage>(p.x, n, row);
            Sum sums[RowQuads::kWindow];
            for (int64_t o = first; o < last; ++o)
                sums[o - first] = p.bias ? widened(static_cast<const Storage*>(p.bias)[o]) : Sum(0);
            for (int64_t b = 0; b < p.weight.blocks; ++b)
                for (int64_t q = window * kQuads; q < min_of(quads, (window + 1) * kQuads); ++q)
                    for_each_value(p.weight, Quad(p.weight, b, q), [&](int64_t i, int64_t o, int64_t column) {
                        const Sum value = static_cast<const Sum*>(p.values)[i];
                        sums[o - first] += value * row[b * p.weight.block + column];
                    });
            Storage* output = static_cast<Storage*>(p.output) + n * p.weight.rows;
            for (int64_t o = first; o < last; ++o) narrow(clamped(p, sums[o - first]), &output[o]);
        }
    }
}

// The rows of the gradient that belong to windows [begin, end): zero but for the values that `sums` has.
template <class Storage, class Sum>
void write_gradients(const MaskedWeightGrad& p, int64_t begin, int64_t end) {
    constexpr int64_t kQuads = RowQuads::kWindow / 4;
    const int64_t rows = p.weight.rows, quads = (rows + 3) / 4;
    Storage* gradient = static_cast<Storage*>(p.gradient);
    const Sum* sums = static_cast<const Sum*>(p.sums);
    for (int64_t window = begin; window < end; ++window) {  // which the second-level cache holds meanwhile
        const int64_t first = window * RowQuads::kWindow, last = min_of(rows, first + RowQuads::kWindow);
        memset(gradient + first * p.row_size, 0, static_cast<size_t>((last - first) * p.row_size) * sizeof(Storage));
        for (int64_t b = 0; p.x.samples > 0 && b < p.weight.blocks; ++b)
            for (int64_t q = window * kQuads; q < min_of(quads, (window + 1) * kQuads); ++q) {
                const Quad quad(p.weight, b, q);
                const int64_t from = quad.first_step * 4;
                const int64_t to = from + (quad.steps[0] + quad.steps[1] + quad.steps[2]) * 4;
                for (int64_t i = from; i < to; ++i)
                    if (p.source[i] >= 0) narrow(sums[i], &gradient[p.source[i]]);
            }
    }
}

template <class Storage, class Sum>
void plain_weight_grad(const MaskedWeightGrad& p, int64_t begin, int64_t end) {
    constexpr int64_t kQuads = RowQuads::kWindow / 4;
    const int64_t quads = min_of((p.weight.rows + 3) / 4, end * kQuads);
    Sum* row = static_cast<Sum*>(thread_scratch(columns_of(p.x) * sizeof(Sum)));
    Sum* sums = static_cast<Sum*>(p.sums);
    for (int64_t n = 0; n < p.x.samples; ++n) {
        gather_row<Storage>(p.x, n, row);
        const Storage* grad = static_cast<const Storage*>(p.grad) + n * p.grad_stride;
        for (int64_t b = 0; b < p.weight.blocks; ++b)
            for (int64_t q = begin * kQuads; q < quads; ++q)
                for_each_value(p.weight, Quad(p.weight, b, q), [&](int64_t i, int64_t o, int64_t column) {
                    const Sum g = o < p.weight.rows ? widened(grad[o]) : Sum(0);
                    const Sum product = g * row[b * p.weight.block + column];
                    sums[i] = n == 0 ? product : sums[i] + product;
                });
    }
    write_gradients<Storage, Sum>(p, begin, end);
}

template <class Storage, class Sum>
void plain_values(const MaskedValues& p, int64_t begin, int64_t end) {
    const Storage* weight = static_cast<const Storage*>(p.weight);
    Sum* values = static_cast<Sum*>(p.values);
    for (int64_t i = begin; i < end; ++i) {
        const int64_t at = p.source ? p.source[i] : i;
        values[i] = at < 0 ? Sum(0) : widened(weight[at]);
    }
}

// --- int8 ------------------------------------------------------------------------------------------------------------
// Rounds half to even where |y| < 2^22: adding 1.5 * 2^23 leaves no bits for a fraction.
IMGOPT_HD inline float round_half_even(float y) { return (y + 12582912.0f) - 12582912.0f; }

IMGOPT_HD inline void requantized(float y, int32_t zero_point, uint8_t& out) {
    out = static_cast<uint8_t>(static_cast<int32_t>(round_half_even(y)) + zero_point);
}
IMGOPT_HD inline void requantized(float y, int32_t zero_point, int8_t& out) {
    out = static_cast<int8_t>(static_cast<int32_t>(round_half_even(y)) + zero_point);
}
IMGOPT_HD inline void requantized(float y, int32_t, float& out) { out = y; }

template <class Output>
void requantize(const Int8MaskedMatmul& p, const int32_t* sums, int64_t row, int count, Output* output) {
    for (int o = 0; o < count; ++o) {
        float y = static_cast<float>(sums[o]) * p.multiplier[row + o];
        y = y < p.low ? p.low : y;
        y = y > p.high ? p.high : y;
        requantized(y, p.output_zero_point, output[o]);
    }
}

// What the sums over raw inputs start from. Modulo 2^32: partial sums may leave int32, the total does not.
inline int32_t first_sum(const Int8MaskedMatmul& p, int64_t row, int32_t zero_point) {
    const uint32_t shift = static_cast<uint32_t>(zero_point) * static_cast<uint32_t>(p.weight_sum[row]);
    return static_cast<int32_t>(static_cast<uint32_t>(p.bias[row]) - shift);
}

template <class Input, class Output>
void plain_int8_matmul(const Int8MaskedMatmul& p, int64_t begin, int64_t end) {
    constexpr int64_t kQuads = RowQuads::kWindow / 4, kPanel = MaskedMatmul::kPanel, kGroup = Int8MaskedMatmul::kGroup;
    const int64_t windows = windows_of(p.weight), quads = (p.weight.rows + 3) / 4;
    for (int64_t unit = begin; unit < end; ++unit) {
        const int64_t panel = unit / windows, window = unit % windows, first = window * RowQuads::kWindow;
        const int64_t rows = min_of(p.weight.rows - first, RowQuads::kWindow);
        for (int64_t n = panel * kPanel; n < min_of(p.samples, (panel + 1) * kPanel); ++n) {
            const Input* x = static_cast<const Input*>(p.input) + n * p.channels;
            uint32_t sums[RowQuads::kWindow] = {};
            int32_t totals[RowQuads::kWindow];
            for (int64_t b = 0; b < p.weight.blocks; ++b)
                for (int64_t q = window * kQuads; q < min_of(quads, (window + 1) * kQuads); ++q)
                    for_each_value(p.weight, Quad(p.weight, b, q), [&](int64_t i, int64_t o, int64_t group) {
                        const int64_t at = (b * p.weight.block + group) * kGroup;
                        for (int64_t k = 0; k < kGroup; ++k)
                            sums[o - first] += static_cast<uint32_t>(p.values[i * kGroup + k] * x[at + k]);
                    });
            for (int64_t o = 0; o < rows; ++o)
                totals[o] =
                    static_cast<int32_t>(sums[o] + static_cast<uint32_t>(first_sum(p, first + o, p.zero_point)));
            requantize(p, totals, first, static_cast<int>(rows),
                       static_cast<Output*>(p.result) + n * p.weight.rows + first);
        }
    }
}

// --- from a dtype to types -------------------------------------------------------------------------------------------
template <class... T>
struct Types {};

// Calls body(Types<Storage, Sum>) for a floating dtype.
template <class Body>
void by_dtype(DType dtype, const Body& body) {
    switch (dtype) {
        case DType::f64: return body(Types<double, double>{});
        case DType::f16: return body(Types<Half, float>{});
        case DType::bf16: return body(Types<BFloat16, float>{});
        default: return body(Types<float, float>{});
    }
}

template <class Input, class Body>
void by_output(DType output, const Body& body) {
    switch (output) {
        case DType::u8: return body(Types<Input, uint8_t>{});
        case DType::i8: return body(Types<Input, int8_t>{});
        default: return body(Types<Input, float>{});
    }
}

// Calls body(Types<Input, Output>) for the dtypes of an int8 product.
template <class Body>
void by_int8(const Int8MaskedMatmul& p, const Body& body) {
    if (p.x == DType::u8) return by_output<uint8_t>(p.output, body);
    by_output<int8_t>(p.output, body);
}

inline void any_values(const MaskedValues& p, int64_t begin, int64_t end) {
    by_dtype(p.dtype,
             [&]<class Storage, class Sum>(Types<Storage, Sum>) { plain_values<Storage, Sum>(p, begin, end); });
}

}  // namespace
}  // namespace imgopt

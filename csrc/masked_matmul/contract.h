// The contract of masked_matmul.
//
// output[n, o] = bias[o] + sum of x[n, k] · weight[o, k] over the entries (o, k) of a mask.
// The mask comes as "row quads", which ops/masked_matmul/layout.py describes: per block of columns and quad of rows,
// the rows, the first step, the first column, and the number of steps of each kind; a step multiplies four values, one
// per row, with 1, 2 or 4 columns. Sums run over the blocks in order, and within one over its steps, in float32
// (float64 for float64); so they are equal for any number of threads, not across instruction sets, which add the
// fused way or not.
#pragma once

#include "../dtype.h"

namespace imgopt {

struct RowQuads {
    static constexpr int kRows = 4, kFields = 9;
    static constexpr int kWindow = 64;  // rows among which quads are formed: a unit of work owns a window
    const int32_t* quads;               // (blocks, ceil(rows / 4), kFields)
    const void* columns;                // within the block: u8, or i32 if `wide`
    int64_t rows, blocks, block;
    bool wide;
};

// What the rows of x are. A linear has one tap and rows of `channels`; a convolution's row n is an output position, its
// columns are (tap, channel), and tap t along an axis reads the input at (position * step + offset + t * per_tap) /
// divide where that is whole and inside, zero elsewhere. Pixels are `stride` elements apart, their channels adjacent.
struct MaskedInput {
    DType dtype;  // f32, f64, f16, bf16
    const void* data;
    int64_t samples, channels, stride;
    int64_t in[2], out[2], taps[2], step[2], offset[2], per_tap[2], divide[2];  // y, x
};

struct MaskedMatmul {
    static constexpr int kPanel = 64;  // samples of a unit
    RowQuads weight;
    MaskedInput x;
    const void* values;  // float, 4 per step; double for f64
    const void* bias;    // of x's dtype, or null
    void* output;        // (samples, rows), of x's dtype
    // The sums are clamped to [low, high] before they are rounded to the dtype.
    double low = -__builtin_inf(), high = __builtin_inf();
    // (rows, columns) of x's dtype, zero off the mask, or null: what a kernel may read instead for a few samples.
    const void* dense = nullptr;
};

// gradient[source[i]] = sum over n of grad[n, row(i)] * x[n, column(i)], for the values i that are no padding; 0
// elsewhere. Row o of the structure is the `row_size` positions from o * row_size on.
struct MaskedWeightGrad {
    RowQuads weight;
    MaskedInput x;
    const void* grad;       // (samples, rows), of x's dtype, rows `grad_stride` elements apart
    const int32_t* source;  // 4 per step, -1 for padding
    void* sums;             // float, 4 per step; double for f64: working memory
    void* gradient;         // of x's dtype
    int64_t grad_stride;
    int64_t row_size;  // 0 where the rows of the structure are not those of the weight: the gradient comes zeroed
};

// values[i] = weight[source[i]], 0 where source is -1, widened to float (f64: double).
struct MaskedValues {
    DType dtype;  // of the weight: floating
    const void* weight;
    const int32_t* source;  // null: the weight holds the values themselves, in order
    void* values;
};

// output[n, o] = requantize(bias[o] + sum of (x[n, k] - zero_point) * weight[o, k]), with the overflow bound and the
// requantization of int8_conv2d. On the CPU the structure is that of groups of four adjacent columns, of which an
// instruction adds the four products to an int32: a group exists where one of its weights does. The zero point meets
// the sums: weight_sum[o] = sum of weight[o, k].
struct Int8MaskedMatmul {
    static constexpr int64_t kLargestBlock = 256, kGroup = 4;
    RowQuads weight;       // wide: false
    DType x, output;       // u8, i8; output also f32
    const void* input;     // (samples, channels); on the CPU channels % kGroup == 0
    const int8_t* values;  // 4 per step, on the CPU times kGroup
    const int32_t* bias;   // per row
    const float* multiplier;
    void* result;  // (samples, rows)
    int64_t samples, channels;
    int32_t zero_point, output_zero_point;
    float low, high;  // of y before the zero point
    const int32_t* weight_sum = nullptr;
};

struct Masked {
    // unit: kPanel samples times one window of rows, the window running fastest
    void (*matmul)(const MaskedMatmul& p, int64_t begin, int64_t end);
    void (*weight_grad)(const MaskedWeightGrad& p, int64_t begin, int64_t end);  // unit: a window of rows
    void (*values)(const MaskedValues& p, int64_t begin, int64_t end);           // unit: a value
    void (*int8_matmul)(const Int8MaskedMatmul& p, int64_t begin, int64_t end);  // unit: as for matmul
};

}  // namespace imgopt

// The contract of affine_warp.
//
// output[n, c, y, x] = epilogue(sample of images[n, c] at (x', y')), where [x', y', 1] ~ matrix[n] [x, y, 1] maps
// output to input and pixel centres are integers. csrc/affine_warp/arithmetic.h is this text as code.
//
// Type of the arithmetic: R = float64 where the images or the output are float64, float32 otherwise.
// Coordinates, affine (last row exactly 0, 0, 1): for each 64 output columns that start at x0, the base m0 x0 + m1 y
//   + m2 is computed in float64 and split into an int32 floor and a fraction of type R; inside the block
//   fma(m0, lane, fraction), in R, is split again. Identity, shifts and flips are exact at any image size, the error
//   of float32 is below 64 · 2^-24 · max(1, |m0|) = 4e-6 pixels at unit scale, and a vector of lanes costs one fma.
//   Bases are clamped to +-2^30, offsets inside a block to +-2^24, steps to +-2^30: nothing overflows.
// Coordinates, perspective: float64 throughout, X = m0 x + (m1 y + m2) and so on, r = 1 / w, x' = X r, then split into
//   an int32 floor, clamped to +-2^30, and a fraction of type R.
// Not finite (w = 0 included): the value is `fill` in every mode.
// Padding: a tap outside the image is `fill` (constant, blended tap by tap) or the border pixel (edge). reflect (about
//   the border pixel's centre, period 2n - 2) and symmetric (about its outer edge, period 2n) first fold the
//   coordinate; a mirrored fraction f > 0 becomes 1 - f. An axis of size 1 replicates.
// Weights. nearest: floor(x + 1/2). bilinear on uint8: integers of the fixed sum S = 32512 = 127 · 256. The right
//   column has w1 = rne(fx S), product in R, the left one w0 = S - w1; with v = min(rne(fy 2^15), 2^15 - 1) the lower
//   row has (w v + 2^14) >> 15 of each, the upper one the rest. No weight is negative, and they are off by less than
//   0.016 levels; acc <= 255 S < 2^23 is exact in int32 and in float32. S splits into two bytes, 127 · 256, which is
//   what the int8 dot products take, and 1/S rounds so that rne(acc · f32(1/S)) is the exact quotient rounded half to
//   even for every acc (tested exhaustively). bicubic on uint8 (Keys, a = -0.75): horizontally rne(w S) with the tap at
//   floor(x) taking the rest, exact in int32 (|acc| < 1.4 · 255 S < 2^24), then vertically fma over the rows in
//   ascending order with weights in R. Floating images: bilinear fma(fx, p01 - p00, p00) per row, then the same in y;
//   bicubic fma over the columns, then over the rows, both ascending.
// antialias: k = max(1, floor(hypot(row of the linear part) + 1e-6)) per source axis, of a homography its Jacobian at
//   the output's centre; the source is averaged over boxes of ky x kx pixels, the last ones over what they cover,
//   rounded to its own dtype (uint8: half up, of the exact mean; floating: summed in float64), and x' becomes
//   (x' - (k - 1)/2) / k. The table comes before it.
// Epilogue: colour matrix on units of [0, 1] (levels / 255; floating images as they are), clamp to [0, 1], NaN stays;
//   value · scale + offset for floating output, levels for uint8 (value · 255 unless the images are uint8 and there is
//   no matrix), half to even, saturated, NaN is 0. Processors multiply all of it into matrix and bounds, in float64.
#pragma once

#include "../dtype.h"

namespace imgopt {

enum class Interpolation : int32_t { nearest, bilinear, bicubic };
enum class Padding : int32_t { constant, edge, reflect, symmetric };

struct AffineWarp {
    int64_t batch, channels, height, width, output_height, output_width;  // sides below 2^30, height and width > 0
    const void* images;
    int64_t images_stride[4];  // N, C, H, W
    void* output;
    int64_t output_stride[4];
    const double* matrix;              // 9 per image, row by row
    int64_t matrix_stride;             // 9, or 0: one for all
    const double* fill;                // [channels], in the units of the images; integers for uint8
    const uint8_t* table;              // [channels][256] per image, or null; uint8 images only
    int64_t table_stride;              // 256 channels, or 0
    const double* color_matrix;        // [3][4] per image, or null; three channels only
    int64_t color_stride;              // 12, or 0
    const double* scale;               // [channels] 1 / std, or 1
    const double* offset;              // [channels] -mean / std, or -0.0, which keeps the sign of a zero
    DType images_dtype, output_dtype;  // u8, f16, bf16, f32, f64
    Interpolation interpolation;
    Padding padding;
    bool antialias;
};

// Gradients of affine_warp, floating images and output. `warp.output` is not used; warp.output_dtype and
// warp.output_stride are those of `grad`. The gradient at a coordinate on a pixel is the one from the right; a clamped
// colour passes none, nor does a coordinate that is not finite, clamped or where nearest was asked for.
struct AffineWarpBackward {
    AffineWarp warp;
    const void* grad;
    void* grad_images;  // in the images' dtype
    int64_t grad_images_stride[4];
    double* grad_matrix;  // [batch][output_height][9]: each output row's share, to be added up in order
};

struct AffineWarpGradients {
    void (*images)(const AffineWarpBackward& p, int64_t begin, int64_t end);  // unit: a row of the images
    void (*matrix)(const AffineWarpBackward& p, int64_t begin, int64_t end);  // unit: a row of the output
};

}  // namespace imgopt

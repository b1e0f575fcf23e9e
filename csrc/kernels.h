// The contract between the bindings and the kernels: one struct of parameters per operation, and the table of
// functions that the dispatcher fills for the chosen instruction set. No torch, no Python, no C++ library: every
// ISA unit includes this file, and an inline library function compiled with AVX flags could be the copy that the
// linker keeps for everyone.
//
// Rules for every kernel
//   * A kernel does the units of work [begin, end); what a unit is stands beside the function pointer. Units are
//     independent, so any split over threads gives the same bits.
//   * A kernel never allocates, throws, or takes a lock; working memory comes from thread_scratch().
//   * Inputs and outputs do not alias unless the struct says so. Strides count elements.
//   * Every file is compiled with -ffp-contract=off: a fused multiply-add happens only where it is written.
#pragma once

#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32)
#define IMGOPT_API __declspec(dllexport)
#else
#define IMGOPT_API __attribute__((visibility("default")))
#endif

// For the arithmetic that CPU and CUDA kernels share.
#if defined(__CUDACC__)
#define IMGOPT_HD __host__ __device__
#else
#define IMGOPT_HD
#endif

namespace imgopt {

enum class DType : int32_t { u8, i8, i32, f16, bf16, f32, f64 };

// --- probe: what one core can do, the denominators of every "% of the floor" -----------------------------------------
// The arithmetic loops return how many multiply-adds they did, as counted by their own accumulators: every product
// is 1. All operands come from memory, so that no compiler knows them.
struct Probe {
    struct Operands {
        alignas(64) float zeros_f32[256] = {};
        alignas(64) float ones_f32[16];
        alignas(64) int16_t ones_s16[256];
        alignas(64) uint8_t ones_u8[64];
        alignas(64) int8_t ones_s8[64];

        Operands() {
            for (float& x : ones_f32) x = 1;
            for (int16_t& x : ones_s16) x = 1;
            for (uint8_t& x : ones_u8) x = 1;
            for (int8_t& x : ones_s8) x = 1;
        }
    };
    int64_t (*fma)(int64_t rounds, const Operands& operands);       // rounds <= 2^24: float32 counts exactly
    int64_t (*int8_dot)(int64_t rounds, const Operands& operands);  // exact sums in int32, the best instruction
    uint64_t (*read)(const void* source, int64_t bytes);            // sum of its 64-bit words; bytes % 512 == 0
    void (*copy)(const void* source, void* target, int64_t bytes);  // bytes % 512 == 0
};

// --- affine_warp ---------------------------------------------------------------------------------------------------
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
// column
//   has w1 = rne(fx S), product in R, the left one w0 = S - w1; with v = min(rne(fy 2^15), 2^15 - 1) the lower row has
//   (w v + 2^14) >> 15 of each, the upper one the rest. No weight is negative, and they are off by less than 0.016
//   levels; acc <= 255 S < 2^23 is exact in int32 and in float32. S splits into two bytes, 127 · 256, which is what the
//   int8 dot products take, and 1/S rounds so that rne(acc · f32(1/S)) is the exact quotient rounded half to
//   even for every acc (tested exhaustively). bicubic on uint8 (Keys, a = -0.75): horizontally rne(w S) with the tap
//   at floor(x) taking the rest, exact in int32 (|acc| < 1.4 · 255 S < 2^24), then vertically fma over the rows in
//   ascending order with weights in R. Floating images: bilinear fma(fx, p01 - p00, p00) per row, then the same in y;
//   bicubic fma over the columns, then over the rows, both ascending.
// antialias: k = max(1, floor(hypot(row of the linear part) + 1e-6)) per source axis, of a homography its Jacobian at
// the
//   output's centre; the source is averaged over boxes of ky x kx pixels, the last ones over what they cover, rounded
//   to its own dtype (uint8: half up, of the exact mean; floating: summed in float64), and x' becomes
//   (x' - (k - 1)/2) / k. The table comes before it.
// Epilogue: colour matrix on units of [0, 1] (levels / 255; floating images as they are), then clamp to [0, 1], NaN
//   stays; then value · scale + offset, in units of [0, 1], for floating output. uint8 output is levels (value · 255
//   unless the images are uint8 and there is no colour matrix), half to even, saturated, NaN is 0.
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

// --- int8_conv2d and int8_graph ------------------------------------------------------------------------------------
//
// Activations are bytes in (n, h, w, c) order; a pixel may be a slice of a wider one (the strides count bytes between
// pixels). int8 bytes are read and written with their top bit flipped (flip = 0x80, otherwise 0), which turns them into
// uint8 with a zero point 128 higher: one kernel serves both. Every zero point below is that of the flipped byte. With
// u = byte ^ flip, and u = zero_point at padded taps,
//
//   offset[o] = bias[o] - zero_point * sum_k(w[o, k]),   S[o] = offset[o] + sum_k(w[o, k] * u[k])   modulo 2^32.
//
// Overflow bound. S is exact when its true value fits int32, however its parts wrap: two's complement sums are exact
// modulo 2^32. With d = u - zero_point in [-zero_point, 255 - zero_point], and W+ and W- the sums of the magnitudes of
// a channel's positive and negative weights,
//   bias - W+ * zero_point - W- * (255 - zero_point) <= S <= bias + W+ * (255 - zero_point) + W- * zero_point,
// which is checked for every channel when a weight is packed. Worst case without bias: 255 * 128 * K < 2^31, K <=
// 65,793.
//
// Requantization, in float32 without contraction:
//   y = float(S) * multiplier[o]; with a residual y = y + float(r - residual_zero_point) * residual_multiplier;
//   y = min(max(y, low), high); float output is y, a byte (round_half_even(y) + output_zero_point) ^ output_flip.
// For bytes low and high lie within [-output_zero_point, 255 - output_zero_point], so a kernel may as well round first,
// saturate, and clamp the integers: rounding is monotonic. y is finite: |multiplier| <= 2^96 and |S| <= 2^31.
// With shifts (all scales powers of two): t = (S << sum_left) + ((r - residual_zero_point) << residual_left) in int64,
// |t| < 2^61; q = (t + (1 << (right - 1))) >> right for right > 0, otherwise saturate(t) << -right; q is clamped to
// [round(low), round(high)].

// The slack behind every per-channel array: a vector kernel reads whole groups of channels.
constexpr int64_t kChannelSlack = 64;

struct Int8Shift {
    int8_t right;          // in [-31, 62]
    int8_t sum_left;       // in [0, 29]
    int8_t residual_left;  // in [0, 51]
    int8_t unused;
};

// The geometry of a weight; its canonical order is (out_channels, group_channels, kernel_h, kernel_w) int8.
struct Int8Weight {
    int64_t out_channels;    // a multiple of groups
    int64_t group_channels;  // input channels of one group
    int64_t groups;
    int64_t kernel_h, kernel_w;
};

struct Int8Conv2d {
    Int8Weight weight;
    const uint8_t* packed;  // 64-byte aligned, what int8_weight_pack of the same table wrote

    const uint8_t* input;  // (batch, in_h, in_w, groups * group_channels)
    int64_t batch, in_h, in_w, input_stride;
    int64_t stride_h, stride_w, dilation_h, dilation_w, pad_top, pad_left;
    uint8_t input_flip, input_zero_point;

    const int32_t* offset;    // per output channel, kChannelSlack more entries are readable
    const float* multiplier;  // the same; unused where shift is given
    const Int8Shift* shift;   // or nullptr

    // (batch, out_h, out_w, out_channels) or nullptr. It may be the output, value for value, on a processor: the
    // kernels read each value before they write it.
    const uint8_t* residual;
    int64_t residual_stride;
    float residual_multiplier;
    uint8_t residual_flip, residual_zero_point;

    void* output;                         // (batch, out_h, out_w, out_channels): bytes, or float32 where float_output
    int64_t out_h, out_w, output_stride;  // the stride counts elements
    float low, high;
    uint8_t output_flip, output_zero_point;
    bool float_output;
};

// Steps of a graph beside convolution. `bytes` order and the meaning of flip, zero point, low, high as above.
struct Int8Format {
    uint8_t flip, zero_point;
    float low, high;
};

// byte = quantize(x * inverse_scale), NaN -> low. A unit is one pixel row.
struct Int8Quantize {
    const float* input;  // stride_c, stride_h, stride_w, stride_n elements apart: NCHW or channels_last
    int64_t batch, channels, height, width;
    int64_t stride_n, stride_c, stride_h, stride_w;
    float inverse_scale;
    Int8Format format;
    uint8_t* output;  // (batch, height, width, channels)
    int64_t output_stride;
};

// y = float(a - za) * multiplier_a + float(b - zb) * multiplier_b; b may be nullptr (rescale, for concat). A unit is
// one pixel. Without `shifted` the shift is unused.
struct Int8Add {
    const uint8_t *a, *b;
    int64_t channels, a_stride, b_stride;
    uint8_t a_flip, b_flip, a_zero_point, b_zero_point;
    float a_multiplier, b_multiplier;
    bool shifted;
    int32_t a_left, b_left, right;
    Int8Format format;
    uint8_t* output;
    int64_t output_stride;
};

// Maximum, or mean = sum(u - zero_point) * float(ratio / count), over windows. A unit is one output row. With
// `shifted` the mean is (2 * (sum << max(-right, 0)) + d) / (2 * d) rounded down, d = count << max(right, 0).
struct Int8Pool {
    const uint8_t* input;
    int64_t batch, in_h, in_w, channels, input_stride;
    int64_t kernel_h, kernel_w, stride_h, stride_w, pad_top, pad_left;
    uint8_t input_flip, input_zero_point;
    bool average, count_padding, shifted;
    double ratio;
    int32_t right;
    Int8Format format;
    uint8_t* output;
    int64_t out_h, out_w, output_stride;
};

// float(u - zero_point) * scale. A unit is one pixel.
struct Int8Dequantize {
    const uint8_t* input;
    int64_t channels, input_stride;
    uint8_t flip, zero_point;
    float scale;
    float* output;
    int64_t output_stride;
};

// --- masked_matmul -------------------------------------------------------------------------------------------------
// output[n, o] = bias[o] + sum of x[n, k] · weight[o, k] over the entries (o, k) of a mask.
// The mask comes as "row quads", which ops/masked_matmul/layout.py describes: per block of columns and quad of rows,
// the rows, the first step, the first column, and the number of steps of each kind; a step multiplies four values, one
// per row, with 1, 2 or 4 columns. Sums run over the blocks in order, and within one over its steps, in float32
// (float64 for float64); so they are equal for any number of threads, not across instruction sets, which add the
// fused way or not.
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

// --- masked_sgd ----------------------------------------------------------------------------------------------------
// One step of stochastic gradient descent over the kept entries of a weight, in memory order, float32, every
// operation rounded by itself:
//   g = grad + decay * weight;  v = first ? g : factor * v + gain * g  (v = g without velocity);
//   weight = weight - rate * (nesterov ? g + factor * v : v).
// Entries off the mask are neither read nor written. The velocity holds the kept entries only, one after the other. The
// new weight of kept entry i goes to values[s][places[s][i]] too, which saves the next product of masked_matmul the
// gathering: one for the forward product (s = 0), one for the input gradient (s = 1).
struct MaskedSgd {
    static constexpr int64_t kBlock = 4096;  // a unit of work: 16 KiB of weights
    const uint64_t* bits;                    // bit i of word j: entry 64 j + i is kept; zero past the end
    const int64_t* offsets;                  // per block, how many entries are kept before it
    float* weight;
    float* velocity;  // or null
    const float* grad;
    int64_t entries;
    float rate, factor, gain, decay;
    bool first, nesterov;
    float* values[2] = {};  // each or null
    const int32_t* places[2] = {};
};

// --- photometric ---------------------------------------------------------------------------------------------------
// Hue and sharpness work on values as they are, levels of uint8 or units of [0, 1], in float32; uint8 rounds half to
// even. Output has the input's layout. csrc/photometric/arithmetic.h is this text as code. Hue (HSV, hexcone): with v
// the largest channel, c = v - the smallest, and h in sixths of a turn the place of the colour on the circle
// ((g - b) / c where red is largest, else 2 + (b - r) / c where green is, else 4 + (r - g) / c), red, green and blue
// become v - c clamp(min(k, 4 - k), 0, 1) with k = (h + turn + 5, 3, 1) mod 6.
constexpr int64_t kPixelRun = 1 << 13;

struct Hue {
    DType dtype;  // u8 or f32
    const void* images;
    void* output;
    const float* turn;  // per image, in sixths of a turn, 0 <= turn <= 6
    int64_t pixels;     // per image
    bool interleaved;   // channels_last
};

// Sharpness: x + weight (sum over 3 x 3 - 9 x), clamped to the range of the dtype; the outermost pixels stay. The sum
// is exact for uint8. A channels_last image is one plane whose rows hold width · channels elements, a pixel every
// `step`.
struct Sharpness {
    DType dtype;  // u8 or f32
    const void* images;
    void* output;
    const float* weight;  // per image, (1 - factor) / 13
    int64_t planes;       // per image
    int64_t height;
    int64_t row;
    int64_t step;
};

// Lookup: each level of dense uint8 images replaced by that of its channel's table.
struct Lookup {
    const uint8_t* images;
    uint8_t* output;
    const uint8_t* table;      // [channels][256] for each image
    int64_t table_stride;      // 0: the same for all images
    int64_t channels, pixels;  // per image
    bool interleaved;          // channels_last
};

// Sums of the levels of each channel, and how often each level occurs, of dense uint8 images.
struct Levels {
    const uint8_t* images;
    int64_t channels, pixels;  // per image
    bool interleaved;          // channels_last
    int64_t* result;           // [batch][channels] sums, or [batch][channels][256] counts
};

struct KernelTable {
    // Units: output rows, batch · output_height of them.
    void (*affine_warp)(const AffineWarp&, int64_t begin, int64_t end);
    AffineWarpGradients affine_warp_backward;
    // int8_conv2d. The layout names the packed order: bytes of another layout are not readable by this table.
    const char* int8_weight_layout;
    int64_t (*int8_weight_bytes)(const Int8Weight&);
    void (*int8_weight_pack)(const Int8Weight&, const int8_t* weight, uint8_t* packed);
    int64_t (*int8_conv2d_units)(const Int8Conv2d&);
    void (*int8_conv2d)(const Int8Conv2d&, int64_t begin, int64_t end);
    void (*int8_quantize)(const Int8Quantize&, int64_t begin, int64_t end);
    void (*int8_add)(const Int8Add&, int64_t begin, int64_t end);
    void (*int8_pool)(const Int8Pool&, int64_t begin, int64_t end);
    void (*int8_dequantize)(const Int8Dequantize&, int64_t begin, int64_t end);
    Masked masked;
    void (*masked_sgd)(const MaskedSgd&, int64_t begin, int64_t end);  // unit: a block
    // Units: kPixelRun pixels of an image, the last of them fewer; the same; rows, batch · planes · height of them.
    void (*adjust_hue)(const Hue&, int64_t begin, int64_t end);
    void (*lookup)(const Lookup&, int64_t begin, int64_t end);
    void (*adjust_sharpness)(const Sharpness&, int64_t begin, int64_t end);
    // Units: images; channels of images.
    void (*channel_sums)(const Levels&, int64_t begin, int64_t end);
    void (*level_histogram)(const Levels&, int64_t begin, int64_t end);
    Probe probe;
};

// The table of the active instruction set. Throws std::invalid_argument when IMGOPT_ISA names one that does not
// exist or that this processor lacks.
IMGOPT_API const KernelTable& kernels();

// Names in ascending order of preference, nullptr at the end; the last one is the default.
IMGOPT_API const char* const* supported_isas();
IMGOPT_API const char* active_isa();
IMGOPT_API void set_isa(const char* name);  // throws std::invalid_argument like kernels()

// 64-byte aligned memory that belongs to the calling thread and is reused by its next call: at most one live
// block per thread. It grows to the largest request and stays, so that a steady state allocates nothing.
IMGOPT_API void* thread_scratch(int64_t bytes);

// Each ISA unit exports one function, at its foot, which overwrites the entries that it serves better than the
// units before it. dispatch.cpp calls them in ascending order.
namespace scalar {
void affine_warp(KernelTable& table);
void int8_conv2d(KernelTable& table);
void masked_matmul(KernelTable& table);
void masked_sgd(KernelTable& table);
void photometric(KernelTable& table);
void probe(KernelTable& table);
}  // namespace scalar
namespace avx2 {
void affine_warp(KernelTable& table);
void int8_conv2d(KernelTable& table);
void masked_matmul(KernelTable& table);
void masked_sgd(KernelTable& table);
void photometric(KernelTable& table);
void probe(KernelTable& table);
}  // namespace avx2
namespace avxvnni {
void int8_conv2d(KernelTable& table);
void probe(KernelTable& table);
}  // namespace avxvnni
namespace avx512 {
void affine_warp(KernelTable& table);
void int8_conv2d(KernelTable& table);
void masked_matmul(KernelTable& table);
void masked_sgd(KernelTable& table);
void photometric(KernelTable& table);
void probe(KernelTable& table);
}  // namespace avx512
namespace neon {
void affine_warp(KernelTable& table);
void int8_conv2d(KernelTable& table);
void masked_matmul(KernelTable& table);
void masked_sgd(KernelTable& table);
void photometric(KernelTable& table);
void probe(KernelTable& table);
}  // namespace neon

}  // namespace imgopt

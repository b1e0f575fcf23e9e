// The contract of the steps of a graph beside convolution. The order of bytes and the meaning of flip, zero point, low
// and high are those of int8_conv2d.
#pragma once

#include "../dtype.h"

namespace imgopt {

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

}  // namespace imgopt

// The contract of int8_conv2d.
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
#pragma once

#include "../dtype.h"

namespace imgopt {

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

}  // namespace imgopt

// The arithmetic that defines int8_conv2d beyond the sum: rounding, requantization, and what one output byte is. Shared
// by every unit, for the scalar kernel as a whole and for the vector kernels' rare cases; contract.h states the
// contract.
#pragma once

#include "../kernels.h"

namespace imgopt {
namespace {

// Half to even. Adding 1.5 * 2^23 leaves no bits for a fraction, exact for |y| < 2^22; y has been clamped to a byte's
// range before. No call, so that compilers vectorise it with any flags.
IMGOPT_HD inline float round_half_even(float y) {
    const float shift = 12582912.0f;
    return (y + shift) - shift;
}

// NaN becomes low.
IMGOPT_HD inline float clamp(float y, float low, float high) {
    y = y > low ? y : low;
    return y < high ? y : high;
}

IMGOPT_HD inline uint8_t to_byte(float y, const Int8Format& f) {
    const int32_t q = static_cast<int32_t>(round_half_even(clamp(y, f.low, f.high)));
    return static_cast<uint8_t>((q + f.zero_point) ^ f.flip);
}

// t * 2^-right, half up; |t| < 2^61.
IMGOPT_HD inline int64_t shift_right(int64_t t, int right) {
    if (right > 0) return (t + (int64_t{1} << (right - 1))) >> right;
    const int64_t limit = int64_t{1} << 31;  // more would saturate as well
    t = t < -limit ? -limit : t > limit ? limit : t;
    return t * (int64_t{1} << -right);
}

IMGOPT_HD inline uint8_t saturate(int64_t q, const Int8Format& f) {
    const int64_t low = static_cast<int64_t>(round_half_even(f.low));
    const int64_t high = static_cast<int64_t>(round_half_even(f.high));
    q = q < low ? low : q > high ? high : q;
    return static_cast<uint8_t>((q + f.zero_point) ^ f.flip);
}

IMGOPT_HD inline int32_t residual_difference(const Int8Conv2d& p, int64_t pixel, int64_t channel) {
    return (p.residual[pixel * p.residual_stride + channel] ^ p.residual_flip) - p.residual_zero_point;
}

// Requantizes and stores one sum.
IMGOPT_HD inline void store_sum(const Int8Conv2d& p, int64_t pixel, int64_t channel, int32_t sum) {
    const Int8Format format = {p.output_flip, p.output_zero_point, p.low, p.high};
    const int64_t at = pixel * p.output_stride + channel;
    if (p.shift && !p.float_output) {
        const Int8Shift s = p.shift[channel];
        int64_t t = int64_t{sum} * (int64_t{1} << s.sum_left);
        if (p.residual) t += int64_t{residual_difference(p, pixel, channel)} * (int64_t{1} << s.residual_left);
        static_cast<uint8_t*>(p.output)[at] = saturate(shift_right(t, s.right), format);
        return;
    }
    float y = static_cast<float>(sum) * p.multiplier[channel];
    if (p.residual) {
        const float r = static_cast<float>(residual_difference(p, pixel, channel)) * p.residual_multiplier;
        y = y + r;
    }
    if (p.float_output)
        static_cast<float*>(p.output)[at] = clamp(y, p.low, p.high);
    else
        static_cast<uint8_t*>(p.output)[at] = to_byte(y, format);
}

}  // namespace
}  // namespace imgopt

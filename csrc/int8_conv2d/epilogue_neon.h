// What becomes of sums on NEON: up to 16 channels of a pixel, by scales or by shifts (the rules of contract.h). Nothing
// is rare here: conversions saturate, and so does the rounding shift, whose count may have either sign.
#pragma once

#include <arm_neon.h>

#include "igemm.h"

namespace imgopt::neon {
namespace {

// Bytes of up to 16 channels.
inline uint8x16_t load_bytes(const uint8_t* from, int64_t channels) {
    if (channels == 16) return vld1q_u8(from);
    uint8_t bytes[16] = {};
    copy_bytes(bytes, from, channels);
    return vld1q_u8(bytes);
}
inline void store_bytes(uint8_t* to, uint8x16_t v, int64_t channels) {
    if (channels == 16) return vst1q_u8(to, v);
    uint8_t bytes[16];
    vst1q_u8(bytes, v);
    copy_bytes(to, bytes, channels);
}

// The residual less its zero point, four channels in each vector.
inline void load_residual(const Int8Conv2d& p, int64_t pixel, int64_t channel, int64_t channels, int32x4_t* to) {
    const uint8_t* from = p.residual + pixel * p.residual_stride + channel;
    const uint8x16_t bytes = veorq_u8(load_bytes(from, channels), vdupq_n_u8(p.residual_flip));
    const uint8x16_t zero = vdupq_n_u8(p.residual_zero_point);
    const int16x8_t low = vreinterpretq_s16_u16(vsubl_u8(vget_low_u8(bytes), vget_low_u8(zero)));
    const int16x8_t high = vreinterpretq_s16_u16(vsubl_high_u8(bytes, zero));
    to[0] = vmovl_s16(vget_low_s16(low));
    to[1] = vmovl_high_s16(low);
    to[2] = vmovl_s16(vget_low_s16(high));
    to[3] = vmovl_high_s16(high);
}

inline float32x4_t scaled(const Int8Conv2d& p, int64_t channel, int32x4_t sum, const int32x4_t* residual) {
    const float32x4_t y = vmulq_f32(vcvtq_f32_s32(sum), vld1q_f32(p.multiplier + channel));
    return residual ? vaddq_f32(y, vmulq_n_f32(vcvtq_f32_s32(*residual), p.residual_multiplier)) : y;
}

// Four channels by their shifts, saturated to int32.
inline int32x4_t shifted(const Int8Conv2d& p, int64_t channel, int32x4_t sum, const int32x4_t* residual) {
    int32x4_t fields;
    memcpy(&fields, p.shift + channel, sizeof fields);  // right, sum_left, residual_left
    const auto field = [&](int32_t bit) { return vshrq_n_s32(vshlq_s32(fields, vdupq_n_s32(24 - bit)), 24); };
    const int32x4_t right = vnegq_s32(field(0)), sum_left = field(8), residual_left = field(16);
    const auto half = [&](int32x2_t s, int32x2_t left, int32x2_t r, int32x2_t r_left, int32x2_t count) {
        int64x2_t t = vshlq_s64(vmovl_s32(s), vmovl_s32(left));
        if (residual) t = vaddq_s64(t, vshlq_s64(vmovl_s32(r), vmovl_s32(r_left)));
        return vqmovn_s64(vqrshlq_s64(t, vmovl_s32(count)));
    };
    const int32x4_t r = residual ? *residual : sum;
    return vcombine_s32(half(vget_low_s32(sum), vget_low_s32(sum_left), vget_low_s32(r), vget_low_s32(residual_left),
                             vget_low_s32(right)),
                        half(vget_high_s32(sum), vget_high_s32(sum_left), vget_high_s32(r),
                             vget_high_s32(residual_left), vget_high_s32(right)));
}

inline void store_floats(const Tile& t, int64_t pixel, int j, float32x4_t y) {
    const Int8Conv2d& p = *t.conv;
    const float32x4_t low = vdupq_n_f32(p.low), high = vdupq_n_f32(p.high);
    y = vbslq_f32(vcgtq_f32(y, low), y, low);
    y = vbslq_f32(vcltq_f32(y, high), y, high);
    float* to = static_cast<float*>(p.output) + pixel * p.output_stride + t.channel + 4 * j;
    if (t.channels >= 4 * j + 4) return vst1q_f32(to, y);
    float values[4];
    vst1q_f32(values, y);
    for (int64_t c = 0; c < t.channels - 4 * j; ++c) to[c] = values[c];
}

// One row of sums of NV * 4 channels, of which t.channels exist.
template <int NV>
void store_row(const Tile& t, int64_t pixel, const int32x4_t* sums) {
    const Int8Conv2d& p = *t.conv;
    int32x4_t residual[4], levels[4] = {};
    if (p.residual) load_residual(p, pixel, t.channel, t.channels, residual);
    for (int j = 0; j < NV; ++j) {
        const int32x4_t* r = p.residual ? residual + j : nullptr;
        if (p.shift && !p.float_output) {
            levels[j] = shifted(p, t.channel + 4 * j, sums[j], r);
            continue;
        }
        const float32x4_t y = scaled(p, t.channel + 4 * j, sums[j], r);
        if (p.float_output)
            store_floats(t, pixel, j, y);
        else
            levels[j] = vcvtnq_s32_f32(y);
    }
    if (p.float_output) return;
    const int16x8_t zero = vdupq_n_s16(p.output_zero_point);
    const auto words = [&](int j) { return vqaddq_s16(vqmovn_high_s32(vqmovn_s32(levels[j]), levels[j + 1]), zero); };
    const uint8x16_t bytes = vqmovun_high_s16(vqmovun_s16(words(0)), words(2));
    const uint8x16_t cut = vminq_u8(vmaxq_u8(bytes, vdupq_n_u8(t.range.low)), vdupq_n_u8(t.range.high));
    uint8_t* to = static_cast<uint8_t*>(p.output) + pixel * p.output_stride + t.channel;
    store_bytes(to, veorq_u8(cut, vdupq_n_u8(p.output_flip)), t.channels);
}

}  // namespace
}  // namespace imgopt::neon

// Points, bicubic weights and colours of four pixels in NEON: arithmetic.h lane by lane.
#pragma once

#include <arm_neon.h>

#include "points.h"

namespace imgopt::neon {
namespace {

constexpr int kLanes = 4;

// --- coordinates ---------------------------------------------------------------------------------------------------

struct FourPoints {
    int32x4_t x, y;  // floors
    float32x4_t fx, fy;
    uint32x4_t finite;
};

IMGOPT_INLINE float32x4_t lanes_from(int lane) {
    const float32x4_t index = {0, 1, 2, 3};
    return vaddq_f32(vdupq_n_f32(static_cast<float>(lane)), index);
}

IMGOPT_INLINE FourPoints affine_points(const Base<float>& base, int lane) {
    const float far = static_cast<float>(kFarInBlock);
    const auto along = [&](float step, float start) {
        const float32x4_t v = vfmaq_n_f32(vdupq_n_f32(start), lanes_from(lane), step);
        return vminq_f32(vmaxq_f32(v, vdupq_n_f32(-far)), vdupq_n_f32(far));
    };
    const float32x4_t x = along(base.step_x, base.fx), y = along(base.step_y, base.fy);
    const float32x4_t wx = vrndmq_f32(x), wy = vrndmq_f32(y);
    return {vaddq_s32(vdupq_n_s32(base.x), vcvtq_s32_f32(wx)), vaddq_s32(vdupq_n_s32(base.y), vcvtq_s32_f32(wy)),
            vsubq_f32(x, wx), vsubq_f32(y, wy), vdupq_n_u32(~0u)};
}

struct TwoPoints {
    int32x2_t x, y;
    float32x2_t fx, fy;
    uint32x2_t finite;
};

IMGOPT_INLINE TwoPoints perspective_half(const double* m, int64_t x, int64_t y) {
    const float64x2_t index = {0, 1}, column = vaddq_f64(vdupq_n_f64(static_cast<double>(x)), index);
    const auto row = [&](int i) { return vaddq_f64(vmulq_n_f64(column, m[i]), vdupq_n_f64(m[i + 1] * y + m[i + 2])); };
    const float64x2_t r = vdivq_f64(vdupq_n_f64(1), row(6)), sx = vmulq_f64(row(0), r), sy = vmulq_f64(row(3), r);
    const uint64x2_t finite = vandq_u64(vceqzq_f64(vsubq_f64(sx, sx)), vceqzq_f64(vsubq_f64(sy, sy)));
    const auto cut = [](float64x2_t v) { return vminnmq_f64(vmaxnmq_f64(v, vdupq_n_f64(-kFar)), vdupq_n_f64(kFar)); };
    const float64x2_t cx = cut(sx), cy = cut(sy), wx = vrndmq_f64(cx), wy = vrndmq_f64(cy);
    return {vmovn_s64(vcvtq_s64_f64(wx)), vmovn_s64(vcvtq_s64_f64(wy)), vcvt_f32_f64(vsubq_f64(cx, wx)),
            vcvt_f32_f64(vsubq_f64(cy, wy)), vmovn_u64(finite)};
}

IMGOPT_INLINE FourPoints perspective_points(const double* m, int64_t x, int64_t y) {
    const TwoPoints a = perspective_half(m, x, y), b = perspective_half(m, x + 2, y);
    return {vcombine_s32(a.x, b.x), vcombine_s32(a.y, b.y), vcombine_f32(a.fx, b.fx), vcombine_f32(a.fy, b.fy),
            vcombine_u32(a.finite, b.finite)};
}

IMGOPT_INLINE void round_to_nearest(FourPoints& at) {
    const float32x4_t half = vdupq_n_f32(0.5f);
    at.x = vsubq_s32(at.x, vreinterpretq_s32_u32(vcgeq_f32(at.fx, half)));
    at.y = vsubq_s32(at.y, vreinterpretq_s32_u32(vcgeq_f32(at.fy, half)));
    at.fx = at.fy = vdupq_n_f32(0);
}

// fold() of arithmetic.h where a coordinate lies outside; most groups of four lie inside.
IMGOPT_INLINE void fold_axis(int32x4_t& i, float32x4_t& f, int32_t n, Padding padding) {
    const uint32x4_t outside = vcgeq_u32(vreinterpretq_u32_s32(i), vdupq_n_u32(static_cast<uint32_t>(n)));
    if (vmaxvq_u32(outside) == 0) return;
    int32_t index[kLanes];
    float fraction[kLanes];
    vst1q_s32(index, i);
    vst1q_f32(fraction, f);
    for (int lane = 0; lane < kLanes; ++lane) fold(index[lane], fraction[lane], n, padding);
    i = vld1q_s32(index);
    f = vld1q_f32(fraction);
}

// --- weights and colours -------------------------------------------------------------------------------------------

// bicubic_weights() of arithmetic.h.
IMGOPT_INLINE void bicubic_weights(float32x4_t f, float32x4_t* to) {
    constexpr float a = static_cast<float>(kKeys);
    const float32x4_t one = vdupq_n_f32(1), g = vsubq_f32(one, f);
    const auto near = [&](float32x4_t d) {
        const float32x4_t line =
            vfmaq_n_f32(vdupq_n_f32(static_cast<float>(-kKeys - 3)), d, static_cast<float>(kKeys + 2));
        return vfmaq_f32(one, line, vmulq_f32(d, d));
    };
    to[0] = vmulq_f32(vmulq_n_f32(f, a), vmulq_f32(g, g));
    to[1] = near(f);
    to[2] = near(g);
    to[3] = vmulq_f32(vmulq_n_f32(g, a), vmulq_f32(f, f));
}

IMGOPT_INLINE void apply_color(const ColorMap<float>& map, float32x4_t* v) {
    const float* m = map.matrix;
    const float32x4_t r = v[0], g = v[1], b = v[2];
    for (int i = 0; i < 3; ++i, m += 4) {
        float32x4_t t = vfmaq_n_f32(vdupq_n_f32(m[3]), r, m[0]);
        t = vfmaq_n_f32(vfmaq_n_f32(t, g, m[1]), b, m[2]);
        v[i] = vminq_f32(vmaxq_f32(t, vdupq_n_f32(map.low[i])), vdupq_n_f32(map.high[i]));
    }
}

}  // namespace
}  // namespace imgopt::neon

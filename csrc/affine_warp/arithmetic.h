// The arithmetic that defines affine_warp (contract.h has it in words), pixel by pixel: coordinates, borders,
// weights, conversions. The scalar kernel is built from it, the vector units take it for whatever they do not
// accelerate, and the CUDA kernel includes it: one text, hence one result.
#pragma once

#include "../element_types.h"

// For the steps of a vector loop: a call in it sends sixteen registers through memory.
#define IMGOPT_INLINE [[gnu::always_inline]] inline

namespace imgopt {
namespace {

constexpr int kBlock = 64;               // output columns that share one float64 base
constexpr int kWeightSum = 32512;        // 127 · 256: the most that splits into two signed bytes
constexpr double kFar = 1 << 30;         // clamp of coordinates and steps: two periods of reflection still fit in int32
constexpr double kFarInBlock = 1 << 24;  // clamp inside a block: exact in float32
constexpr double kBoxSlack = 1e-6;       // a rotation scaled by 2 has rows of length 2 only up to rounding
constexpr double kKeys = -0.75;          // a of Keys' kernel, as in torch and OpenCV

IMGOPT_HD inline float fused(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
IMGOPT_HD inline double fused(double a, double b, double c) { return __builtin_fma(a, b, c); }
IMGOPT_HD inline float floor_of(float v) { return __builtin_floorf(v); }
IMGOPT_HD inline double floor_of(double v) { return __builtin_floor(v); }

template <class V>
IMGOPT_HD inline V clamped(V v, V low, V high) {  // NaN stays
    v = v < low ? low : v;
    return v > high ? high : v;
}
IMGOPT_HD inline bool finite(double v) { return v - v == 0; }

// Nearest integer, ties to even, of |v| < 2^22: the sum's last bit is worth 1.
IMGOPT_HD inline float nearest_integer(float v) { return (v + 12582912.0f) - 12582912.0f; }
IMGOPT_HD inline double nearest_integer(double v) { return (v + 6755399441055744.0) - 6755399441055744.0; }

// Levels, half to even, saturated, NaN to 0.
template <class R>
IMGOPT_HD inline uint8_t level(R v) {
    v = v > 0 ? v : 0;  // NaN too
    v = v < 255 ? v : 255;
    return static_cast<uint8_t>(nearest_integer(v));
}

// --- coordinates ---------------------------------------------------------------------------------------------------

// One image's matrix, and the source as it is sampled: after the box filter, if there is one.
struct Map {
    double m[9];
    bool affine;
    int32_t box_x, box_y;  // 1 without antialias
};

IMGOPT_HD inline bool is_affine(const double* m) { return m[6] == 0 && m[7] == 0 && m[8] == 1; }

IMGOPT_HD inline int32_t box_side(double a, double b, int64_t side) {
    const double length = __builtin_sqrt(a * a + b * b) + kBoxSlack;
    if (!(length >= 2 && finite(length))) return 1;
    return static_cast<int32_t>(length < side ? length : side);
}

IMGOPT_HD inline Map map_of(const AffineWarp& p, int64_t image) {
    Map map;
    for (int i = 0; i < 9; ++i) map.m[i] = p.matrix[image * p.matrix_stride + i];
    double* m = map.m;
    map.affine = is_affine(m);
    map.box_x = map.box_y = 1;
    if (!p.antialias) return map;
    if (map.affine) {
        map.box_x = box_side(m[0], m[1], p.width);
        map.box_y = box_side(m[3], m[4], p.height);
    } else {
        const double x = (p.output_width - 1) * 0.5, y = (p.output_height - 1) * 0.5;
        const double w = m[6] * x + m[7] * y + m[8];
        const double sx = (m[0] * x + m[1] * y + m[2]) / w, sy = (m[3] * x + m[4] * y + m[5]) / w;
        map.box_x = box_side((m[0] - sx * m[6]) / w, (m[1] - sx * m[7]) / w, p.width);
        map.box_y = box_side((m[3] - sy * m[6]) / w, (m[4] - sy * m[7]) / w, p.height);
    }
    // x' = (x - (k - 1)/2) / k, as a matrix on the left; exact where k is 1.
    for (int i = 0; i < 3; ++i) {
        if (map.box_x > 1) m[i] = (m[i] - (map.box_x - 1) * 0.5 * m[6 + i]) / map.box_x;
        if (map.box_y > 1) m[3 + i] = (m[3 + i] - (map.box_y - 1) * 0.5 * m[6 + i]) / map.box_y;
    }
    return map;
}

template <class R>
struct Point {
    int32_t x, y;  // floor
    R fx, fy;      // fraction, 0 <= f <= 1
    bool finite;
};

// What the points of one block share.
template <class R>
struct Base {
    int32_t x, y;
    R fx, fy, step_x, step_y;
    bool finite;
};

template <class R>
IMGOPT_HD IMGOPT_INLINE Base<R> affine_base(const double* m, int64_t x0, int64_t y) {
    Base<R> base{};
    const double x = m[0] * x0 + (m[1] * y + m[2]), yy = m[3] * x0 + (m[4] * y + m[5]);
    base.finite = finite(x) && finite(yy);
    if (!base.finite) return base;
    const double cx = clamped(x, -kFar, kFar), cy = clamped(yy, -kFar, kFar);
    base.x = static_cast<int32_t>(floor_of(cx));
    base.y = static_cast<int32_t>(floor_of(cy));
    base.fx = static_cast<R>(cx - base.x);
    base.fy = static_cast<R>(cy - base.y);
    base.step_x = static_cast<R>(clamped(m[0], -kFar, kFar));
    base.step_y = static_cast<R>(clamped(m[3], -kFar, kFar));
    return base;
}

template <class R>
IMGOPT_HD inline Point<R> affine_point(const Base<R>& base, int lane) {
    const R far = static_cast<R>(kFarInBlock);
    const R x = clamped(fused(base.step_x, static_cast<R>(lane), base.fx), -far, far);
    const R y = clamped(fused(base.step_y, static_cast<R>(lane), base.fy), -far, far);
    const R wx = floor_of(x), wy = floor_of(y);
    return {base.x + static_cast<int32_t>(wx), base.y + static_cast<int32_t>(wy), x - wx, y - wy, base.finite};
}

template <class R>
IMGOPT_HD inline Point<R> perspective_point(const double* m, int64_t x, int64_t y) {
    const double r = 1.0 / (m[6] * x + (m[7] * y + m[8]));
    const double sx = (m[0] * x + (m[1] * y + m[2])) * r, sy = (m[3] * x + (m[4] * y + m[5])) * r;
    if (!(finite(sx) && finite(sy))) return {0, 0, 0, 0, false};
    const double cx = clamped(sx, -kFar, kFar), cy = clamped(sy, -kFar, kFar);
    const double wx = floor_of(cx), wy = floor_of(cy);
    return {static_cast<int32_t>(wx), static_cast<int32_t>(wy), static_cast<R>(cx - wx), static_cast<R>(cy - wy), true};
}

// --- borders -------------------------------------------------------------------------------------------------------

IMGOPT_HD inline int32_t modulo(int32_t i, int32_t period) {
    const int32_t r = i % period;
    return r < 0 ? r + period : r;
}

// Brings a coordinate of a mirrored axis into the image; returns -1 where its direction is reversed, else 1.
template <class R>
IMGOPT_HD inline int fold(int32_t& i, R& f, int32_t n, Padding padding) {
    if (padding < Padding::reflect || (i >= 0 && i < n) || n == 1) return 1;
    const int32_t period = padding == Padding::reflect ? 2 * n - 2 : 2 * n;
    i = modulo(i, period);
    if (i < n) return 1;
    i = (padding == Padding::reflect ? period : period - 1) - i;
    if (f > 0) {
        --i;
        f = 1 - f;
    }
    return -1;
}

// Index of the pixel that serves tap i, or -1: fill.
IMGOPT_HD inline int32_t tap_index(int32_t i, int32_t n, Padding padding) {
    if (i >= 0 && i < n) return i;
    if (padding == Padding::constant) return -1;
    if (padding == Padding::edge || n == 1) return i < 0 ? 0 : n - 1;
    const int32_t period = padding == Padding::reflect ? 2 * n - 2 : 2 * n;
    i = modulo(i, period);
    return i < n ? i : (padding == Padding::reflect ? period : period - 1) - i;
}

// --- weights -------------------------------------------------------------------------------------------------------

struct BilinearWeights {
    int32_t w00, w01, w10, w11;  // row, column
};

// The columns' weights first, then each of them shared between the rows by a multiplication in 15 bits: none is
// negative, the sum is exact whatever the rounding, and a vector unit works on words.
template <class R>
IMGOPT_HD inline BilinearWeights bilinear_weights(R fx, R fy) {
    const int32_t right = static_cast<int32_t>(nearest_integer(fx * static_cast<R>(kWeightSum)));
    const int32_t rounded = static_cast<int32_t>(nearest_integer(fy * static_cast<R>(32768)));
    const int32_t below = rounded < 32767 ? rounded : 32767, left = kWeightSum - right;
    const int32_t w11 = (right * below + 16384) >> 15, w10 = (left * below + 16384) >> 15;
    return {left - w10, right - w11, w10, w11};
}

template <class R>
IMGOPT_HD inline R keys_near(R d) {  // |distance| <= 1
    return fused(fused(static_cast<R>(kKeys + 2), d, static_cast<R>(-kKeys - 3)), d * d, static_cast<R>(1));
}

template <class R>
IMGOPT_HD inline void bicubic_weights(R f, R w[4]) {
    const R g = 1 - f;
    w[0] = (static_cast<R>(kKeys) * f) * (g * g);
    w[1] = keys_near(f);
    w[2] = keys_near(g);
    w[3] = (static_cast<R>(kKeys) * g) * (f * f);
}

template <class R>
IMGOPT_HD inline void bicubic_slopes(R f, R d[4]) {
    const R a = static_cast<R>(kKeys), g = 1 - f;
    d[0] = a * g * (g - 2 * f);
    d[1] = f * (3 * (a + 2) * f - 2 * (a + 3));
    d[2] = -g * (3 * (a + 2) * g - 2 * (a + 3));
    d[3] = a * f * (2 * g - f);
}

// Weights of an axis and their slopes, for the gradients.
template <int taps, class R>
IMGOPT_HD inline void axis_weights(R f, R (&w)[taps], R (&slope)[taps]) {
    if constexpr (taps == 1) {
        w[0] = 1;
        slope[0] = 0;
    } else if constexpr (taps == 2) {
        w[0] = 1 - f;
        w[1] = f;
        slope[0] = -1;
        slope[1] = 1;
    } else {
        bicubic_weights(f, w);
        bicubic_slopes(f, slope);
    }
}

template <class R>
IMGOPT_HD inline void bicubic_integer_weights(R f, int32_t w[4]) {
    R real[4];
    bicubic_weights(f, real);
    for (int i = 0; i < 4; ++i) w[i] = static_cast<int32_t>(nearest_integer(real[i] * static_cast<R>(kWeightSum)));
    w[1] = kWeightSum - w[0] - w[2] - w[3];
}

}  // namespace
}  // namespace imgopt

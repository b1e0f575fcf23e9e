// affine_warp on CUDA, uint8 images: the part of an image that a tile of the output samples, in shared memory, a word
// per pixel with a byte for each of up to four channels. Staging (cuda_stage.h) deals with layout, table and border
// once per source pixel; what is left for an output pixel are shared loads without a test, 45 instructions for three
// channels. A pixel's four taps read from global memory byte by byte, with their borders, were 208 instructions on an
// H100 and 170 microseconds for 256 images of 224^2.
//
// Rows of a tile are staged together if their map is affine and their taps span at most kRegionWords pixels: 32 at
// scale 1.3 and any angle, 8 at scale 2.5. Fourteen tiles then share a multiprocessor, which hides one's loads behind
// another's arithmetic.
#pragma once

#include "cuda_sample.h"

namespace imgopt {
namespace {

constexpr int kTileSide = 32;  // output columns of a tile
constexpr int kTileRows = 32;  // output rows of a tile: all in one region where they fit, else half of them, ...
constexpr int kLeastRows = 8;
constexpr int kRegionWords = 3600;    // pixels of a region, with the padding of its rows
constexpr int kTileBlocks = 14;       // of a multiprocessor, by kRegionWords and by registers
constexpr float kFarthest = 1 << 28;  // coordinates of a staged tile: their sums fit in int32
constexpr float kOnes = 12582912.0f;  // 1.5 · 2^23: one unit in the last place is 1

constexpr size_t kRegionBytes = size_t{kRegionWords} * 4;

constexpr int kTilePixels = 8;  // of a thread, neighbours in a row
constexpr int kTileThreads = 64;
constexpr int kRowsAtOnce = kTileThreads * kTilePixels / kTileSide;

// Pixels [x, x + 4 groups) × [y, y + rows) of the plane that the image's padding makes infinite.
struct Region {
    int32_t x, y, groups, rows;
    bool folds;  // coordinates have to be brought into a mirrored image

    // In words; odd, so that neighbours in any direction lie in different banks.
    __device__ int pitch() const { return 4 * groups + 1; }
};

// --- coordinates ---------------------------------------------------------------------------------------------------

// Where a row's block of columns starts in the source.
struct alignas(16) RowBase {
    int32_t x, y;  // floor
    float fx, fy;
};

// affine_base() for the rows of a tile that can be staged: nothing to clamp, and a sum rounded down is the floor.
__device__ inline RowBase row_base(const double* m, int64_t x0, int64_t y) {
    constexpr double ones = 6755399441055744.0;  // 1.5 · 2^52: one unit in the last place is 1
    const double x = m[0] * x0 + (m[1] * y + m[2]), yy = m[3] * x0 + (m[4] * y + m[5]);
    const double wx = sum_rounded_down(x, ones), wy = sum_rounded_down(yy, ones);
    return {low_word(wx), low_word(wy), static_cast<float>(x - (wx - ones)), static_cast<float>(yy - (wy - ones))};
}

// affine_base(), by that shorter way where coordinates and steps allow it.
template <class R>
__device__ inline Base<R> base_of(const double* m, int64_t x0, int64_t y) {
    if constexpr (sizeof(R) == 4) {
        constexpr double steepest = 1 << 15;  // offsets inside a block stay below 2^22
        const auto within = [](double v, double most) { return v > -most && v < most; };
        if (within(m[0] * x0 + (m[1] * y + m[2]), kFarthest) && within(m[3] * x0 + (m[4] * y + m[5]), kFarthest) &&
            within(m[0], steepest) && within(m[3], steepest)) {
            const RowBase near = row_base(m, x0, y);
            return {near.x, near.y, near.fx, near.fy, static_cast<float>(m[0]), static_cast<float>(m[3]), true};
        }
    }
    return affine_base<R>(m, x0, y);
}

template <Interpolation interpolation, class R>
__device__ inline void round_nearest(Point<R>& at) {
    if (interpolation != Interpolation::nearest) return;
    at.x += at.fx >= static_cast<R>(0.5);
    at.y += at.fy >= static_cast<R>(0.5);
    at.fx = at.fy = 0;
}

__device__ inline float size_of(float v) { return __builtin_fabsf(v); }

struct Span {
    int32_t first, last;
};

// Where fold() may take the coordinates of a span: -1 too, which is a fraction before the first pixel.
__device__ inline Span folded(const Span& s, int32_t n, Padding padding, bool& folds) {
    if (padding < Padding::reflect || n == 1 || (s.first >= 0 && s.last < n)) return s;
    folds = true;
    if (s.first <= -n || s.last - n >= n - 1) return {-1, n - 1};
    Span to{n - 1, -1};
    const auto cover = [&](int32_t first, int32_t last) {
        to.first = first < to.first ? first : to.first;
        to.last = last > to.last ? last : to.last;
    };
    if (s.first < n && s.last >= 0) cover(s.first, s.last);
    if (s.first < 0) cover((s.last < 0 ? -s.last : 1) - 2, -s.first);
    if (s.last >= n) cover(n - 3 - (s.last - n), n - 1 - (s.first < n ? 0 : s.first - n));
    return {to.first < -1 ? -1 : to.first, to.last < n ? to.last : n - 1};
}

// Whether `count` rows of the tile from (x0, y0) on can be staged, and what they need then. A map takes their corners
// to those of the pixels that they sample; every thread computes the same.
template <Interpolation interpolation>
__device__ inline bool plan_region(const double* m, int32_t x0, int32_t y0, int32_t count, int32_t height,
                                   int32_t width, Padding padding, Region& region) {
    constexpr int before = interpolation == Interpolation::bicubic ? 1 : 0;
    constexpr int after = interpolation == Interpolation::bicubic    ? 2
                          : interpolation == Interpolation::bilinear ? 1
                                                                     : 0;
    constexpr float rounding = interpolation == Interpolation::nearest ? 0.5f : 0;
    constexpr float half_x = (kTileSide - 1) * 0.5f;
    const float half_y = static_cast<float>(count - 1) * 0.5f;
    const double middle_x = x0 + static_cast<double>(half_x), middle_y = y0 + static_cast<double>(half_y);
    bool fits = true;
    Span spans[2];
#pragma unroll
    for (int axis = 0; axis < 2; ++axis, m += 3) {  // in float32, with more room than its rounding takes
        const float middle = static_cast<float>(m[0] * middle_x + (m[1] * middle_y + m[2]));
        const float right = size_of(static_cast<float>(m[0])), down = size_of(static_cast<float>(m[1]));
        const float slack = fused(size_of(middle), 0x1p-21f, 0x1p-7f);
        const float reach = fused(right, half_x, fused(down, half_y, slack));
        fits = fits && size_of(middle) < kFarthest && reach < static_cast<float>(kRegionWords / 8);
        spans[axis] = {static_cast<int32_t>(floor_of(middle - reach + rounding)),
                       static_cast<int32_t>(floor_of(middle + reach + rounding))};
    }
    if (!fits) return false;
    bool folds = false;
    const Span x = folded(spans[0], width, padding, folds), y = folded(spans[1], height, padding, folds);
    const int32_t left = (x.first - before) & ~3;
    region = {left, y.first - before, (x.last + after - left) / 4 + 1, y.last + after - (y.first - before) + 1, folds};
    return region.groups <= kTileThreads && region.rows * region.pitch() <= kRegionWords;
}

// --- samples -------------------------------------------------------------------------------------------------------

// bilinear_weights() two by two, the left column in the low half. No half of a difference borrows from the other.
struct PairedWeights {
    uint32_t above, below;
};
__device__ inline PairedWeights paired_weights(float fx, float fy) {
    const uint32_t ones = bits_of_float(kOnes);
    const uint32_t right = bits_of_float(fx * static_cast<float>(kWeightSum) + kOnes) - ones;
    const float rounded = fused(fy, 32768.0f, kOnes);
    const uint32_t twice = 2 * (bits_of_float(rounded < kOnes + 32767 ? rounded : kOnes + 32767) - ones);
    const uint32_t left = kWeightSum - right;
    const uint32_t below = bytes_of(left * twice + 32768, right * twice + 32768, 0x7632);  // >> 16 of both
    return {left + (right << 16) - below, below};
}

// An integer below 2^23 in the last bits of `sum`, whose others are those of 2^23.
constexpr int32_t kExponent = 0x4B000000;
__device__ inline float counted(int32_t sum) { return float_of_bits(static_cast<uint32_t>(sum)) - 8388608.0f; }

// Channels c and c + 1 of two neighbouring pixels, the pixels of a channel side by side.
template <int c>
__device__ inline uint32_t two_channels(uint32_t left, uint32_t right) {
    return bytes_of(left, right, c == 0 ? 0x5140 : 0x7362);
}

template <int C>
__device__ inline void bilinear_staged(const uint32_t* at, int pitch, float fx, float fy, float (&to)[C]) {
    const PairedWeights w = paired_weights(fx, fy);
    const uint32_t p00 = at[0], p01 = at[1], p10 = at[pitch], p11 = at[pitch + 1];
#pragma unroll
    for (int c = 0; c < C; c += 2) {
        const uint32_t a = c == 0 ? two_channels<0>(p00, p01) : two_channels<2>(p00, p01);
        const uint32_t b = c == 0 ? two_channels<0>(p10, p11) : two_channels<2>(p10, p11);
        to[c] = counted(dot2_low(w.below, b, dot2_low(w.above, a, kExponent)));
        if (c + 1 < C) to[c + 1] = counted(dot2_high(w.below, b, dot2_high(w.above, a, kExponent)));
    }
}

template <int C>
__device__ inline void bicubic_staged(const uint32_t* at, int pitch, float fx, float fy, float (&to)[C]) {
    int32_t w[4];
    float wy[4];
    bicubic_integer_weights(fx, w);
    bicubic_weights(fy, wy);
    const uint32_t first = bytes_of(static_cast<uint32_t>(w[0]), static_cast<uint32_t>(w[1]), 0x5410);
    const uint32_t last = bytes_of(static_cast<uint32_t>(w[2]), static_cast<uint32_t>(w[3]), 0x5410);
#pragma unroll
    for (int row = 0; row < 4; ++row, at += pitch) {
        const uint32_t p[4] = {at[0], at[1], at[2], at[3]};
#pragma unroll
        for (int c = 0; c < C; c += 2) {
            const uint32_t a = c == 0 ? two_channels<0>(p[0], p[1]) : two_channels<2>(p[0], p[1]);
            const uint32_t b = c == 0 ? two_channels<0>(p[2], p[3]) : two_channels<2>(p[2], p[3]);
            const auto add = [&](int32_t sum, int channel) {
                const float v = static_cast<float>(sum);
                to[channel] = row ? fused(wy[row], v, to[channel]) : wy[0] * v;
            };
            add(dot2_low(last, b, dot2_low(first, a, 0)), c);
            if (c + 1 < C) add(dot2_high(last, b, dot2_high(first, a, 0)), c + 1);
        }
    }
}

// The sample at a point whose pixel (floor) is `at`.
template <Interpolation interpolation, int C>
__device__ inline void sample_staged(const uint32_t* at, int pitch, float fx, float fy, float (&to)[C]) {
    if constexpr (interpolation == Interpolation::nearest) {
        const uint32_t pixel = at[0];
#pragma unroll
        for (int c = 0; c < C; ++c) to[c] = static_cast<float>(pixel >> (8 * c) & 255);
    } else if constexpr (interpolation == Interpolation::bilinear) {
        bilinear_staged<C>(at, pitch, fx, fy, to);
    } else {
        bicubic_staged<C>(at - pitch - 1, pitch, fx, fy, to);
    }
}

// A thread's pixels from the staged region, four at a time so that what they need stays in registers; `lane` counts
// from the base. Inside the image a point's whole part is never taken out of its float: the bits that the exponent
// leaves behind are part of the region's origin.
template <Interpolation interpolation, int C>
__device__ inline void sample_region(const Region& region, const RowBase& base, float step_x, float step_y, int lane,
                                     int32_t height, int32_t width, Padding padding, const uint32_t* staged,
                                     float (&values)[kTilePixels][C]) {
    const uint32_t exponent = bits_of_float(kOnes);
    const uint32_t x0 = static_cast<uint32_t>(base.x) - exponent, y0 = static_cast<uint32_t>(base.y) - exponent;
    const int pitch = region.pitch();
    const uint32_t wide = static_cast<uint32_t>(pitch);
    const uint32_t origin =
        kept((y0 - static_cast<uint32_t>(region.y)) * wide + (x0 - static_cast<uint32_t>(region.x)));
    const float first = static_cast<float>(lane);
#pragma unroll
    for (int from = 0; from < kTilePixels; from += 4) {
        float fx[4], fy[4];
        uint32_t x[4], y[4], place[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float along = first + static_cast<float>(from + i);
            const float at_x = fused(step_x, along, base.fx), at_y = fused(step_y, along, base.fy);
            const float whole_x = sum_rounded_down(at_x, kOnes), whole_y = sum_rounded_down(at_y, kOnes);
            fx[i] = at_x - (whole_x - kOnes);
            fy[i] = at_y - (whole_y - kOnes);
            x[i] = bits_of_float(whole_x);
            y[i] = bits_of_float(whole_y);
            if (interpolation == Interpolation::nearest) {
                x[i] += fx[i] >= 0.5f;
                y[i] += fy[i] >= 0.5f;
                fx[i] = fy[i] = 0;
            }
            place[i] = y[i] * wide + x[i] + origin;
        }
        if (region.folds)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                int32_t column = static_cast<int32_t>(x[i] + x0), row = static_cast<int32_t>(y[i] + y0);
                fold(column, fx[i], width, padding);
                fold(row, fy[i], height, padding);
                place[i] = static_cast<uint32_t>((row - region.y) * pitch + (column - region.x));
            }
#pragma unroll
        for (int i = 0; i < 4; ++i)
            sample_staged<interpolation>(staged + static_cast<int32_t>(place[i]), pitch, fx[i], fy[i],
                                         values[from + i]);
    }
}

}  // namespace
}  // namespace imgopt

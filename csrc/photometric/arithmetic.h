// The photometric passes as code. Branch-free loops over blocks of pixels: each ISA unit compiles this text with its
// own flags, and without contraction the compiler's vectors give the same bits as its scalars.
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "../kernels.h"

namespace imgopt {
namespace {

constexpr int kBlock = 256;                    // pixels: three planes of floats, 3 KiB, stay in the first-level cache
constexpr float kRoundingShift = 12582912.0f;  // 1.5 · 2^23: adding it leaves no bits for a fraction

IMGOPT_HD inline float smaller(float a, float b) { return a < b ? a : b; }
IMGOPT_HD inline float larger(float a, float b) { return a > b ? a : b; }

// Levels round half to even; `value` lies within [0, 255].
IMGOPT_HD inline void store(float value, uint8_t* to) {
    *to = static_cast<uint8_t>(static_cast<int32_t>(value + kRoundingShift - kRoundingShift));
}
IMGOPT_HD inline void store(float value, float* to) { *to = value; }

// How far a channel lies below the largest, in units of the chroma, `x` sixths of a turn past its own sector.
IMGOPT_HD inline float distance(float x) {
    const float k = x - 6.0f * static_cast<float>(static_cast<int32_t>(x * (1.0f / 6.0f)));
    return smaller(larger(smaller(k, 4.0f - k), 0.0f), 1.0f);
}

IMGOPT_HD inline void turn_pixel(float& red, float& green, float& blue, float turn) {
    const float r = red, g = green, b = blue;
    const float value = larger(larger(r, g), b);
    const float chroma = value - smaller(smaller(r, g), b);
    const float inverse = 1.0f / (chroma > 0.0f ? chroma : 1.0f);
    const float at_red = (g - b) * inverse;
    const float at_green = 2.0f + (b - r) * inverse;
    const float at_blue = 4.0f + (r - g) * inverse;
    const float other = value == g ? at_green : at_blue;
    const float hue = (value == r ? at_red : other) + turn;
    red = value - chroma * distance(hue + 5.0f);
    green = value - chroma * distance(hue + 3.0f);
    blue = value - chroma * distance(hue + 1.0f);
}

inline void turn_hue(float* red, float* green, float* blue, float turn) {
    for (int i = 0; i < kBlock; ++i) turn_pixel(red[i], green[i], blue[i], turn);
}

template <class T, int kStride>
inline void hue_block(const T* from, T* to, int64_t channel_stride, int count, float turn) {
    float planes[3][kBlock] = {};
    for (int c = 0; c < 3; ++c)
        for (int i = 0; i < count; ++i)
            planes[c][i] = static_cast<float>(from[c * channel_stride + static_cast<int64_t>(i) * kStride]);
    turn_hue(planes[0], planes[1], planes[2], turn);
    for (int c = 0; c < 3; ++c)
        for (int i = 0; i < count; ++i)
            store(planes[c][i], to + c * channel_stride + static_cast<int64_t>(i) * kStride);
}

template <class T>
inline void hue_rows(const Hue& p, int64_t begin, int64_t end) {
    const int64_t blocks = (p.pixels + kBlock - 1) / kBlock;
    for (int64_t unit = begin; unit < end; ++unit) {
        const int64_t image = unit, size = 3 * p.pixels;
        const T* from = static_cast<const T*>(p.images) + image * size;
        T* to = static_cast<T*>(p.output) + image * size;
        for (int64_t block = 0; block < blocks; ++block) {
            const int64_t first = block * kBlock;
            const int count = static_cast<int>(p.pixels - first < kBlock ? p.pixels - first : kBlock);
            if (p.interleaved)
                hue_block<T, 3>(from + 3 * first, to + 3 * first, 1, count, p.turn[image]);
            else
                hue_block<T, 1>(from + first, to + first, p.pixels, count, p.turn[image]);
        }
    }
}

// The sum over 3 × 3 pixels less nine times the middle one: 13 times what smoothing would change.
IMGOPT_HD inline int32_t excess(const uint8_t* up, const uint8_t* at, const uint8_t* down, int64_t step) {
    const int32_t sides = up[-step] + up[0] + up[step] + at[-step] + at[step] + down[-step] + down[0] + down[step];
    return sides - 8 * at[0];
}
IMGOPT_HD inline float excess(const float* up, const float* at, const float* down, int64_t step) {
    const float left = up[-step] + at[-step] + down[-step], right = up[step] + at[step] + down[step];
    return left + (up[0] + down[0]) + right - 8.0f * at[0];
}

template <class T>
inline void sharpen_row(const T* __restrict at, T* __restrict to, int64_t row, int64_t step, float weight, float most) {
    for (int64_t i = step; i < row - step; ++i) {
        const float change = weight * static_cast<float>(excess(at + i - row, at + i, at + i + row, step));
        store(smaller(larger(static_cast<float>(at[i]) + change, 0.0f), most), to + i);
    }
}

template <class T>
inline void sharpness_rows(const Sharpness& p, float most, int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) {
        const int64_t y = unit % p.height;
        const T* at = static_cast<const T*>(p.images) + unit * p.row;
        T* to = static_cast<T*>(p.output) + unit * p.row;
        const bool inside = y > 0 && y < p.height - 1 && p.row >= 3 * p.step;
        const int64_t kept = inside ? p.step : p.row;
        memcpy(to, at, static_cast<size_t>(kept) * sizeof(T));
        if (!inside) continue;
        sharpen_row(at, to, p.row, p.step, p.weight[unit / p.height / p.planes], most);
        memcpy(to + p.row - kept, at + p.row - kept, static_cast<size_t>(kept) * sizeof(T));
    }
}

inline void adjust_hue(const Hue& p, int64_t begin, int64_t end) {
    p.dtype == DType::u8 ? hue_rows<uint8_t>(p, begin, end) : hue_rows<float>(p, begin, end);
}

inline void adjust_sharpness(const Sharpness& p, int64_t begin, int64_t end) {
    p.dtype == DType::u8 ? sharpness_rows<uint8_t>(p, 255.0f, begin, end) : sharpness_rows<float>(p, 1.0f, begin, end);
}

}  // namespace
}  // namespace imgopt

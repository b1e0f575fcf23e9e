// The photometric passes as code, pixel by pixel: what every unit computes, and what the units without vectors of their
// own are compiled from. Branch-free, so that the compiler makes vectors of the loops; without contraction they give
// the same bits as its scalars.
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "../kernels.h"

namespace imgopt {
namespace {

// --- hue -----------------------------------------------------------------------------------------------------------

// On a colour circle of six sixths, a channel lies below the largest by clamp(2 - |place|, 0, 1) of the chroma, where
// place is how far the turned colour is from the channel's complement. Times the chroma, place is a difference of two
// channels plus the chroma times a number that only the turn and the channel's place behind the largest decide: no
// division, and no remainder either, because beyond 2 the clamp hides what a whole turn would change. For the largest
// channel, the next one (green behind red, blue behind green, red behind blue), and the last one:
struct Places {
    float largest, next, last;
};

IMGOPT_HD inline Places places(float turn) {  // 0 <= turn <= 6, in sixths; results lie in [-3, 3]
    return {turn - 3.0f, turn > 2.0f ? turn - 5.0f : turn + 1.0f, turn > 4.0f ? turn - 7.0f : turn - 1.0f};
}

IMGOPT_HD inline float smaller(float a, float b) { return a < b ? a : b; }
IMGOPT_HD inline float larger(float a, float b) { return a > b ? a : b; }

IMGOPT_HD inline void turn_pixel(float& red, float& green, float& blue, const Places& at) {
    const float r = red, g = green, b = blue;
    const float value = larger(larger(r, g), b), low = smaller(smaller(r, g), b);
    const float chroma = value - low, lowest = low - chroma;
    const bool is_red = value == r, is_green = value == g;
    const float difference = is_red ? g - b : is_green ? b - r : r - g;
    const float place_r = is_red ? at.largest : is_green ? at.last : at.next;
    const float place_g = is_red ? at.next : is_green ? at.largest : at.last;
    const float place_b = is_red ? at.last : is_green ? at.next : at.largest;
    red = smaller(value, larger(low, lowest + __builtin_fabsf(difference + chroma * place_r)));
    green = smaller(value, larger(low, lowest + __builtin_fabsf(difference + chroma * place_g)));
    blue = smaller(value, larger(low, lowest + __builtin_fabsf(difference + chroma * place_b)));
}

// --- rounding ------------------------------------------------------------------------------------------------------

constexpr float kRoundingShift = 12582912.0f;  // 1.5 · 2^23: adding it leaves no bits for a fraction

// Levels round half to even; `value` lies within [0, 255], and is then the last byte of the sum.
IMGOPT_HD inline void store(float value, uint8_t* to) {
    const float shifted = value + kRoundingShift;
    uint32_t bits;
    memcpy(&bits, &shifted, sizeof bits);
    *to = static_cast<uint8_t>(bits);
}
IMGOPT_HD inline void store(float value, float* to) { *to = value; }

// --- sharpness -----------------------------------------------------------------------------------------------------

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
IMGOPT_HD inline void sharpen(T at, float excess, float weight, float most, T* to) {
    store(smaller(larger(static_cast<float>(at) + weight * excess, 0.0f), most), to);
}

}  // namespace
}  // namespace imgopt

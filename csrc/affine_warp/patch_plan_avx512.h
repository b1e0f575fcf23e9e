// Which patch of the source each block of output pixels needs (patch_avx512.h), for eight blocks at a time: where it
// begins, and whether the block lies inside the image, at its border, or beyond it. In float64, from the blocks'
// corners.
#pragma once

#include <immintrin.h>

#include "arithmetic.h"
#include "prepare.h"

namespace imgopt::avx512 {
namespace {

constexpr int kSide = 8;                          // of a block of output pixels
constexpr int kPatchColumns = 15, kPartRows = 4;  // of a patch, of one of its registers
constexpr double kPatchSlack = 1.0 / 64;          // between a block's points and what its corners say in float64
constexpr double kNear = 1 << 22;                 // coordinates that no border has to bring nearer first
constexpr double kSure = 1e-9;  // of w relative to its terms: far from where rounding decides its sign
typedef double Doubles __attribute__((vector_size(64)));
typedef int64_t Longs __attribute__((vector_size(64)));

IMGOPT_INLINE Doubles least(Doubles a, Doubles b) { return a < b ? a : b; }
IMGOPT_INLINE Doubles most(Doubles a, Doubles b) { return a < b ? b : a; }
IMGOPT_INLINE Doubles magnitude(Doubles v) { return v < 0 ? -v : v; }
IMGOPT_INLINE Doubles floor_of(Doubles v) {
    return (Doubles)_mm512_roundscale_pd((__m512d)v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
}

constexpr int64_t kInside = 0, kBorder = 1, kAllFill = 2, kBeyond = 3;  // beyond: no patch holds it

// The eight blocks of kBlock columns: where each one's patch begins, and what the block reaches.
struct Patches {
    int32_t x[kSide], y[kSide];
    alignas(64) int64_t reach[kSide];
};

// Coordinates of the eight blocks' corners along both axes, the least and the greatest: the extremes over a block, as
// long as w does not vanish in between.
struct Extremes {
    Doubles low[2], high[2];
    Longs known;
};

IMGOPT_INLINE Extremes affine_extremes(const Map& map, Doubles column, double y) {
    Extremes to;
    for (int axis = 0; axis < 2; ++axis) {
        const double* m = map.m + 3 * axis;
        const double along = (kSide - 1) * m[0], down = (kSide - 1) * m[1];
        const Doubles v = m[0] * column + (m[1] * y + m[2]);
        to.low[axis] = v + ((along < 0 ? along : 0) + (down < 0 ? down : 0));
        to.high[axis] = v + ((along < 0 ? 0 : along) + (down < 0 ? 0 : down));
    }
    to.known = Longs{} - 1;
    return to;
}

inline Extremes perspective_extremes(const Map& map, Doubles column, double y0) {
    const double* m = map.m;
    const Doubles infinity = Doubles{} + __builtin_inf();
    Extremes to{{infinity, infinity}, {-infinity, -infinity}, Longs{} - 1};
    Doubles sign{};
    for (int corner = 0; corner < 4; ++corner) {
        const Doubles x = column + (corner & 1 ? kSide - 1 : 0);
        const double y = y0 + (corner & 2 ? kSide - 1 : 0);
        const Doubles w = m[6] * x + (m[7] * y + m[8]);
        const Doubles size = magnitude(m[6] * x) + (__builtin_fabs(m[7] * y) + __builtin_fabs(m[8]));
        if (corner == 0) sign = w < 0 ? Doubles{} - 1 : Doubles{} + 1;
        to.known &= (w * sign > kSure * size) & (w * sign > 0x1p-500) & (w * sign < 0x1p500);
        for (int axis = 0; axis < 2; ++axis) {
            const double* row = m + 3 * axis;
            const Doubles v = (row[0] * x + (row[1] * y + row[2])) / w;
            to.known &= v - v == 0;
            to.low[axis] = least(to.low[axis], v);
            to.high[axis] = most(to.high[axis], v);
        }
    }
    return to;
}

template <int taps, int parts>
IMGOPT_INLINE void plan_patches(const Map& map, const Source<uint8_t>& source, Padding padding, int64_t x0, int64_t y0,
                                Patches& to) {
    const Doubles column = Doubles{0, 8, 16, 24, 32, 40, 48, 56} + static_cast<double>(x0);
    const Extremes at = map.affine ? affine_extremes(map, column, static_cast<double>(y0))
                                   : perspective_extremes(map, column, static_cast<double>(y0));
    const double side[2] = {static_cast<double>(source.width), static_cast<double>(source.height)};
    constexpr double room[2] = {kPatchColumns, parts * kPartRows}, half = taps == 1 ? 0.5 : 0;
    Longs inside = at.known, held = at.known, fill{};
    for (int axis = 0; axis < 2; ++axis) {
        const Doubles first = floor_of(at.low[axis] + (half - kPatchSlack));
        const Doubles last = floor_of(at.high[axis] + (half + kPatchSlack)) + (taps - 1);
        inside &= (first >= 0) & (last < side[axis]);
        held &= (last - first < room[axis]) & (first > -kNear) & (last < kNear);
        fill |= (last < 0) | (first >= side[axis]);
        const Doubles start = least(most(first, Doubles{}), Doubles{} + (side[axis] - room[axis]));
        const __m256i whole = _mm512_cvttpd_epi32((__m512d)start);
        __builtin_memcpy(axis ? to.y : to.x, &whole, sizeof whole);
    }
    fill &= at.known & (Longs{} - (padding == Padding::constant));
    const Longs reach = fill ? Longs{} + kAllFill : (held ? (inside ? Longs{} : Longs{} + kBorder) : Longs{} + kBeyond);
    __builtin_memcpy(to.reach, &reach, sizeof reach);
}

// Whether the blocks of a tile find their patches: all of an affine map's, at corners and centre those of a homography.
template <int taps, int parts>
bool patches_fit(const Map& map, const Source<uint8_t>& source, int64_t y0, int64_t y1, int64_t x0, int64_t x1) {
    constexpr int rows = parts * kPartRows;
    if (source.width < kPatchColumns || source.height < rows) return false;
    const double* m = map.m;
    if (map.affine) {
        const auto span = [&](const double* row) {
            return (kSide - 1) * (__builtin_fabs(row[0]) + __builtin_fabs(row[1])) + 2 * kPatchSlack + taps;
        };
        const auto near = [&](const double* row) {
            const double x = static_cast<double>(x1 + kBlock), y = static_cast<double>(y1 + kSide);
            return __builtin_fabs(row[0]) * x + __builtin_fabs(row[1]) * y + __builtin_fabs(row[2]) < kNear;
        };
        return span(m) <= kPatchColumns && span(m + 3) <= rows && near(m) && near(m + 3);
    }
    const int64_t last_x = x1 - 1 - (x1 - 1 - x0) % kSide, last_y = y1 - 1 - (y1 - 1 - y0) % kSide;
    for (int corner = 0; corner < 5; ++corner) {
        const int64_t x = corner == 4 ? (x0 + last_x) / 2 : corner & 1 ? last_x : x0;
        const int64_t y = corner == 4 ? (y0 + last_y) / 2 : corner & 2 ? last_y : y0;
        Patches patches;
        plan_patches<taps, parts>(map, source, Padding::edge, x, y, patches);
        if (patches.reach[0] == kBeyond) return false;
    }
    return true;
}

}  // namespace
}  // namespace imgopt::avx512

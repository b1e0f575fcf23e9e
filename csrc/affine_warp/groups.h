// Where groups of pixels, two vectors of a unit each, lie in a window: planned for strips of rows, where all of a group
// lies inside it or all of it is fill, and coordinate by coordinate where neither is known.
#pragma once

#include "window.h"

namespace imgopt {
namespace {

// --- planned -------------------------------------------------------------------------------------------------------

constexpr int kStripBlocks = 16;  // columns of blocks that are planned together, the most

constexpr int32_t kReachInside = 0, kReachFill = 1, kReachEither = 2;

// Floors of coordinates, along both axes: `inside`, nothing has to be clamped or mirrored, `fill`: all taps are fill.
struct Limits {
    int32_t inside[2][2], fill[2][2];  // first and end
    float half;                        // of a pixel where coordinates are rounded, not floored
    bool fills;                        // bicubic weights do not sum to exactly one: they are always applied

    Limits(const AffineWarp& p, const Source<uint8_t>& source, const Window& w, int taps)
        : half(taps == 1 ? 0.5f : 0.0f), fills(p.padding == Padding::constant && taps != 4) {
        const bool mirrored = p.padding >= Padding::reflect;
        const int lead = taps == 4;
        const int32_t first[2] = {w.x0 + lead, w.y0 + lead}, last[2] = {w.x_last, w.y_last};
        const int32_t side[2] = {source.width, source.height};
        for (int axis = 0; axis < 2; ++axis) {
            inside[axis][0] = mirrored ? 0 : first[axis];
            inside[axis][1] = mirrored ? side[axis] : first[axis] + last[axis] + 1;
            fill[axis][0] = -(taps / 2);
            fill[axis][1] = side[axis] + lead;
        }
    }
};

// affine_base() of a column of blocks, and what each of its groups of pixels reaches, for a strip of rows at once:
// block by block that would take as long as the pixels. Written in the compiler's own vectors, of the unit's width.
template <class Isa>
struct BlockColumn {
    static constexpr int kRows = Isa::kLanes, kHalf = kRows / 2, kGroupLanes = 2 * Isa::kLanes;
    static constexpr int kGroups = kBlock / kGroupLanes;
    using Ints = typename Isa::Rows::Ints;
    using Floats = typename Isa::Rows::Floats;
    using HalfInts = typename Isa::Rows::HalfInts;
    using HalfFloats = typename Isa::Rows::HalfFloats;
    using Longs = typename Isa::Rows::Longs;
    using Doubles = typename Isa::Rows::Doubles;

    alignas(64) int32_t at[2][kRows];
    alignas(64) float fraction[2][kRows];
    alignas(64) int32_t reach[kGroups][kRows];
    float step[2];

    IMGOPT_INLINE void plan(const Map& map, const Limits& limits, int64_t x0, int64_t y0) {
        alignas(64) int32_t finite_rows[kRows];
        for (int half = 0; half < 2; ++half) {
            Doubles y;
            for (int r = 0; r < kHalf; ++r) y[r] = r;
            y += static_cast<double>(y0 + half * kHalf);
            HalfInts all_finite = HalfInts{} - 1;
            for (int axis = 0; axis < 2; ++axis) {
                const double* m = map.m + 3 * axis;
                const Doubles v = m[0] * static_cast<double>(x0) + (m[1] * y + m[2]), far = Doubles{} + kFar;
                const Longs is_finite = v - v == 0;
                Doubles cut = v < -far ? -far : v;
                cut = is_finite ? (cut > far ? far : cut) : Doubles{};
                HalfInts whole = __builtin_convertvector(cut, HalfInts);
                const Longs above = __builtin_convertvector(whole, Doubles) > cut;
                whole += __builtin_convertvector(above, HalfInts);
                const Doubles rest = cut - __builtin_convertvector(whole, Doubles);
                const HalfFloats narrow_rest = __builtin_convertvector(rest, HalfFloats);
                __builtin_memcpy(at[axis] + half * kHalf, &whole, sizeof whole);
                __builtin_memcpy(fraction[axis] + half * kHalf, &narrow_rest, sizeof narrow_rest);
                all_finite &= __builtin_convertvector(is_finite, HalfInts);
            }
            __builtin_memcpy(finite_rows + half * kHalf, &all_finite, sizeof all_finite);
        }
        for (int axis = 0; axis < 2; ++axis) step[axis] = static_cast<float>(clamped(map.m[3 * axis], -kFar, kFar));
        for (int group = 0; group < kGroups; ++group) plan_group(limits, group, finite_rows);
    }

    // Coordinates rise or fall along a row, in float32 too, so its ends decide. Differences below 2^23 are exact.
    IMGOPT_INLINE void plan_group(const Limits& limits, int group, const int32_t* finite_rows) {
        constexpr int32_t kNear = 1 << 22;
        const float first = static_cast<float>(group * kGroupLanes), last = first + (kGroupLanes - 1);
        Ints in, out{}, finite_row;
        __builtin_memcpy(&finite_row, finite_rows, sizeof finite_row);
        in = finite_row;
        for (int axis = 0; axis < 2; ++axis) {
            alignas(64) float ends[2][kRows];
            for (int r = 0; r < kRows; ++r) {
                ends[0][r] = fused(step[axis], first, fraction[axis][r]);
                ends[1][r] = fused(step[axis], last, fraction[axis][r]);
            }
            Ints base;
            Floats a, b;
            __builtin_memcpy(&base, at[axis], sizeof base);
            __builtin_memcpy(&a, ends[0], sizeof a);
            __builtin_memcpy(&b, ends[1], sizeof b);
            const Floats low = a < b ? a : b, high = a < b ? b : a;
            const Ints known = (base < kNear) & (base > -kNear);
            const auto below = [&](const Floats& v, int32_t bound) {
                return v < __builtin_convertvector(bound - base, Floats) - limits.half;
            };
            in &= known & ~below(low, limits.inside[axis][0]) & below(high, limits.inside[axis][1]);
            out |= known & (below(high, limits.fill[axis][0]) | ~below(low, limits.fill[axis][1]));
        }
        const Ints fill = (limits.fills ? out : Ints{}) | ~finite_row;
        const Ints found = in ? Ints{} + kReachInside : (fill ? Ints{} + kReachFill : Ints{} + kReachEither);
        __builtin_memcpy(reach[group], &found, sizeof found);
    }

    IMGOPT_INLINE Base<float> base(int r) const {
        return {at[0][r], at[1][r], fraction[0][r], fraction[1][r], step[0], step[1], true};
    }
};

// --- coordinate by coordinate --------------------------------------------------------------------------------------

// Where one row of a block lies.
struct Place {
    Base<float> base;
    int64_t x, y;
};

// Offsets, fractions and validity of a group that may touch the border, or that a homography places. Not inlined, nor
// is finish_group() of windowed.h: what they need in registers would be taken from the loops over whole groups inside.
template <class Isa, int taps, class T>
[[gnu::noinline]] void locate_group(const AffineWarp& p, const Map& map, const Source<T>& source, const Window& w,
                                    int bytes, const Place& place, int lane, typename Isa::Group& group) {
    for (int h = 0; h < 2; ++h, lane += Isa::kLanes) {
        auto at = map.affine ? Isa::affine(place.base, lane) : Isa::perspective(map.m, place.x + lane, place.y);
        if constexpr (taps == 1) Isa::round(at);
        if (p.padding >= Padding::reflect) Isa::fold(at, source.width, source.height, p.padding);
        Isa::locate(w, bytes, taps == 4, at, group, h);
    }
    group.plain = map.affine || Isa::all_finite(group);
}

}  // namespace
}  // namespace imgopt

// affine_warp on CUDA, uint8 images: the part of an image that a tile of the output samples, in shared memory, a word
// per pixel with a byte for each of up to four channels. Staging deals with layout, table and border once per source
// pixel; what is left for an output pixel are shared loads without a test. A pixel's four taps read from global memory
// byte by byte, with their borders, were 208 instructions on an H100 and 170 microseconds for 256 images of 224^2.
//
// A tile is staged if its map is affine and its taps span at most 80 pixels both ways: scale 2.4, or 1.7 turned by any
// angle. Eight tiles then share a multiprocessor, which hides one's loads behind another's arithmetic.
#pragma once

#include "cuda_sample.h"

namespace imgopt {
namespace {

constexpr int kTileSide = 32;
constexpr int kRegionSide = 80;                // pixels
constexpr int kRegionPitch = kRegionSide + 1;  // words; odd, so that neighbours in any direction lie in different banks
constexpr float kFarthest = 1 << 28;           // coordinates of a staged tile: their sums fit in int32
constexpr float kOnes = 12582912.0f;           // 1.5 · 2^23: one unit in the last place is 1

constexpr size_t kRegionBytes = size_t{kRegionSide} * kRegionPitch * 4;

template <class T, class R, int C>
constexpr __host__ __device__ bool can_be_staged() {
    return sizeof(T) == 1 && sizeof(R) == 4 && C <= 4;
}
// Pixels of a thread, neighbours in a row.
template <class T, class R, int C>
constexpr int kPixels = can_be_staged<T, R, C>() ? 8 : 4;
template <class T, class R, int C>
constexpr int kTileThreads = kTileSide * kTileSide / kPixels<T, R, C>;

// Pixels [x, x + 4 groups) × [y, y + rows) of the plane that the image's padding makes infinite.
struct Region {
    int32_t x, y, groups, rows;
    bool folds;  // coordinates have to be brought into a mirrored image
};

// --- coordinates ---------------------------------------------------------------------------------------------------

// affine_base() for the rows of a tile that can be staged: nothing to clamp, and a sum rounded down is the floor.
__device__ inline Base<float> near_base(const double* m, int64_t x0, int64_t y) {
    constexpr double ones = 6755399441055744.0;  // 1.5 · 2^52: one unit in the last place is 1
    Base<float> base;
    const double x = m[0] * x0 + (m[1] * y + m[2]), yy = m[3] * x0 + (m[4] * y + m[5]);
    const double wx = sum_rounded_down(x, ones), wy = sum_rounded_down(yy, ones);
    base.x = low_word(wx);
    base.y = low_word(wy);
    base.fx = static_cast<float>(x - (wx - ones));
    base.fy = static_cast<float>(yy - (wy - ones));
    base.step_x = static_cast<float>(m[0]);
    base.step_y = static_cast<float>(m[3]);
    base.finite = true;
    return base;
}

// affine_point() for coordinates inside the block below 2^22, where a sum rounded down is the floor: no conversions.
__device__ inline Point<float> near_point(const Base<float>& base, float lane) {
    const float x = fused(base.step_x, lane, base.fx), y = fused(base.step_y, lane, base.fy);
    const float wx = sum_rounded_down(x, kOnes), wy = sum_rounded_down(y, kOnes);
    const auto whole = [](float w) { return static_cast<int32_t>(bits_of_float(w) - bits_of_float(kOnes)); };
    return {base.x + whole(wx), base.y + whole(wy), x - (wx - kOnes), y - (wy - kOnes), true};
}

// affine_base(), by that shorter way where coordinates and steps allow it.
template <class R>
__device__ inline Base<R> base_of(const double* m, int64_t x0, int64_t y) {
    if constexpr (sizeof(R) == 4) {
        constexpr double steepest = 1 << 15;  // offsets inside a block stay below 2^22
        const auto within = [](double v, double most) { return v > -most && v < most; };
        if (within(m[0] * x0 + (m[1] * y + m[2]), kFarthest) && within(m[3] * x0 + (m[4] * y + m[5]), kFarthest) &&
            within(m[0], steepest) && within(m[3], steepest))
            return near_base(m, x0, y);
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

__device__ inline float smaller_of(float a, float b) { return a < b ? a : b; }

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

// Whether the tile from (x0, y0) on can be staged, and what it needs then. A map takes its corners to those of the
// pixels that it samples; every thread computes the same.
template <Interpolation interpolation>
__device__ inline bool plan_region(const double* m, int64_t x0, int64_t y0, int32_t height, int32_t width,
                                   Padding padding, Region& region) {
    constexpr int before = interpolation == Interpolation::bicubic ? 1 : 0;
    constexpr int after = interpolation == Interpolation::bicubic    ? 2
                          : interpolation == Interpolation::bilinear ? 1
                                                                     : 0;
    constexpr float rounding = interpolation == Interpolation::nearest ? 0.5f : 0;
    bool fits = true;
    Span spans[2];
#pragma unroll
    for (int axis = 0; axis < 2; ++axis, m += 3) {  // in float32, with more room than its rounding takes
        const float corner = static_cast<float>(m[0] * x0 + (m[1] * y0 + m[2]));
        const float across = static_cast<float>(m[0]) * (kTileSide - 1),
                    down = static_cast<float>(m[1]) * (kTileSide - 1);
        const float slack = fused(corner < 0 ? -corner : corner, 0x1p-21f, 0x1p-7f);
        const float low = corner + smaller_of(across, 0.0f) + smaller_of(down, 0.0f) - slack + rounding;
        const float high = corner - smaller_of(-across, 0.0f) - smaller_of(-down, 0.0f) + slack + rounding;
        fits = fits && low > -kFarthest && high < kFarthest && high - low < kRegionSide;
        spans[axis] = {static_cast<int32_t>(floor_of(low)), static_cast<int32_t>(floor_of(high))};
    }
    if (!fits) return false;
    bool folds = false;
    const Span x = folded(spans[0], width, padding, folds), y = folded(spans[1], height, padding, folds);
    const int32_t left = (x.first - before) & ~3;
    region = {left, y.first - before, (x.last + after - left) / 4 + 1, y.last + after - (y.first - before) + 1, folds};
    return region.groups <= kRegionSide / 4 && region.rows <= kRegionSide;
}

// --- staging -------------------------------------------------------------------------------------------------------

// The word at any address; reads only words that hold one of its bytes.
__device__ inline uint32_t load_word(const uint8_t* at) {
    const uintptr_t address = reinterpret_cast<uintptr_t>(at);
    const uint32_t* from = reinterpret_cast<const uint32_t*>(address & ~uintptr_t{3});
    const uint32_t bits = static_cast<uint32_t>(address & 3) * 8;
    return shift_pair(load_cached(from), bits ? load_cached(from + 1) : 0, bits);
}

// Four pixels, a word each, of the twelve bytes of three interleaved channels, and of a word for each of C channels.
__device__ inline void split_interleaved(uint32_t a, uint32_t b, uint32_t c, uint32_t (&to)[4]) {
    to[0] = a;
    to[1] = bytes_of(a, b, 0x0543);
    to[2] = bytes_of(b, c, 0x0432);
    to[3] = c >> 8;
}
template <int C>
__device__ inline void split_planes(const uint32_t (&w)[4], uint32_t (&to)[4]) {
    if constexpr (C == 1) {
#pragma unroll
        for (int i = 0; i < 4; ++i) to[i] = w[0] >> (8 * i);
    } else {
        const uint32_t a = bytes_of(w[0], w[1], 0x5140), b = bytes_of(w[2], w[3], 0x5140);
        const uint32_t c = bytes_of(w[0], w[1], 0x7362), d = bytes_of(w[2], w[3], 0x7362);
        to[0] = bytes_of(a, b, 0x5410);
        to[1] = bytes_of(a, b, 0x7632);
        to[2] = bytes_of(c, d, 0x5410);
        to[3] = bytes_of(c, d, 0x7632);
    }
}

template <int C>
__device__ inline uint32_t through_table(const uint8_t* table, uint32_t pixel) {
    uint32_t to = 0;
#pragma unroll
    for (int c = 0; c < C; ++c) to |= uint32_t{load_cached(table + c * 256 + (pixel >> (8 * c) & 255))} << (8 * c);
    return to;
}

// Four neighbouring pixels of packed channels, at any address, through the table if there is one.
template <int C>
__device__ inline void load_anywhere(const Pixels<uint8_t>& s, const uint8_t* at, bool planar, uint32_t (&to)[4]) {
    if (planar) {
        uint32_t w[4] = {};
#pragma unroll
        for (int c = 0; c < C; ++c) w[c] = load_word(at + c * s.channel);
        split_planes<C>(w, to);
    } else if constexpr (C == 3) {
        split_interleaved(load_word(at), load_word(at + 4), load_word(at + 8), to);
    } else {
#pragma unroll
        for (int k = 0; k < 4; ++k) to[k] = load_word(at + 4 * k);
    }
    if (s.table)
#pragma unroll
        for (int k = 0; k < 4; ++k) to[k] = through_table<C>(s.table, to[k]);
}

// The pixel that serves a place in or outside the image, byte by byte.
template <int C>
__device__ inline uint32_t bordered_pixel(const Pixels<uint8_t>& s, int32_t x, int32_t y, Padding padding,
                                          uint32_t fill) {
    const int32_t column = tap_index(x, s.width, padding), row = tap_index(y, s.height, padding);
    if (column < 0 || row < 0) return fill;
    uint32_t pixel = 0;
    for (int c = 0; c < C; ++c)
        pixel |= uint32_t{load_cached(s.data + row * s.row + column * s.column + c * s.channel)} << (8 * c);
    return s.table ? through_table<C>(s.table, pixel) : pixel;
}

// The words of four pixels, where rows and channels start at whole words, and their pixels.
template <int C>
__device__ inline void load_words(const uint8_t* at, uint32_t plane, bool planar, uint32_t (&to)[4]) {
    const uint32_t* from = reinterpret_cast<const uint32_t*>(at);
    if (planar) {
#pragma unroll
        for (int c = 0; c < C; ++c) to[c] = load_cached(from + c * plane / 4);
    } else {
#pragma unroll
        for (int c = 0; c < C; ++c) to[c] = load_cached(from + c);
    }
}
template <int C>
__device__ inline void split_words(const uint32_t (&w)[4], bool planar, uint32_t (&to)[4]) {
    if (planar) {
        split_planes<C>(w, to);
    } else if constexpr (C == 3) {
        split_interleaved(w[0], w[1], w[2], to);
    } else {
#pragma unroll
        for (int k = 0; k < 4; ++k) to[k] = w[k];
    }
}

__device__ inline void put_pixels(const uint32_t (&pixels)[4], uint32_t* to) {
#pragma unroll
    for (int k = 0; k < 4; ++k) to[k] = pixels[k];
}

// Four pixels anywhere.
template <int C>
__device__ inline void stage_group(const Pixels<uint8_t>& s, int32_t x, int32_t y, bool packed, bool planar,
                                   Padding padding, uint32_t fill, uint32_t* to) {
    const bool in_row = y >= 0 && y < s.height;
    if (in_row && packed && x >= 0 && x <= s.width - 4) {
        uint32_t pixels[4];
        load_anywhere<C>(s, s.data + y * s.row + x * s.column, planar, pixels);
        put_pixels(pixels, to);
    } else if (padding == Padding::constant && (!in_row || x <= -4 || x >= s.width)) {
        put_pixels({fill, fill, fill, fill}, to);
    } else {
#pragma unroll 1
        for (int k = 0; k < 4; ++k) to[k] = bordered_pixel<C>(s, x + k, y, padding, fill);
    }
}

// The groups of four pixels of a region, row by row, and the first of them of a thread.
struct Groups {
    int across, count;
    uint32_t reciprocal;

    __device__ explicit Groups(const Region& region)
        : across(region.groups),
          count(region.groups * region.rows),
          reciprocal(65536 / static_cast<uint32_t>(region.groups) + 1) {}
    // Exact below 65536 / 20 with at most 20 groups to a row: the error of i · reciprocal is less than 1 / across.
    __device__ int row(int i) const { return static_cast<int>(static_cast<uint32_t>(i) * reciprocal >> 16); }
};

// By all threads. `s` starts at the first of the C channels, its table too; `fill` has a byte for each. First the
// groups inside the image, several at a time so that their loads are under way together, then those that are not.
template <int C, int threads>
__device__ inline void stage_region(const Pixels<uint8_t>& s, const Region& region, Padding padding, uint32_t fill,
                                    uint32_t* staged) {
    constexpr int batch = 4;
    const bool planar = s.column == 1, packed = planar || (C > 1 && s.channel == 1 && s.column == C);
    const uint64_t starts = reinterpret_cast<uintptr_t>(s.data) | static_cast<uint64_t>(s.row) |
                            static_cast<uint64_t>(planar && C > 1 ? s.channel : 0);
    // Then offsets take 32 bits, and the image's first words are there to be read instead of what lies outside.
    const bool aligned = packed && !s.table && (starts & 3) == 0 && s.width >= 4 && s.row >= 0 &&
                         s.row * s.height < (int64_t{1} << 31) &&
                         (!planar || (s.channel < (1 << 30) && s.channel >= 0));
    const Groups groups(region);
    const int first = static_cast<int>(threadIdx.x);
    const uint32_t height = static_cast<uint32_t>(s.height), last_x = static_cast<uint32_t>(s.width - 4);
    const auto inside = [&](int row, int group) {
        return static_cast<uint32_t>(region.y + row) < height && static_cast<uint32_t>(region.x + 4 * group) <= last_x;
    };
    if (aligned) {
        const uint32_t down = static_cast<uint32_t>(s.row), plane = static_cast<uint32_t>(s.channel);
        for (int from = first; from < groups.count; from += batch * threads) {
            uint32_t words[batch][4] = {};
            int to[batch];  // or -1
#pragma unroll
            for (int k = 0; k < batch; ++k) {
                const int i = from + k * threads, row = groups.row(i), group = i - row * groups.across;
                const bool now = i < groups.count && inside(row, group);
                const uint32_t y = static_cast<uint32_t>(region.y + row),
                               x = static_cast<uint32_t>(region.x + 4 * group);
                to[k] = now ? row * kRegionPitch + 4 * group : -1;
                load_words<C>(s.data + (now ? y * down + x * (planar ? 1 : C) : 0), plane, planar, words[k]);
            }
#pragma unroll
            for (int k = 0; k < batch; ++k) {
                if (to[k] < 0) continue;
                uint32_t pixels[4];
                split_words<C>(words[k], planar, pixels);
                put_pixels(pixels, staged + to[k]);
            }
        }
        if (inside(0, 0) && inside(region.rows - 1, region.groups - 1)) return;
    }
#pragma unroll 1
    for (int i = first; i < groups.count; i += threads) {
        const int row = groups.row(i), group = i - row * groups.across;
        if (!aligned || !inside(row, group))
            stage_group<C>(s, region.x + 4 * group, region.y + row, packed, planar, padding, fill,
                           staged + row * kRegionPitch + 4 * group);
    }
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
__device__ inline void bilinear_staged(const uint32_t* at, float fx, float fy, float (&to)[C]) {
    const PairedWeights w = paired_weights(fx, fy);
    const uint32_t p00 = at[0], p01 = at[1], p10 = at[kRegionPitch], p11 = at[kRegionPitch + 1];
#pragma unroll
    for (int c = 0; c < C; c += 2) {
        const uint32_t a = c == 0 ? two_channels<0>(p00, p01) : two_channels<2>(p00, p01);
        const uint32_t b = c == 0 ? two_channels<0>(p10, p11) : two_channels<2>(p10, p11);
        to[c] = counted(dot2_low(w.below, b, dot2_low(w.above, a, kExponent)));
        if (c + 1 < C) to[c + 1] = counted(dot2_high(w.below, b, dot2_high(w.above, a, kExponent)));
    }
}

template <int C>
__device__ inline void bicubic_staged(const uint32_t* at, float fx, float fy, float (&to)[C]) {
    int32_t w[4];
    float wy[4];
    bicubic_integer_weights(fx, w);
    bicubic_weights(fy, wy);
    const uint32_t first = bytes_of(static_cast<uint32_t>(w[0]), static_cast<uint32_t>(w[1]), 0x5410);
    const uint32_t last = bytes_of(static_cast<uint32_t>(w[2]), static_cast<uint32_t>(w[3]), 0x5410);
#pragma unroll
    for (int row = 0; row < 4; ++row, at += kRegionPitch) {
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
__device__ inline void sample_staged(const uint32_t* at, float fx, float fy, float (&to)[C]) {
    if constexpr (interpolation == Interpolation::nearest) {
        const uint32_t pixel = at[0];
#pragma unroll
        for (int c = 0; c < C; ++c) to[c] = static_cast<float>(pixel >> (8 * c) & 255);
    } else if constexpr (interpolation == Interpolation::bilinear) {
        bilinear_staged<C>(at, fx, fy, to);
    } else {
        bicubic_staged<C>(at - kRegionPitch - 1, fx, fy, to);
    }
}

}  // namespace
}  // namespace imgopt

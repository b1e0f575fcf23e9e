// affine_warp on CUDA, uint8 images: brings the part of an image that a tile samples into shared memory, a word per
// pixel with a byte for each of up to four channels. Groups of four pixels of a row whose words can be loaded whole go
// first (stage_words), several loads of a thread under way together; what a border cuts apart, what a table changes and
// what no word starts with goes byte by byte (stage_groups), out of line, so that its registers are not the rule's.
#pragma once

#include "cuda_plan.h"
#include "cuda_tile.h"

namespace imgopt {
namespace {

// --- four pixels ---------------------------------------------------------------------------------------------------

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

__device__ inline void put_group(const uint32_t (&pixels)[4], uint32_t* to) {
#pragma unroll
    for (int k = 0; k < 4; ++k) to[k] = pixels[k];
}

// --- groups whose words can be loaded whole ------------------------------------------------------------------------

// The words of four pixels, where rows and planes start at whole words, and their pixels.
template <int C, bool planar>
__device__ inline void load_words(const uint8_t* at, uint32_t plane, uint32_t (&to)[4]) {
#pragma unroll
    for (int c = 0; c < C; ++c) to[c] = load_cached(reinterpret_cast<const uint32_t*>(at + c * (planar ? plane : 4)));
}
template <int C, bool planar>
__device__ inline void split_words(const uint32_t (&w)[4], uint32_t (&to)[4]) {
    if constexpr (planar) {
        split_planes<C>(w, to);
    } else if constexpr (C == 3) {
        split_interleaved(w[0], w[1], w[2], to);
    } else {
#pragma unroll
        for (int k = 0; k < 4; ++k) to[k] = w[k];
    }
}
// The words that split into four pixels of fill.
template <int C, bool planar>
__device__ inline void fill_words(uint32_t fill, uint32_t (&to)[4]) {
    if constexpr (planar) {
#pragma unroll
        for (int c = 0; c < C; ++c) to[c] = bytes_of(fill, fill, 0x1111u * static_cast<uint32_t>(c));
    } else if constexpr (C == 3) {
        to[0] = bytes_of(fill, fill, 0x0210);
        to[1] = bytes_of(fill, fill, 0x1021);
        to[2] = bytes_of(fill, fill, 0x2102);
    } else {
#pragma unroll
        for (int k = 0; k < 4; ++k) to[k] = fill;
    }
}

// Which columns of a group of four are in the image.
struct Columns {
    bool inside, outside;  // all of them, none
    __device__ Columns(int32_t x, int32_t width)
        : inside(static_cast<uint32_t>(x) <= static_cast<uint32_t>(width - 4)), outside(x <= -4 || x >= width) {}
};
__device__ inline bool in_rows(int32_t y, int32_t height) {
    return static_cast<uint32_t>(y) < static_cast<uint32_t>(height);
}

// What stage_words() leaves to stage_groups().
__device__ inline bool is_left(const Columns& columns, bool in_row, Padding padding) {
    if (padding != Padding::constant) return !(columns.inside && in_row);
    return !(columns.inside || columns.outside);
}
__device__ inline bool any_left(const Region& region, int32_t height, int32_t width, Padding padding) {
    if (padding == Padding::constant && width % 4 == 0) return false;  // groups start at multiples of four
    return region.x < 0 || region.x + 4 * region.groups > width || region.y < 0 || region.y + region.rows > height;
}

// By all threads: each has a column of groups and every so many rows of it, which takes no division per group.
template <int C, bool planar, int threads>
__device__ inline void stage_words(const uint8_t* image, uint32_t down, uint32_t plane, int32_t height, int32_t width,
                                   const Region& region, Padding padding, uint32_t fill, uint32_t* staged) {
    constexpr int batch = 6;
    const int thread = static_cast<int>(threadIdx.x);
    const float share = reciprocal_of(static_cast<float>(region.groups));  // exact enough: quotients are halves away
    const int rows_at_once = static_cast<int>((threads + 0.5f) * share);
    int row = static_cast<int>((static_cast<float>(thread) + 0.5f) * share);
    const int group = thread - row * region.groups;
    const int32_t x = region.x + 4 * group;
    const Columns columns(x, width);
    if (row >= rows_at_once || !(columns.inside || (columns.outside && padding == Padding::constant))) return;
    const int pitch = region.pitch();
    int to = row * pitch + 4 * group;
    const uint8_t* column = kept(image + static_cast<uint32_t>(columns.inside ? x : 0) * (planar ? 1 : C));
    const int32_t rows = columns.inside ? height : 0;  // whose words are loaded
    const bool filled = padding == Padding::constant;  // else rows outside the image are left, too
    uint32_t blank[4] = {};
    fill_words<C, planar>(fill, blank);
#pragma unroll 1
    for (; row < region.rows; row += batch * rows_at_once) {
        uint32_t words[batch][4];
        bool now[batch];
#pragma unroll
        for (int k = 0; k < batch; ++k) {
            const int32_t mine = row + k * rows_at_once, y = region.y + mine;
            const bool loaded = mine < region.rows && in_rows(y, rows);
            now[k] = filled ? mine < region.rows : loaded;
#pragma unroll
            for (int c = 0; c < 4; ++c) words[k][c] = blank[c];
            if (loaded) load_words<C, planar>(column + static_cast<uint32_t>(y) * down, plane, words[k]);
        }
#pragma unroll
        for (int k = 0; k < batch; ++k, to += rows_at_once * pitch) {
            uint32_t pixels[4];
            split_words<C, planar>(words[k], pixels);
            if (now[k]) put_group(pixels, staged + to);
        }
    }
}

// --- all others ----------------------------------------------------------------------------------------------------

// Four pixels anywhere.
template <int C>
__device__ inline void stage_group(const Pixels<uint8_t>& s, int32_t x, int32_t y, bool packed, bool planar,
                                   Padding padding, uint32_t fill, uint32_t* to) {
    const bool in_row = in_rows(y, s.height);
    if (in_row && packed && x >= 0 && x <= s.width - 4) {
        uint32_t pixels[4];
        load_anywhere<C>(s, s.data + y * s.row + x * s.column, planar, pixels);
        put_group(pixels, to);
    } else if (padding == Padding::constant && (!in_row || x <= -4 || x >= s.width)) {
        put_group({fill, fill, fill, fill}, to);
    } else {
#pragma unroll 1
        for (int k = 0; k < 4; ++k) to[k] = bordered_pixel<C>(s, x + k, y, padding, fill);
    }
}

// By all threads: every group of the region, or those that stage_words() has left. `s` starts at the first of the C
// channels, its table too; `fill` has a byte for each.
template <int C, int threads>
__device__ __noinline__ void stage_groups(const Pixels<uint8_t> s, const Region region, Padding padding, uint32_t fill,
                                          bool all, uint32_t* staged) {
    const bool planar = s.column == 1, packed = planar || (C > 1 && s.channel == 1 && s.column == C);
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x); i < region.groups * region.rows; i += threads) {
        const int row = i / region.groups, group = i - row * region.groups;
        const int32_t x = region.x + 4 * group, y = region.y + row;
        if (all || is_left(Columns(x, s.width), in_rows(y, s.height), padding))
            stage_group<C>(s, x, y, packed, planar, padding, fill, staged + row * region.pitch() + 4 * group);
    }
}

}  // namespace
}  // namespace imgopt

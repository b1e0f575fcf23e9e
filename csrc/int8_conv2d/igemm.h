// Convolution as a matrix product without im2col, for any vector unit: what is the same for all of them. The rows of
// the left operand are found through a table of pointers, one per output pixel and tap, and padded taps point to a row
// of zero points, so that borders cost nothing in the inner loop and cancel exactly in the sum (kernels.h).
//
// Work is cut into units of a block of output pixels times a panel of output channels. A block's table is built once
// and stays in L1; a panel's weights are read once per block.
//
// A unit supplies an `Isa` with
//   kLanes              output channels of one vector
//   kMaxVectors         vectors of the widest tile
//   rows(vectors)       output pixels of the tallest tile of that width
//   tile(rows, vectors) the function that computes one tile
#pragma once

#include <string.h>

#include "arithmetic.h"

namespace imgopt {
namespace {

// Pixels of a block: 9 taps of 96 pointers are 7 KB.
constexpr int64_t kBlockPixels = 96;

// One tile: `pixels` consecutive output pixels (known to the function) times up to `channels` output channels.
struct Tile {
    const Int8Conv2d* conv;
    const uint8_t* const* rows;  // rows[tap * row_stride + pixel]
    int64_t row_stride, taps;
    int64_t row_offset;  // where the group's channels begin in a pixel
    int64_t inner;       // bytes of one row, a multiple of 4
    const int8_t* weight;
    int64_t pixel, channel, channels;
};
using TileFunction = void (*)(const Tile&);

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// How a group's output channels are cut: `vectors` of kLanes, spread evenly over `panels`.
template <class Isa>
struct Panels {
    int64_t vectors, panels;

    explicit Panels(const Int8Weight& w)
        : vectors(ceil_div(w.out_channels / w.groups, Isa::kLanes)), panels(ceil_div(vectors, Isa::kMaxVectors)) {}
    int64_t begin(int64_t panel) const { return vectors * panel / panels; }
};

inline int64_t taps_of(const Int8Weight& w) { return w.kernel_h * w.kernel_w; }
// Products of one output value, in whole groups of four.
inline int64_t depth_of(const Int8Weight& w) { return round_up(taps_of(w) * w.group_channels, 4); }
// Rows of whole dwords are read where they lie; others are first collected in a strip.
inline bool reads_in_place(const Int8Weight& w) { return w.group_channels % 4 == 0; }

template <class Isa>
int64_t igemm_weight_bytes(const Int8Weight& w) {
    return w.groups * Panels<Isa>(w).vectors * Isa::kLanes * depth_of(w);
}

// (group, panel, depth / 4, channel of the panel, 4), zero where there is no channel or tap.
template <class Isa>
void igemm_weight_pack(const Int8Weight& w, const int8_t* weight, uint8_t* packed) {
    const Panels<Isa> panels(w);
    const int64_t per_group = w.out_channels / w.groups, taps = taps_of(w), depth = depth_of(w);
    memset(packed, 0, static_cast<size_t>(igemm_weight_bytes<Isa>(w)));
    for (int64_t o = 0; o < w.out_channels; ++o) {
        const int64_t group = o / per_group, channel = o % per_group, vector = channel / Isa::kLanes;
        int64_t panel = 0;
        while (panels.begin(panel + 1) <= vector) ++panel;
        const int64_t first = panels.begin(panel), width = (panels.begin(panel + 1) - first) * Isa::kLanes;
        uint8_t* out = packed + (group * panels.vectors + first) * Isa::kLanes * depth;
        for (int64_t t = 0; t < taps; ++t) {
            for (int64_t c = 0; c < w.group_channels; ++c) {
                const int64_t k = t * w.group_channels + c;
                out[((k / 4) * width + channel - first * Isa::kLanes) * 4 + k % 4] =
                    static_cast<uint8_t>(weight[(o * w.group_channels + c) * taps + t]);
            }
        }
    }
}

// The cut of all output pixels into blocks of nearly equal size.
struct Blocks {
    int64_t pixels, blocks;

    explicit Blocks(const Int8Conv2d& p)
        : pixels(p.batch * p.out_h * p.out_w), blocks(ceil_div(pixels, kBlockPixels)) {}
    int64_t begin(int64_t block) const { return pixels * block / blocks; }
};

template <class Isa>
int64_t igemm_units(const Int8Conv2d& p) {
    return Blocks(p).blocks * p.weight.groups * Panels<Isa>(p.weight).panels;
}

// Pointers to the input pixels of output pixels [begin, end), table[tap * kBlockPixels + pixel - begin].
inline void fill_table(const Int8Conv2d& p, int64_t begin, int64_t end, const uint8_t* padding, const uint8_t** table) {
    const int64_t step = p.stride_w * p.input_stride;
    for (int64_t m = begin; m < end;) {
        const int64_t row = m / p.out_w, ox = m % p.out_w;
        const int64_t n = row / p.out_h, oy = row % p.out_h;
        const int64_t run = smaller(p.out_w - ox, end - m);
        const uint8_t** out = table + (m - begin);
        for (int64_t ky = 0; ky < p.weight.kernel_h; ++ky) {
            const int64_t y = oy * p.stride_h - p.pad_top + ky * p.dilation_h;
            const bool inside = y >= 0 && y < p.in_h;
            for (int64_t kx = 0; kx < p.weight.kernel_w; ++kx, out += kBlockPixels) {
                const int64_t x0 = ox * p.stride_w - p.pad_left + kx * p.dilation_w;
                int64_t first = x0 < 0 ? smaller(ceil_div(-x0, p.stride_w), run) : 0;
                int64_t last = x0 >= p.in_w ? 0 : smaller(ceil_div(p.in_w - x0, p.stride_w), run);
                if (!inside || last <= first) first = last = run;
                const uint8_t* base = p.input + ((n * p.in_h + y) * p.in_w + x0) * p.input_stride;
                for (int64_t i = 0; i < first; ++i) out[i] = padding;
                for (int64_t i = first; i < last; ++i) out[i] = base + i * step;
                for (int64_t i = last; i < run; ++i) out[i] = padding;
            }
        }
        m += run;
    }
}

// Collects the products' left operands of a block, (pixel, depth), from the table; every tap is a few bytes.
inline void fill_strip(const Int8Weight& w, const uint8_t* const* table, int64_t offset, int64_t pixels,
                       uint8_t* strip) {
    const int64_t depth = depth_of(w), taps = taps_of(w), channels = w.group_channels;
    for (int64_t m = 0; m < pixels; ++m) {
        uint8_t* out = strip + m * depth;
        for (int64_t t = 0; t < taps; ++t) {
            memcpy(out, table[t * kBlockPixels + m] + offset, static_cast<size_t>(channels));
            out += channels;
        }
    }
}

template <class Isa>
void igemm(const Int8Conv2d& p, int64_t begin, int64_t end) {
    const Int8Weight& w = p.weight;
    const Panels<Isa> panels(w);
    const Blocks blocks(p);
    const int64_t depth = depth_of(w), taps = taps_of(w), per_group = w.out_channels / w.groups;
    const bool in_place = reads_in_place(w);
    const int64_t table_bytes = taps * kBlockPixels * 8, row_bytes = round_up(w.groups * w.group_channels, 64);
    const int64_t strip_bytes = in_place ? 0 : kBlockPixels * (depth + 8);
    char* scratch = static_cast<char*>(thread_scratch(table_bytes + row_bytes + strip_bytes));
    const uint8_t** table = reinterpret_cast<const uint8_t**>(scratch);
    uint8_t* padding = reinterpret_cast<uint8_t*>(scratch + table_bytes);
    uint8_t* strip = padding + row_bytes;
    const uint8_t** strip_rows = reinterpret_cast<const uint8_t**>(strip + kBlockPixels * depth);
    memset(padding, p.input_zero_point ^ p.input_flip, static_cast<size_t>(row_bytes));

    int64_t block_done = -1, group_done = -1;
    for (int64_t unit = begin; unit < end; ++unit) {
        const int64_t panel = unit % panels.panels, group = unit / panels.panels % w.groups;
        const int64_t block = unit / panels.panels / w.groups;
        const int64_t first_pixel = blocks.begin(block), pixels = blocks.begin(block + 1) - first_pixel;
        if (block != block_done) {
            fill_table(p, first_pixel, first_pixel + pixels, padding, table);
            group_done = -1;
        }
        block_done = block;
        if (!in_place && group != group_done) {
            fill_strip(w, table, group * w.group_channels, pixels, strip);
            for (int64_t m = 0; m < pixels; ++m) strip_rows[m] = strip + m * depth;
        }
        group_done = group;

        const int64_t vector = panels.begin(panel), vectors = panels.begin(panel + 1) - vector;
        const int64_t channel = vector * Isa::kLanes;
        Tile tile{};
        tile.conv = &p;
        tile.row_stride = kBlockPixels;
        tile.taps = in_place ? taps : 1;
        tile.row_offset = in_place ? group * w.group_channels : 0;
        tile.inner = in_place ? w.group_channels : depth;
        tile.weight =
            reinterpret_cast<const int8_t*>(p.packed) + (group * panels.vectors + vector) * Isa::kLanes * depth;
        tile.channel = group * per_group + channel;
        tile.channels = smaller(per_group - channel, vectors * Isa::kLanes);
        const int64_t tiles = ceil_div(pixels, Isa::rows(vectors));
        for (int64_t t = 0; t < tiles; ++t) {
            const int64_t m = pixels * t / tiles, rows = pixels * (t + 1) / tiles - m;
            tile.rows = (in_place ? table : strip_rows) + m;
            tile.pixel = first_pixel + m;
            Isa::tile(rows, vectors)(tile);
        }
    }
}

}  // namespace
}  // namespace imgopt

// Convolution as a matrix product without im2col, for any vector unit: what is the same for all of them. The rows of
// the left operand are found through a table of pointers, one per output pixel and tap, and padded taps point to a row
// of zero points, so that borders cost nothing in the inner loop and cancel exactly in the sum (contract.h). With few
// channels, as in a first layer, the taps of a kernel row lie side by side in memory, and a pointer serves all of them.
// Where all rows of a block follow each other, in 1 x 1 layers or as copies of a first layer's input rows with their
// padding, a unit may do without the table.
//
// Work is cut into units of a block of output pixels times a panel of output channels. A block's table is built once
// and stays in L1; a panel's weights are read once per block.
//
// A unit supplies an `Isa` with
//   Product             type in which the operands are multiplied: int8_t (four per dword) or int16_t (two)
//   kLanes              output channels of one vector
//   kMaxVectors         vectors of the widest tile
//   kBlockPixels        output pixels of a block
//   rows(vectors)       output pixels of the tallest tile of that width
//   tiles(rows, vectors) the function that computes tiles of that size
//   kSortedPixels       if it is there: of a block whose pixels are sorted; the tiles then heed `tap` and `at`
//   kConsecutiveRows    if it is there: a multiple of all tallest tiles; the tiles then heed `first` and `ends`
//   collect_ends(copies, pixels)  with it: brings the last bytes of kernel rows to their planes
#pragma once

#include "panels.h"
#include "rows.h"
#include "tap_classes.h"

namespace imgopt {
namespace {

// The clamp of output bytes, before the flip.
struct ByteRange {
    uint8_t low, high;
};

inline ByteRange byte_range(const Int8Conv2d& p) {
    if (p.float_output) return {0, 255};
    const int low = static_cast<int>(round_half_even(p.low)), high = static_cast<int>(round_half_even(p.high));
    return {static_cast<uint8_t>(low + p.output_zero_point), static_cast<uint8_t>(high + p.output_zero_point)};
}

// Whether every |y| of the epilogue stays below 2^31, beyond which its conversion to int32 would turn a huge y into the
// smallest: sums are below 2^31, and 2^31 / 2 + 255 * 2^22 < 2^31. Multipliers are positive, so their bits are ordered
// as they are. Layers with larger ones, half a step of the output for one of the sum, exist in tests only.
inline bool is_bounded(const Int8Conv2d& p) {
    int32_t most = 0;
    for (int64_t c = 0; c < p.weight.out_channels; ++c) {
        int32_t bits;
        memcpy(&bits, p.multiplier + c, 4);
        most = bits > most ? bits : most;
    }
    return most < 0x3f000000 && !(p.residual && p.residual_multiplier >= 4194304.0f);  // 0.5, 2^22
}

inline bool is_rare(const Int8Conv2d& p) { return p.float_output || p.shift || !is_bounded(p); }

// Consecutive tiles of one size: `pixels` output pixels, a multiple of a tile's (known to the function), times up to
// `channels` output channels. Several to a call, because its constants and its way in and out took a tenth of the time
// of a tile whose pixels have 64 channels.
struct Tile {
    const Int8Conv2d* conv;
    const uint8_t* const* rows;  // rows[tap * row_stride + pixel]
    int64_t row_stride, taps;
    const uint8_t* tap;  // which taps; null: the first ones, in order
    int64_t row_offset;  // where the group's channels begin in a pixel
    int64_t inner;       // bytes of one row, a multiple of 4
    const uint8_t* weight;
    int64_t pixel, pixels, channel, channels;
    const int64_t* at;  // output pixel of every row; null: from `pixel` on
    // Of rows that follow each other, `first_stride` bytes apart, with taps `tap_stride` bytes apart; null: they are in
    // the table. Behind the taps come `end_dwords` of every pixel, in planes that are `end_pitch` bytes apart.
    const uint8_t* first;
    int64_t first_stride, tap_stride;
    const uint8_t* ends;
    int64_t end_dwords, end_pitch;
    ByteRange range;
    bool rare;             // to be stored a sum at a time
    const uint8_t* ahead;  // to be fetched meanwhile, so many bytes per pixel: a part of the next block's input
    int64_t ahead_bytes;
    const uint8_t* next;  // likewise the weights of the next panel, so many bytes per dword of a tile's pixels
    int64_t next_bytes;
};
using TileFunction = void (*)(const Tile&);

// Inlined by force: gcc removes calls of a function that does nothing else.
[[gnu::always_inline]] inline void prefetch(const uint8_t* from, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(from + i, 0, 2);
}

// How the left operand is read: pixels that are whole dwords where they lie, tap by tap; those of a first layer, where
// the pixels of a kernel row follow each other, row by row; others from a strip. Words are read from widened rows, or,
// where every pixel has one tap at most, also from a strip.
enum class Reading { taps, rows, strip };

template <class Isa>
Reading reading_of(const Int8Conv2d& p) {
    const Int8Weight& w = p.weight;
    if (kGroup<Isa> == 2 && (w.kernel_h <= p.stride_h || w.kernel_w <= p.stride_w)) return Reading::strip;
    if (w.group_channels % kGroup<Isa> == 0) return Reading::taps;
    return p.dilation_h == 1 && p.dilation_w == 1 && w.groups == 1 && w.group_channels == p.input_stride
               ? Reading::rows
               : Reading::strip;
}

template <class Isa>
constexpr int64_t sorted_pixels() {
    if constexpr (requires { Isa::kSortedPixels; }) return Isa::kSortedPixels;
    return 0;
}

// Whether taps that meet only padding are left out.
template <class Isa>
bool skips_taps(const Int8Conv2d& p) {
    return sorted_pixels<Isa>() > 0 && reading_of<Isa>(p) == Reading::taps && can_skip_taps(p);
}

// Whether the words of a block's input rows are made before its table.
template <class Isa>
bool widens_rows(const Int8Conv2d& p) {
    return kGroup<Isa> == 2 && reading_of<Isa>(p) != Reading::strip;
}

// Whether an output pixel is the product of the input pixel at its place.
inline bool is_pointwise(const Int8Conv2d& p) {
    return taps_of(p.weight) == 1 && p.stride_h == 1 && p.stride_w == 1 && p.out_h == p.in_h && p.out_w == p.in_w &&
           p.pad_top == 0 && p.pad_left == 0;
}

// Whether such pixels are read without a table.
template <class Isa>
bool reads_directly(const Int8Conv2d& p) {
    return consecutive_rows<Isa>() > 0 && is_pointwise(p) && reading_of<Isa>(p) == Reading::taps;
}

// Whether a block is an output row, of which the tiles read copies of input rows with their padding.
template <class Isa>
bool copies_rows(const Int8Conv2d& p) {
    return consecutive_rows<Isa>() > 0 && p.weight.kernel_h > 1 && reading_of<Isa>(p) == Reading::rows;
}

// Bytes that go in and out of a block that is read directly, half of an L1 cache: a block is started in the time of a
// tile, and layers of few channels have many.
constexpr int64_t kPointwiseBytes = 24576;

template <class Isa>
int64_t block_pixels(const Int8Conv2d& p) {
    if (reads_directly<Isa>(p)) {
        const int64_t fitting = kPointwiseBytes / (p.input_stride + p.output_stride);
        return round_up(fitting < Isa::kBlockPixels ? Isa::kBlockPixels : smaller(fitting, 4 * Isa::kBlockPixels),
                        consecutive_rows<Isa>());
    }
    if (copies_rows<Isa>(p)) return p.out_w;
    return skips_taps<Isa>(p) || widens_rows<Isa>(p) ? sorted_pixels<Isa>() : Isa::kBlockPixels;
}

template <class Isa>
Blocks blocks_of(const Int8Conv2d& p) {
    return Blocks(p, block_pixels<Isa>(p), reads_directly<Isa>(p) ? consecutive_rows<Isa>() : 1);
}

template <class Isa>
int64_t igemm_units(const Int8Conv2d& p) {
    return blocks_of<Isa>(p).blocks * p.weight.groups * Panels<Isa>(p.weight).panels;
}

// Runs the tiles of `pixels` rows of the table. Of those that are needed, the first ones have a row more where the
// pixels do not divide evenly.
template <class Isa>
void run_tiles(Tile& tile, int64_t pixels, int64_t vectors) {
    const int64_t tiles = ceil_div(pixels, Isa::rows(vectors)), low = pixels / tiles, taller = pixels % tiles;
    for (int64_t rows = low + 1; rows >= low; --rows) {
        tile.pixels = rows * (rows > low ? taller : tiles - taller);
        if (tile.pixels == 0) continue;
        Isa::tiles(rows, vectors)(tile);
        tile.rows += tile.pixels;
        tile.pixel += tile.pixels;
        if (tile.at) tile.at += tile.pixels;
        if (tile.first) tile.first += tile.pixels * tile.first_stride;
        if (tile.ends) tile.ends += tile.pixels * 4;
        tile.ahead += tile.pixels * tile.ahead_bytes;
        tile.next += tile.pixels / rows * tile.taps * (tile.inner / 4) * tile.next_bytes;
    }
}

// The same where the pixels are sorted: tiles of one class have the same taps.
template <class Isa, int64_t BLOCK>
void run_classes(Tile& tile, const TapClasses<BLOCK>& classes, int64_t vectors) {
    const int64_t all = tile.taps;
    tile.at = classes.pixel;
    for (int64_t c = 0; c < classes.count; ++c) {
        if (classes.classes[c].pixels == 0) continue;
        tile.tap = classes.classes[c].tap;
        tile.taps = classes.classes[c].taps;
        run_tiles<Isa>(tile, classes.classes[c].pixels, vectors);
    }
    tile.at = nullptr;
    tile.tap = nullptr;
    tile.taps = all;
}

// The left operands of one block after another, in the thread's scratch memory.
template <class Isa>
struct LeftOperands {
    using Product = typename Isa::Product;
    static constexpr int64_t kProductBytes = sizeof(Product);

    const Int8Conv2d& p;
    const Reading reading;
    const bool skips, widens, copies;
    const int64_t most, row_depth, depth;  // pixels of a block; products
    CopiedRows copied;                     // where `copies`
    const uint8_t **table, **sorted, **strip_rows;
    uint8_t* padding;
    Product *strip, *words;
    TapClasses<sorted_pixels<Isa>()> classes;
    int64_t group_done;

    // For blocks [begin, end).
    LeftOperands(const Int8Conv2d& conv, const Blocks& blocks, int64_t begin, int64_t end)
        : p(conv),
          reading(reading_of<Isa>(conv)),
          skips(skips_taps<Isa>(conv)),
          widens(widens_rows<Isa>(conv)),
          copies(copies_rows<Isa>(conv)),
          most(block_pixels<Isa>(conv)),
          row_depth(row_depth_of<Isa>(conv.weight)),
          depth(depth_of<Isa>(conv.weight)),
          copied(conv, row_depth) {
        const int64_t table_entries = taps_of(p.weight) * most, channels = p.weight.groups * p.weight.group_channels;
        const int64_t table_bytes = round_up(((skips ? 2 : 1) * table_entries + most) * 8, 64);
        const int64_t row_bytes = round_up(channels * kProductBytes, 64);
        const int64_t strip_bytes = copies                     ? copied.bytes()
                                    : reading == Reading::taps ? 0
                                                               : round_up(most * depth * kProductBytes, 64);
        int64_t rows = 0;
        for (int64_t block = begin; widens && block < end; ++block) {
            const WidenedRows widened(p, blocks.begin(block), blocks.begin(block + 1));
            rows = widened.end - widened.begin > rows ? widened.end - widened.begin : rows;
        }
        const int64_t words_bytes = widens ? (rows * WidenedRows::row_words(p) + row_depth) * kProductBytes : 0;
        char* scratch = static_cast<char*>(thread_scratch(table_bytes + row_bytes + strip_bytes + words_bytes));
        table = reinterpret_cast<const uint8_t**>(scratch);
        strip_rows = table + table_entries;
        sorted = strip_rows + most;  // where `skips`
        padding = reinterpret_cast<uint8_t*>(scratch + table_bytes);
        strip = reinterpret_cast<Product*>(padding + row_bytes);
        words = reinterpret_cast<Product*>(padding + row_bytes + strip_bytes);
        for (int64_t m = 0; reading == Reading::strip && m < most; ++m)
            strip_rows[m] = reinterpret_cast<const uint8_t*>(strip + m * depth);
        memset(padding, p.input_zero_point ^ p.input_flip, static_cast<size_t>(row_bytes));
        if (widens)
            for (int64_t c = 0; c < channels; ++c)
                reinterpret_cast<Product*>(padding)[c] = static_cast<Product>(p.input_zero_point);
        if (copies) copied.start(padding[0], reinterpret_cast<uint8_t*>(strip));
    }

    void fill(int64_t begin, int64_t end) {
        if constexpr (consecutive_rows<Isa>() > 0)
            if (copies) {
                copied.find(p, begin / p.out_w, padding[0]);
                return Isa::collect_ends(copied, p.out_w);
            }
        Int8Conv2d widened;
        if constexpr (kProductBytes > 1)
            if (widens) widened = WidenedRows(p, begin, end).fill(p, words);
        const Int8Conv2d& from = widens ? widened : p;
        if (reading == Reading::rows)
            fill_rows(from, begin, end, padding, row_depth, strip, table, most);
        else
            fill_table(from, begin, end, padding, table, most);
        if constexpr (sorted_pixels<Isa>() > 0)
            if (skips) {
                classes.sort(p, begin, end);
                if (classes.count > 1) classes.sort_table(table, taps_of(p.weight), end - begin, most, sorted);
            }
        group_done = -1;
    }

    // The table of a group whose block is `pixels` long.
    const uint8_t* const* rows(int64_t group, int64_t pixels) {
        if (reading != Reading::strip) return classes.count > 1 ? sorted : table;
        if (group != group_done)
            fill_strip(p, table, most, group * p.weight.group_channels, pixels, depth, row_depth, place_of<Isa>, strip);
        group_done = group;
        return strip_rows;
    }
};

// Weights of a layer that stay in L2 from one block of pixels to the next. More of them, and those that only one block
// reads, come from further away, and the first tile of a panel waited for them: 512 to 512 channels at 7 x 7 takes 0.86
// of the time when a panel is fetched evenly while the one before it is in use, and 1.0 when in bursts per tap.
constexpr int64_t kWeightsKept = int64_t{1} << 19;

template <class Isa>
void igemm(const Int8Conv2d& p, int64_t begin, int64_t end) {
    constexpr int64_t product_bytes = LeftOperands<Isa>::kProductBytes;
    if (begin >= end) return;
    const Int8Weight& w = p.weight;
    const Panels<Isa> panels(w);
    const Blocks blocks = blocks_of<Isa>(p);
    const int64_t per_block = panels.panels * w.groups, per_group = w.out_channels / w.groups;
    LeftOperands<Isa> left(p, blocks, begin / per_block, (end - 1) / per_block + 1);

    Tile tile{};
    tile.conv = &p;
    tile.range = byte_range(p);
    tile.rare = is_rare(p);
    tile.row_stride = left.most;
    const bool strip = left.reading == Reading::strip;
    const int64_t row_taps = left.reading == Reading::taps ? w.kernel_w : 1;
    tile.taps = strip ? 1 : w.kernel_h * row_taps;
    tile.inner = (strip ? left.depth : left.row_depth / row_taps) * product_bytes;
    // 1 x 1 layers read every pixel once, by rows in an order that no hardware prefetcher follows.
    const bool streams = is_pointwise(p) && w.groups == 1;
    const bool direct = reads_directly<Isa>(p);
    tile.first_stride = left.copies ? left.copied.step : p.input_stride;
    tile.tap_stride = left.copied.pitch;
    tile.end_dwords = left.copies ? left.copied.end_dwords : 0;
    tile.end_pitch = left.copied.end_pitch;
    tile.ahead_bytes = streams ? ceil_div(p.input_stride, panels.panels) : 0;
    const bool weights_come = blocks.blocks == 1 || igemm_weight_bytes<Isa>(w) > kWeightsKept;
    int64_t block_done = -1;
    for (int64_t unit = begin; unit < end; ++unit) {
        const int64_t panel = unit % panels.panels, group = unit / panels.panels % w.groups, block = unit / per_block;
        const int64_t first_pixel = blocks.begin(block), pixels = blocks.begin(block + 1) - first_pixel;
        if (block != block_done && !direct) left.fill(first_pixel, first_pixel + pixels);
        block_done = block;

        const int64_t vector = panels.begin(panel), vectors = panels.begin(panel + 1) - vector;
        const int64_t channel = vector * Isa::kLanes;
        tile.rows = left.rows(group, pixels);
        tile.row_offset = left.reading == Reading::taps ? group * w.group_channels * product_bytes : 0;
        if (direct) tile.first = p.input + first_pixel * p.input_stride + tile.row_offset;
        if (left.copies) {
            tile.first = left.copied.rows;
            tile.ends = left.copied.ends;
        }
        tile.weight = p.packed + (group * panels.vectors + vector) * Isa::kLanes * left.depth * product_bytes;
        tile.channel = group * per_group + channel;
        tile.channels = smaller(per_group - channel, vectors * Isa::kLanes);
        const int64_t panel_bytes = vectors * Isa::kLanes * left.depth * product_bytes;
        // Behind the last panel of a layer lie the weights of the next one, in a graph's program.
        const bool wraps = panel + 1 == panels.panels && group + 1 == w.groups && block + 1 < blocks.blocks;
        tile.next = wraps ? p.packed : tile.weight + panel_bytes;
        tile.next_bytes = weights_come ? ceil_div(vectors * 64, ceil_div(pixels, Isa::rows(vectors))) : 0;
        tile.pixel = first_pixel;
        tile.ahead = p.input + (first_pixel + pixels) * p.input_stride + panel * pixels * tile.ahead_bytes;
        if (left.classes.count > 1)
            run_classes<Isa>(tile, left.classes, vectors);
        else
            run_tiles<Isa>(tile, pixels, vectors);
    }
}

}  // namespace
}  // namespace imgopt

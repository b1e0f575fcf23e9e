// Depthwise convolution on NEON with the dot product extension, for every geometry, 16 channels of a pixel at a time.
// sdot adds four products to an int32, so four rows of an input column are interleaved to dwords [r0 r1 r2 r3], in the
// order of the channels. As grouped convolution, a channel at a time, an output took some 60 times as many
// instructions.
#pragma once

#include <arm_neon.h>

#include "epilogue_neon.h"

namespace imgopt::neon {
namespace {

constexpr int64_t kDepthwiseChannels = 16;
constexpr int64_t kDepthwisePixels = 96;

inline bool is_depthwise(const Int8Weight& w) { return w.group_channels == 1 && w.out_channels == w.groups; }
inline int64_t row_groups(const Int8Weight& w) { return ceil_div(w.kernel_h, 4); }
inline int64_t depthwise_block_bytes(const Int8Weight& w) {
    return w.kernel_w * row_groups(w) * 4 * kDepthwiseChannels;
}
inline int64_t depthwise_weight_bytes(const Int8Weight& w) {
    return ceil_div(w.out_channels, kDepthwiseChannels) * depthwise_block_bytes(w);
}

// (block of 16 channels, kernel_w, rows / 4, channel, row % 4), zero where there is no row or channel.
inline void depthwise_weight_pack(const Int8Weight& w, const int8_t* weight, uint8_t* packed) {
    memset(packed, 0, static_cast<size_t>(depthwise_weight_bytes(w)));
    for (int64_t c = 0; c < w.out_channels; ++c) {
        uint8_t* block = packed + c / kDepthwiseChannels * depthwise_block_bytes(w);
        for (int64_t ky = 0; ky < w.kernel_h; ++ky)
            for (int64_t kx = 0; kx < w.kernel_w; ++kx)
                block[((kx * row_groups(w) + ky / 4) * kDepthwiseChannels + c % kDepthwiseChannels) * 4 + ky % 4] =
                    static_cast<uint8_t>(weight[(c * w.kernel_h + ky) * w.kernel_w + kx]);
    }
}

inline int64_t depthwise_units(const Int8Conv2d& p) { return Blocks(p, kDepthwisePixels).blocks; }

// Adds the products of four rows of a column.
[[gnu::always_inline]] inline void add_column(const int8x16_t (&row)[4], const uint8_t* weight, int32x4_t (&sums)[4]) {
    const int16x8_t low01 = vreinterpretq_s16_s8(vzip1q_s8(row[0], row[1]));
    const int16x8_t high01 = vreinterpretq_s16_s8(vzip2q_s8(row[0], row[1]));
    const int16x8_t low23 = vreinterpretq_s16_s8(vzip1q_s8(row[2], row[3]));
    const int16x8_t high23 = vreinterpretq_s16_s8(vzip2q_s8(row[2], row[3]));
    const int16x8_t quads[4] = {vzip1q_s16(low01, low23), vzip2q_s16(low01, low23), vzip1q_s16(high01, high23),
                                vzip2q_s16(high01, high23)};
    for (int j = 0; j < 4; ++j)
        sums[j] = vdotq_s32(sums[j], vreinterpretq_s8_u8(vld1q_u8(weight + 16 * j)), vreinterpretq_s8_s16(quads[j]));
}

// One pixel of t.channels channels; FULL: 16. `rows` is its column of the table, `start` what its sums begin with.
template <bool FULL>
inline void depthwise_pixel(const Tile& t, const uint8_t* const* rows, const int32x4_t* start) {
    const Int8Weight& w = t.conv->weight;
    const uint8x16_t flip = vdupq_n_u8(t.conv->input_flip ^ 0x80);
    const int64_t down = w.kernel_w * t.row_stride;  // to the next row of taps
    const uint8_t* weight = t.weight;
    int32x4_t sums[4] = {start[0], start[1], start[2], start[3]};
    for (int64_t kx = 0; kx < w.kernel_w; ++kx, rows += t.row_stride)
        for (int64_t ky = 0; ky < w.kernel_h; ky += 4, weight += 4 * kDepthwiseChannels) {
            int8x16_t row[4];
            for (int64_t i = 0; i < 4; ++i) {  // rows that are not there meet weights of zero
                const uint8_t* from = rows[(ky + i < w.kernel_h ? ky + i : ky) * down] + t.channel;
                row[i] = vreinterpretq_s8_u8(veorq_u8(FULL ? vld1q_u8(from) : load_bytes(from, t.channels), flip));
            }
            add_column(row, weight, sums);
        }
    store_row<4>(t, t.pixel, sums);
}

// `weight_sums` holds the sum of every channel's weights.
inline void depthwise(const Int8Conv2d& p, const int32_t* weight_sums, int64_t begin, int64_t end) {
    const Int8Weight& w = p.weight;
    const Blocks blocks(p, kDepthwisePixels);
    const int64_t table_bytes = taps_of(w) * kDepthwisePixels * 8, row_bytes = round_up(w.groups, 64);
    char* scratch = static_cast<char*>(thread_scratch(table_bytes + row_bytes));
    const uint8_t** table = reinterpret_cast<const uint8_t**>(scratch);
    uint8_t* padding = reinterpret_cast<uint8_t*>(scratch + table_bytes);
    memset(padding, p.input_zero_point ^ p.input_flip, static_cast<size_t>(row_bytes));
    Tile tile{};
    tile.conv = &p;
    tile.range = byte_range(p);
    tile.row_stride = kDepthwisePixels;
    for (int64_t block = begin; block < end; ++block) {
        const int64_t first = blocks.begin(block), pixels = blocks.begin(block + 1) - first;
        fill_table(p, first, first + pixels, padding, table, kDepthwisePixels);
        for (int64_t c = 0; c < w.out_channels; c += kDepthwiseChannels) {
            tile.weight = p.packed + c / kDepthwiseChannels * depthwise_block_bytes(w);
            tile.channel = c;
            tile.channels = smaller(kDepthwiseChannels, w.out_channels - c);
            int32x4_t start[4];
            for (int j = 0; j < 4; ++j)
                start[j] = vmlaq_n_s32(vld1q_s32(p.offset + c + 4 * j), vld1q_s32(weight_sums + c + 4 * j), 128);
            for (int64_t m = 0; m < pixels; ++m) {
                tile.pixel = first + m;
                tile.channels == kDepthwiseChannels ? depthwise_pixel<true>(tile, table + m, start)
                                                    : depthwise_pixel<false>(tile, table + m, start);
            }
        }
    }
}

}  // namespace
}  // namespace imgopt::neon

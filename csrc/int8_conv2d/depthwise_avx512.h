// Depthwise convolution on AVX-512 VNNI for every geometry but 3 x 3 and 5 x 5 with strides 1 and 2
// (depthwise_rows_avx512.h), 64 lanes at a time. vpdpbusd wants the four products of a sum in one dword, so four rows
// of an input column are interleaved to [r0 r1 r2 r3] per channel, once, however many taps read it. Interleaving works
// within 128-bit lanes and leaves vector j with channels 16L + 4j + i in dword 4L + i, which is exactly the order that
// packing to bytes undoes. Lanes are 64 channels of a pixel, or, where at most 32 channels are left, those of two
// neighbouring pixels.
//
// Work runs along memory, all channels of a strip of pixels before the next strip. A pass over the image per block of
// channels, a row at a time, took 621 us instead of 251 for eight images of 192 channels at 28 x 28 that had left the
// caches.
#pragma once

#include "depthwise3_avx512.h"
#include "depthwise5_avx512.h"

namespace imgopt::avx512 {
namespace {

constexpr int64_t kStripBytes = 16384;  // of the columns that are interleaved together; they stay in L1

// Where a vector of bytes goes: all its lanes to one pixel, or half of them to each of two.
struct DepthwiseOutput {
    uint8_t* data;
    int64_t stride;
    __mmask64 mask;
};

template <class L>
[[gnu::always_inline]] inline void store_lanes(uint8_t* out, __m512i bytes, const DepthwiseOutput& to, bool second) {
    if constexpr (L::kPixels == 1) {
        L::store_whole(out, bytes, to.mask);
    } else {
        L::store_half(out, _mm512_castsi512_si256(bytes), to.mask);
        if (second) L::store_half(out + to.stride, _mm512_extracti64x4_epi64(bytes, 1), to.mask);
    }
}

struct Depthwise {
    const Int8Conv2d& p;
    const int64_t taps, groups;  // of a row; of four rows
    const ByteEpilogue<false> to_bytes;
    const bool rare;
    const int64_t block_bytes, strip_pixels;
    InputRows* inputs;  // per group
    uint8_t *blocks, *strip, *padding;

    explicit Depthwise(const Int8Conv2d& conv)
        : p(conv),
          taps(conv.weight.kernel_w),
          groups(row_groups(conv.weight.kernel_h)),
          to_bytes(conv, byte_range(conv)),
          rare(conv.residual || is_rare(conv)),
          block_bytes(static_cast<int64_t>(sizeof(DepthwiseBlock)) + depthwise_block_bytes(conv.weight)),
          strip_pixels(pixels_of_strip()) {
        const int64_t channels = p.weight.out_channels;
        const int64_t inputs_bytes = round_up(groups * static_cast<int64_t>(sizeof(InputRows)), 64);
        const int64_t blocks_bytes = depthwise_blocks(p.weight) * block_bytes;
        // Two pixels of a vector read their columns side by side, where the second may lie behind the strip.
        const int64_t columns = strip_pixels * p.stride_w + (taps - 1) * p.dilation_w + 1;
        const int64_t strip_bytes = columns * groups * kColumnBytes;
        uint8_t* scratch = static_cast<uint8_t*>(thread_scratch(inputs_bytes + blocks_bytes + strip_bytes + 64));
        inputs = reinterpret_cast<InputRows*>(scratch);
        blocks = scratch + inputs_bytes;
        strip = blocks + blocks_bytes;
        padding = strip + strip_bytes;
        memset(padding, p.input_zero_point ^ p.input_flip, 64);
        for (int64_t c = 0; c < channels; c += kDepthwiseChannels)
            prepare_block(p, c, halves(c) ? 32 : 64, block_at(c));
    }

    bool halves(int64_t channel) const { return !rare && p.weight.out_channels - channel <= 32; }
    DepthwiseBlock* block_at(int64_t channel) const {
        return reinterpret_cast<DepthwiseBlock*>(blocks + channel / kDepthwiseChannels * block_bytes);
    }

    // Strips of nearly equal length, a multiple of four pixels.
    int64_t pixels_of_strip() const {
        const int64_t columns = kStripBytes / (groups * kColumnBytes) - (taps - 1) * p.dilation_w;
        int64_t most = smaller(columns / p.stride_w / 4 * 4, kStripPixels);
        most = most > 4 ? most : 4;
        return round_up(ceil_div(p.out_w, ceil_div(p.out_w, most)), 4);
    }

    // The input rows of output row oy.
    void find_rows(int64_t n, int64_t oy) const {
        const int64_t row_bytes = p.in_w * p.input_stride;
        for (int64_t group = 0; group < groups; ++group) {
            InputRows& in = inputs[group];
            const int64_t first = group * 4;
            in.real = smaller(4, p.weight.kernel_h - first);
            for (int64_t i = 0; i < in.real; ++i) {
                const int64_t y = oy * p.stride_h - p.pad_top + (first + i) * p.dilation_h;
                const bool inside = y >= 0 && y < p.in_h;
                in.row[i] = inside ? p.input + (n * p.in_h + y) * row_bytes : padding;
                in.step[i] = inside ? p.input_stride : 0;
                in.channel_step[i] = inside;
            }
        }
    }

    template <class L>
    void interleave(int64_t channel, const ColumnRange& columns) const {
        for (int64_t group = 0; group < groups; ++group)
            interleave_function<L>(inputs[group].real)(inputs[group], channel, columns, strip + group * kColumnBytes);
    }

    // The sums of COUNT neighbouring vectors from `columns` on, vector j of the four.
    template <int PIXELS, int COUNT>
    [[gnu::always_inline]] void sum(const DepthwiseBlock* block, const uint8_t* columns, int j,
                                    __m512i (&sums)[COUNT]) const {
        const int64_t column_bytes = groups * kColumnBytes, vector_bytes = PIXELS * p.stride_w * column_bytes;
#pragma GCC unroll 4
        for (int i = 0; i < COUNT; ++i) sums[i] = block->offset[j];
        for (int64_t kx = 0; kx < taps; ++kx)
            for (int64_t group = 0; group < groups; ++group) {
                const uint8_t* column = columns + kx * p.dilation_w * column_bytes + group * kColumnBytes + 64 * j;
                const __m512i w = block->weight[(kx * groups + group) * 4 + j];
#pragma GCC unroll 4
                for (int i = 0; i < COUNT; ++i)
                    sums[i] = _mm512_dpbusd_epi32(sums[i], _mm512_load_si512(column + i * vector_bytes), w);
            }
    }

    // COUNT vectors. `second`: the last one has two real pixels, if it has room for two.
    template <class L, int COUNT>
    [[gnu::always_inline]] void vectors(const DepthwiseBlock* block, const DepthwiseOutput& to, int64_t pixel,
                                        bool second) const {
        const uint8_t* columns = strip + pixel * p.stride_w * groups * kColumnBytes;
        __m512i words[2][COUNT];
#pragma GCC unroll 2
        for (int pair = 0; pair < 2; ++pair) {
            __m512i q[2][COUNT];
#pragma GCC unroll 2
            for (int j = 0; j < 2; ++j) {
                sum<L::kPixels>(block, columns, 2 * pair + j, q[j]);
#pragma GCC unroll 4
                for (int i = 0; i < COUNT; ++i) q[j][i] = rounded(q[j][i], block, 2 * pair + j);
            }
#pragma GCC unroll 4
            for (int i = 0; i < COUNT; ++i) words[pair][i] = to_bytes.words(q[0][i], q[1][i]);
        }
#pragma GCC unroll 4
        for (int i = 0; i < COUNT; ++i)
            store_lanes<L>(to.data + (pixel + i * L::kPixels) * to.stride, to_bytes.bytes(words[0][i], words[1][i]), to,
                           second || i + 1 < COUNT);
    }

    // One strip of one block: `pixels` output pixels.
    template <class L>
    void strip_of(int64_t channel, const ColumnRange& columns, const DepthwiseOutput& to, int64_t pixels) const {
        interleave<L>(channel, columns);
        const DepthwiseBlock* block = block_at(channel);
        const auto second = [&](int64_t end) { return end < pixels || pixels % L::kPixels == 0; };
        int64_t pixel = 0;
        for (; pixel + 3 * L::kPixels < pixels; pixel += 4 * L::kPixels)
            vectors<L, 4>(block, to, pixel, second(pixel + 4 * L::kPixels));
        for (; pixel < pixels; pixel += L::kPixels) vectors<L, 1>(block, to, pixel, second(pixel + L::kPixels));
    }

    // One strip, all channels: `pixels` outputs from `pixel` on, which is at column ox.
    void channels(int64_t pixel, int64_t ox, int64_t pixels) const {
        ColumnRange columns{ox * p.stride_w - p.pad_left,
                            (pixels - 1) * p.stride_w + (taps - 1) * p.dilation_w + 1,
                            p.in_w,
                            p.stride_w,
                            groups * kColumnBytes,
                            ~uint64_t{0},
                            _mm512_set1_epi8(static_cast<char>(p.input_flip)),
                            _mm512_set1_epi8(static_cast<char>(p.input_zero_point))};
        uint8_t* out = static_cast<uint8_t*>(p.output) + pixel * p.output_stride;
        for (int64_t c = 0; c < p.weight.out_channels; c += kDepthwiseChannels) {
            const int64_t left = p.weight.out_channels - c;
            if (left < kDepthwiseChannels) columns.mask = (uint64_t{1} << left) - 1;
            if (rare) {
                interleave<Lanes<64, true>>(c, columns);
                store_rare(c, pixel, pixels);
                continue;
            }
            const DepthwiseOutput to = {out + c, p.output_stride, columns.mask};
            if (left >= 64)
                strip_of<Lanes<64, false>>(c, columns, to, pixels);
            else if (left > 32)
                strip_of<Lanes<64, true>>(c, columns, to, pixels);
            else if (left == 32)
                strip_of<Lanes<32, false>>(c, columns, to, pixels);
            else if (left == 16)
                strip_of<Lanes<16, false>>(c, columns, to, pixels);
            else
                strip_of<Lanes<32, true>>(c, columns, to, pixels);
        }
    }

    // Float output, shifts, or a residual, a pixel at a time.
    [[gnu::noinline]] void store_rare(int64_t channel, int64_t pixel, int64_t pixels) const {
        const int64_t channels = smaller(kDepthwiseChannels, p.weight.out_channels - channel);
        Tile tile{};
        tile.conv = &p, tile.channel = channel, tile.channels = channels;
        for (int64_t i = 0; i < pixels; ++i) {
            alignas(64) int32_t found[4][16], sums[4][4][4];  // lane 4L + n of vector j is channel 16L + 4j + n
            for (int j = 0; j < 4; ++j) {
                __m512i q[1];
                sum<1>(block_at(channel), strip + i * p.stride_w * groups * kColumnBytes, j, q);
                _mm512_store_si512(found[j], q[0]);
                for (int l = 0; l < 4; ++l) memcpy(sums[l][j], found[j] + 4 * l, 16);
            }
            avx512::store_rare(tile, pixel + i, &sums[0][0][0], 1, 64);
        }
    }

    // Units are output rows.
    void run(int64_t begin, int64_t end) const {
        for (int64_t row = begin; row < end; ++row) {
            find_rows(row / p.out_h, row % p.out_h);
            for (int64_t ox = 0; ox < p.out_w; ox += strip_pixels)
                channels(row * p.out_w + ox, ox, smaller(strip_pixels, p.out_w - ox));
        }
    }
};

int64_t depthwise_units(const Int8Conv2d& p) {
    if (p.batch * p.out_h * p.out_w == 0) return 0;
    return p.batch * p.out_h;
}

void depthwise(const Int8Conv2d& p, int64_t begin, int64_t end) {
    if (is_depthwise_rows(p, 3, 1)) return depthwise_rows<Depthwise3, 1>(p, begin, end);
    if (is_depthwise_rows(p, 3, 2)) return depthwise_rows<Depthwise3, 2>(p, begin, end);
    if (is_depthwise_rows(p, 5, 1)) return depthwise_rows<Depthwise5, 1>(p, begin, end);
    if (is_depthwise_rows(p, 5, 2)) return depthwise_rows<Depthwise5, 2>(p, begin, end);
    Depthwise(p).run(begin, end);
}

}  // namespace
}  // namespace imgopt::avx512

// Depthwise convolution on AVX-512 VNNI for every geometry but 3 x 3 with strides 1 and 2 (depthwise3_avx512.h), 64
// lanes at a time. vpdpbusd wants the four products of a sum in one dword, so four rows of an input column are
// interleaved to [r0 r1 r2 r3] per channel: once per column, however many taps read it, and once for two output rows,
// which differ in their weights only: [w0 w1 w2 0] and [0 w0 w1 w2] for 3 rows. Interleaving works within 128-bit lanes
// and leaves vector j with channels 16L + 4j + i in dword 4L + i, which is exactly the order that packing to bytes
// undoes. Lanes are 64 channels of a pixel, or, where at most 32 channels are left, those of two neighbouring pixels.
//
// Work runs along memory, all channels of a strip of pixels before the next strip. A pass over the image per block of
// channels, a row at a time, took 621 us instead of 251 for eight images of 192 channels at 28 x 28 that had left the
// caches.
#pragma once

#include "depthwise3_avx512.h"

namespace imgopt::avx512 {
namespace {

constexpr int64_t kStripBytes = 16384;  // of the columns that are interleaved together; they stay in L1

// Where a vector of bytes goes: all its lanes to one pixel, or half of them to each of two.
struct DepthwiseOutput {
    uint8_t* data;
    int64_t row_bytes, stride;
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

// Adds the products of COUNT neighbouring vectors of each of ROWS output rows, vector j of the four.
template <class G, int ROWS, int PIXELS, int COUNT>
[[gnu::always_inline]] inline void depthwise_sums(const G& g, const DepthwiseBlock* block, const uint8_t* strip, int j,
                                                  __m512i (&sums)[ROWS][COUNT]) {
    const int64_t column_bytes = g.groups * kColumnBytes, vector_bytes = PIXELS * g.stride * column_bytes;
#pragma GCC unroll 2
    for (int v = 0; v < ROWS; ++v)
#pragma GCC unroll 4
        for (int i = 0; i < COUNT; ++i) sums[v][i] = block->offset[j];
    const auto add_tap = [&](int64_t kx, int64_t group) __attribute__((always_inline)) {
        const uint8_t* column = strip + kx * g.dilation * column_bytes + group * kColumnBytes + 64 * j;
        const __m512i* weight = block->weight + (kx * g.groups + group) * 4 + j;
        __m512i w[ROWS];
#pragma GCC unroll 2
        for (int v = 0; v < ROWS; ++v) w[v] = weight[v * g.taps * g.groups * 4];
#pragma GCC unroll 4
        for (int i = 0; i < COUNT; ++i) {
#pragma GCC unroll 2
            for (int v = 0; v < ROWS; ++v) {
                const __m512i x = _mm512_load_si512(column + i * vector_bytes);
                sums[v][i] = _mm512_dpbusd_epi32(sums[v][i], x, w[v]);
            }
        }
    };
    if constexpr (G::kFixed) {
#pragma GCC unroll 5
        for (int64_t kx = 0; kx < G::taps; ++kx)
#pragma GCC unroll 2
            for (int64_t group = 0; group < G::groups; ++group) add_tap(kx, group);
    } else {
        for (int64_t kx = 0; kx < g.taps; ++kx)
            for (int64_t group = 0; group < g.groups; ++group) add_tap(kx, group);
    }
}

// COUNT vectors of each of ROWS output rows. `second`: the last vector has two real pixels.
template <class G, int ROWS, class L, int COUNT, bool PLAIN>
[[gnu::always_inline]] inline void depthwise_vectors(const G& g, const DepthwiseBlock* block,
                                                     const ByteEpilogue<PLAIN>& to_bytes, const uint8_t* strip,
                                                     const DepthwiseOutput& to, int64_t pixel, bool second) {
    __m512i words[2][ROWS][COUNT];
#pragma GCC unroll 2
    for (int pair = 0; pair < 2; ++pair) {
        __m512i q[2][ROWS][COUNT];
#pragma GCC unroll 2
        for (int j = 0; j < 2; ++j) {
            depthwise_sums<G, ROWS, L::kPixels, COUNT>(g, block, strip, 2 * pair + j, q[j]);
#pragma GCC unroll 2
            for (int v = 0; v < ROWS; ++v)
#pragma GCC unroll 4
                for (int i = 0; i < COUNT; ++i) q[j][v][i] = rounded<PLAIN>(q[j][v][i], block, 2 * pair + j);
        }
#pragma GCC unroll 2
        for (int v = 0; v < ROWS; ++v)
#pragma GCC unroll 4
            for (int i = 0; i < COUNT; ++i) words[pair][v][i] = to_bytes.words(q[0][v][i], q[1][v][i]);
    }
#pragma GCC unroll 2
    for (int v = 0; v < ROWS; ++v)
#pragma GCC unroll 4
        for (int i = 0; i < COUNT; ++i)
            store_lanes<L>(to.data + v * to.row_bytes + (pixel + i * L::kPixels) * to.stride,
                           to_bytes.bytes(words[0][v][i], words[1][v][i]), to, second || i + 1 < COUNT);
}

// One strip of one block: `pixels` output pixels of ROWS rows.
template <class G, int ROWS, class L, bool PLAIN>
void depthwise_strip(const G& g, const DepthwiseBlock* block, const ByteEpilogue<PLAIN>& to_bytes, const uint8_t* strip,
                     const DepthwiseOutput& to, int64_t pixels) {
    const int64_t vectors = ceil_div(pixels, L::kPixels), pixel_bytes = g.stride * g.groups * kColumnBytes;
    const bool even = pixels % L::kPixels == 0;
    int64_t i = 0;
    for (; i + 4 <= vectors; i += 4)
        depthwise_vectors<G, ROWS, L, 4, PLAIN>(g, block, to_bytes, strip + i * L::kPixels * pixel_bytes, to,
                                                i * L::kPixels, even || i + 4 < vectors);
    if (i + 2 <= vectors) {
        depthwise_vectors<G, ROWS, L, 2, PLAIN>(g, block, to_bytes, strip + i * L::kPixels * pixel_bytes, to,
                                                i * L::kPixels, even || i + 2 < vectors);
        i += 2;
    }
    if (i < vectors)
        depthwise_vectors<G, ROWS, L, 1, PLAIN>(g, block, to_bytes, strip + i * L::kPixels * pixel_bytes, to,
                                                i * L::kPixels, even);
}

// The operation for one geometry. PLAIN: see ByteEpilogue; the sums are floats then. A unit of work is G::kRows output
// rows, or the last ones of an image.
template <class G, bool PLAIN>
struct Depthwise {
    const Int8Conv2d& p;
    const G g;
    const ByteEpilogue<PLAIN> to_bytes;
    const bool rare;
    const int64_t block_bytes, strip_pixels;
    InputRows* inputs;  // per group
    uint8_t *blocks, *strip, *padding;

    static int64_t units(const Int8Conv2d& p) { return p.batch * ceil_div(p.out_h, G::kRows); }

    explicit Depthwise(const Int8Conv2d& conv)
        : p(conv),
          g(conv),
          to_bytes(conv, byte_range(conv)),
          rare(conv.residual || is_rare(conv)),
          block_bytes(static_cast<int64_t>(sizeof(DepthwiseBlock)) + G::kRows * g.taps * g.groups * kColumnBytes),
          strip_pixels(pixels_of_strip()) {
        const int64_t channels = p.weight.out_channels;
        const int64_t inputs_bytes = round_up(g.groups * static_cast<int64_t>(sizeof(InputRows)), 64);
        const int64_t blocks_bytes = depthwise_blocks(p.weight) * block_bytes;
        // Two pixels of a vector read their columns side by side, where the second may lie behind the strip.
        const int64_t columns = strip_pixels * g.stride + (g.taps - 1) * g.dilation + 1;
        const int64_t strip_bytes = columns * g.groups * kColumnBytes;
        uint8_t* scratch = static_cast<uint8_t*>(thread_scratch(inputs_bytes + blocks_bytes + strip_bytes + 64));
        inputs = reinterpret_cast<InputRows*>(scratch);
        blocks = scratch + inputs_bytes;
        strip = blocks + blocks_bytes;
        padding = strip + strip_bytes;
        memset(padding, p.input_zero_point ^ p.input_flip, 64);
        for (int64_t c = 0; c < channels; c += kDepthwiseChannels) {
            prepare_block(p, g, c, halves(c) ? 32 : 64, block_at(c));
            if (PLAIN) take_as_floats(block_at(c));
        }
    }

    bool halves(int64_t channel) const { return !rare && p.weight.out_channels - channel <= 32; }
    DepthwiseBlock* block_at(int64_t channel) const {
        return reinterpret_cast<DepthwiseBlock*>(blocks + channel / kDepthwiseChannels * block_bytes);
    }

    // Strips of nearly equal length, a multiple of four pixels.
    int64_t pixels_of_strip() const {
        const int64_t columns = kStripBytes / (g.groups * kColumnBytes) - (g.taps - 1) * g.dilation;
        int64_t most = smaller(columns / g.stride / 4 * 4, kStripPixels);
        most = most > 4 ? most : 4;
        return round_up(ceil_div(p.out_w, ceil_div(p.out_w, most)), 4);
    }

    // The input rows of ROWS output rows.
    template <int ROWS>
    void find_rows(int64_t n, int64_t oy) const {
        const int64_t row_bytes = p.in_w * p.input_stride;
        const int64_t rows = p.weight.kernel_h + (ROWS - 1) * g.stride;
        for (int64_t group = 0; group < g.groups; ++group) {
            InputRows& in = inputs[group];
            const int64_t first = group * 4;
            in.real = smaller(4, rows - first);
            for (int64_t i = 0; i < in.real; ++i) {
                const int64_t y = oy * p.stride_h - p.pad_top + (first + i) * p.dilation_h;
                const bool inside = y >= 0 && y < p.in_h;
                in.row[i] = inside ? p.input + (n * p.in_h + y) * row_bytes : padding;
                in.step[i] = inside ? p.input_stride : 0;
                in.channel_step[i] = inside;
            }
        }
    }

    template <int ROWS, class L>
    void interleave(int64_t channel, const ColumnRange& columns) const {
        for (int64_t group = 0; group < g.groups; ++group)
            interleave_function<L>(inputs[group].real)(inputs[group], channel, columns, strip + group * kColumnBytes);
    }

    template <int ROWS, class L>
    void strip_of(int64_t channel, const ColumnRange& columns, const DepthwiseOutput& to, int64_t pixels) const {
        interleave<ROWS, L>(channel, columns);
        depthwise_strip<G, ROWS, L, PLAIN>(g, block_at(channel), to_bytes, strip, to, pixels);
    }

    // One strip, all channels: `pixels` outputs of ROWS rows from `pixel` on, which is at column ox.
    template <int ROWS>
    void channels(int64_t pixel, int64_t ox, int64_t pixels) const {
        ColumnRange columns{ox * p.stride_w - p.pad_left,
                            (pixels - 1) * g.stride + (g.taps - 1) * g.dilation + 1,
                            p.in_w,
                            g.stride,
                            g.groups * kColumnBytes,
                            ~uint64_t{0},
                            _mm512_set1_epi8(static_cast<char>(p.input_flip)),
                            _mm512_set1_epi8(static_cast<char>(p.input_zero_point))};
        uint8_t* out = static_cast<uint8_t*>(p.output) + pixel * p.output_stride;
        for (int64_t c = 0; c < p.weight.out_channels; c += kDepthwiseChannels) {
            const int64_t left = p.weight.out_channels - c;
            if (left < kDepthwiseChannels) columns.mask = (uint64_t{1} << left) - 1;
            if (rare) {
                interleave<1, Lanes<64, true>>(c, columns);
                store_rare(c, pixel, pixels);
                continue;
            }
            const DepthwiseOutput to = {out + c, p.out_w * p.output_stride, p.output_stride, columns.mask};
            if (left >= 64)
                strip_of<ROWS, Lanes<64, false>>(c, columns, to, pixels);
            else if (left > 32)
                strip_of<ROWS, Lanes<64, true>>(c, columns, to, pixels);
            else if (left == 32)
                strip_of<ROWS, Lanes<32, false>>(c, columns, to, pixels);
            else if (left == 16)
                strip_of<ROWS, Lanes<16, false>>(c, columns, to, pixels);
            else
                strip_of<ROWS, Lanes<32, true>>(c, columns, to, pixels);
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
                __m512i q[1][1];
                depthwise_sums<G, 1, 1, 1>(g, block_at(channel), strip + i * g.stride * g.groups * kColumnBytes, j, q);
                _mm512_store_si512(found[j], q[0][0]);
                for (int l = 0; l < 4; ++l) memcpy(sums[l][j], found[j] + 4 * l, 16);
            }
            avx512::store_rare(tile, pixel + i, &sums[0][0][0], 1, 64);
        }
    }

    // ROWS output rows from oy on, strip after strip.
    template <int ROWS>
    void rows(int64_t n, int64_t oy) const {
        find_rows<ROWS>(n, oy);
        const int64_t row = n * p.out_h + oy;
        for (int64_t ox = 0; ox < p.out_w; ox += strip_pixels) {
            const int64_t pixels = smaller(strip_pixels, p.out_w - ox);
            channels<ROWS>(row * p.out_w + ox, ox, pixels);
        }
    }

    void run(int64_t begin, int64_t end) const {
        const int64_t per_image = ceil_div(p.out_h, G::kRows);
        for (int64_t unit = begin; unit < end; ++unit) {
            const int64_t n = unit / per_image, oy = unit % per_image * G::kRows;
            if (G::kRows == 1 || oy + G::kRows <= p.out_h)
                rows<G::kRows>(n, oy);
            else
                rows<1>(n, oy);
        }
    }
};

// Calls `use` with the geometry that serves the layer.
template <class Use>
auto with_geometry(const Int8Conv2d& p, const Use& use) {
    if (Geometry<5, 2, 1, 2>::fits(p)) return use(Geometry<5, 2, 1, 2>(p));
    if (Geometry<5, 2, 2, 2>::fits(p)) return use(Geometry<5, 2, 2, 2>(p));
    return use(AnyGeometry(p));
}

int64_t depthwise_units(const Int8Conv2d& p) {
    if (p.batch * p.out_h * p.out_w == 0) return 0;
    if (is_depthwise3(p, 1)) return Depthwise3<1, false>::units(p);
    if (is_depthwise3(p, 2)) return Depthwise3<2, false>::units(p);
    return with_geometry(p, [&](auto g) { return Depthwise<decltype(g), false>::units(p); });
}

void depthwise(const Int8Conv2d& p, int64_t begin, int64_t end) {
    if (is_depthwise3(p, 1)) return depthwise3<1>(p, begin, end);
    if (is_depthwise3(p, 2)) return depthwise3<2>(p, begin, end);
    with_geometry(p, [&](auto g) {
        if (decltype(g)::kFixed && has_float_sums(p))
            Depthwise<decltype(g), decltype(g)::kFixed>(p).run(begin, end);
        else
            Depthwise<decltype(g), false>(p).run(begin, end);
    });
}

}  // namespace
}  // namespace imgopt::avx512

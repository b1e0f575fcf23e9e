// Depthwise layers on AVX-512 VNNI, rolling along a row of outputs: what is the same for the kernels that do so
// (depthwise3_avx512.h, depthwise5_avx512.h). A column of the input is brought to dwords [r0 r1 r2 r3] of four rows,
// the operand of vpdpbusd, added to the sums of all the output pixels that it belongs to, and forgotten; weights and
// sums stay in registers. A column outside of the image is a constant, so a border costs no more than any other pixel.
// With 3 x 3 taps that is 47 instructions per 64 outputs instead of 70 for two rows of two vectors at a time, which
// loaded their weights and formed most columns twice: 11 cycles instead of 13 at 28 x 28 pixels, 15 instead of 22 at 7
// x 7.
//
// A kernel K supplies
//   kTaps, kStride               of both axes
//   kBlockBytes                  of a DepthwiseBlock
//   kFarBytes                    images and outputs of more bytes are fetched ahead
//   prepare(p, channel, bytes, block)
//   strip<L, FETCH>(strip)       all rows of the strip, FETCH: with place.fetch() for every pixel
#pragma once

#include "depthwise_weight_avx512.h"

namespace imgopt::avx512 {
namespace {

constexpr int64_t kBandRows = 8;                        // output rows for which a block's weights are loaded once
constexpr int64_t kMostLaneRows = 4;                    // of 16 channels
constexpr int64_t kMostRows = 5 + (kBandRows - 1) * 2;  // input rows of a band: 5 taps, stride 2

// What the 64 lanes of a vector are: `BYTES` channels of a pixel in each of 64 / BYTES neighbouring output rows; with
// MASKED fewer channels of one pixel.
template <int BYTES, bool MASKED>
struct RowLanes {
    static constexpr int kBytes = BYTES, kRows = 64 / BYTES;

    // Bytes `at` of rows row[0], row[STRIDE], ..
    template <int STRIDE>
    [[gnu::always_inline]] static __m512i load(const uint8_t* const* row, int64_t at, __mmask64 mask) {
        if constexpr (MASKED) return _mm512_maskz_loadu_epi8(mask, row[0] + at);
        if constexpr (BYTES == 64) return _mm512_loadu_si512(row[0] + at);
        if constexpr (BYTES == 32)
            return _mm512_inserti64x4(_mm512_castsi256_si512(load_32(row[0] + at)), load_32(row[STRIDE] + at), 1);
        __m512i v = _mm512_castsi128_si512(load_16(row[0] + at));
        v = _mm512_inserti32x4(v, load_16(row[STRIDE] + at), 1);
        v = _mm512_inserti32x4(v, load_16(row[2 * STRIDE] + at), 2);
        return _mm512_inserti32x4(v, load_16(row[3 * STRIDE] + at), 3);
    }
    // To the first `rows` rows.
    [[gnu::always_inline]] static void store(uint8_t* out, int64_t row_bytes, __m512i bytes, int64_t rows,
                                             __mmask64 mask) {
        if constexpr (MASKED) {
            _mm512_mask_storeu_epi8(out, mask, bytes);
        } else if constexpr (BYTES == 64) {
            _mm512_storeu_si512(out, bytes);
        } else if constexpr (BYTES == 32) {
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm512_castsi512_si256(bytes));
            if (rows > 1)
                _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + row_bytes), _mm512_extracti64x4_epi64(bytes, 1));
        } else {
            _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm512_castsi512_si128(bytes));
            if (rows > 1) store_16(out + row_bytes, _mm512_extracti32x4_epi32(bytes, 1));
            if (rows > 2) store_16(out + 2 * row_bytes, _mm512_extracti32x4_epi32(bytes, 2));
            if (rows > 3) store_16(out + 3 * row_bytes, _mm512_extracti32x4_epi32(bytes, 3));
        }
    }

  private:
    static __m128i load_16(const uint8_t* in) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(in)); }
    static __m256i load_32(const uint8_t* in) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(in)); }
    static void store_16(uint8_t* out, __m128i bytes) { _mm_storeu_si128(reinterpret_cast<__m128i*>(out), bytes); }
};

// A block of channels of some pixels of a band of output rows.
struct Strip {
    const uint8_t* const* row;  // column 0 of the input rows
    const DepthwiseBlock* block;
    __mmask64 mask;
    __m512i flip, zero_point;
    int64_t channel, x0, in_w, pixel, out_pixel, out_row;  // first column; of the images; the last three in bytes
    int64_t pixels, rows;
    uint8_t* out;
    // Where the next strip of all channels reads rows that this one does not, and where it writes. The blocks of
    // channels fetch a part each, beside their work.
    const uint8_t *in_ahead, *out_ahead;
    int64_t in_row;
};

// Four vectors of bytes to dwords [a b c d].
[[gnu::always_inline]] inline void interleave_bytes(__m512i a, __m512i b, __m512i c, __m512i d, __m512i (&quads)[4]) {
    const __m512i low01 = _mm512_unpacklo_epi8(a, b), high01 = _mm512_unpackhi_epi8(a, b);
    const __m512i low23 = _mm512_unpacklo_epi8(c, d), high23 = _mm512_unpackhi_epi8(c, d);
    quads[0] = _mm512_unpacklo_epi16(low01, low23), quads[1] = _mm512_unpackhi_epi16(low01, low23);
    quads[2] = _mm512_unpacklo_epi16(high01, high23), quads[3] = _mm512_unpackhi_epi16(high01, high23);
}

// Byte `at` of a row of the image, and with more lanes of the STRIDE-th ones behind it.
template <class L, int STRIDE, bool FLIP>
[[gnu::always_inline]] inline __m512i load_row(const Strip& s, const uint8_t* const* row, int64_t at) {
    const __m512i u = L::template load<STRIDE>(row, at, s.mask);
    __m512i v = FLIP ? _mm512_xor_si512(u, s.flip) : u;
    asm("" : "+v"(v));  // loaded once, not by both shuffles that take it
    return v;
}

// A value from memory, loaded again each time: a copy of a register would take a place in a vector pipe.
[[gnu::always_inline]] inline __m512i fresh(__m512i v) {
    asm("" : "+v"(v));
    return v;
}

// Where a row of outputs has come to: column `x`, at byte `at` of the input rows; output row y, pixel i.
template <int TAPS, int STRIDE>
struct Place {
    const uint8_t* row[TAPS + (kMostLaneRows - 1) * STRIDE];
    int64_t x, at, y, i;
    uint8_t* out;
    const uint8_t *in_ahead, *out_ahead;

    template <class L>
    [[gnu::always_inline]] void start(const Strip& s, int64_t output_row) {
        y = output_row, i = 0, x = s.x0, at = s.x0 * s.pixel, out = s.out + y * s.out_row;
        in_ahead = s.in_ahead + y * STRIDE * s.in_row, out_ahead = s.out_ahead + y * s.out_row;
        for (int k = 0; k < TAPS + (L::kRows - 1) * STRIDE; ++k) row[k] = s.row[y * STRIDE + k] + s.channel;
    }

    // So many of the pixels to come, with STRIDE columns each, are not at the border.
    int64_t inside(const Strip& s) const { return x < 0 ? 0 : smaller((s.in_w - x) / STRIDE, s.pixels); }

    // With more lanes, one of their rows for every pixel.
    template <class L>
    [[gnu::always_inline]] void fetch(const Strip& s) {
        const int64_t lane = L::kRows == 1 ? 0 : i % L::kRows;
        const uint8_t* in = in_ahead + lane * STRIDE * s.in_row;
#pragma GCC unroll 2
        for (int64_t k = 0; k < STRIDE; ++k) prefetch(in + k * s.in_row, STRIDE * 64);
        prefetch(out_ahead + lane * s.out_row, 64);
        if (lane == L::kRows - 1) in_ahead += STRIDE * 64, out_ahead += 64;
    }

    // The rows of the next column, which outside of the image is padding.
    template <class L, bool FLIP, bool BORDER>
    [[gnu::always_inline]] void load(const Strip& s, __m512i (&u)[TAPS]) {
#pragma GCC unroll 5
        for (int r = 0; r < TAPS; ++r)
            if (!BORDER || static_cast<uint64_t>(x) < static_cast<uint64_t>(s.in_w))
                u[r] = load_row<L, STRIDE, FLIP>(s, row + r, at);
            else
                u[r] = s.zero_point;
        ++x, at += s.pixel;
    }
};

// A layer by kernel K. A unit of work is an output row.
template <class K>
struct DepthwiseRows {
    static constexpr int kTaps = K::kTaps, kStride = K::kStride;

    const Int8Conv2d& p;
    const K kernel;
    const bool far;
    const int64_t channels;
    uint8_t *blocks, *padding;  // padding: a row of the image

    explicit DepthwiseRows(const Int8Conv2d& conv)
        : p(conv),
          kernel(conv),
          far(conv.batch * (conv.in_h * conv.in_w * conv.input_stride + conv.out_h * conv.out_w * conv.output_stride) >
              K::kFarBytes),
          channels(conv.weight.out_channels) {
        const int64_t row_bytes = round_up(p.in_w * p.input_stride, 64) + 64;
        blocks = static_cast<uint8_t*>(thread_scratch(depthwise_blocks(p.weight) * K::kBlockBytes + row_bytes));
        padding = blocks + depthwise_blocks(p.weight) * K::kBlockBytes;
        memset(padding, p.input_zero_point ^ p.input_flip, static_cast<size_t>(row_bytes));
        for (int64_t c = 0; c < channels; c += kDepthwiseChannels)
            K::prepare(p, c, 64 / rows_of(channels - c), block_at(c));
    }

    DepthwiseBlock* block_at(int64_t channel) const {
        return reinterpret_cast<DepthwiseBlock*>(blocks + channel / kDepthwiseChannels * K::kBlockBytes);
    }

    // Output rows in a vector that takes the last channels.
    static int64_t rows_of(int64_t channels) { return channels == 16 ? 4 : channels == 32 ? 2 : 1; }

    template <class L>
    void strip_of(const Strip& s) const {
        far ? kernel.template strip<L, true>(s) : kernel.template strip<L, false>(s);
    }

    // Pixels [ox, end) of the output rows [oy, stop) of image n, block of channels after block.
    void blocks_of(int64_t n, int64_t oy, int64_t stop, int64_t ox, int64_t end) const {
        const int64_t in_row = p.in_w * p.input_stride, out_row = p.out_w * p.output_stride;
        const int64_t top = oy * kStride - p.pad_top, rows = round_up(stop - oy, 4);
        const uint8_t* row[kMostRows];
        const uint8_t* image = p.input + (n * p.in_h + top) * in_row;
        for (int64_t i = 0; i < kTaps + (rows - 1) * kStride; ++i)
            row[i] = top + i >= 0 && top + i < p.in_h ? image + i * in_row : padding;
        uint8_t* out = static_cast<uint8_t*>(p.output) + (n * p.out_h + oy) * out_row;
        const bool last = end == p.out_w;
        Strip s;
        s.row = row;
        s.flip = _mm512_set1_epi8(static_cast<char>(p.input_flip));
        s.zero_point = _mm512_set1_epi8(static_cast<char>(p.input_zero_point));
        s.x0 = ox * kStride - p.pad_left, s.in_w = p.in_w, s.pixel = p.input_stride;
        s.out_pixel = p.output_stride, s.out_row = out_row;
        s.pixels = end - ox, s.rows = stop - oy;
        s.in_row = in_row;
        s.in_ahead =
            image + (kTaps - kStride) * in_row + (last ? (stop - oy) * kStride * in_row : end * kStride * s.pixel);
        s.out_ahead = out + (last ? (stop - oy) * out_row : end * s.out_pixel);
        out += ox * s.out_pixel;
        for (int64_t c = 0; c < channels; c += kDepthwiseChannels) {
            const int64_t left = channels - c, lanes = rows_of(left);
            s.channel = c;
            s.block = block_at(c);
            s.mask = left < 64 ? (uint64_t{1} << left) - 1 : ~uint64_t{0};
            s.out = out + c;
            if (lanes == 4)
                strip_of<RowLanes<16, false>>(s);
            else if (lanes == 2)
                strip_of<RowLanes<32, false>>(s);
            else if (left >= 64)
                strip_of<RowLanes<64, false>>(s);
            else
                strip_of<RowLanes<64, true>>(s);
            s.in_ahead += s.pixels * kStride * 64, s.out_ahead += s.pixels * 64;
        }
    }

    void run(int64_t begin, int64_t end) const {
        while (begin < end) {
            const int64_t n = begin / p.out_h, oy = begin % p.out_h;
            const int64_t rows = smaller(smaller(kBandRows, p.out_h - oy), end - begin);
            for (int64_t ox = 0; ox < p.out_w; ox += kStripPixels)
                blocks_of(n, oy, oy + rows, ox, smaller(ox + kStripPixels, p.out_w));
            begin += rows;
        }
    }
};

// Runs a layer by K<STRIDE, PLAIN>.
template <template <int, bool> class K, int STRIDE>
void depthwise_rows(const Int8Conv2d& p, int64_t begin, int64_t end) {
    if (p.input_flip == 0 && is_plain(p, byte_range(p)))
        DepthwiseRows<K<STRIDE, true>>(p).run(begin, end);
    else
        DepthwiseRows<K<STRIDE, false>>(p).run(begin, end);
}

bool is_depthwise_rows(const Int8Conv2d& p, int64_t taps, int64_t stride) {
    const Int8Weight& w = p.weight;
    return w.kernel_h == taps && w.kernel_w == taps && p.stride_h == stride && p.stride_w == stride &&
           p.dilation_h == 1 && p.dilation_w == 1 && !p.residual && !is_rare(p);
}

}  // namespace
}  // namespace imgopt::avx512

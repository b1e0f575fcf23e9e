// Depthwise layers on AVX-512 VNNI a row of outputs at a time, columns formed in registers: what is the same for the
// kernels that do so (depthwise3_avx512.h, depthwise5_avx512.h). A column of four input rows is interleaved to dwords
// [r0 r1 r2 r3], the operand of vpdpbusd, right before the products that take it: the shuffles go to the two vector
// pipes that have no multiplier. Forming the columns of a strip first and multiplying then, as the kernel for every
// geometry does (depthwise_avx512.h), costs 4 to 16 cycles more per 64 outputs: a core stores one vector per cycle.
//
// A kernel K supplies
//   kTaps, kStride      of both axes
//   kRows               output rows that are computed together
//   kBlockBytes         of a DepthwiseBlock
//   prepare(p, channel, bytes, block)
//   vectors<ROWS, L, COUNT, BORDER>(strip, ox, pixels)   COUNT vectors of each of ROWS output rows from pixel ox on
#pragma once

#include "depthwise_weight_avx512.h"

namespace imgopt::avx512 {
namespace {

constexpr int64_t kBandRows = 8;
constexpr int kVectors = 2;  // neighbouring vectors of an output row, which share their weights
// Images and outputs larger than this, which is what the second cache holds, are far away when they are met again,
// unless a loop does nothing else. Fetching their rows ahead takes up to half of the time away (144 channels at 56 x
// 56, N = 8: 737 to 509 us), and costs 2 to 4 % where they are near.
constexpr int64_t kFarBytes = 1 << 20;

// What the lanes of a vector are: BYTES channels of each of 64 / BYTES neighbouring output pixels, of which pixels have
// more, have no more (whole), or, of one pixel, fewer (masked).
enum class Pixels { cut, whole, masked };

template <int BYTES, Pixels PIXELS>
struct PixelLanes {
    static constexpr int kPixels = 64 / BYTES;

    // TOGETHER: the pixels follow each other.
    template <bool TOGETHER>
    static __m512i load(const uint8_t* const (&pixel)[kPixels], __mmask64 mask) {
        if constexpr (PIXELS == Pixels::masked) return _mm512_maskz_loadu_epi8(mask, pixel[0]);
        if constexpr (BYTES == 64 || (PIXELS == Pixels::whole && TOGETHER)) return _mm512_loadu_si512(pixel[0]);
        if constexpr (BYTES == 32)
            return _mm512_inserti64x4(_mm512_castsi256_si512(load_32(pixel[0])), load_32(pixel[kPixels - 1]), 1);
        __m512i v = _mm512_castsi128_si512(load_16(pixel[0]));
        v = _mm512_inserti32x4(v, load_16(pixel[1 % kPixels]), 1);
        v = _mm512_inserti32x4(v, load_16(pixel[2 % kPixels]), 2);
        return _mm512_inserti32x4(v, load_16(pixel[3 % kPixels]), 3);
    }
    // The first `pixels` of a vector.
    static void store(uint8_t* out, int64_t stride, __m512i bytes, int64_t pixels, __mmask64 mask) {
        if constexpr (PIXELS == Pixels::masked) {
            _mm512_mask_storeu_epi8(out, mask, bytes);
        } else if (BYTES == 64 || (PIXELS == Pixels::whole && pixels >= kPixels)) {
            _mm512_storeu_si512(out, bytes);
        } else if constexpr (BYTES == 32) {
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm512_castsi512_si256(bytes));
            if (pixels > 1)
                _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + stride), _mm512_extracti64x4_epi64(bytes, 1));
        } else {
            _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm512_castsi512_si128(bytes));
            if (pixels > 1) store_one(out + stride, _mm512_extracti32x4_epi32(bytes, 1));
            if (pixels > 2) store_one(out + 2 * stride, _mm512_extracti32x4_epi32(bytes, 2));
            if (pixels > 3) store_one(out + 3 * stride, _mm512_extracti32x4_epi32(bytes, 3));
        }
    }

  private:
    static __m128i load_16(const uint8_t* in) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(in)); }
    static __m256i load_32(const uint8_t* in) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(in)); }
    static void store_one(uint8_t* out, __m128i bytes) { _mm_storeu_si128(reinterpret_cast<__m128i*>(out), bytes); }
};

// What a strip of a block of channels reads and writes.
struct Strip {
    const uint8_t* row[6];  // column 0 of the input rows
    const DepthwiseBlock* block;
    const uint8_t* padding;  // a row of the image
    __mmask64 mask;
    __m512i flip;
    int64_t in_w, pad, pixel, out_pixel, out_row;  // of the images; the last three are distances in bytes
    uint8_t* out;                                  // pixel 0 of the row
};

// Input row i of a vector whose first pixel is at column x, and the others STRIDE columns apart; outside of the image
// it is padding.
template <class L, int STRIDE, bool FLIP, bool BORDER>
[[gnu::always_inline]] inline __m512i load_column(const Strip& s, int i, int64_t x) {
    const uint8_t* pixel[L::kPixels];
#pragma GCC unroll 4
    for (int64_t k = 0; k < L::kPixels; ++k) {
        const int64_t at = x + k * STRIDE;
        pixel[k] = s.row[i] + at * s.pixel;
        if constexpr (BORDER) {  // without a branch, which would be mispredicted at every border
            const int64_t inside = -static_cast<int64_t>(static_cast<uint64_t>(at) < static_cast<uint64_t>(s.in_w));
            pixel[k] = s.padding + ((pixel[k] - s.padding) & inside);
        }
    }
    const __m512i u = L::template load < !BORDER && STRIDE == 1 > (pixel, s.mask);
    __m512i v = FLIP ? _mm512_xor_si512(u, s.flip) : u;
    asm("" : "+v"(v));  // loaded once, not by both shuffles that take it
    return v;
}

// Four vectors of bytes to dwords [a b c d].
[[gnu::always_inline]] inline void interleave_bytes(__m512i a, __m512i b, __m512i c, __m512i d, __m512i (&quads)[4]) {
    const __m512i low01 = _mm512_unpacklo_epi8(a, b), high01 = _mm512_unpackhi_epi8(a, b);
    const __m512i low23 = _mm512_unpacklo_epi8(c, d), high23 = _mm512_unpackhi_epi8(c, d);
    quads[0] = _mm512_unpacklo_epi16(low01, low23), quads[1] = _mm512_unpackhi_epi16(low01, low23);
    quads[2] = _mm512_unpacklo_epi16(high01, high23), quads[3] = _mm512_unpackhi_epi16(high01, high23);
}

// Requantizes and stores the sums of ROWS rows of COUNT vectors.
template <class L, bool PLAIN, int ROWS, int COUNT>
[[gnu::always_inline]] inline void store_vectors(const Strip& s, const ByteEpilogue<PLAIN>& to_bytes, int64_t ox,
                                                 int64_t pixels, __m512i (&sums)[ROWS][COUNT][4]) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j)
#pragma GCC unroll 4
        for (int i = 0; i < ROWS * COUNT; ++i) {
            __m512i& sum = sums[i / COUNT][i % COUNT][j];
            sum = rounded<PLAIN>(sum, s.block, j);
        }
#pragma GCC unroll 2
    for (int v = 0; v < ROWS; ++v)
#pragma GCC unroll 4
        for (int i = 0; i < COUNT; ++i) {
            const __m512i(&q)[4] = sums[v][i];
            L::store(s.out + v * s.out_row + (ox + i * L::kPixels) * s.out_pixel, s.out_pixel,
                     to_bytes.bytes(to_bytes.words(q[0], q[1]), to_bytes.words(q[2], q[3])), pixels - i * L::kPixels,
                     s.mask);
        }
}

// A layer by kernel K. A unit of work is kRows output rows, or the last one of an image.
template <class K>
struct DepthwiseRows {
    static constexpr int kTaps = K::kTaps, kStride = K::kStride, kRows = K::kRows;

    const Int8Conv2d& p;
    const K kernel;
    const bool far;
    uint8_t *blocks, *padding;  // padding: a row of the image

    static int64_t units(const Int8Conv2d& p) { return p.batch * ceil_div(p.out_h, kRows); }

    explicit DepthwiseRows(const Int8Conv2d& conv)
        : p(conv),
          kernel(conv),
          far(conv.batch * (conv.in_h * conv.in_w * conv.input_stride + conv.out_h * conv.out_w * conv.output_stride) >
              kFarBytes) {
        const int64_t channels = p.weight.out_channels, row_bytes = round_up(p.in_w * p.input_stride, 64) + 64;
        blocks = static_cast<uint8_t*>(thread_scratch(depthwise_blocks(p.weight) * K::kBlockBytes + row_bytes));
        padding = blocks + depthwise_blocks(p.weight) * K::kBlockBytes;
        memset(padding, p.input_zero_point ^ p.input_flip, static_cast<size_t>(row_bytes));
        for (int64_t c = 0; c < channels; c += kDepthwiseChannels)
            K::prepare(p, c, lanes_of(channels - c), block_at(c));
    }

    DepthwiseBlock* block_at(int64_t channel) const {
        return reinterpret_cast<DepthwiseBlock*>(blocks + channel / kDepthwiseChannels * K::kBlockBytes);
    }

    // Bytes of a pixel in a vector that takes the last channels.
    static int64_t lanes_of(int64_t channels) { return channels == 16 || channels == 32 ? channels : 64; }

    // Where the next strip of all channels reads rows that this one does not, and where it writes. The strips of the
    // blocks of channels fetch a part each, beside their work.
    struct Ahead {
        const uint8_t *in, *out;
        int64_t in_row, out_row;

        // The part of so many vectors of each row.
        [[gnu::always_inline]] void fetch(int64_t vectors) {
#pragma GCC unroll 2
            for (int64_t i = 0; i < kRows * kStride; ++i) prefetch(in + i * in_row, vectors * kStride * 64);
#pragma GCC unroll 2
            for (int64_t i = 0; i < kRows; ++i) prefetch(out + i * out_row, vectors * 64);
            in += vectors * kStride * 64, out += vectors * 64;
        }
    };

    // Vectors that read pixels outside the image, or are not followed by another one.
    template <int ROWS, class L>
    [[gnu::noinline]] void border(const Strip& s, int64_t ox, int64_t pixels) const {
        if (pixels > L::kPixels)
            kernel.template vectors<ROWS, L, kVectors, true>(s, ox, pixels);
        else
            kernel.template vectors<ROWS, L, 1, true>(s, ox, pixels);
    }

    // Output pixels [ox, end) of ROWS rows.
    template <int ROWS, class L, bool FETCH>
    [[gnu::noinline]] void strip(const Strip& given, Ahead ahead, int64_t ox, int64_t end) const {
        const Strip s = given;  // a copy, which no store of bytes can change
        constexpr int64_t kPixels = kVectors * L::kPixels;
        const int64_t room = s.in_w + s.pad - kTaps;
        const int64_t inside = smaller(room < 0 ? 0 : room / kStride + 1, end);  // behind the last pixel inside
        for (; ox < end && ox * kStride < s.pad; ox += kPixels) border<ROWS, L>(given, ox, end - ox);
        for (; ox + kPixels <= inside; ox += kPixels) {
            if constexpr (FETCH) ahead.fetch(kVectors);
            kernel.template vectors<ROWS, L, kVectors, false>(s, ox, kPixels);
        }
        for (; ox < end; ox += kPixels) border<ROWS, L>(given, ox, end - ox);
    }

    template <int ROWS, class L>
    void strip_of(const Strip& s, const Ahead& ahead, int64_t ox, int64_t end) const {
        far ? strip<ROWS, L, true>(s, ahead, ox, end) : strip<ROWS, L, false>(s, ahead, ox, end);
    }

    template <int ROWS>
    void strip_of_channels(const Strip& s, const Ahead& ahead, int64_t channels, int64_t ox, int64_t end) const {
        const bool whole = s.pixel == channels && s.out_pixel == channels;
        if (channels >= 64)
            strip_of<ROWS, PixelLanes<64, Pixels::cut>>(s, ahead, ox, end);
        else if (channels == 32)
            whole ? strip_of<ROWS, PixelLanes<32, Pixels::whole>>(s, ahead, ox, end)
                  : strip_of<ROWS, PixelLanes<32, Pixels::cut>>(s, ahead, ox, end);
        else if (channels == 16)
            whole ? strip_of<ROWS, PixelLanes<16, Pixels::whole>>(s, ahead, ox, end)
                  : strip_of<ROWS, PixelLanes<16, Pixels::cut>>(s, ahead, ox, end);
        else
            strip_of<ROWS, PixelLanes<64, Pixels::masked>>(s, ahead, ox, end);
    }

    // Pixels [ox, end) of output rows [oy, stop) of image n, channels from c on. `last`: at the end of the rows.
    void block(int64_t n, int64_t oy, int64_t stop, int64_t c, int64_t ox, int64_t end, bool last) const {
        Strip s{};
        const int64_t left = p.weight.out_channels - c;
        s.block = block_at(c);
        s.padding = padding;
        s.mask = left < 64 ? (uint64_t{1} << left) - 1 : ~uint64_t{0};
        s.flip = _mm512_set1_epi8(static_cast<char>(p.input_flip));
        s.in_w = p.in_w, s.pad = p.pad_left, s.pixel = p.input_stride;
        s.out_pixel = p.output_stride, s.out_row = p.out_w * p.output_stride;
        const int64_t in_row = p.in_w * p.input_stride, part = c * (end - ox);
        const int64_t in_ahead = last ? (stop - oy) * kStride * in_row : end * kStride * s.pixel;
        const int64_t out_ahead = last ? (stop - oy) * s.out_row : end * s.out_pixel;
        while (oy < stop) {
            const int64_t top = oy * kStride - p.pad_top, rows = oy + kRows <= stop ? kRows : 1;
            const uint8_t* image = p.input + (n * p.in_h + top) * in_row;
            uint8_t* out = static_cast<uint8_t*>(p.output) + (n * p.out_h + oy) * s.out_row;
            for (int64_t i = 0; i < kTaps + (rows - 1) * kStride; ++i)
                s.row[i] = top + i >= 0 && top + i < p.in_h ? image + i * in_row + c : padding;
            s.out = out + c;
            const Ahead ahead = {image + (kTaps - kStride) * in_row + in_ahead + part * kStride, out + out_ahead + part,
                                 in_row, s.out_row};
            if (rows == kRows)
                strip_of_channels<kRows>(s, ahead, left, ox, end);
            else
                strip_of_channels<1>(s, ahead, left, ox, end);
            oy += rows;
        }
    }

    // Strips of rows, block of channels after block. Of narrow images several rows, so that a block's weights and the
    // input rows that its next outputs read again stay in the first cache; of wide ones that would leave the order of
    // memory (96 channels at 112 x 112, stride 2, N = 8: 670 us instead of 430).
    void run(int64_t begin, int64_t end) const {
        const int64_t per_image = ceil_div(p.out_h, kRows), band = p.out_w <= kStripPixels ? kBandRows / kRows : 1;
        while (begin < end) {
            const int64_t n = begin / per_image, first = begin % per_image;
            const int64_t steps = smaller(smaller(band, per_image - first), end - begin);
            const int64_t oy = first * kRows, stop = smaller((first + steps) * kRows, p.out_h);
            for (int64_t ox = 0; ox < p.out_w; ox += kStripPixels) {
                const int64_t pixels = smaller(kStripPixels, p.out_w - ox);
                for (int64_t c = 0; c < p.weight.out_channels; c += kDepthwiseChannels)
                    block(n, oy, stop, c, ox, ox + pixels, ox + pixels == p.out_w);
            }
            begin += steps;
        }
    }
};

// Runs a layer by K<STRIDE, PLAIN>.
template <template <int, bool> class K, int STRIDE>
void depthwise_rows(const Int8Conv2d& p, int64_t begin, int64_t end) {
    if (p.input_flip == 0 && has_float_sums(p))
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

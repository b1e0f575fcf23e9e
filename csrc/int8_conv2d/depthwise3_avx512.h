// Depthwise 3 x 3 on AVX-512 VNNI, with strides 1 and 2. A column of three or four input rows is interleaved to dwords
// (columns_avx512.h) in registers, right before the products that take it: 12 vpdpbusd and 4 multiplications per 64
// outputs keep two of the four vector pipes busy for 8 cycles, and the shuffles go to the other two meanwhile. Forming
// the columns of a strip first and multiplying then, as other kernels do it (depthwise_avx512.h), cost 4 to 16 cycles
// more: a core stores one vector per cycle.
#pragma once

#include "depthwise_weight_avx512.h"

namespace imgopt::avx512 {
namespace {

constexpr int kTaps = 3;
constexpr int kVectors = 2;  // neighbouring vectors of an output row, which share their weights

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

// The operation for one stride. A unit of work is kRows output rows, or the last one of an image: with stride 1 two of
// them share four input rows.
template <int STRIDE, bool PLAIN>
struct Depthwise3 {
    static constexpr int kRows = STRIDE == 1 ? 2 : 1;
    using G = Geometry<kTaps, 1, STRIDE, kRows>;
    static constexpr int64_t kBlockBytes = sizeof(DepthwiseBlock) + kRows * kTaps * kColumnBytes;

    const Int8Conv2d& p;
    const ByteEpilogue<PLAIN> to_bytes;
    uint8_t *blocks, *padding;  // padding: a row of the image

    static int64_t units(const Int8Conv2d& p) { return p.batch * ceil_div(p.out_h, kRows); }

    explicit Depthwise3(const Int8Conv2d& conv) : p(conv), to_bytes(conv, byte_range(conv)) {
        const int64_t channels = p.weight.out_channels, row_bytes = round_up(p.in_w * p.input_stride, 64) + 64;
        blocks = static_cast<uint8_t*>(thread_scratch(depthwise_blocks(p.weight) * kBlockBytes + row_bytes));
        padding = blocks + depthwise_blocks(p.weight) * kBlockBytes;
        memset(padding, p.input_zero_point ^ p.input_flip, static_cast<size_t>(row_bytes));
        for (int64_t c = 0; c < channels; c += kDepthwiseChannels) {
            DepthwiseBlock* block = block_at(c);
            prepare_block(p, G(p), c, lanes_of(channels - c), block);
            if (PLAIN) take_as_floats(block);
        }
    }

    DepthwiseBlock* block_at(int64_t channel) const {
        return reinterpret_cast<DepthwiseBlock*>(blocks + channel / kDepthwiseChannels * kBlockBytes);
    }

    // Bytes of a pixel in a vector that takes the last channels.
    static int64_t lanes_of(int64_t channels) { return channels == 16 || channels == 32 ? channels : 64; }

    // What a strip of a block of channels reads and writes.
    struct Strip {
        const uint8_t* row[4];  // column 0 of the input rows
        const DepthwiseBlock* block;
        __mmask64 mask;
        __m512i flip;
        int64_t in_w, pad, pixel, out_pixel, out_row;  // of the images; the last three are distances in bytes
        uint8_t* out;                                  // pixel 0 of the row
    };

    // The quads of a vector of columns x, x + STRIDE, ..; outside of the image they are padding.
    template <int ROWS, class L, bool BORDER>
    [[gnu::always_inline]] void column(const Strip& s, int64_t x, __m512i (&quads)[4]) const {
        constexpr int kSources = kTaps + ROWS - 1;
        __m512i u[kSources];
#pragma GCC unroll 4
        for (int i = 0; i < kSources; ++i) {
            const uint8_t* pixel[L::kPixels];
#pragma GCC unroll 4
            for (int64_t k = 0; k < L::kPixels; ++k) {
                const int64_t at = x + k * STRIDE;
                pixel[k] = s.row[i] + at * s.pixel;
                if constexpr (BORDER) {  // without a branch, which would be mispredicted at every border
                    const int64_t inside =
                        -static_cast<int64_t>(static_cast<uint64_t>(at) < static_cast<uint64_t>(s.in_w));
                    pixel[k] = padding + ((pixel[k] - padding) & inside);
                }
            }
            u[i] = L::template load < !BORDER && STRIDE == 1 > (pixel, s.mask);
            if constexpr (!PLAIN) u[i] = _mm512_xor_si512(u[i], s.flip);
        }
        const __m512i low01 = _mm512_unpacklo_epi8(u[0], u[1]), high01 = _mm512_unpackhi_epi8(u[0], u[1]);
        const __m512i low23 = _mm512_unpacklo_epi8(u[2], u[kSources - 1]);   // without a fourth row the third again,
        const __m512i high23 = _mm512_unpackhi_epi8(u[2], u[kSources - 1]);  // which meets weights of zero
        quads[0] = _mm512_unpacklo_epi16(low01, low23), quads[1] = _mm512_unpackhi_epi16(low01, low23);
        quads[2] = _mm512_unpacklo_epi16(high01, high23), quads[3] = _mm512_unpackhi_epi16(high01, high23);
    }

    // COUNT vectors of each of ROWS output rows from output pixel ox on, of which there are `pixels`.
    template <int ROWS, class L, int COUNT, bool BORDER>
    [[gnu::always_inline]] void vectors(const Strip& s, int64_t ox, int64_t pixels) const {
        constexpr int kDistance = L::kPixels * STRIDE;  // columns between vectors
        const DepthwiseBlock* block = s.block;
        __m512i sums[ROWS][COUNT][4], quads[kTaps + (COUNT - 1) * kDistance][4];
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j)
#pragma GCC unroll 4
            for (int i = 0; i < ROWS * COUNT; ++i) sums[i / COUNT][i % COUNT][j] = block->offset[j];
        const int64_t x0 = ox * STRIDE - s.pad;
#pragma GCC unroll 3
        for (int t = 0; t < kTaps; ++t) {
#pragma GCC unroll 4
            for (int i = 0; i < COUNT; ++i)
                if (t < kDistance || i + 1 == COUNT)  // otherwise vector i + 1 has had it
                    column<ROWS, L, BORDER>(s, x0 + t + i * kDistance, quads[t + i * kDistance]);
#pragma GCC unroll 2
            for (int v = 0; v < ROWS; ++v)
#pragma GCC unroll 4
                for (int j = 0; j < 4; ++j) {
                    __m512i w = block->weight[(v * kTaps + t) * 4 + j];
                    asm("" : "+v"(w));  // loaded once, not by every product: loads are as scarce as products
#pragma GCC unroll 4
                    for (int i = 0; i < COUNT; ++i)
                        sums[v][i][j] = _mm512_dpbusd_epi32(sums[v][i][j], quads[t + i * kDistance][j], w);
                }
        }
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j)
#pragma GCC unroll 4
            for (int i = 0; i < ROWS * COUNT; ++i) {
                __m512i& sum = sums[i / COUNT][i % COUNT][j];
                sum = rounded<PLAIN>(sum, block, j);
            }
#pragma GCC unroll 2
        for (int v = 0; v < ROWS; ++v)
#pragma GCC unroll 4
            for (int i = 0; i < COUNT; ++i) {
                const __m512i(&q)[4] = sums[v][i];
                L::store(s.out + v * s.out_row + (ox + i * L::kPixels) * s.out_pixel, s.out_pixel,
                         to_bytes.bytes(to_bytes.words(q[0], q[1]), to_bytes.words(q[2], q[3])),
                         pixels - i * L::kPixels, s.mask);
            }
    }

    // Vectors that read pixels outside the image, or are not followed by another one.
    template <int ROWS, class L>
    [[gnu::noinline]] void border(const Strip& s, int64_t ox, int64_t pixels) const {
        if (pixels > L::kPixels)
            vectors<ROWS, L, kVectors, true>(s, ox, pixels);
        else
            vectors<ROWS, L, 1, true>(s, ox, pixels);
    }

    // Output pixels [ox, end) of ROWS rows.
    template <int ROWS, class L>
    [[gnu::noinline]] void strip(const Strip& given, int64_t ox, int64_t end) const {
        const Strip s = given;  // a copy, which no store of bytes can change
        constexpr int64_t kPixels = kVectors * L::kPixels;
        const int64_t room = s.in_w + s.pad - kTaps;
        const int64_t inside = smaller(room < 0 ? 0 : room / STRIDE + 1, end);  // behind the last pixel inside
        for (; ox < end && ox * STRIDE < s.pad; ox += kPixels) border<ROWS, L>(given, ox, end - ox);
        for (; ox + kPixels <= inside; ox += kPixels) vectors<ROWS, L, kVectors, false>(s, ox, kPixels);
        for (; ox < end; ox += kPixels) border<ROWS, L>(given, ox, end - ox);
    }

    template <int ROWS>
    void rows(int64_t n, int64_t oy) const {
        Strip s{};
        s.flip = _mm512_set1_epi8(static_cast<char>(p.input_flip));
        s.in_w = p.in_w, s.pad = p.pad_left, s.pixel = p.input_stride;
        s.out_pixel = p.output_stride, s.out_row = p.out_w * p.output_stride;
        const uint8_t* row[4];
        for (int64_t i = 0; i < kTaps + ROWS - 1; ++i) {
            const int64_t y = oy * STRIDE - p.pad_top + i;
            row[i] = y >= 0 && y < p.in_h ? p.input + (n * p.in_h + y) * p.in_w * p.input_stride : padding;
        }
        uint8_t* out = static_cast<uint8_t*>(p.output) + (n * p.out_h + oy) * p.out_w * p.output_stride;
        for (int64_t ox = 0; ox < p.out_w; ox += kStripPixels) {
            const int64_t end = smaller(ox + kStripPixels, p.out_w);
            for (int64_t c = 0; c < p.weight.out_channels; c += kDepthwiseChannels) {
                const int64_t left = p.weight.out_channels - c;
                for (int64_t i = 0; i < kTaps + ROWS - 1; ++i) s.row[i] = row[i] == padding ? padding : row[i] + c;
                s.block = block_at(c);
                s.mask = left < 64 ? (uint64_t{1} << left) - 1 : ~uint64_t{0};
                s.out = out + c;
                const bool whole = p.input_stride == left && p.output_stride == left;
                if (left >= 64)
                    strip<ROWS, PixelLanes<64, Pixels::cut>>(s, ox, end);
                else if (left == 32)
                    whole ? strip<ROWS, PixelLanes<32, Pixels::whole>>(s, ox, end)
                          : strip<ROWS, PixelLanes<32, Pixels::cut>>(s, ox, end);
                else if (left == 16)
                    whole ? strip<ROWS, PixelLanes<16, Pixels::whole>>(s, ox, end)
                          : strip<ROWS, PixelLanes<16, Pixels::cut>>(s, ox, end);
                else
                    strip<ROWS, PixelLanes<64, Pixels::masked>>(s, ox, end);
            }
        }
    }

    void run(int64_t begin, int64_t end) const {
        const int64_t per_image = ceil_div(p.out_h, kRows);
        for (int64_t unit = begin; unit < end; ++unit) {
            const int64_t n = unit / per_image, oy = unit % per_image * kRows;
            if (oy + kRows <= p.out_h)
                rows<kRows>(n, oy);
            else
                rows<1>(n, oy);
        }
    }
};

template <int STRIDE>
void depthwise3(const Int8Conv2d& p, int64_t begin, int64_t end) {
    if (p.input_flip == 0 && has_float_sums(p))
        Depthwise3<STRIDE, true>(p).run(begin, end);
    else
        Depthwise3<STRIDE, false>(p).run(begin, end);
}

bool is_depthwise3(const Int8Conv2d& p, int64_t stride) {
    const Int8Weight& w = p.weight;
    return w.kernel_h == kTaps && w.kernel_w == kTaps && p.stride_h == stride && p.stride_w == stride &&
           p.dilation_h == 1 && p.dilation_w == 1 && !p.residual && !is_rare(p);
}

}  // namespace
}  // namespace imgopt::avx512

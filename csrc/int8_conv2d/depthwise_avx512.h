// Depthwise convolution on AVX-512 VNNI, 64 channels at a time. vpdpbusd wants the four products of a sum in one dword,
// so up to four rows of an input column are interleaved to [r0 r1 r2 r3] per channel: once per column, however many
// taps read it. Interleaving works within 128-bit lanes and leaves vector j with channels 16L + 4j + i in dword 4L + i,
// which is exactly the order that packing to bytes undoes.
#pragma once

#include "igemm.h"

namespace imgopt::avx512 {
namespace {

constexpr int64_t kDepthwiseChannels = 64;
constexpr int64_t kColumnBytes = 256;  // one column of 64 channels, four rows
constexpr int64_t kStripPixels = 16;   // output pixels whose columns are interleaved together; they stay in L1
constexpr int kPixels = 4;             // output pixels that share a load of weights

bool is_depthwise(const Int8Weight& w) { return w.group_channels == 1 && w.out_channels == w.groups; }

int64_t depthwise_blocks(const Int8Weight& w) { return ceil_div(w.out_channels, kDepthwiseChannels); }
int64_t row_groups(const Int8Weight& w) { return ceil_div(w.kernel_h, 4); }
int64_t depthwise_block_bytes(const Int8Weight& w) { return w.kernel_w * row_groups(w) * kColumnBytes; }

int64_t depthwise_weight_bytes(const Int8Weight& w) { return depthwise_blocks(w) * depthwise_block_bytes(w); }

// (block of 64 channels, kernel_w, rows / 4, vector, dword, row % 4), zero where there is no row or channel.
void depthwise_weight_pack(const Int8Weight& w, const int8_t* weight, uint8_t* packed) {
    memset(packed, 0, static_cast<size_t>(depthwise_weight_bytes(w)));
    for (int64_t c = 0; c < w.out_channels; ++c) {
        const int64_t in_block = c % kDepthwiseChannels;
        const int64_t lane = in_block / 16, vector = in_block % 16 / 4, dword = 4 * lane + in_block % 4;
        uint8_t* block = packed + c / kDepthwiseChannels * depthwise_block_bytes(w);
        for (int64_t ky = 0; ky < w.kernel_h; ++ky)
            for (int64_t kx = 0; kx < w.kernel_w; ++kx)
                block[(kx * row_groups(w) + ky / 4) * kColumnBytes + vector * 64 + dword * 4 + ky % 4] =
                    static_cast<uint8_t>(weight[(c * w.kernel_h + ky) * w.kernel_w + kx]);
    }
}

// Rows of a unit: enough pixels that the constants of the channels, gathered once per unit, weigh nothing.
int64_t rows_per_unit(const Int8Conv2d& p) { return smaller(p.out_h, ceil_div(64, p.out_w)); }
int64_t strips_of(const Int8Conv2d& p) { return ceil_div(p.out_h, rows_per_unit(p)); }
int64_t depthwise_units(const Int8Conv2d& p) {
    if (p.batch * p.out_h * p.out_w == 0) return 0;
    return p.batch * strips_of(p) * depthwise_blocks(p.weight);
}

// One output row of one block of channels.
struct DepthwiseRow {
    const Int8Conv2d* conv;
    const uint8_t* image;    // of the block's channels
    const uint8_t* padding;  // 64 zero points, as stored
    const int8_t* weight;
    int64_t channel, channels, n, oy;
    __m512i offset[4];
    __m512 multiplier[4];
    ByteRange range;
};

// Interleaves rows 4g.. of `count` input columns from x0 on into the strip; `ROWS` of the four are real.
template <int ROWS>
void interleave_rows(const DepthwiseRow& r, int64_t g, int64_t x0, int64_t count, int64_t column_bytes,
                     uint8_t* strip) {
    const Int8Conv2d& p = *r.conv;
    const __mmask64 mask = r.channels >= 64 ? ~uint64_t{0} : (uint64_t{1} << r.channels) - 1;
    const __m512i flip = _mm512_set1_epi8(static_cast<char>(p.input_flip));
    const __m512i zero_point = _mm512_set1_epi8(static_cast<char>(p.input_zero_point));
    const uint8_t* row[ROWS];
    int64_t step[ROWS];
    for (int i = 0; i < ROWS; ++i) {
        const int64_t y = r.oy * p.stride_h - p.pad_top + (4 * g + i) * p.dilation_h;
        const bool inside = y >= 0 && y < p.in_h;
        row[i] = inside ? r.image + y * p.in_w * p.input_stride : r.padding;
        step[i] = inside ? p.input_stride : 0;
    }
    for (int64_t x = x0; x < x0 + count; ++x, strip += column_bytes) {
        __m512i* out = reinterpret_cast<__m512i*>(strip);
        if (x < 0 || x >= p.in_w) {
            for (int j = 0; j < 4; ++j) _mm512_store_si512(out + j, zero_point);
            continue;
        }
        __m512i u[4] = {};
#pragma GCC unroll 4
        for (int i = 0; i < ROWS; ++i)
            u[i] = _mm512_xor_si512(_mm512_maskz_loadu_epi8(mask, row[i] + x * step[i]), flip);
        const __m512i low01 = _mm512_unpacklo_epi8(u[0], u[1]), high01 = _mm512_unpackhi_epi8(u[0], u[1]);
        const __m512i low23 = _mm512_unpacklo_epi8(u[2], u[3]), high23 = _mm512_unpackhi_epi8(u[2], u[3]);
        _mm512_store_si512(out + 0, _mm512_unpacklo_epi16(low01, low23));
        _mm512_store_si512(out + 1, _mm512_unpackhi_epi16(low01, low23));
        _mm512_store_si512(out + 2, _mm512_unpacklo_epi16(high01, high23));
        _mm512_store_si512(out + 3, _mm512_unpackhi_epi16(high01, high23));
    }
}

void interleave_columns(const DepthwiseRow& r, int64_t x0, int64_t count, uint8_t* strip) {
    const int64_t groups = row_groups(r.conv->weight);
    for (int64_t g = 0; g < groups; ++g) {
        const int64_t rows = smaller(4, r.conv->weight.kernel_h - 4 * g), bytes = groups * kColumnBytes;
        const auto interleave = rows == 1   ? interleave_rows<1>
                                : rows == 2 ? interleave_rows<2>
                                : rows == 3 ? interleave_rows<3>
                                            : interleave_rows<4>;
        interleave(r, g, x0, count, bytes, strip + g * kColumnBytes);
    }
}

// What the common kernels know when they are compiled: then addresses are constants, and neighbouring pixels share
// their loads of columns. Zeros: any geometry.
template <int TAPS, int GROUPS, int STRIDE>
struct Columns {
    int64_t taps, groups, pixel_bytes, tap_bytes;

    explicit Columns(const Int8Conv2d& p)
        : taps(TAPS ? TAPS : p.weight.kernel_w),
          groups(TAPS ? GROUPS : row_groups(p.weight)),
          pixel_bytes((TAPS ? STRIDE : p.stride_w) * groups * kColumnBytes),
          tap_bytes((TAPS ? 1 : p.dilation_w) * groups * kColumnBytes) {}

    static bool fits(const Int8Conv2d& p) {
        return p.weight.kernel_w == TAPS && row_groups(p.weight) == GROUPS && p.stride_w == STRIDE && p.dilation_w == 1;
    }
};

// Sums of kPixels pixels, vector j.
template <int TAPS, int GROUPS, int STRIDE>
[[gnu::always_inline]] inline void depthwise_sums(const DepthwiseRow& r, const Columns<TAPS, GROUPS, STRIDE>& c,
                                                  const uint8_t* strip, int j, __m512i (&sums)[kPixels]) {
#pragma GCC unroll 4
    for (int i = 0; i < kPixels; ++i) sums[i] = r.offset[j];
    const auto add_tap = [&](int64_t kx, int64_t g) __attribute__((always_inline)) {
        const __m512i w = _mm512_loadu_si512(r.weight + (kx * c.groups + g) * kColumnBytes + 64 * j);
        const uint8_t* column = strip + kx * c.tap_bytes + g * kColumnBytes + 64 * j;
#pragma GCC unroll 4
        for (int i = 0; i < kPixels; ++i)
            sums[i] = _mm512_dpbusd_epi32(sums[i], _mm512_load_si512(column + i * c.pixel_bytes), w);
    };
    if constexpr (TAPS > 0) {
#pragma GCC unroll 5
        for (int kx = 0; kx < TAPS; ++kx)
#pragma GCC unroll 2
            for (int g = 0; g < GROUPS; ++g) add_tap(kx, g);
    } else {
        for (int64_t kx = 0; kx < c.taps; ++kx)
            for (int64_t g = 0; g < c.groups; ++g) add_tap(kx, g);
    }
}

// float output, shifts, or a residual: a sum at a time.
[[gnu::noinline]] void depthwise_rare(const DepthwiseRow& r, int64_t pixel, const int32_t* sums) {
    for (int64_t c = 0; c < r.channels; ++c)
        store_sum(*r.conv, pixel, r.channel + c, sums[c % 16 / 4 * 16 + c / 16 * 4 + c % 4]);
}

template <int TAPS, int GROUPS, int STRIDE>
void depthwise_row(const DepthwiseRow& r, uint8_t* strip) {
    const Int8Conv2d& p = *r.conv;
    const ByteEpilogue to_bytes(p, r.range);
    const Columns<TAPS, GROUPS, STRIDE> columns(p);
    const int64_t stride = p.stride_w, out_w = p.out_w, output_stride = p.output_stride, first = -p.pad_left;
    const int64_t span = (columns.taps - 1) * p.dilation_w + 1;
    const int64_t row = (r.n * p.out_h + r.oy) * out_w;
    const bool rare = p.residual || p.float_output || p.shift;
    const __mmask64 mask = r.channels >= 64 ? ~uint64_t{0} : (uint64_t{1} << r.channels) - 1;
    uint8_t* out = static_cast<uint8_t*>(p.output) + row * output_stride + r.channel;
    for (int64_t ox = 0; ox < out_w; ox += kStripPixels) {
        const int64_t pixels = smaller(kStripPixels, out_w - ox);
        interleave_columns(r, ox * stride + first, (pixels - 1) * stride + span, strip);
        for (int64_t i = 0; i < pixels; i += kPixels) {
            const int64_t real = smaller(kPixels, pixels - i);
            const uint8_t* from = strip + i * columns.pixel_bytes;
            __m512i q[4][kPixels];
#pragma GCC unroll 4
            for (int j = 0; j < 4; ++j) depthwise_sums(r, columns, from, j, q[j]);
            if (rare) {
                for (int64_t k = 0; k < real; ++k) {
                    alignas(64) int32_t sums[64];
                    for (int j = 0; j < 4; ++j) _mm512_store_si512(sums + 16 * j, q[j][k]);
                    depthwise_rare(r, row + ox + i + k, sums);
                }
                continue;
            }
#pragma GCC unroll 4
            for (int k = 0; k < kPixels; ++k) {
                if (k >= real) break;
#pragma GCC unroll 4
                for (int j = 0; j < 4; ++j)
                    q[j][k] = round_to_int(_mm512_mul_ps(_mm512_cvtepi32_ps(q[j][k]), r.multiplier[j]));
                _mm512_mask_storeu_epi8(out + (ox + i + k) * output_stride, mask,
                                        to_bytes(q[0][k], q[1][k], q[2][k], q[3][k]));
            }
        }
    }
}

void depthwise(const Int8Conv2d& p, int64_t begin, int64_t end) {
    const Int8Weight& w = p.weight;
    // The last pixels of a strip are computed kPixels at a time: the columns they read beyond it hold old bytes.
    const int64_t columns = (kStripPixels + kPixels) * p.stride_w + (w.kernel_w - 1) * p.dilation_w + 1;
    const int64_t strip_bytes = columns * row_groups(w) * kColumnBytes;
    uint8_t* strip = static_cast<uint8_t*>(thread_scratch(strip_bytes + 64));
    uint8_t* padding = strip + strip_bytes;
    memset(padding, p.input_zero_point ^ p.input_flip, 64);
    const auto compute_row = Columns<3, 1, 1>::fits(p)   ? depthwise_row<3, 1, 1>
                             : Columns<3, 1, 2>::fits(p) ? depthwise_row<3, 1, 2>
                             : Columns<5, 2, 1>::fits(p) ? depthwise_row<5, 2, 1>
                             : Columns<5, 2, 2>::fits(p) ? depthwise_row<5, 2, 2>
                                                         : depthwise_row<0, 0, 0>;
    const ByteRange range = byte_range(p);
    const int64_t blocks = depthwise_blocks(w), rows = rows_per_unit(p), strips = strips_of(p);
    const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 32, 33, 34, 35, 48, 49, 50, 51);
    for (int64_t unit = begin; unit < end; ++unit) {
        const int64_t block = unit % blocks, strip_index = unit / blocks % strips;
        DepthwiseRow r{};
        r.conv = &p;
        r.padding = padding;
        r.range = range;
        r.n = unit / blocks / strips;
        r.channel = block * kDepthwiseChannels;
        r.channels = smaller(kDepthwiseChannels, w.out_channels - r.channel);
        r.image = p.input + r.n * p.in_h * p.in_w * p.input_stride + r.channel;
        r.weight = reinterpret_cast<const int8_t*>(p.packed) + block * depthwise_block_bytes(w);
        for (int j = 0; j < 4; ++j) {
            const __m512i index = _mm512_add_epi32(first, _mm512_set1_epi32(4 * j));
            r.offset[j] = _mm512_i32gather_epi32(index, p.offset + r.channel, 4);
            r.multiplier[j] = _mm512_i32gather_ps(index, p.multiplier + r.channel, 4);
        }
        for (r.oy = strip_index * rows; r.oy < smaller((strip_index + 1) * rows, p.out_h); ++r.oy)
            compute_row(r, strip);
    }
}

}  // namespace
}  // namespace imgopt::avx512

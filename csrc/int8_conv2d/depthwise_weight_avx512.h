// Weights of the depthwise kernels of AVX-512: how they are packed, how a block of 64 channels is brought into the
// order of the interleaved columns (columns_avx512.h), once per call, and how its sums become bytes.
#pragma once

#include "columns_avx512.h"

namespace imgopt::avx512 {
namespace {

constexpr int64_t kDepthwiseChannels = 64;
constexpr int64_t kStripPixels = 28;  // output pixels of a row, at most, of which all channels are computed together

bool is_depthwise(const Int8Weight& w) { return w.group_channels == 1 && w.out_channels == w.groups; }

int64_t depthwise_blocks(const Int8Weight& w) { return ceil_div(w.out_channels, kDepthwiseChannels); }
int64_t row_groups(int64_t rows) { return ceil_div(rows, 4); }
int64_t depthwise_block_bytes(const Int8Weight& w) { return w.kernel_w * row_groups(w.kernel_h) * kColumnBytes; }

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
                block[(kx * row_groups(w.kernel_h) + ky / 4) * kColumnBytes + vector * 64 + dword * 4 + ky % 4] =
                    static_cast<uint8_t>(weight[(c * w.kernel_h + ky) * w.kernel_w + kx]);
    }
}

// A block of channels, ready for the lanes: its constants, then (tap, rows / 4, vector) of weights.
struct DepthwiseBlock {
    __m512i offset[4];
    __m512 multiplier[4];
    __m512i weight[];
};

// Vector j of four holds lanes L of `in`, channels 16L + 4j..; after `bytes` channels, 64, 32 or 16, they are repeated.
void lanes_of_channels(const void* in, int64_t bytes, void* out) {
    __m512i v[4];
    for (int i = 0; i < 4; ++i) v[i] = _mm512_loadu_si512(static_cast<const char*>(in) + 64 * (i % (bytes / 16)));
    const __m512i a = _mm512_shuffle_i32x4(v[0], v[1], 0x44), b = _mm512_shuffle_i32x4(v[2], v[3], 0x44);
    const __m512i c = _mm512_shuffle_i32x4(v[0], v[1], 0xee), d = _mm512_shuffle_i32x4(v[2], v[3], 0xee);
    __m512i* to = static_cast<__m512i*>(out);
    _mm512_store_si512(to + 0, _mm512_shuffle_i32x4(a, b, 0x88));
    _mm512_store_si512(to + 1, _mm512_shuffle_i32x4(a, b, 0xdd));
    _mm512_store_si512(to + 2, _mm512_shuffle_i32x4(c, d, 0x88));
    _mm512_store_si512(to + 3, _mm512_shuffle_i32x4(c, d, 0xdd));
}

// Lanes behind `bytes` channels repeat those before.
void prepare_block(const Int8Conv2d& p, int64_t channel, int64_t bytes, DepthwiseBlock* block) {
    lanes_of_channels(p.offset + channel, bytes, block->offset);
    lanes_of_channels(p.multiplier + channel, bytes, block->multiplier);
    const int64_t block_bytes = depthwise_block_bytes(p.weight);
    const uint8_t* packed = p.packed + channel / kDepthwiseChannels * block_bytes;
    for (int64_t i = 0; i < block_bytes; i += 64) {
        __m512i w = _mm512_loadu_si512(packed + i);
        if (bytes < 64) w = bytes == 32 ? _mm512_shuffle_i32x4(w, w, 0x44) : _mm512_shuffle_i32x4(w, w, 0x00);
        _mm512_store_si512(block->weight + i / 64, w);
    }
}

// Sums of vector j, scaled and rounded.
[[gnu::always_inline]] inline __m512i rounded(__m512i sum, const DepthwiseBlock* block, int j) {
    return _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_cvtepi32_ps(sum), block->multiplier[j]));
}

}  // namespace
}  // namespace imgopt::avx512

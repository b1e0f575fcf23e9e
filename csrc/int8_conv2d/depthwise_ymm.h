// Depthwise convolution on 256-bit vectors, 16 channels at a time: taps are taken in pairs, interleaved as words, and
// vpmaddwd adds the two products of each channel, exactly. Interleaving and the final packing both work within 128-bit
// lanes, so the channels come out in order.
#pragma once

#include <immintrin.h>

#include "tile_ymm.h"

namespace imgopt {
namespace {

constexpr int64_t kDepthwiseChannels = 16;
constexpr int64_t kDepthwisePixels = 48;

inline bool is_depthwise(const Int8Weight& w) { return w.group_channels == 1 && w.out_channels == w.groups; }
inline int64_t depthwise_blocks(const Int8Weight& w) { return ceil_div(w.out_channels, kDepthwiseChannels); }
inline int64_t depthwise_pairs(const Int8Weight& w) { return ceil_div(taps_of(w), 2); }

inline int64_t depthwise_weight_bytes(const Int8Weight& w) { return depthwise_blocks(w) * depthwise_pairs(w) * 64; }

// (block of 16 channels, pair of taps, half, channel, tap of the pair) words; a half holds channels 8L + 4 half + 0..3
// of both 128-bit lanes L.
inline void depthwise_weight_pack(const Int8Weight& w, const int8_t* weight, uint8_t* packed) {
    memset(packed, 0, static_cast<size_t>(depthwise_weight_bytes(w)));
    int16_t* out = reinterpret_cast<int16_t*>(packed);
    const int64_t taps = taps_of(w);
    for (int64_t c = 0; c < w.out_channels; ++c) {
        const int64_t in_block = c % kDepthwiseChannels;
        const int64_t lane = in_block / 8, half = in_block % 8 / 4, dword = 4 * lane + in_block % 4;
        for (int64_t t = 0; t < taps; ++t)
            out[(c / kDepthwiseChannels * depthwise_pairs(w) + t / 2) * 32 + half * 16 + dword * 2 + t % 2] =
                weight[c * taps + t];
    }
}

inline int64_t depthwise_units(const Int8Conv2d& p) { return Blocks(p, kDepthwisePixels).blocks; }

// 16 bytes of which the first `channels` are real.
inline __m128i load_16(const uint8_t* in, int64_t channels) {
    if (channels >= 16) return _mm_loadu_si128(reinterpret_cast<const __m128i*>(in));
    alignas(16) uint8_t bytes[16] = {};
    copy_bytes(bytes, in, channels);
    return _mm_load_si128(reinterpret_cast<const __m128i*>(bytes));
}

// The sums of a pixel's channels. FULL: of 16; TAPS: so many, or 0 where the number is not known here.
template <bool FULL, int TAPS>
[[gnu::always_inline]] inline void depthwise_sums(const Tile& t, const uint8_t* const* rows, __m128i flip,
                                                  const __m256i (&offset)[2], __m256i (&sums)[2]) {
    const int64_t taps = TAPS ? TAPS : t.taps;
    const auto load = [&](int64_t tap) __attribute__((always_inline)) {
        const uint8_t* from = rows[tap * kDepthwisePixels] + t.channel;
        const __m128i bytes =
            FULL ? _mm_loadu_si128(reinterpret_cast<const __m128i*>(from)) : load_16(from, t.channels);
        return _mm256_cvtepu8_epi16(_mm_xor_si128(bytes, flip));
    };
    const __m256i* weight = reinterpret_cast<const __m256i*>(t.weight);
    __m256i sum0 = offset[0], sum1 = offset[1];
#pragma GCC unroll 13
    for (int64_t tap = 0; tap < taps; tap += 2, weight += 2) {
        const __m256i a = load(tap), b = tap + 1 < taps ? load(tap + 1) : a;
        const __m256i low = _mm256_unpacklo_epi16(a, b), high = _mm256_unpackhi_epi16(a, b);
        sum0 = _mm256_add_epi32(sum0, _mm256_madd_epi16(low, _mm256_loadu_si256(weight)));
        sum1 = _mm256_add_epi32(sum1, _mm256_madd_epi16(high, _mm256_loadu_si256(weight + 1)));
    }
    // Back to sums of channels 0..7 and 8..15, which the common epilogue takes.
    sums[0] = _mm256_permute2x128_si256(sum0, sum1, 0x20), sums[1] = _mm256_permute2x128_si256(sum0, sum1, 0x31);
}

// One block of pixels, whose table is `table`.
template <bool FULL, int TAPS>
void depthwise_block(const Tile& t, const uint8_t* const* table) {
    const __m256i* offset = reinterpret_cast<const __m256i*>(t.conv->offset + t.channel);
    const __m256i o0 = _mm256_loadu_si256(offset), o1 = _mm256_loadu_si256(offset + 1);
    const __m256i lanes[2] = {_mm256_permute2x128_si256(o0, o1, 0x20), _mm256_permute2x128_si256(o0, o1, 0x31)};
    const __m128i flip = _mm_set1_epi8(static_cast<char>(t.conv->input_flip));
    const ByteEpilogueYmm to_bytes(t);
    for (int64_t m = 0; m < t.pixels; m += 2) {
        __m256i sums[2][2];
        const int64_t pixel[2] = {t.pixel + m, t.pixel + m + 1};
        const int count = m + 1 < t.pixels ? 2 : 1;
        depthwise_sums<FULL, TAPS>(t, table + m, flip, lanes, sums[0]);
        if (count > 1) depthwise_sums<FULL, TAPS>(t, table + m + 1, flip, lanes, sums[1]);
        store_pixels<2>(t, to_bytes, pixel, sums, count);
    }
}

using DepthwiseFunction = void (*)(const Tile&, const uint8_t* const*);

inline DepthwiseFunction depthwise_function(bool full, int64_t taps) {
    if (!full) return depthwise_block<false, 0>;
    return taps == 9 ? depthwise_block<true, 9> : taps == 25 ? depthwise_block<true, 25> : depthwise_block<true, 0>;
}

inline void depthwise(const Int8Conv2d& p, int64_t begin, int64_t end) {
    const Int8Weight& w = p.weight;
    const Blocks blocks(p, kDepthwisePixels);
    const int64_t taps = taps_of(w);
    const int64_t table_bytes = taps * kDepthwisePixels * 8, row_bytes = round_up(w.groups, 64);
    char* scratch = static_cast<char*>(thread_scratch(table_bytes + row_bytes));
    const uint8_t** table = reinterpret_cast<const uint8_t**>(scratch);
    uint8_t* padding = reinterpret_cast<uint8_t*>(scratch + table_bytes);
    memset(padding, p.input_zero_point ^ p.input_flip, static_cast<size_t>(row_bytes));
    const ByteRange range = byte_range(p);
    const bool rare = is_rare(p);
    for (int64_t block = begin; block < end; ++block) {
        const int64_t first = blocks.begin(block), pixels = blocks.begin(block + 1) - first;
        fill_table(p, first, first + pixels, padding, table, kDepthwisePixels);
        for (int64_t c = 0; c < w.out_channels; c += kDepthwiseChannels) {
            Tile tile{};
            tile.conv = &p;
            tile.range = range;
            tile.rare = rare;
            tile.row_stride = kDepthwisePixels;
            tile.taps = taps;
            tile.weight = p.packed + c / kDepthwiseChannels * depthwise_pairs(w) * 64;
            tile.channel = c;
            tile.channels = smaller(kDepthwiseChannels, w.out_channels - c);
            tile.pixel = first;
            tile.pixels = pixels;
            depthwise_function(tile.channels == kDepthwiseChannels, taps)(tile, table);
        }
    }
}

// The whole operation on a unit's dot product.
template <class Dot>
struct Convolution {
    static int64_t weight_bytes(const Int8Weight& w) {
        return is_depthwise(w) ? depthwise_weight_bytes(w) : igemm_weight_bytes<Ymm<Dot>>(w);
    }
    static void weight_pack(const Int8Weight& w, const int8_t* weight, uint8_t* packed) {
        is_depthwise(w) ? depthwise_weight_pack(w, weight, packed) : igemm_weight_pack<Ymm<Dot>>(w, weight, packed);
    }
    static int64_t units(const Int8Conv2d& p) {
        return is_depthwise(p.weight) ? depthwise_units(p) : igemm_units<Ymm<Dot>>(p);
    }
    static void kernel(const Int8Conv2d& p, int64_t begin, int64_t end) {
        is_depthwise(p.weight) ? depthwise(p, begin, end) : igemm<Ymm<Dot>>(p, begin, end);
    }
    static void fill(KernelTable& table, const char* layout) {
        table.int8_weight_layout = layout;
        table.int8_weight_bytes = weight_bytes;
        table.int8_weight_pack = weight_pack;
        table.int8_conv2d_units = units;
        table.int8_conv2d = kernel;
    }
};

}  // namespace
}  // namespace imgopt

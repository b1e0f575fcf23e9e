// Tiles of 256-bit vectors: 6 pixels by 16 channels, 12 accumulators, for any instruction that adds the products of two
// dwords of operands to eight int32. Shared by the AVX2 unit (two words per dword) and the AVX-VNNI unit (four bytes).
#pragma once

#include <immintrin.h>

#include "igemm.h"
#include "shift_ymm.h"

namespace imgopt {
namespace {

inline __m128i load_channels(const uint8_t* in, int64_t channels) {
    if (channels >= 8) return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(in));
    uint64_t bytes = 0;
    for (int64_t c = 0; c < channels; ++c) bytes |= uint64_t{in[c]} << (8 * c);
    return _mm_cvtsi64_si128(static_cast<long long>(bytes));
}

// The residual's bytes of 8 channels, flipped to uint8.
inline __m128i residual_bytes(const Tile& t, int64_t pixel, int64_t channel) {
    const Int8Conv2d& p = *t.conv;
    const uint8_t* in = p.residual + pixel * p.residual_stride + t.channel + channel;
    return _mm_xor_si128(load_channels(in, t.channels - channel), _mm_set1_epi8(static_cast<char>(p.residual_flip)));
}

inline __m256 requantize(const Tile& t, int64_t pixel, int64_t channel, __m256i sum) {
    const Int8Conv2d& p = *t.conv;
    const __m256 y = _mm256_mul_ps(_mm256_cvtepi32_ps(sum), _mm256_loadu_ps(p.multiplier + t.channel + channel));
    if (!p.residual) return y;
    const __m256i bytes = _mm256_cvtepu8_epi32(residual_bytes(t, pixel, channel));
    const __m256i r = _mm256_sub_epi32(bytes, _mm256_set1_epi32(p.residual_zero_point));
    return _mm256_add_ps(y, _mm256_mul_ps(_mm256_cvtepi32_ps(r), _mm256_set1_ps(p.residual_multiplier)));
}

// Float output, and multipliers that is_bounded refuses, a sum at a time; shifts in vectors.
template <int NV>
[[gnu::noinline]] void store_rare(const Tile& t, int64_t pixel, const __m256i* sums) {
    const Int8Conv2d& p = *t.conv;
    if (p.shift && !p.float_output) {
        const ShiftEpilogueYmm to_bytes(p);
        uint8_t* out = static_cast<uint8_t*>(p.output) + pixel * p.output_stride + t.channel;
        for (int64_t c = 0; c < t.channels; c += 8) {
            const __m128i residual = p.residual ? residual_bytes(t, pixel, c) : _mm_setzero_si128();
            const __m128i bytes = to_bytes(t.channel + c, sums[c / 8], residual);
            uint8_t eight[8];
            _mm_storel_epi64(reinterpret_cast<__m128i*>(eight), bytes);
            copy_bytes(out + c, eight, smaller(t.channels - c, 8));
        }
        return;
    }
    alignas(32) int32_t values[16];
    for (int j = 0; j < NV; ++j) _mm256_store_si256(reinterpret_cast<__m256i*>(values + 8 * j), sums[j]);
    for (int64_t c = 0; c < t.channels; ++c) store_sum(p, pixel, t.channel + c, values[c]);
}

// One row of sums of 16 (or, with NV = 1, 8) channels.
template <int NV>
void store_row(const Tile& t, int64_t pixel, const __m256i* sums) {
    const Int8Conv2d& p = *t.conv;
    if (t.rare) return store_rare<NV>(t, pixel, sums);
    const __m256i q0 = _mm256_cvtps_epi32(requantize(t, pixel, 0, sums[0]));
    const __m256i q1 = NV == 2 ? _mm256_cvtps_epi32(requantize(t, pixel, 8, sums[NV - 1])) : q0;
    // Packing works within 128-bit lanes; the permutation brings the channels back into order.
    __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(q0, q1), 0xd8);
    words = _mm256_adds_epi16(words, _mm256_set1_epi16(p.output_zero_point));
    __m128i bytes = _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    bytes = _mm_max_epu8(bytes, _mm_set1_epi8(static_cast<char>(t.range.low)));
    bytes = _mm_min_epu8(bytes, _mm_set1_epi8(static_cast<char>(t.range.high)));
    bytes = _mm_xor_si128(bytes, _mm_set1_epi8(static_cast<char>(p.output_flip)));
    uint8_t* out = static_cast<uint8_t*>(p.output) + pixel * p.output_stride + t.channel;
    if (t.channels == 16) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(out), bytes);
    } else {
        alignas(16) uint8_t row[16];
        _mm_store_si128(reinterpret_cast<__m128i*>(row), bytes);
        copy_bytes(out, row, t.channels);
    }
}

template <class Dot, int MR, int NV>
[[gnu::always_inline]] inline void tile_ymm(const Tile& t, int64_t m) {
    const Int8Conv2d& p = *t.conv;
    __m256i sums[MR][NV];
#pragma GCC unroll 6
    for (int i = 0; i < MR; ++i)
#pragma GCC unroll 2
        for (int j = 0; j < NV; ++j)
            sums[i][j] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p.offset + t.channel + 8 * j));
    const Dot dot(p);
    const uint8_t* weight = t.weight;
    const uint8_t* const* rows = t.rows + m;
    for (int64_t tap = 0; tap < t.taps; ++tap, rows += t.row_stride) {
        const uint8_t* row[MR];
#pragma GCC unroll 6
        for (int i = 0; i < MR; ++i) row[i] = rows[i] + t.row_offset;
        for (int64_t c = 0; c < t.inner; c += 4, weight += 32 * NV) {
            __m256i w[NV];
#pragma GCC unroll 2
            for (int j = 0; j < NV; ++j) w[j] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(weight) + j);
#pragma GCC unroll 6
            for (int i = 0; i < MR; ++i) {
                int32_t dword;
                memcpy(&dword, row[i] + c, 4);
                const __m256i x = dot.left(_mm256_set1_epi32(dword));
#pragma GCC unroll 2
                for (int j = 0; j < NV; ++j) sums[i][j] = dot(sums[i][j], x, w[j]);
            }
        }
    }
#pragma GCC unroll 6
    for (int i = 0; i < MR; ++i) store_row<NV>(t, t.pixel + m + i, sums[i]);
}

template <class Dot, int MR, int NV>
void tiles_ymm(const Tile& t) {
    for (int64_t m = 0; m < t.pixels; m += MR) tile_ymm<Dot, MR, NV>(t, m);
}

template <class Dot>
struct Ymm {
    using Product = typename Dot::Product;
    static constexpr int64_t kLanes = 8, kMaxVectors = 2;
    static constexpr int64_t kBlockPixels = 48;  // a strip of 48 pixels of 2304 words fills a fifth of an L2 cache
    static int64_t rows(int64_t) { return 6; }
    static TileFunction tiles(int64_t rows, int64_t vectors) {
        static constexpr TileFunction one[] = {tiles_ymm<Dot, 1, 1>, tiles_ymm<Dot, 2, 1>, tiles_ymm<Dot, 3, 1>,
                                               tiles_ymm<Dot, 4, 1>, tiles_ymm<Dot, 5, 1>, tiles_ymm<Dot, 6, 1>};
        static constexpr TileFunction two[] = {tiles_ymm<Dot, 1, 2>, tiles_ymm<Dot, 2, 2>, tiles_ymm<Dot, 3, 2>,
                                               tiles_ymm<Dot, 4, 2>, tiles_ymm<Dot, 5, 2>, tiles_ymm<Dot, 6, 2>};
        return (vectors == 1 ? one : two)[rows - 1];
    }
};

}  // namespace
}  // namespace imgopt

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

// Scaled and rounded values of two pixels' 16 channels to bytes, a pixel in each half.
struct ByteEpilogueYmm {
    __m256i zero_point, low, high, flip;

    explicit ByteEpilogueYmm(const Tile& t)
        : zero_point(_mm256_set1_epi16(t.conv->output_zero_point)),
          low(_mm256_set1_epi8(static_cast<char>(t.range.low))),
          high(_mm256_set1_epi8(static_cast<char>(t.range.high))),
          flip(_mm256_set1_epi8(static_cast<char>(t.conv->output_flip))) {}

    __m256i operator()(const __m256i (&first)[2], const __m256i (&second)[2]) const {
        const __m256i words0 = _mm256_adds_epi16(_mm256_packs_epi32(first[0], first[1]), zero_point);
        const __m256i words1 = _mm256_adds_epi16(_mm256_packs_epi32(second[0], second[1]), zero_point);
        // Packing works within 128-bit lanes; the permutation brings pixels and channels back into order.
        const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
        const __m256i bytes = _mm256_permutevar8x32_epi32(_mm256_packus_epi16(words0, words1), order);
        return _mm256_xor_si256(_mm256_min_epu8(_mm256_max_epu8(bytes, low), high), flip);
    }
};

inline void store_bytes(const Tile& t, int64_t pixel, __m128i bytes) {
    uint8_t* out = static_cast<uint8_t*>(t.conv->output) + pixel * t.conv->output_stride + t.channel;
    if (t.channels == 16) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(out), bytes);
    } else {
        alignas(16) uint8_t row[16];
        _mm_store_si128(reinterpret_cast<__m128i*>(row), bytes);
        copy_bytes(out, row, t.channels);
    }
}

// The sums of 16 (or, with NV = 1, 8) channels of the first one or two pixels, in rows.
template <int NV>
[[gnu::always_inline]] inline void store_pixels(const Tile& t, const ByteEpilogueYmm& to_bytes, const int64_t* pixel,
                                                const __m256i (*sums)[NV], int count) {
    if (t.rare) {
        for (int i = 0; i < count; ++i) store_rare<NV>(t, pixel[i], sums[i]);
        return;
    }
    __m256i q[2][2];
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i)
#pragma GCC unroll 2
        for (int j = 0; j < 2; ++j)
            q[i][j] = i < count && j < NV ? _mm256_cvtps_epi32(requantize(t, pixel[i], 8 * j, sums[i][j])) : q[0][0];
    const __m256i bytes = to_bytes(q[0], q[1]);
    store_bytes(t, pixel[0], _mm256_castsi256_si128(bytes));
    if (count > 1) store_bytes(t, pixel[1], _mm256_extracti128_si256(bytes, 1));
}

template <class Dot, int MR, int NV>
[[gnu::always_inline]] inline void tile_ymm(const Tile& t, const ByteEpilogueYmm& to_bytes, int64_t m) {
    const Int8Conv2d& p = *t.conv;
    __m256i sums[MR][NV];
#pragma GCC unroll 6
    for (int i = 0; i < MR; ++i)
#pragma GCC unroll 2
        for (int j = 0; j < NV; ++j)
            sums[i][j] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p.offset + t.channel + 8 * j));
    const Dot dot(p);
    for (int64_t i = 0; i < t.taps; ++i) {
        const int64_t tap = t.tap ? t.tap[i] : i;
        const uint8_t* weight = t.weight + tap * t.inner * 8 * NV;
        const uint8_t* const* rows = t.rows + m + tap * t.row_stride;
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
    int64_t pixel[MR];
#pragma GCC unroll 6
    for (int i = 0; i < MR; ++i) pixel[i] = t.at ? t.at[m + i] : t.pixel + m + i;
#pragma GCC unroll 3
    for (int i = 0; i < MR; i += 2) store_pixels<NV>(t, to_bytes, pixel + i, sums + i, i + 1 < MR ? 2 : 1);
}

template <class Dot, int MR, int NV>
void tiles_ymm(const Tile& t) {
    const ByteEpilogueYmm to_bytes(t);
    for (int64_t m = 0; m < t.pixels; m += MR) tile_ymm<Dot, MR, NV>(t, to_bytes, m);
}

template <class Dot>
struct Ymm {
    using Product = typename Dot::Product;
    static constexpr int64_t kLanes = 8, kMaxVectors = 2;
    static constexpr int64_t kBlockPixels = 48;   // a strip of 48 pixels of 2304 words fills a fifth of an L2 cache
    static constexpr int64_t kSortedPixels = 98;  // divides 14 x 14 and the larger maps of networks for 224 x 224
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

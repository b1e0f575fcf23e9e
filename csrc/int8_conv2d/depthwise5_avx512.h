// Depthwise 5 x 5 on AVX-512 VNNI, with strides 1 and 2. Four rows of a column fill a dword; of the fifth row, four
// neighbouring columns do: 28 vpdpbusd and 4 multiplications per 64 outputs, where columns of five rows would take 40.
// With stride 1 two output rows share the columns of input rows 1 to 4, and the first one's row 0 and the second one's
// row 5 are what is left. The columns of such a row are shared by two neighbouring vectors, whose weights lie in other
// bytes.
#pragma once

#include "depthwise_rows_avx512.h"

namespace imgopt::avx512 {
namespace {

template <int STRIDE, bool PLAIN>
struct Depthwise5 {
    static constexpr int kTaps = 5, kStride = STRIDE, kRows = STRIDE == 1 ? 2 : 1;
    // How the five rows of weights are split: four and the last one, or, for the first of two output rows, the first
    // one and four.
    enum Split { kLast, kFirst };
    static constexpr int kFour = kTaps * 4, kOne = 2 * 2 * 4, kWeights = kRows * (kFour + kOne);
    static constexpr int64_t kBlockBytes = sizeof(DepthwiseBlock) + kWeights * 64;

    const ByteEpilogue<PLAIN> to_bytes;

    explicit Depthwise5(const Int8Conv2d& p) : to_bytes(p, byte_range(p)) {}

    // Weights, per split: four rows (tap, vector), then one row (which of two neighbouring vectors, dword of columns,
    // vector), byte b of dword d being column 4d + b of those that the neighbours read together.
    static void prepare(const Int8Conv2d& p, int64_t channel, int64_t bytes, DepthwiseBlock* block) {
        alignas(64) uint8_t memory[sizeof(DepthwiseBlock) + kTaps * 2 * 4 * 64];
        DepthwiseBlock* packed = reinterpret_cast<DepthwiseBlock*>(memory);  // weights (tap, rows / 4, vector)
        prepare_block(p, 1, channel, bytes, packed);
        memcpy(block, packed, sizeof(DepthwiseBlock));
        if (PLAIN) take_as_floats(block);
        const int distance = static_cast<int>(64 / bytes) * STRIDE;
        for (int split = 0; split < kRows; ++split) {
            __m512i *four = block->weight + split * (kFour + kOne), *one = four + kFour;
            for (int i = 0; i < kOne; ++i) one[i] = _mm512_setzero_si512();
            for (int tap = 0; tap < kTaps; ++tap)
                for (int j = 0; j < 4; ++j) {
                    const __m512i top = packed->weight[tap * 8 + j], last = packed->weight[tap * 8 + 4 + j];
                    four[tap * 4 + j] =
                        split == kLast ? top : _mm512_or_si512(_mm512_srli_epi32(top, 8), _mm512_slli_epi32(last, 24));
                    const __m512i w = split == kLast ? last : _mm512_and_si512(top, _mm512_set1_epi32(0xff));
                    for (int i = 0; i < 2; ++i) {
                        const int column = i * distance % 4 + tap;
                        __m512i& to = one[(i * 2 + column / 4) * 4 + j];
                        to = _mm512_or_si512(to, _mm512_sll_epi32(w, _mm_cvtsi32_si128(column % 4 * 8)));
                    }
                }
        }
    }

    template <int ROWS, class L, int COUNT, bool BORDER>
    [[gnu::always_inline]] void vectors(const Strip& s, int64_t ox, int64_t pixels) const {
        __m512i sums[ROWS][COUNT][4];
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j)
#pragma GCC unroll 4
            for (int i = 0; i < ROWS * COUNT; ++i) sums[i / COUNT][i % COUNT][j] = s.block->offset[j];
        const int64_t x0 = ox * STRIDE - s.pad;
        add_four_rows<ROWS, L, COUNT, BORDER>(s, x0, sums);
        if constexpr (ROWS == 2) add_one_row<kFirst, L, COUNT, BORDER>(s, 0, x0, sums[0]);
        add_one_row<kLast, L, COUNT, BORDER>(s, ROWS + 3, x0, sums[ROWS - 1]);
        store_vectors<L>(s, to_bytes, ox, pixels, sums);
    }

  private:
    static const __m512i* weights(const Strip& s, int split) { return s.block->weight + split * (kFour + kOne); }

    // Rows 0..3, or, of two output rows, 1..4.
    template <int ROWS, class L, int COUNT, bool BORDER>
    [[gnu::always_inline]] static void add_four_rows(const Strip& s, int64_t x0, __m512i (&sums)[ROWS][COUNT][4]) {
        constexpr int kDistance = L::kPixels * STRIDE;  // columns between vectors
        __m512i quads[kTaps + (COUNT - 1) * kDistance][4];
#pragma GCC unroll 5
        for (int t = 0; t < kTaps; ++t) {
#pragma GCC unroll 2
            for (int i = 0; i < COUNT; ++i) {
                const int x = t + i * kDistance;
                if (t >= kDistance && i + 1 < COUNT) continue;  // vector i + 1 has had it
                __m512i u[4];
#pragma GCC unroll 4
                for (int r = 0; r < 4; ++r) u[r] = load_column<L, STRIDE, !PLAIN, BORDER>(s, ROWS - 1 + r, x0 + x);
                interleave_bytes(u[0], u[1], u[2], u[3], quads[x]);
            }
#pragma GCC unroll 2
            for (int v = 0; v < ROWS; ++v)
#pragma GCC unroll 4
                for (int j = 0; j < 4; ++j) {
                    __m512i w = weights(s, ROWS - 1 - v)[t * 4 + j];
                    asm("" : "+v"(w));  // loaded once, not by every product
#pragma GCC unroll 2
                    for (int i = 0; i < COUNT; ++i)
                        sums[v][i][j] = _mm512_dpbusd_epi32(sums[v][i][j], quads[t + i * kDistance][j], w);
                }
        }
    }

    template <Split SPLIT, class L, int COUNT, bool BORDER>
    [[gnu::always_inline]] static void add_one_row(const Strip& s, int row, int64_t x0, __m512i (&sums)[COUNT][4]) {
        constexpr int kDistance = L::kPixels * STRIDE, kColumns = kTaps + (COUNT - 1) * kDistance;
        const __m512i* weight = weights(s, SPLIT) + kFour;
#pragma GCC unroll 4
        for (int q = 0; q < (kColumns + 3) / 4; ++q) {
            __m512i u[4], quads[4];
#pragma GCC unroll 4
            for (int b = 0; b < 4; ++b)  // behind the last column the one before, which meets weights of zero
                u[b] = 4 * q + b < kColumns ? load_column<L, STRIDE, !PLAIN, BORDER>(s, row, x0 + 4 * q + b) : u[b - 1];
            interleave_bytes(u[0], u[1], u[2], u[3], quads);
#pragma GCC unroll 2
            for (int i = 0; i < COUNT; ++i) {
                const int dword = q - i * kDistance / 4;
                if (dword < 0 || dword > 1) continue;
#pragma GCC unroll 4
                for (int j = 0; j < 4; ++j)
                    sums[i][j] = _mm512_dpbusd_epi32(sums[i][j], quads[j], weight[(i * 2 + dword) * 4 + j]);
            }
        }
    }
};

}  // namespace
}  // namespace imgopt::avx512

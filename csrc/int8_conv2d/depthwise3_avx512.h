// Depthwise 3 x 3 on AVX-512 VNNI, with strides 1 and 2: 12 vpdpbusd and 4 multiplications per 64 outputs keep two of
// the four vector pipes busy for 8 cycles. With stride 1 two output rows share the columns of four input rows.
#pragma once

#include "depthwise_rows_avx512.h"

namespace imgopt::avx512 {
namespace {

template <int STRIDE, bool PLAIN>
struct Depthwise3 {
    static constexpr int kTaps = 3, kStride = STRIDE, kRows = STRIDE == 1 ? 2 : 1;
    static constexpr int64_t kBlockBytes = sizeof(DepthwiseBlock) + kRows * kTaps * kColumnBytes;

    const ByteEpilogue<PLAIN> to_bytes;

    explicit Depthwise3(const Int8Conv2d& p) : to_bytes(p, byte_range(p)) {}

    static void prepare(const Int8Conv2d& p, int64_t channel, int64_t bytes, DepthwiseBlock* block) {
        prepare_block(p, kRows, channel, bytes, block);
        if (PLAIN) take_as_floats(block);
    }

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
            for (int i = 0; i < COUNT; ++i) {
                const int x = t + i * kDistance;
                if (t >= kDistance && i + 1 < COUNT) continue;  // vector i + 1 has had it
                __m512i u[kTaps + ROWS - 1];
#pragma GCC unroll 4
                for (int r = 0; r < kTaps + ROWS - 1; ++r) u[r] = load_column<L, STRIDE, !PLAIN, BORDER>(s, r, x0 + x);
                // Without a fourth row the third again, which meets weights of zero.
                interleave_bytes(u[0], u[1], u[2], u[kTaps + ROWS - 2], quads[x]);
            }
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
        store_vectors<L>(s, to_bytes, ox, pixels, sums);
    }
};

}  // namespace
}  // namespace imgopt::avx512

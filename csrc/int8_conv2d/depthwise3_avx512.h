// Depthwise 3 x 3 on AVX-512 VNNI, with strides 1 and 2, rolling along a row (depthwise_rows_avx512.h): 12 vpdpbusd and
// 4 multiplications per 64 outputs keep two of the four vector pipes busy for 8 cycles. The 12 vectors of weights and
// the sums of three pixels, or with stride 2 of two, fit the registers.
#pragma once

#include "depthwise_rows_avx512.h"

namespace imgopt::avx512 {
namespace {

template <int STRIDE, bool PLAIN>
struct Depthwise3 {
    static constexpr int kTaps = 3, kStride = STRIDE;
    static constexpr int64_t kBlockBytes = sizeof(DepthwiseBlock) + kTaps * kColumnBytes;
    // Fetching rows ahead takes a quarter to a half of the time away where they come from memory (144 channels at 56 x
    // 56, N = 8: 600 to 333 us) and adds up to a quarter where they come from the third cache: two instructions per 64
    // outputs, five with stride 2.
    static constexpr int64_t kFarBytes = int64_t{STRIDE == 1 ? 2 : 6} << 20;

    const ByteEpilogue<PLAIN> to_bytes;

    explicit Depthwise3(const Int8Conv2d& p) : to_bytes(p, byte_range(p)) {}

    static void prepare(const Int8Conv2d& p, int64_t channel, int64_t bytes, DepthwiseBlock* block) {
        prepare_block(p, channel, bytes, block);
    }

    template <class L, bool FETCH>
    [[gnu::noinline]] void strip(const Strip& given) const {
        const Strip s = given;  // a copy, which no store of bytes can change
        Weights w;
#pragma GCC unroll 12
        for (int i = 0; i < 4 * kTaps; ++i) {
            w.tap[i / 4][i % 4] = s.block->weight[i];
            asm("" : "+v"(w.tap[i / 4][i % 4]));  // in a register
        }
        for (int64_t y = 0; y < s.rows; y += L::kRows) row<L, FETCH>(s, w, y);
    }

  private:
    struct Weights {
        __m512i tap[kTaps][4];
    };

    template <class L, bool FETCH>
    [[gnu::always_inline]] void row(const Strip& s, const Weights& w, int64_t y) const {
        Place<kTaps, STRIDE> p;
        p.template start<L>(s, y);
        __m512i a[4], b[4], c[4], column[4];  // sums of three neighbouring pixels
        load_column<L, true>(s, p, column);
        begin(a, s.block, column, w.tap[0]);
        if constexpr (STRIDE == 1) {
            load_column<L, true>(s, p, column);
            add(a, column, w.tap[1]);
            begin(b, s.block, column, w.tap[0]);
        }
        const int64_t inside = p.inside(s);
        while (p.i + 3 <= inside) {
            step<L, FETCH, false>(s, w, p, a, b, c);
            step<L, FETCH, false>(s, w, p, b, c, a);
            step<L, FETCH, false>(s, w, p, c, a, b);
        }
        for (;;) {
            if (p.i == s.pixels) break;
            step<L, FETCH, true>(s, w, p, a, b, c);
            if (p.i == s.pixels) break;
            step<L, FETCH, true>(s, w, p, b, c, a);
            if (p.i == s.pixels) break;
            step<L, FETCH, true>(s, w, p, c, a, b);
        }
    }

    // Finishes a pixel, and begins the one behind the last that has begun.
    template <class L, bool FETCH, bool BORDER>
    [[gnu::always_inline]] void step(const Strip& s, const Weights& w, Place<kTaps, STRIDE>& p, __m512i (&old)[4],
                                     __m512i (&next)[4], __m512i (&young)[4]) const {
        if constexpr (FETCH) p.template fetch<L>(s);
        __m512i column[4];
        if constexpr (STRIDE == 2) {
            load_column<L, BORDER>(s, p, column);
            add(old, column, w.tap[1]);
        }
        load_column<L, BORDER>(s, p, column);
        add(old, column, w.tap[2]);
        if constexpr (STRIDE == 1) add(next, column, w.tap[1]);
        begin(STRIDE == 1 ? young : next, s.block, column, w.tap[0]);
        __m512i q[4];
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) q[j] = rounded(old[j], s.block, j);
        L::store(p.out, s.out_row, to_bytes.bytes(to_bytes.words(q[0], q[1]), to_bytes.words(q[2], q[3])), s.rows - p.y,
                 s.mask);
        p.out += s.out_pixel;
        ++p.i;
    }

    template <class L, bool BORDER>
    [[gnu::always_inline]] static void load_column(const Strip& s, Place<kTaps, STRIDE>& p, __m512i (&quads)[4]) {
        __m512i u[kTaps];
        p.template load<L, !PLAIN, BORDER>(s, u);
        interleave_bytes(u[0], u[1], u[2], u[2], quads);  // the fourth meets weights of zero
    }

    [[gnu::always_inline]] static void add(__m512i (&sums)[4], const __m512i (&column)[4], const __m512i (&weight)[4]) {
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) sums[j] = _mm512_dpbusd_epi32(sums[j], column[j], weight[j]);
    }
    [[gnu::always_inline]] static void begin(__m512i (&sums)[4], const DepthwiseBlock* block,
                                             const __m512i (&column)[4], const __m512i (&weight)[4]) {
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) sums[j] = _mm512_dpbusd_epi32(fresh(block->offset[j]), column[j], weight[j]);
    }
};

}  // namespace
}  // namespace imgopt::avx512

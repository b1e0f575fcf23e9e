// Depthwise 5 x 5 on AVX-512 VNNI, with strides 1 and 2, rolling along a row (depthwise_rows_avx512.h). Four rows of a
// column fill a dword; of the fifth row, four neighbouring columns do, of which a pixel takes two dwords: 28 vpdpbusd
// and 4 multiplications per 64 outputs, where columns of five rows would take 40. Registers hold the weights and sums
// of half of the channels, so a row is gone through twice; the first time leaves words.
#pragma once

#include "depthwise_rows_avx512.h"

namespace imgopt::avx512 {
namespace {

template <int STRIDE, bool PLAIN>
struct Depthwise5 {
    static constexpr int kTaps = 5, kStride = STRIDE;
    static constexpr int kHalf = 2 * kTaps + 4;        // vectors of weights: (tap, vector), the fifth row's two dwords
    static constexpr int kLast = STRIDE == 1 ? 3 : 2;  // byte of the second dword that a pixel's last column is in
    static constexpr int64_t kBlockBytes = sizeof(DepthwiseBlock) + 2 * kHalf * 64;
    // Fetching rows ahead takes a quarter of the time away where they come from memory and costs 2 % where not.
    static constexpr int64_t kFarBytes = int64_t{1} << 20;

    const ByteEpilogue<PLAIN> to_bytes;

    explicit Depthwise5(const Int8Conv2d& p) : to_bytes(p, byte_range(p)) {}

    static void prepare(const Int8Conv2d& p, int64_t channel, int64_t bytes, DepthwiseBlock* block) {
        alignas(64) uint8_t memory[sizeof(DepthwiseBlock) + kTaps * 2 * 4 * 64];
        DepthwiseBlock* packed = reinterpret_cast<DepthwiseBlock*>(memory);  // weights (tap, rows / 4, vector)
        prepare_block(p, channel, bytes, packed);
        memcpy(block, packed, sizeof(DepthwiseBlock));
        for (int j = 0; j < 4; ++j) {
            __m512i *four = block->weight + j / 2 * kHalf + j % 2, *one = four + 2 * kTaps;
            one[0] = _mm512_setzero_si512();
            for (int tap = 0; tap < kTaps; ++tap) {
                const __m512i last = packed->weight[tap * 8 + 4 + j];
                four[2 * tap] = packed->weight[tap * 8 + j];
                if (tap < 4)
                    one[0] = _mm512_or_si512(one[0], _mm512_sll_epi32(last, _mm_cvtsi32_si128(8 * tap)));
                else
                    one[2] = _mm512_slli_epi32(last, 8 * kLast);
            }
        }
    }

    template <class L, bool FETCH>
    [[gnu::noinline]] void strip(const Strip& given) const {
        const Strip s = given;  // a copy, which no store of bytes can change
        alignas(64) __m512i words[kStripPixels];
        for (int64_t y = 0; y < s.rows; y += L::kRows) {
            row<L, FETCH, 0>(s, y, words);
            row<L, FETCH, 1>(s, y, words);
        }
    }

  private:
    using Pair = __m512i[2];  // two of the four vectors
    struct State {
        Place<kTaps, STRIDE> p;
        Pair tap[kTaps];
        const Pair* fifth;         // weights
        __m512i before, pairs[2];  // of the fifth row: the column before; pairs of columns, the last two of them
        __m512i* words;
    };

    template <class L, bool FETCH, int HALF>
    [[gnu::always_inline]] void row(const Strip& s, int64_t y, __m512i* words) const {
        State t;
        t.p.template start<L>(s, y);
        const __m512i* weight = s.block->weight + HALF * kHalf;
#pragma GCC unroll 10
        for (int i = 0; i < 2 * kTaps; ++i) {
            t.tap[i / 2][i % 2] = weight[i];
            asm("" : "+v"(t.tap[i / 2][i % 2]));  // in a register
        }
        t.fifth = reinterpret_cast<const Pair*>(weight + 2 * kTaps);
        t.before = t.pairs[0] = t.pairs[1] = s.zero_point;
        t.words = words;
        Pair a, b, c, d, e;  // sums of neighbouring pixels
        if constexpr (STRIDE == 1) {
            add_column<L, HALF, 4, true>(s, t, e, e, e, e, a);
            add_column<L, HALF, 3, true>(s, t, e, e, e, a, b);
            add_column<L, HALF, 2, true>(s, t, e, e, a, b, c);
            add_column<L, HALF, 1, true>(s, t, e, a, b, c, d);
        } else {
            add_columns<L, HALF, 2, true>(s, t, c, c, a);
            add_columns<L, HALF, 1, true>(s, t, c, a, b);
        }
        const int64_t inside = t.p.inside(s);
        if constexpr (STRIDE == 1) {
            while (t.p.i + 5 <= inside) {
                step<L, FETCH, HALF, false>(s, t, a, b, c, d, e);
                step<L, FETCH, HALF, false>(s, t, b, c, d, e, a);
                step<L, FETCH, HALF, false>(s, t, c, d, e, a, b);
                step<L, FETCH, HALF, false>(s, t, d, e, a, b, c);
                step<L, FETCH, HALF, false>(s, t, e, a, b, c, d);
            }
        } else {
            while (t.p.i + 3 <= inside) {
                step<L, FETCH, HALF, false>(s, t, a, b, c, d, e);
                step<L, FETCH, HALF, false>(s, t, b, c, a, d, e);
                step<L, FETCH, HALF, false>(s, t, c, a, b, d, e);
            }
        }
        while (t.p.i < s.pixels) {
            step<L, FETCH, HALF, true>(s, t, a, b, c, d, e);
#pragma GCC unroll 2
            for (int j = 0; j < 2; ++j) {
                a[j] = b[j], b[j] = c[j];
                if constexpr (STRIDE == 1) c[j] = d[j], d[j] = e[j];
            }
        }
    }

    // Finishes pixel a, and begins the one behind the last that has begun: e, or with stride 2 c.
    template <class L, bool FETCH, int HALF, bool BORDER>
    [[gnu::always_inline]] void step(const Strip& s, State& t, Pair& a, Pair& b, Pair& c, Pair& d, Pair& e) const {
        if constexpr (FETCH && HALF == 0) t.p.template fetch<L>(s);
        if constexpr (STRIDE == 1)
            add_column<L, HALF, 0, BORDER>(s, t, a, b, c, d, e);
        else
            add_columns<L, HALF, 0, BORDER>(s, t, a, b, c);
        const __m512i q = to_bytes.words(rounded(a[0], s.block, 2 * HALF), rounded(a[1], s.block, 2 * HALF + 1));
        if constexpr (HALF == 0) {
            _mm512_store_si512(t.words, q);
        } else {
            L::store(t.p.out, s.out_row, to_bytes.bytes(_mm512_load_si512(t.words), q), s.rows - t.p.y, s.mask);
            t.p.out += s.out_pixel;
        }
        ++t.words, ++t.p.i;
    }

    // A column with stride 1; the SKIP oldest pixels are none.
    template <class L, int HALF, int SKIP, bool BORDER>
    [[gnu::always_inline]] static void add_column(const Strip& s, State& t, Pair& a, Pair& b, Pair& c, Pair& d,
                                                  Pair& e) {
        Pair quads, row;
        const __m512i last = load_column<L, HALF, BORDER>(s, t.p, quads);
        const __m512i pair = unpack_bytes<HALF>(t.before, last);
        unpack_words(t.pairs[0], pair, row);
        t.before = last, t.pairs[0] = t.pairs[1], t.pairs[1] = pair;
        if constexpr (SKIP < 1) add(a, quads, t.tap[4]), add(a, row, t.fifth[1]);
        if constexpr (SKIP < 2) add(b, quads, t.tap[3]), add(b, row, t.fifth[0]);
        if constexpr (SKIP < 3) add(c, quads, t.tap[2]);
        if constexpr (SKIP < 4) add(d, quads, t.tap[1]);
        begin<HALF>(e, s.block, quads, t.tap[0]);
    }

    // Two columns with stride 2.
    template <class L, int HALF, int SKIP, bool BORDER>
    [[gnu::always_inline]] static void add_columns(const Strip& s, State& t, Pair& a, Pair& b, Pair& c) {
        Pair quads, row;
        __m512i last = load_column<L, HALF, BORDER>(s, t.p, quads);
        if constexpr (SKIP < 1) add(a, quads, t.tap[4]);
        if constexpr (SKIP < 2) add(b, quads, t.tap[2]);
        begin<HALF>(c, s.block, quads, t.tap[0]);
        const __m512i before = last;
        last = load_column<L, HALF, BORDER>(s, t.p, quads);
        const __m512i pair = unpack_bytes<HALF>(before, last);
        unpack_words(t.pairs[0], pair, row);
        t.pairs[0] = pair;
        if constexpr (SKIP < 1) add(a, row, t.fifth[1]);
        if constexpr (SKIP < 2) add(b, quads, t.tap[3]), add(b, row, t.fifth[0]);
        add(c, quads, t.tap[1]);
    }

    // The next column: dwords of rows 0 to 3, and row 4.
    template <class L, int HALF, bool BORDER>
    [[gnu::always_inline]] static __m512i load_column(const Strip& s, Place<kTaps, STRIDE>& p, Pair& quads) {
        __m512i u[kTaps];
        p.template load<L, !PLAIN, BORDER>(s, u);
        unpack_words(unpack_bytes<HALF>(u[0], u[1]), unpack_bytes<HALF>(u[2], u[3]), quads);
        return u[4];
    }

    template <int HALF>
    [[gnu::always_inline]] static __m512i unpack_bytes(__m512i a, __m512i b) {
        return HALF == 0 ? _mm512_unpacklo_epi8(a, b) : _mm512_unpackhi_epi8(a, b);
    }
    [[gnu::always_inline]] static void unpack_words(__m512i a, __m512i b, Pair& quads) {
        quads[0] = _mm512_unpacklo_epi16(a, b), quads[1] = _mm512_unpackhi_epi16(a, b);
    }
    [[gnu::always_inline]] static void add(Pair& sums, const Pair& quads, const Pair& weight) {
#pragma GCC unroll 2
        for (int j = 0; j < 2; ++j) sums[j] = _mm512_dpbusd_epi32(sums[j], quads[j], weight[j]);
    }
    template <int HALF>
    [[gnu::always_inline]] static void begin(Pair& sums, const DepthwiseBlock* block, const Pair& quads,
                                             const Pair& weight) {
#pragma GCC unroll 2
        for (int j = 0; j < 2; ++j)
            sums[j] = _mm512_dpbusd_epi32(fresh(block->offset[2 * HALF + j]), quads[j], weight[j]);
    }
};

}  // namespace
}  // namespace imgopt::avx512

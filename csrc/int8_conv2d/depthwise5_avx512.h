// Depthwise 5 x 5 on AVX-512 VNNI, with strides 1 and 2, rolling along a row (depthwise_rows_avx512.h). Four rows of a
// column fill a dword; of the fifth row, four neighbouring columns do, of which a pixel takes two dwords: 28 vpdpbusd
// and 4 multiplications per 64 outputs, where columns of five rows would take 40. With stride 1 registers hold the sums
// of half of the channels, so a row is gone through twice; the first time leaves words.
#pragma once

#include "depthwise_rows_avx512.h"

namespace imgopt::avx512 {
namespace {

template <int STRIDE, bool PLAIN>
struct Depthwise5 {
    static constexpr int kTaps = 5, kStride = STRIDE;
    static constexpr int kVectors = STRIDE == 1 ? 2 : 4;  // of the four, in a pass
    static constexpr int kWeights =
        (kTaps + 2) * kVectors;                        // of a pass: (tap, vector), (dword of the fifth row, vector)
    static constexpr int kLast = STRIDE == 1 ? 3 : 2;  // byte of the second dword that a pixel's last column is in
    static constexpr int64_t kBlockBytes = sizeof(DepthwiseBlock) + 4 / kVectors * kWeights * 64;
    // With stride 1 fetching rows ahead takes a tenth of the time away where they come from memory and costs 2 % where
    // not; with stride 2 it costs a tenth at 4 MiB (144 channels at 56 x 56, N = 8).
    static constexpr int64_t kFarBytes = int64_t{STRIDE == 1 ? 1 : 6} << 20;

    const ByteEpilogue<PLAIN> to_bytes;

    explicit Depthwise5(const Int8Conv2d& p) : to_bytes(p, byte_range(p)) {}

    static void prepare(const Int8Conv2d& p, int64_t channel, int64_t bytes, DepthwiseBlock* block) {
        alignas(64) uint8_t memory[sizeof(DepthwiseBlock) + kTaps * 2 * 4 * 64];
        DepthwiseBlock* packed = reinterpret_cast<DepthwiseBlock*>(memory);  // weights (tap, rows / 4, vector)
        prepare_block(p, channel, bytes, packed);
        memcpy(block, packed, sizeof(DepthwiseBlock));
        for (int j = 0; j < 4; ++j) {
            __m512i* four = block->weight + j / kVectors * kWeights + j % kVectors;
            __m512i* one = four + kTaps * kVectors;
            one[0] = _mm512_setzero_si512();
            for (int tap = 0; tap < kTaps; ++tap) {
                const __m512i last = packed->weight[tap * 8 + 4 + j];
                four[tap * kVectors] = packed->weight[tap * 8 + j];
                if (tap < 4)
                    one[0] = _mm512_or_si512(one[0], _mm512_sll_epi32(last, _mm_cvtsi32_si128(8 * tap)));
                else
                    one[kVectors] = _mm512_slli_epi32(last, 8 * kLast);
            }
        }
    }

    template <class L, bool FETCH>
    [[gnu::noinline]] void strip(const Strip& given) const {
        const Strip s = given;  // a copy, which no store of bytes can change
        alignas(64) __m512i words[kStripPixels];
        for (int64_t y = 0; y < s.rows; y += L::kRows) {
            row<L, FETCH, 0>(s, y, words);
            if constexpr (kVectors == 2) row<L, FETCH, 2>(s, y, words);
        }
    }

  private:
    using Group = __m512i[kVectors];      // the vectors of a pass
    using Bytes = __m512i[kVectors / 2];  // two rows or columns, interleaved
    struct State {
        Place<kTaps, STRIDE> p;
        Group tap[kTaps];
        const Group* fifth;      // weights
        __m512i before;          // of the fifth row: the column before
        Bytes oldest, previous;  // the pairs of columns that ended two columns ago and one column ago
        __m512i* words;
    };

    // FIRST: of the vectors of this pass.
    template <class L, bool FETCH, int FIRST>
    [[gnu::always_inline]] void row(const Strip& s, int64_t y, __m512i* words) const {
        State t;
        t.p.template start<L>(s, y);
        const __m512i* weight = s.block->weight + FIRST / kVectors * kWeights;
#pragma GCC unroll 20
        for (int i = 0; i < kTaps * kVectors; ++i) {
            t.tap[i / kVectors][i % kVectors] = weight[i];
            asm("" : "+v"(t.tap[i / kVectors][i % kVectors]));  // in a register, if there is one
        }
        t.fifth = reinterpret_cast<const Group*>(weight + kTaps * kVectors);
        t.before = s.zero_point;
#pragma GCC unroll 2
        for (int i = 0; i < kVectors / 2; ++i) t.oldest[i] = t.previous[i] = s.zero_point;
        t.words = words;
        Group a, b, c, d, e;  // sums of neighbouring pixels
        if constexpr (STRIDE == 1) {
            add_column<L, FIRST, 4, true>(s, t, e, e, e, e, a);
            add_column<L, FIRST, 3, true>(s, t, e, e, e, a, b);
            add_column<L, FIRST, 2, true>(s, t, e, e, a, b, c);
            add_column<L, FIRST, 1, true>(s, t, e, a, b, c, d);
        } else {
            add_columns<L, 2, true>(s, t, c, c, a);
            add_columns<L, 1, true>(s, t, c, a, b);
        }
        const int64_t inside = t.p.inside(s);
        if constexpr (STRIDE == 1) {
            while (t.p.i + 5 <= inside) {
                step<L, FETCH, FIRST, false>(s, t, a, b, c, d, e);
                step<L, FETCH, FIRST, false>(s, t, b, c, d, e, a);
                step<L, FETCH, FIRST, false>(s, t, c, d, e, a, b);
                step<L, FETCH, FIRST, false>(s, t, d, e, a, b, c);
                step<L, FETCH, FIRST, false>(s, t, e, a, b, c, d);
            }
        } else {
            while (t.p.i + 3 <= inside) {
                step<L, FETCH, FIRST, false>(s, t, a, b, c, d, e);
                step<L, FETCH, FIRST, false>(s, t, b, c, a, d, e);
                step<L, FETCH, FIRST, false>(s, t, c, a, b, d, e);
            }
        }
        while (t.p.i < s.pixels) {
            step<L, FETCH, FIRST, true>(s, t, a, b, c, d, e);
#pragma GCC unroll 4
            for (int j = 0; j < kVectors; ++j) {
                a[j] = b[j], b[j] = c[j];
                if constexpr (STRIDE == 1) c[j] = d[j], d[j] = e[j];
            }
        }
    }

    // Finishes pixel a, and begins the one behind the last that has begun: e, or with stride 2 c.
    template <class L, bool FETCH, int FIRST, bool BORDER>
    [[gnu::always_inline]] void step(const Strip& s, State& t, Group& a, Group& b, Group& c, Group& d, Group& e) const {
        if constexpr (FETCH && FIRST == 0) t.p.template fetch<L>(s);
        if constexpr (STRIDE == 1)
            add_column<L, FIRST, 0, BORDER>(s, t, a, b, c, d, e);
        else
            add_columns<L, 0, BORDER>(s, t, a, b, c);
        __m512i words[2];
#pragma GCC unroll 2
        for (int i = 0; i < kVectors; i += 2)
            words[i / 2] = to_bytes.words(rounded(a[i], s.block, FIRST + i), rounded(a[i + 1], s.block, FIRST + i + 1));
        if constexpr (FIRST + kVectors < 4) {
            _mm512_store_si512(t.words++, words[0]);
        } else {
            const __m512i bytes = kVectors == 4 ? to_bytes.bytes(words[0], words[1])
                                                : to_bytes.bytes(_mm512_load_si512(t.words++), words[0]);
            L::store(t.p.out, s.out_row, bytes, s.rows - t.p.y, s.mask);
            t.p.out += s.out_pixel;
        }
        ++t.p.i;
    }

    // A column with stride 1; the SKIP oldest pixels are none.
    template <class L, int FIRST, int SKIP, bool BORDER>
    [[gnu::always_inline]] static void add_column(const Strip& s, State& t, Group& a, Group& b, Group& c, Group& d,
                                                  Group& e) {
        Group quads, row;
        Bytes pair;
        const __m512i last = load_column<L, FIRST, BORDER>(s, t.p, quads);
        unpack_bytes<FIRST>(t.before, last, pair);
        unpack_words(t.oldest, pair, row);
        t.before = last, t.oldest[0] = t.previous[0], t.previous[0] = pair[0];
        if constexpr (SKIP < 1) add(a, quads, t.tap[4]), add(a, row, t.fifth[1]);
        if constexpr (SKIP < 2) add(b, quads, t.tap[3]), add(b, row, t.fifth[0]);
        if constexpr (SKIP < 3) add(c, quads, t.tap[2]);
        if constexpr (SKIP < 4) add(d, quads, t.tap[1]);
        begin<FIRST>(e, s.block, quads, t.tap[0]);
    }

    // Two columns with stride 2.
    template <class L, int SKIP, bool BORDER>
    [[gnu::always_inline]] static void add_columns(const Strip& s, State& t, Group& a, Group& b, Group& c) {
        Group quads, row;
        Bytes pair;
        const __m512i before = load_column<L, 0, BORDER>(s, t.p, quads);
        if constexpr (SKIP < 1) add(a, quads, t.tap[4]);
        if constexpr (SKIP < 2) add(b, quads, t.tap[2]);
        begin<0>(c, s.block, quads, t.tap[0]);
        const __m512i last = load_column<L, 0, BORDER>(s, t.p, quads);
        if constexpr (SKIP < 2) add(b, quads, t.tap[3]);
        add(c, quads, t.tap[1]);
        unpack_bytes<0>(before, last, pair);
        unpack_words(t.oldest, pair, row);
#pragma GCC unroll 2
        for (int i = 0; i < kVectors / 2; ++i) t.oldest[i] = pair[i];
        if constexpr (SKIP < 1) add(a, row, t.fifth[1]);
        if constexpr (SKIP < 2) add(b, row, t.fifth[0]);
    }

    // The next column: dwords of rows 0 to 3, and row 4.
    template <class L, int FIRST, bool BORDER>
    [[gnu::always_inline]] static __m512i load_column(const Strip& s, Place<kTaps, STRIDE>& p, Group& quads) {
        __m512i u[kTaps];
        Bytes top, bottom;
        p.template load<L, !PLAIN, BORDER>(s, u);
        unpack_bytes<FIRST>(u[0], u[1], top);
        unpack_bytes<FIRST>(u[2], u[3], bottom);
        unpack_words(top, bottom, quads);
        return u[4];
    }

    template <int FIRST>
    [[gnu::always_inline]] static void unpack_bytes(__m512i a, __m512i b, Bytes& out) {
        out[0] = FIRST == 0 ? _mm512_unpacklo_epi8(a, b) : _mm512_unpackhi_epi8(a, b);
        if constexpr (kVectors == 4) out[1] = _mm512_unpackhi_epi8(a, b);
    }
    [[gnu::always_inline]] static void unpack_words(const Bytes& a, const Bytes& b, Group& quads) {
#pragma GCC unroll 2
        for (int i = 0; i < kVectors / 2; ++i) {
            quads[2 * i] = _mm512_unpacklo_epi16(a[i], b[i]);
            quads[2 * i + 1] = _mm512_unpackhi_epi16(a[i], b[i]);
        }
    }
    [[gnu::always_inline]] static void add(Group& sums, const Group& quads, const Group& weight) {
#pragma GCC unroll 4
        for (int j = 0; j < kVectors; ++j) sums[j] = _mm512_dpbusd_epi32(sums[j], quads[j], weight[j]);
    }
    template <int FIRST>
    [[gnu::always_inline]] static void begin(Group& sums, const DepthwiseBlock* block, const Group& quads,
                                             const Group& weight) {
#pragma GCC unroll 4
        for (int j = 0; j < kVectors; ++j)
            sums[j] = _mm512_dpbusd_epi32(fresh(block->offset[FIRST + j]), quads[j], weight[j]);
    }
};

}  // namespace
}  // namespace imgopt::avx512

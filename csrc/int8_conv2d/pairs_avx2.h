// Exact products of bytes on AVX2. vpmaddubsw adds two products of uint8 and int8 in 16 bits, where they saturate. They
// do not where the weights w, v of a pair have w+ + v+ <= 128 and w- + v- <= 128 (255 * 128 < 2^15), and which channels
// form a pair is free: when weights are packed, the 16 neighbouring channels of a group are paired so that all 16
// filters of a panel can bear it, and the kernel brings the bytes of a pixel into that order. A group without such
// pairs (one of 500 where weights have a deviation of 40 steps) is halved into two, w / 2 and the rest, of which any
// two channels are a pair; a layer with many of them takes words (avx2.cpp).
//
// Both ways are bound by two multiplications for 32 products, 32 products per cycle. Words take two additions beside
// them, all four pipes at once, and reach 0.87 of that even from registers; bytes take one and reach 0.98.
#pragma once

#include "tile_ymm.h"

namespace imgopt::avx2 {
namespace {

constexpr int64_t kSide = 16;         // channels of a group, filters of a panel
constexpr int64_t kMostTries = 4096;  // until a search for pairs gives up
constexpr int64_t kReordered = 256;   // bytes of a pixel that are brought into order together
constexpr int64_t kGroupBytes = kSide * kSide;

// The other half of a group's weights.
struct SecondHalf {
    int64_t at;  // of its products in the panel
    uint8_t order[kSide], weight[kGroupBytes];
};

// Where the parts of a layer's packed weights lie. Groups are those of all panels: (group of the convolution, panel,
// tap, channels / 16), each with (channels / 4, filter, channel % 4) of weights.
struct PairedLayout {
    int64_t depth, panels, groups, most_halves;

    explicit PairedLayout(const Int8Weight& w)
        : depth(w.group_channels * taps_of(w)),
          panels(w.out_channels / kSide),
          groups(panels * (depth / kSide)),
          most_halves(groups / 8 + 4) {}

    int64_t orders_at() const { return groups * kGroupBytes; }
    int64_t counts_at() const { return orders_at() + groups * kSide; }  // second halves before panel i, int64
    int64_t halves_at() const { return counts_at() + (panels + 1) * 8; }
    int64_t bytes() const { return halves_at() + most_halves * static_cast<int64_t>(sizeof(SecondHalf)); }
};

inline bool may_pair(const Int8Weight& w) {
    return w.group_channels % kSide == 0 && w.out_channels / w.groups % kSide == 0;
}

// Channels and filters of a group, and how its channels are paired.
struct ChannelPairs {
    int8_t weight[kSide][kSide];  // (channel, filter)
    uint16_t partners[kSide];     // a bit for every channel that it may form a pair with
    int64_t tries = 0;
    uint8_t order[kSide];  // the channels at 2i and 2i + 1 form a pair

    ChannelPairs(const int8_t* from, int64_t channel_stride, int64_t filter_stride) {
        for (int64_t c = 0; c < kSide; ++c)
            for (int64_t o = 0; o < kSide; ++o) weight[c][o] = from[c * channel_stride + o * filter_stride];
        for (int a = 0; a < kSide; ++a) {
            partners[a] = 0;
            for (int b = 0; b < kSide; ++b)
                partners[a] = static_cast<uint16_t>(partners[a] | (a != b && fits(weight[a], weight[b])) << b);
        }
    }

    static bool fits(const int8_t* a, const int8_t* b) {
        bool all = true;
        for (int64_t o = 0; o < kSide; ++o) {
            const int positive = (a[o] > 0 ? a[o] : 0) + (b[o] > 0 ? b[o] : 0);
            all = all && positive <= 128 && positive - a[o] - b[o] <= 128;
        }
        return all;
    }

    // Pairs the channels of `left`, a bit each, into the places from `at` on.
    bool find(unsigned left = 0xffff, int at = 0) {
        if (left == 0) return true;
        const int a = __builtin_ctz(left);
        left &= left - 1;
        for (unsigned others = partners[a] & left; others && tries < kMostTries; others &= others - 1) {
            const int b = __builtin_ctz(others);
            ++tries;
            order[at] = static_cast<uint8_t>(a), order[at + 1] = static_cast<uint8_t>(b);
            if (find(left & ~(1u << b), at + 2)) return true;
        }
        return false;
    }

    void write(uint8_t* to) const {
        for (int i = 0; i < kSide; ++i)
            for (int64_t o = 0; o < kSide; ++o)
                to[(i / 4 * kSide + o) * 4 + i % 4] = static_cast<uint8_t>(weight[order[i]][o]);
    }

    // Leaves one half of the weights here, and writes the other one.
    void halve(SecondHalf& other) {
        ChannelPairs rest = *this;
        for (int c = 0; c < kSide; ++c) {
            order[c] = rest.order[c] = other.order[c] = static_cast<uint8_t>(c);
            for (int o = 0; o < kSide; ++o) {
                weight[c][o] = static_cast<int8_t>(weight[c][o] / 2);
                rest.weight[c][o] = static_cast<int8_t>(rest.weight[c][o] - weight[c][o]);
            }
        }
        rest.write(other.weight);
    }
};

// False if too many groups have no pairs.
inline bool paired_weight_pack(const Int8Weight& w, const int8_t* weight, uint8_t* packed) {
    const PairedLayout layout(w);
    const int64_t taps = taps_of(w);
    uint8_t *out = packed, *orders = packed + layout.orders_at();
    int64_t* counts = reinterpret_cast<int64_t*>(packed + layout.counts_at());
    SecondHalf* halves = reinterpret_cast<SecondHalf*>(packed + layout.halves_at());
    int64_t found = 0;
    for (int64_t panel = 0; panel < layout.panels; ++panel) {
        counts[panel] = found;
        for (int64_t at = 0; at < layout.depth; at += kSide, out += kGroupBytes, orders += kSide) {
            const int64_t tap = at / w.group_channels, channel = at % w.group_channels;
            ChannelPairs pairs(weight + panel * kSide * layout.depth + channel * taps + tap, taps, layout.depth);
            if (!pairs.find()) {
                if (found == layout.most_halves) return false;
                halves[found].at = at;
                pairs.halve(halves[found++]);
            }
            pairs.write(out);
            memcpy(orders, pairs.order, kSide);
        }
    }
    counts[layout.panels] = found;
    return true;
}

// The bytes of MR pixels' channels in the order of the pairs.
template <int MR, bool FLIP>
struct Reordered {
    alignas(32) uint8_t bytes[MR][kReordered];

    [[gnu::always_inline]] void fill(const uint8_t* const (&row)[MR], const uint8_t* order, int64_t channels,
                                     __m256i flip) {
        int64_t c = 0;
        for (; c + 2 * kSide <= channels; c += 2 * kSide) {  // two groups, one in each half of a vector
            const __m256i places = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(order + c));
#pragma GCC unroll 6
            for (int r = 0; r < MR; ++r) {
                const __m256i from = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row[r] + c));
                _mm256_store_si256(reinterpret_cast<__m256i*>(bytes[r] + c),
                                   flipped(_mm256_shuffle_epi8(from, places), flip));
            }
        }
        if (c == channels) return;
        const __m128i places = _mm_loadu_si128(reinterpret_cast<const __m128i*>(order + c));
#pragma GCC unroll 6
        for (int r = 0; r < MR; ++r) {
            const __m128i from = _mm_loadu_si128(reinterpret_cast<const __m128i*>(row[r] + c));
            const __m256i both = flipped(_mm256_castsi128_si256(_mm_shuffle_epi8(from, places)), flip);
            _mm_store_si128(reinterpret_cast<__m128i*>(bytes[r] + c), _mm256_castsi256_si128(both));
        }
    }

    [[gnu::always_inline]] static __m256i flipped(__m256i v, __m256i flip) {
        return FLIP ? _mm256_xor_si256(v, flip) : v;
    }

    [[gnu::always_inline]] void add_products(const uint8_t* weights, int64_t channels, __m256i (&sums)[MR][2]) const {
        const __m256i ones = _mm256_set1_epi16(1);
        const __m256i* weight = reinterpret_cast<const __m256i*>(weights);
        for (int64_t c = 0; c < channels; c += 4, weight += 2) {
            const __m256i w[2] = {_mm256_loadu_si256(weight), _mm256_loadu_si256(weight + 1)};
#pragma GCC unroll 6
            for (int r = 0; r < MR; ++r) {
                int32_t dword;
                memcpy(&dword, bytes[r] + c, 4);
                const __m256i x = _mm256_set1_epi32(dword);
#pragma GCC unroll 2
                for (int j = 0; j < 2; ++j)
                    sums[r][j] = _mm256_add_epi32(sums[r][j], _mm256_madd_epi16(_mm256_maddubs_epi16(x, w[j]), ones));
            }
        }
    }
};

template <int MR, bool FLIP>
[[gnu::always_inline]] inline void paired_tile(const Tile& t, const PairedLayout& layout,
                                               const ByteEpilogueYmm& to_bytes, int64_t m) {
    const Int8Conv2d& p = *t.conv;
    const __m256i flip = _mm256_set1_epi8(static_cast<char>(p.input_flip));
    const __m256i* offset = reinterpret_cast<const __m256i*>(p.offset + t.channel);
    __m256i sums[MR][2];
#pragma GCC unroll 12
    for (int i = 0; i < 2 * MR; ++i) sums[i / 2][i % 2] = _mm256_loadu_si256(offset + i % 2);
    Reordered<MR, FLIP> x;
    const auto add = [&](int64_t tap, int64_t channel, int64_t channels, const uint8_t* order, const uint8_t* weight)
                         __attribute__((always_inline)) {
                             const uint8_t* row[MR];
#pragma GCC unroll 6
                             for (int r = 0; r < MR; ++r)
                                 row[r] = t.rows[tap * t.row_stride + m + r] + t.row_offset + channel;
                             x.fill(row, order, channels, flip);
                             x.add_products(weight, channels, sums);
                         };
    const uint8_t* orders = p.packed + layout.orders_at() + (t.weight - p.packed) / kSide;
    for (int64_t i = 0; i < t.taps; ++i) {
        const int64_t tap = t.tap ? t.tap[i] : i;
        for (int64_t c = 0; c < t.inner; c += kReordered) {
            const int64_t at = tap * t.inner + c;
            add(tap, c, smaller(kReordered, t.inner - c), orders + at, t.weight + at * kSide);
        }
    }
    const int64_t* counts = reinterpret_cast<const int64_t*>(p.packed + layout.counts_at()) +
                            (t.weight - p.packed) / (layout.depth * kSide);
    const SecondHalf* half = reinterpret_cast<const SecondHalf*>(p.packed + layout.halves_at());
    for (int64_t i = counts[0]; i < counts[1]; ++i)
        add(half[i].at / t.inner, half[i].at % t.inner, kSide, half[i].order, half[i].weight);
    int64_t pixel[MR];
#pragma GCC unroll 6
    for (int i = 0; i < MR; ++i) pixel[i] = t.at ? t.at[m + i] : t.pixel + m + i;
#pragma GCC unroll 3
    for (int i = 0; i < MR; i += 2) store_pixels<2>(t, to_bytes, pixel + i, sums + i, i + 1 < MR ? 2 : 1);
}

template <int MR>
void paired_tiles(const Tile& t) {
    const PairedLayout layout(t.conv->weight);
    const ByteEpilogueYmm to_bytes(t);
    if (t.conv->input_flip)
        for (int64_t m = 0; m < t.pixels; m += MR) paired_tile<MR, true>(t, layout, to_bytes, m);
    else
        for (int64_t m = 0; m < t.pixels; m += MR) paired_tile<MR, false>(t, layout, to_bytes, m);
}

struct Paired {
    using Product = int8_t;
    static constexpr int64_t kLanes = 8, kMaxVectors = 2;
    static constexpr int64_t kBlockPixels = 48;
    static constexpr int64_t kSortedPixels = 98;  // divides 14 x 14 and the larger maps of networks for 224 x 224
    static int64_t rows(int64_t) { return 5; }
    static TileFunction tiles(int64_t rows, int64_t) {
        static constexpr TileFunction tiles[] = {paired_tiles<1>, paired_tiles<2>, paired_tiles<3>,
                                                 paired_tiles<4>, paired_tiles<5>, paired_tiles<6>};
        return tiles[rows - 1];
    }
};

}  // namespace
}  // namespace imgopt::avx2

// int8_conv2d on NEON with the dot product extension. sdot multiplies signed bytes, so an input byte is taken less 128,
// which for int8 is what lies in memory; 128 times the sum of a channel's weights, kept behind the packed ones, joins
// its offset. Four dwords of a pixel are loaded at once and each meets the weights from its lane: 16 dot products of 4
// pixels by 16 channels take 22 instructions. Sums wrap modulo 2^32, which contract.h shows harmless.
#include <arm_neon.h>

#include "depthwise_neon.h"
#include "steps.h"

namespace imgopt::neon {
namespace {

template <int MR, int NV>
struct Sums {
    int32x4_t of[MR][NV];

    // Adds the products of dword `lane` of every pixel.
    template <int lane>
    [[gnu::always_inline]] inline void add(const int8x16_t* x, const uint8_t* weight) {
        int8x16_t w[NV];
        for (int j = 0; j < NV; ++j) w[j] = vreinterpretq_s8_u8(vld1q_u8(weight + 16 * j));
        for (int i = 0; i < MR; ++i)
            for (int j = 0; j < NV; ++j) of[i][j] = vdotq_laneq_s32(of[i][j], w[j], x[i], lane);
    }
};

template <int MR, int NV>
inline void tile(const Tile& t, int64_t m, const int32_t* weight_sums) {
    const Int8Conv2d& p = *t.conv;
    Sums<MR, NV> sums;
    for (int j = 0; j < NV; ++j) {
        const int64_t channel = t.channel + 4 * j;
        const int32x4_t start = vmlaq_n_s32(vld1q_s32(p.offset + channel), vld1q_s32(weight_sums + channel), 128);
        for (int i = 0; i < MR; ++i) sums.of[i][j] = start;
    }
    const uint8x16_t flip = vdupq_n_u8(p.input_flip ^ 0x80);
    const uint8_t* weight = t.weight;
    constexpr int64_t step = 16 * NV;
    int8x16_t x[MR];
    for (int64_t tap = 0; tap < t.taps; ++tap) {
        const uint8_t* row[MR];
        for (int i = 0; i < MR; ++i) row[i] = t.rows[tap * t.row_stride + m + i] + t.row_offset;
        int64_t c = 0;
        for (; c + 16 <= t.inner; c += 16, weight += 4 * step) {
            for (int i = 0; i < MR; ++i) x[i] = vreinterpretq_s8_u8(veorq_u8(vld1q_u8(row[i] + c), flip));
            sums.template add<0>(x, weight);
            sums.template add<1>(x, weight + step);
            sums.template add<2>(x, weight + 2 * step);
            sums.template add<3>(x, weight + 3 * step);
        }
        for (; c < t.inner; c += 4, weight += step) {
            for (int i = 0; i < MR; ++i) {
                uint32_t four;
                memcpy(&four, row[i] + c, 4);
                x[i] = vreinterpretq_s8_u8(veorq_u8(vreinterpretq_u8_u32(vdupq_n_u32(four)), flip));
            }
            sums.template add<0>(x, weight);
        }
    }
    for (int i = 0; i < MR; ++i) store_row<NV>(t, t.pixel + m + i, sums.of[i]);
}

inline int64_t weight_sums_at(const Int8Weight& w);

template <int MR, int NV>
void tiles(const Tile& t) {
    const int32_t* sums = reinterpret_cast<const int32_t*>(t.conv->packed + weight_sums_at(t.conv->weight));
    for (int64_t m = 0; m < t.pixels; m += MR) tile<MR, NV>(t, m, sums);
}

// Tiles of 4 pixels by 16 channels: 16 accumulators, 4 of the inputs, 4 of weights. Pixels are not sorted by the taps
// that reach the image: padding with a zero point of 0 is taken as -128 here.
struct Dot {
    using Product = int8_t;
    static constexpr int64_t kLanes = 4, kMaxVectors = 4, kBlockPixels = 96;
    static int64_t rows(int64_t) { return 4; }
    static TileFunction tiles(int64_t rows, int64_t vectors) {
        static constexpr TileFunction table[4][4] = {
            {neon::tiles<1, 1>, neon::tiles<2, 1>, neon::tiles<3, 1>, neon::tiles<4, 1>},
            {neon::tiles<1, 2>, neon::tiles<2, 2>, neon::tiles<3, 2>, neon::tiles<4, 2>},
            {neon::tiles<1, 3>, neon::tiles<2, 3>, neon::tiles<3, 3>, neon::tiles<4, 3>},
            {neon::tiles<1, 4>, neon::tiles<2, 4>, neon::tiles<3, 4>, neon::tiles<4, 4>}};
        return table[vectors - 1][rows - 1];
    }
};

// Packed weights, then the sum of each channel's, with the slack that a vector reads.
inline int64_t weight_sums_at(const Int8Weight& w) {
    return round_up(is_depthwise(w) ? depthwise_weight_bytes(w) : igemm_weight_bytes<Dot>(w), 64);
}

int64_t weight_bytes(const Int8Weight& w) { return weight_sums_at(w) + (w.out_channels + kChannelSlack) * 4; }

void weight_pack(const Int8Weight& w, const int8_t* weight, uint8_t* packed) {
    is_depthwise(w) ? depthwise_weight_pack(w, weight, packed) : igemm_weight_pack<Dot>(w, weight, packed);
    int32_t* sums = reinterpret_cast<int32_t*>(packed + weight_sums_at(w));
    memset(sums, 0, static_cast<size_t>(w.out_channels + kChannelSlack) * 4);
    const int64_t depth = w.group_channels * taps_of(w);
    for (int64_t o = 0; o < w.out_channels; ++o)
        for (int64_t k = 0; k < depth; ++k) sums[o] += weight[o * depth + k];
}

int64_t units(const Int8Conv2d& p) { return is_depthwise(p.weight) ? depthwise_units(p) : igemm_units<Dot>(p); }

void kernel(const Int8Conv2d& p, int64_t begin, int64_t end) {
    if (!is_depthwise(p.weight)) return igemm<Dot>(p, begin, end);
    depthwise(p, reinterpret_cast<const int32_t*>(p.packed + weight_sums_at(p.weight)), begin, end);
}

}  // namespace

void int8_conv2d(KernelTable& table) {
    table.int8_weight_layout = "neon columns";
    table.int8_weight_bytes = weight_bytes;
    table.int8_weight_pack = weight_pack;
    table.int8_conv2d_units = units;
    table.int8_conv2d = kernel;
    fill_steps(table);
}

}  // namespace imgopt::neon

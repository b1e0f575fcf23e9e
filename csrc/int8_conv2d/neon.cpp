// int8_conv2d on NEON with the dot product extension. udot multiplies bytes of one signedness, so weights are stored
// with their top bit flipped too: w = v - 128, and sum(w u) = sum(v u) - 128 sum(u). A second accumulator per pixel
// takes sum(u) with a udot by ones, shared by all channels of the tile. Sums wrap modulo 2^32, which kernels.h shows
// harmless.
#include <arm_neon.h>

#include "igemm.h"
#include "steps.h"

namespace imgopt::neon {
namespace {

// One row of sums of NV * 4 channels; the rest of the operation is its definition.
template <int NV>
void store_row(const Tile& t, int64_t pixel, const uint32x4_t* sums) {
    int32_t values[NV * 4];
    for (int j = 0; j < NV; ++j) vst1q_s32(values + 4 * j, vreinterpretq_s32_u32(sums[j]));
    for (int64_t c = 0; c < t.channels; ++c) store_sum(*t.conv, pixel, t.channel + c, values[c]);
}

template <int MR, int NV>
inline void tile(const Tile& t, int64_t m) {
    const Int8Conv2d& p = *t.conv;
    uint32x4_t sums[MR][NV], inputs[MR];
    for (int i = 0; i < MR; ++i) {
        inputs[i] = vdupq_n_u32(0);
        for (int j = 0; j < NV; ++j) sums[i][j] = vreinterpretq_u32_s32(vld1q_s32(p.offset + t.channel + 4 * j));
    }
    const uint8x16_t flip = vdupq_n_u8(p.input_flip), ones = vdupq_n_u8(1), top = vdupq_n_u8(0x80);
    const uint8_t* weight = t.weight;
    for (int64_t tap = 0; tap < t.taps; ++tap) {
        const uint8_t* const* rows = t.rows + tap * t.row_stride + m;
        for (int64_t c = 0; c < t.inner; c += 4, weight += 16 * NV) {
            uint8x16_t w[NV];
            for (int j = 0; j < NV; ++j) w[j] = veorq_u8(vld1q_u8(weight + 16 * j), top);
            for (int i = 0; i < MR; ++i) {
                uint32_t four;
                memcpy(&four, rows[i] + t.row_offset + c, 4);
                const uint8x16_t x = veorq_u8(vreinterpretq_u8_u32(vdupq_n_u32(four)), flip);
                inputs[i] = vdotq_u32(inputs[i], x, ones);
                for (int j = 0; j < NV; ++j) sums[i][j] = vdotq_u32(sums[i][j], x, w[j]);
            }
        }
    }
    for (int i = 0; i < MR; ++i) {
        const uint32x4_t excess = vshlq_n_u32(inputs[i], 7);
        for (int j = 0; j < NV; ++j) sums[i][j] = vsubq_u32(sums[i][j], excess);
        store_row<NV>(t, t.pixel + m + i, sums[i]);
    }
}

template <int MR, int NV>
void tiles(const Tile& t) {
    for (int64_t m = 0; m < t.pixels; m += MR) tile<MR, NV>(t, m);
}

// Tiles of 4 pixels by 16 channels: 16 accumulators, 4 of the inputs' sums, 4 of weights.
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

}  // namespace

void int8_conv2d(KernelTable& table) {
    table.int8_weight_layout = "neon";
    table.int8_weight_bytes = igemm_weight_bytes<Dot>;
    table.int8_weight_pack = igemm_weight_pack<Dot>;
    table.int8_conv2d_units = igemm_units<Dot>;
    table.int8_conv2d = igemm<Dot>;
    fill_steps(table);
}

}  // namespace imgopt::neon

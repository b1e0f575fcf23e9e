// int8_conv2d on Hopper: the implicit matrix product of cuda_gemm.h with the instructions of compute capability 9.0. One
// warp starts the copies that fill a ring of stages, pixels of one tap through an "im2col" tensor map (which finds the
// rows of the left matrix and the image's border by itself) and the weights of that tap; groups of four warps multiply
// straight from shared memory, requantize in registers, and hand whole tiles back to the copy engine. Blocks stay and
// take one tile after the other, so that the ring fills while results are rounded and written.
//
// What it serves: uint8 activations whose border is byte 0 (or is not read), float requantization, channels in
// multiples of 16. The rest is cuda_gemm.h's.
#pragma once

#include "../cuda_hopper.h"
#include "cuda_gemm.h"

namespace imgopt {
namespace {

constexpr int kSharedPerProcessor = 228 << 10, kSharedPerBlock = 227 << 10, kReserved = 1 << 10;
constexpr int kTileAlignment = 1024;
constexpr int kMostStages = 8;

struct WgmmaConv {
    TensorMap input, weight, residual, output;
    Int8Conv2d conv;
};

// Tiles of 64 · kGroups pixels and kColumns output channels, kSpan bytes of the common axis per stage, kBlocks of them
// at once on a processor.
template <int kGroups_, int kColumns_, int kSpan_, int kBlocks_>
struct WgmmaTile {
    static constexpr int kGroups = kGroups_, kColumns = kColumns_, kSpan = kSpan_, kBlocks = kBlocks_;
    static constexpr int kRows = kGroups * kTileRows, kSums = kColumns / 2;
    static constexpr int kThreads = kGroups * kWarpGroup + 32;
    static constexpr int kLeft = kRows * kSpan, kStage = kLeft + kColumns * kSpan;
    static constexpr int kBox = kColumns < 128 ? kColumns : 128;  // output channels of one box
    static constexpr int kOutput = kRows * kColumns;
    static constexpr int kFixed = kOutput + (2 * kMostStages + kGroups) * 8 + kTileAlignment;
    static constexpr int kRoom = kBlocks == 1 ? kSharedPerBlock : kSharedPerProcessor / kBlocks - kReserved;
    static constexpr int kFitting = (kRoom - kFixed) / kStage;
    static constexpr int kStages = kFitting < kMostStages ? kFitting : kMostStages;
    static constexpr int kShared = kStages * kStage + kFixed;
    static_assert(kStages >= 2);
};

// A place in the ring, and the parity of the turn.
struct RingPlace {
    int stage = 0;
    uint32_t parity = 0;

    template <int stages>
    __device__ void advance() {
        if (++stage == stages) {
            stage = 0;
            parity ^= 1;
        }
    }
};

struct WgmmaWork {
    int channel, group_channel;  // first output channel; first input channel
    int64_t row;                 // first pixel
};

// Tile t: column tiles run fastest, so that neighbours in time share their pixels.
template <class Tile>
__device__ inline WgmmaWork work_of(const Int8Conv2d& p, int64_t t) {
    const int outputs = static_cast<int>(p.weight.out_channels / p.weight.groups);
    const int across = (outputs + Tile::kColumns - 1) / Tile::kColumns;
    const int64_t down = (p.batch * p.out_h * p.out_w + Tile::kRows - 1) / Tile::kRows;
    const int group = static_cast<int>(t / across / down);
    return {group * outputs + static_cast<int>(t % across) * Tile::kColumns,
            group * static_cast<int>(p.weight.group_channels), t / across % down * Tile::kRows};
}

// Where a group of warps keeps four bytes of its 64 × kColumns results: boxes of kBox channels, in the order of the
// copy engine.
template <class Tile>
__device__ inline int result_at(int row, int column) {
    const int in_box = row * Tile::kBox + column % Tile::kBox;
    const int swizzle = Tile::kBox == 128 ? row & 7 : row >> 1 & 3;
    return column / Tile::kBox * kTileRows * Tile::kBox + (in_box ^ swizzle << 4);
}

// Requantizes the sums of a group of warps into `results`, in place where a residual stands.
template <class Tile, bool residual>
__device__ inline void requantize(const Int8Conv2d& p, const int32_t (&sums)[Tile::kSums], int channel,
                                  uint8_t* results) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
#pragma unroll
    for (int j = 0; j < Tile::kColumns / 8; ++j) {
        const int column = 8 * j + lane % 4 * 2;
        int2 offset = make_int2(0, 0);
        float2 multiplier = make_float2(0, 0);
        if (channel + column < p.weight.out_channels) {
            offset = load_cached(reinterpret_cast<const int2*>(p.offset + channel + column));
            multiplier = load_cached(reinterpret_cast<const float2*>(p.multiplier + channel + column));
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            auto* to = reinterpret_cast<uint16_t*>(results +
                                                   result_at<Tile>(16 * warp + lane / 4 + 8 * half, column));
            float y0 = static_cast<float>(sums[4 * j + 2 * half] + offset.x) * multiplier.x;
            float y1 = static_cast<float>(sums[4 * j + 2 * half + 1] + offset.y) * multiplier.y;
            if constexpr (residual) {
                const int r = *to ^ p.residual_flip * 0x0101;
                const float r0 = static_cast<float>((r & 0xff) - p.residual_zero_point) * p.residual_multiplier;
                const float r1 = static_cast<float>((r >> 8) - p.residual_zero_point) * p.residual_multiplier;
                y0 = y0 + r0;
                y1 = y1 + r1;
            }
            *to = static_cast<uint16_t>(two_bytes(p, y0, y1));
        }
    }
}

// Floats go out directly: four neighbouring lanes fill a sector.
template <class Tile>
__device__ inline void store_floats(const Int8Conv2d& p, const int32_t (&sums)[Tile::kSums], int channel,
                                    int64_t row0) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
#pragma unroll
    for (int j = 0; j < Tile::kColumns / 8; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int64_t row = row0 + 16 * warp + lane / 4 + i / 2 * 8;
            const int c = channel + 8 * j + lane % 4 * 2 + i % 2;
            if (row < p.batch * p.out_h * p.out_w && c < p.weight.out_channels)
                store_sum(p, row, c, sums[4 * j + i] + load_cached(p.offset + c));
        }
}

#if defined(IMGOPT_HOPPER)

// One thread: keeps the ring full, tile after tile.
template <class Tile>
__device__ inline void load_tiles(const WgmmaConv& k, uint8_t* ring, Barrier* full, Barrier* empty, int64_t tiles) {
    const Int8Conv2d& p = k.conv;
    const Int8Weight& w = p.weight;
    const int kernel_h = static_cast<int>(w.kernel_h), kernel_w = static_cast<int>(w.kernel_w);
    RingPlace at;
    for (int64_t t = blockIdx.x; t < tiles; t += gridDim.x) {
        const WgmmaWork work = work_of<Tile>(p, t);
        const int64_t line = work.row / p.out_w;
        const int x = static_cast<int>(work.row % p.out_w * p.stride_w - p.pad_left);
        const int y = static_cast<int>(line % p.out_h * p.stride_h - p.pad_top), n = static_cast<int>(line / p.out_h);
        for (int tap = 0, ty = 0; ty < kernel_h; ++ty)
            for (int tx = 0; tx < kernel_w; ++tx, ++tap)
                for (int c = 0; c < w.group_channels; c += Tile::kSpan) {
                    wait_for(empty + at.stage, at.parity ^ 1);
                    arrive_expecting(full + at.stage, Tile::kStage);
                    uint8_t* to = ring + at.stage * Tile::kStage;
                    load_window(to, k.input, full + at.stage, work.group_channel + c, x, y, n,
                                tx * static_cast<int>(p.dilation_w), ty * static_cast<int>(p.dilation_h));
                    load_box(to + Tile::kLeft, k.weight, full + at.stage, c, tap, work.channel);
                    at.advance<Tile::kStages>();
                }
    }
}

// A group of warps: 64 rows of every tile.
template <class Tile>
__device__ inline void multiply(const WgmmaConv& k, uint8_t* ring, uint8_t* results, Barrier* full, Barrier* empty,
                                Barrier* residual, int64_t tiles) {
    const Int8Conv2d& p = k.conv;
    const int group = threadIdx.x / kWarpGroup;
    const bool leads = threadIdx.x % kWarpGroup == 0;
    const int blocks = static_cast<int>(p.weight.kernel_h * p.weight.kernel_w) *
                       static_cast<int>((p.weight.group_channels + Tile::kSpan - 1) / Tile::kSpan);
    uint32_t turn = 0;
    RingPlace at;
    for (int64_t t = blockIdx.x; t < tiles; t += gridDim.x, turn ^= 1) {
        const WgmmaWork work = work_of<Tile>(p, t);
        const int64_t row = work.row + group * kTileRows;
        if (leads && p.residual) {
            wait_until_read();
            arrive_expecting(residual, kTileRows * Tile::kColumns);
            for (int c = 0; c < Tile::kColumns; c += Tile::kBox)
                load_box(results + c * kTileRows, k.residual, residual, work.channel + c, static_cast<int>(row));
        }
        int32_t sums[Tile::kSums];
        for (int b = 0; b < blocks; ++b) {
            wait_for(full + at.stage, at.parity);
            const uint8_t* stage = ring + at.stage * Tile::kStage;
            const uint64_t left = tile_of<Tile::kSpan>(stage + group * kTileRows * Tile::kSpan);
            const uint64_t right = tile_of<Tile::kSpan>(stage + Tile::kLeft);
            begin_products();
#pragma unroll
            for (int i = 0; i < Tile::kSpan / kProductDepth; ++i)
                multiply_tiles<Tile::kColumns>(sums, left + 2 * i, right + 2 * i, b + i);
            commit_products();
            wait_products();
            if (leads) arrive(empty + at.stage);
            at.advance<Tile::kStages>();
        }
        if (p.float_output) {
            store_floats<Tile>(p, sums, work.channel, row);
            continue;
        }
        if (p.residual) {
            wait_for(residual, turn);
            requantize<Tile, true>(p, sums, work.channel, results);
        } else {
            if (leads) wait_until_read();
            group_barrier(group);
            requantize<Tile, false>(p, sums, work.channel, results);
        }
        publish_stores();
        group_barrier(group);
        if (leads) {
            for (int c = 0; c < Tile::kColumns; c += Tile::kBox)
                store_box(results + c * kTileRows, k.output, work.channel + c, static_cast<int>(row));
            commit_stores();
        }
    }
    if (leads) wait_until_stored();
}

#endif

template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocks)
    wgmma_conv(const __grid_constant__ WgmmaConv k, const int64_t tiles) {
#if defined(IMGOPT_HOPPER)
    auto* ring = reinterpret_cast<uint8_t*>(
        (reinterpret_cast<uintptr_t>(dynamic_shared<uint8_t>()) + kTileAlignment - 1) / kTileAlignment *
        kTileAlignment);
    uint8_t* results = ring + Tile::kStages * Tile::kStage;
    auto* full = reinterpret_cast<Barrier*>(results + Tile::kOutput);
    Barrier *empty = full + kMostStages, *residual = empty + kMostStages;
    if (threadIdx.x == 0) {
        for (int i = 0; i < Tile::kStages; ++i) {
            start_barrier(full + i, 1);
            start_barrier(empty + i, Tile::kGroups);
        }
        for (int i = 0; i < Tile::kGroups; ++i) start_barrier(residual + i, 1);
        publish_barriers();
    }
    __syncthreads();
    const int group = threadIdx.x / kWarpGroup;
    if (group < Tile::kGroups)
        multiply<Tile>(k, ring, results + group * kTileRows * Tile::kColumns, full, empty, residual + group, tiles);
    else if (threadIdx.x == Tile::kGroups * kWarpGroup)
        load_tiles<Tile>(k, ring, full, empty, tiles);
#endif
}

// --- host ----------------------------------------------------------------------------------------------------------

inline int last_position(int64_t out, int64_t stride, int64_t padding, int64_t in) {
    return static_cast<int>((out - 1) * stride - padding - (in - 1));
}

inline PixelWindow window_of(const Int8Conv2d& p) {
    return {{static_cast<int>(-p.pad_left), static_cast<int>(-p.pad_top)},
            {last_position(p.out_w, p.stride_w, p.pad_left, p.in_w),
             last_position(p.out_h, p.stride_h, p.pad_top, p.in_h)},
            {static_cast<uint32_t>(p.stride_w), static_cast<uint32_t>(p.stride_h)}};
}

// Whether the kernel, and the fields of a tensor map, can express the layer. `columns`: of the tile.
inline bool wgmma_serves(const Int8Conv2d& p) {
    const Int8Weight& w = p.weight;
    const int64_t reach_h = (w.kernel_h - 1) * p.dilation_h, reach_w = (w.kernel_w - 1) * p.dilation_w;
    const PixelWindow window = window_of(p);
    const bool reads_border = p.pad_top > 0 || p.pad_left > 0 || window.last[1] + reach_h > 0 ||
                              window.last[0] + reach_w > 0;
    for (int axis = 0; axis < 2; ++axis)
        if (window.first[axis] < -128 || window.last[axis] < -128 || window.last[axis] > 127 || window.step[axis] > 8)
            return false;
    if (p.input_flip || p.shift || (reads_border && p.input_zero_point)) return false;
    if (p.pad_top > 128 || p.pad_left > 128 || reach_h > 255 || reach_w > 255) return false;
    if (p.batch * p.out_h * p.out_w >= int64_t{1} << 31 || p.batch * p.in_h * p.in_w >= int64_t{1} << 31) return false;
    if (w.group_channels % 16 || !aligned_to_16(p.input, p.input_stride) || !aligned_to_16(p.packed, 0)) return false;
    if (w.out_channels % 2 || (reinterpret_cast<uintptr_t>(p.offset) | reinterpret_cast<uintptr_t>(p.multiplier)) % 8)
        return false;
    if (w.groups > 1 && w.out_channels / w.groups % 64) return false;
    return p.float_output ? !p.residual
                          : aligned_to_16(p.output, p.output_stride) &&
                                (!p.residual || aligned_to_16(p.residual, p.residual_stride));
}

template <class Tile>
int64_t wgmma_tiles(const Int8Conv2d& p) {
    return ceil_div(p.batch * p.out_h * p.out_w, Tile::kRows) *
           ceil_div(p.weight.out_channels / p.weight.groups, Tile::kColumns) * p.weight.groups;
}

template <class Tile>
void launch_wgmma(const Launcher& launch, const Int8Conv2d& p) {
    const auto size = [](int64_t n) { return static_cast<uint64_t>(n); };
    const Int8Weight& w = p.weight;
    const uint64_t pixels = size(p.batch * p.out_h * p.out_w), outputs = size(w.out_channels);
    WgmmaConv k;
    k.conv = p;
    k.input = window_map({p.input,
                          4,
                          {size(w.groups * w.group_channels), size(p.in_w), size(p.in_h), size(p.batch)},
                          {size(p.input_stride), size(p.input_stride * p.in_w), size(p.input_stride * p.in_w * p.in_h)}},
                         window_of(p), Tile::kSpan, Tile::kRows);
    k.weight = box_map({p.packed,
                        3,
                        {size(w.group_channels), size(w.kernel_h * w.kernel_w), outputs},
                        {size(w.group_channels), size(weight_row(w))}},
                       {Tile::kSpan, 1, Tile::kColumns});
    const uint32_t box[3] = {Tile::kBox, kTileRows, 1};
    if (!p.float_output) k.output = box_map({p.output, 2, {outputs, pixels}, {size(p.output_stride)}}, box);
    if (p.residual) k.residual = box_map({p.residual, 2, {outputs, pixels}, {size(p.residual_stride)}}, box);
    const int64_t tiles = wgmma_tiles<Tile>(p), room = launch.processors() * Tile::kBlocks;
    launch(wgmma_conv<Tile>, static_cast<unsigned>(tiles < room ? tiles : room), Tile::kThreads, Tile::kShared, k,
           tiles);
}

}  // namespace
}  // namespace imgopt

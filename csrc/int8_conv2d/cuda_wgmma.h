// int8_conv2d on Hopper: the implicit matrix product of cuda_gemm.h with the instructions of compute capability 9.0.
// One warp starts the copies that fill a ring of stages, pixels of one tap through an "im2col" tensor map (which finds
// the rows of the left matrix and the image's border by itself) and the weights of that tap; groups of four warps
// multiply straight from shared memory, requantize in registers, and hand whole tiles back to the copy engine. Blocks
// stay and take one tile after the other, so that the ring fills while results are rounded and written.
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
// at once on a processor. kKept: spans of weights that stay in shared memory for all of a block's tiles, which then
// have the same columns; 0: weights come with every stage.
template <int kGroups_, int kColumns_, int kSpan_, int kBlocks_, int kKept_ = 0>
struct WgmmaTile {
    static constexpr int kGroups = kGroups_, kColumns = kColumns_, kSpan = kSpan_, kBlocks = kBlocks_, kKept = kKept_;
    static constexpr int kRows = kGroups * kTileRows, kSums = kColumns / 2;
    static constexpr int kThreads = kGroups * kWarpGroup + 32;
    static constexpr int kLeft = kRows * kSpan, kRight = kColumns * kSpan;
    static constexpr int kStage = kLeft + (kKept ? 0 : kRight);
    static constexpr int kBox = kColumns < 128 ? kColumns : 128;  // output channels of one box
    static constexpr int kOutput = kRows * kColumns, kNumbers = kGroups * kColumns * 8;
    static constexpr int kFixed =
        kKept * kRight + kOutput + kNumbers + (2 * kMostStages + kGroups + 1) * 8 + kTileAlignment;
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

    __device__ void advance(int stages) {
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

// Spans of the common axis.
inline __host__ __device__ int blocks_of(const Int8Weight& w, int span) {
    return static_cast<int>(w.kernel_h * w.kernel_w) * static_cast<int>((w.group_channels + span - 1) / span);
}

// What two neighbouring output channels add and are multiplied with.
struct ChannelPair {
    int32_t offset[2];
    float multiplier[2];
};

// Of a group's kColumns channels, into shared memory, by its first threads.
template <class Tile>
__device__ inline void load_numbers(const Int8Conv2d& p, int channel, ChannelPair* numbers) {
    const int pair = threadIdx.x % kWarpGroup, c = channel + 2 * pair;
    if (pair >= Tile::kSums) return;
    ChannelPair n{};
    if (c < p.weight.out_channels)
        n = {{load_cached(p.offset + c), load_cached(p.offset + c + 1)},
             {load_cached(p.multiplier + c), load_cached(p.multiplier + c + 1)}};
    *reinterpret_cast<uint4*>(numbers + pair) = *reinterpret_cast<const uint4*>(&n);
}

__device__ inline ChannelPair pair_at(const ChannelPair* numbers) {
    const uint4 words = *reinterpret_cast<const uint4*>(numbers);
    ChannelPair n;
    __builtin_memcpy(&n, &words, 16);
    return n;
}

// Requantizes the sums of a group of warps into `results`, in place where a residual stands: boxes of 64 pixels by
// kBox channels, in the order of the copy engine.
template <class Tile, bool residual>
__device__ inline void requantize(const Int8Conv2d& p, const int32_t (&sums)[Tile::kSums], const ChannelPair* numbers,
                                  uint8_t* results) {
    const int lane = threadIdx.x % 32, row = threadIdx.x / 32 % 4 * 16 + lane / 4;
    const int swizzle = (Tile::kBox == 128 ? row & 7 : row >> 1 & 3) << 4;
    uint8_t* own = results + row * Tile::kBox + lane % 4 * 2;
    const ByteRounding rounding(p);
    const uint32_t residual_flip = p.residual_flip * 0x0101u;
    const float residual_zero = kWholeFloat + static_cast<float>(p.residual_zero_point);
#pragma unroll
    for (int j = 0; j < Tile::kColumns / 8; ++j) {
        const ChannelPair n = pair_at(numbers + 4 * j + lane % 4);
        const int box = j * 8 / Tile::kBox * Tile::kBox;
        uint8_t* at = own + box * kTileRows + ((j * 8 - box) / 16 * 16 ^ swizzle) + j % 2 * 8;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            auto* to = reinterpret_cast<uint16_t*>(at + half * 8 * Tile::kBox);
            float y0 = static_cast<float>(wrapping_sum(sums[4 * j + 2 * half], n.offset[0])) * n.multiplier[0];
            float y1 = static_cast<float>(wrapping_sum(sums[4 * j + 2 * half + 1], n.offset[1])) * n.multiplier[1];
            if constexpr (residual) {
                const uint32_t r = *to ^ residual_flip;
                y0 = y0 + (whole_float(r & 0xff) - residual_zero) * p.residual_multiplier;
                y1 = y1 + (whole_float(r >> 8) - residual_zero) * p.residual_multiplier;
            }
            *to = static_cast<uint16_t>(rounding.two(y0, y1));
        }
    }
}

// Floats go out directly: four neighbouring lanes fill a sector.
template <class Tile>
__device__ inline void store_floats(const Int8Conv2d& p, const int32_t (&sums)[Tile::kSums], const ChannelPair* numbers,
                                    int channel, int64_t row0) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int64_t row = row0 + threadIdx.x / 32 % 4 * 16 + lane / 4 + 8 * half;
        if (row >= p.batch * p.out_h * p.out_w) break;
        float* to = static_cast<float*>(p.output) + row * p.output_stride + channel;
#pragma unroll
        for (int j = 0; j < Tile::kColumns / 8; ++j) {
            const int column = 8 * j + lane % 4 * 2;
            const ChannelPair n = pair_at(numbers + column / 2);
            if (channel + column >= p.weight.out_channels) break;
#pragma unroll
            for (int i = 0; i < 2; ++i)
                to[column + i] =
                    clamp(static_cast<float>(wrapping_sum(sums[4 * j + 2 * half + i], n.offset[i])) * n.multiplier[i],
                          p.low, p.high);
        }
    }
}

#if defined(IMGOPT_HOPPER)

// The parts of a block's shared memory.
template <class Tile>
struct WgmmaMemory {
    uint8_t *ring, *kept, *results;
    ChannelPair* numbers;
    Barrier *full, *empty, *residual, *weights;

    __device__ explicit WgmmaMemory(uint8_t* shared) {
        ring = shared + (-reinterpret_cast<uintptr_t>(shared) & (kTileAlignment - 1));
        kept = ring + Tile::kStages * Tile::kStage;
        results = kept + Tile::kKept * Tile::kRight;
        numbers = reinterpret_cast<ChannelPair*>(results + Tile::kOutput);
        full = reinterpret_cast<Barrier*>(results + Tile::kOutput + Tile::kNumbers);
        empty = full + kMostStages;
        residual = empty + kMostStages;
        weights = residual + Tile::kGroups;
    }
};

// One thread: keeps the ring full, tile after tile.
template <class Tile>
__device__ inline void load_tiles(const WgmmaConv& k, const WgmmaMemory<Tile>& m, int64_t tiles) {
    const Int8Conv2d& p = k.conv;
    const Int8Weight& w = p.weight;
    const int kernel_h = static_cast<int>(w.kernel_h), kernel_w = static_cast<int>(w.kernel_w);
    if constexpr (Tile::kKept > 0) {
        arrive_expecting(m.weights, blocks_of(w, Tile::kSpan) * Tile::kRight);
        uint8_t* to = m.kept;
        for (int tap = 0; tap < kernel_h * kernel_w; ++tap)
            for (int c = 0; c < w.group_channels; c += Tile::kSpan, to += Tile::kRight)
                load_box(to, k.weight, m.weights, c, tap, 0);
    }
    RingPlace at;
    for (int64_t t = blockIdx.x; t < tiles; t += gridDim.x) {
        const WgmmaWork work = work_of<Tile>(p, t);
        const int64_t line = work.row / p.out_w;
        const int x = static_cast<int>(work.row % p.out_w * p.stride_w - p.pad_left);
        const int y = static_cast<int>(line % p.out_h * p.stride_h - p.pad_top), n = static_cast<int>(line / p.out_h);
        for (int tap = 0, ty = 0; ty < kernel_h; ++ty)
            for (int tx = 0; tx < kernel_w; ++tx, ++tap)
                for (int c = 0; c < w.group_channels; c += Tile::kSpan) {
                    Barrier* full = m.full + at.stage;
                    wait_for(m.empty + at.stage, at.parity ^ 1);
                    arrive_expecting(full, Tile::kStage);
                    uint8_t* to = m.ring + at.stage * Tile::kStage;
                    load_window(to, k.input, full, work.group_channel + c, x, y, n, tx * static_cast<int>(p.dilation_w),
                                ty * static_cast<int>(p.dilation_h));
                    if constexpr (Tile::kKept == 0) load_box(to + Tile::kLeft, k.weight, full, c, tap, work.channel);
                    at.advance(Tile::kStages);
                }
    }
}

// A group of warps: 64 rows of every tile.
template <class Tile>
__device__ inline void multiply(const WgmmaConv& k, const WgmmaMemory<Tile>& m, int64_t tiles) {
    const Int8Conv2d& p = k.conv;
    const int group = threadIdx.x / kWarpGroup;
    const bool leads = threadIdx.x % kWarpGroup == 0;
    const int blocks = blocks_of(p.weight, Tile::kSpan);
    uint8_t* results = m.results + group * kTileRows * Tile::kColumns;
    ChannelPair* numbers = m.numbers + group * Tile::kSums;
    Barrier* residual = m.residual + group;
    uint32_t turn = 0;
    RingPlace at;
    if constexpr (Tile::kKept > 0) wait_for(m.weights, 0);
    for (int64_t t = blockIdx.x; t < tiles; t += gridDim.x, turn ^= 1) {
        const WgmmaWork work = work_of<Tile>(p, t);
        const int64_t row = work.row + group * kTileRows;
        if (leads && p.residual) {
            wait_until_read();
            arrive_expecting(residual, kTileRows * Tile::kColumns);
            for (int c = 0; c < Tile::kColumns; c += Tile::kBox)
                load_box(results + c * kTileRows, k.residual, residual, work.channel + c, static_cast<int>(row));
        }
        load_numbers<Tile>(p, work.channel, numbers);
        int32_t sums[Tile::kSums];
        for (int b = 0; b < blocks; ++b) {
            wait_for(m.full + at.stage, at.parity);
            const uint8_t* stage = m.ring + at.stage * Tile::kStage;
            const uint64_t left = tile_of<Tile::kSpan>(stage + group * kTileRows * Tile::kSpan);
            const uint64_t right = tile_of<Tile::kSpan>(Tile::kKept ? m.kept + b * Tile::kRight : stage + Tile::kLeft);
            begin_products();
#pragma unroll
            for (int i = 0; i < Tile::kSpan / kProductDepth; ++i)
                multiply_tiles<Tile::kColumns>(sums, left + 2 * i, right + 2 * i, b + i);
            commit_products();
            wait_products();
            if (leads) arrive(m.empty + at.stage);
            at.advance(Tile::kStages);
        }
        if (leads && !p.residual) wait_until_read();
        group_barrier(group);  // the numbers are there, and the last tile's results are gone
        if (p.float_output) {
            store_floats<Tile>(p, sums, numbers, work.channel, row);
            group_barrier(group);
            continue;
        }
        if (p.residual) {
            wait_for(residual, turn);
            requantize<Tile, true>(p, sums, numbers, results);
        } else {
            requantize<Tile, false>(p, sums, numbers, results);
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
    const WgmmaMemory<Tile> m(dynamic_shared<uint8_t>());
    let_successor_start();
    if (threadIdx.x == 0) {
        for (int i = 0; i < Tile::kStages; ++i) {
            start_barrier(m.full + i, 1);
            start_barrier(m.empty + i, Tile::kGroups);
        }
        for (int i = 0; i < Tile::kGroups; ++i) start_barrier(m.residual + i, 1);
        start_barrier(m.weights, 1);
        publish_barriers();
    }
    __syncthreads();
    wait_for_predecessor();
    if (threadIdx.x < Tile::kGroups * kWarpGroup)
        multiply<Tile>(k, m, tiles);
    else if (threadIdx.x == Tile::kGroups * kWarpGroup)
        load_tiles<Tile>(k, m, tiles);
#endif
}

// --- host ----------------------------------------------------------------------------------------------------------

inline int last_position(int64_t out, int64_t stride, int64_t padding, int64_t in) {
    return static_cast<int>((out - 1) * stride - padding - (in - 1));
}

inline PixelWindow window_of(const Int8Conv2d& p) {
    return {
        {static_cast<int>(-p.pad_left), static_cast<int>(-p.pad_top)},
        {last_position(p.out_w, p.stride_w, p.pad_left, p.in_w), last_position(p.out_h, p.stride_h, p.pad_top, p.in_h)},
        {static_cast<uint32_t>(p.stride_w), static_cast<uint32_t>(p.stride_h)}};
}

// Whether the kernel, and the fields of a tensor map, can express the layer.
inline bool wgmma_serves(const Int8Conv2d& p) {
    const Int8Weight& w = p.weight;
    const int64_t reach_h = (w.kernel_h - 1) * p.dilation_h, reach_w = (w.kernel_w - 1) * p.dilation_w;
    const PixelWindow window = window_of(p);
    const bool reads_border =
        p.pad_top > 0 || p.pad_left > 0 || window.last[1] + reach_h > 0 || window.last[0] + reach_w > 0;
    for (int axis = 0; axis < 2; ++axis)
        if (window.first[axis] < -128 || window.last[axis] < -128 || window.last[axis] > 127 || window.step[axis] > 8)
            return false;
    if (p.input_flip || p.shift || (reads_border && p.input_zero_point)) return false;
    if (p.pad_top > 128 || p.pad_left > 128 || reach_h > 255 || reach_w > 255) return false;
    if (p.batch * p.out_h * p.out_w >= int64_t{1} << 31 || p.batch * p.in_h * p.in_w >= int64_t{1} << 31) return false;
    if (w.group_channels % 16 || !aligned_to_16(p.input, p.input_stride) || !aligned_to_16(p.packed, 0)) return false;
    if (w.out_channels % 2 || (w.groups > 1 && w.out_channels / w.groups % 64)) return false;
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
    k.input =
        window_map({p.input,
                    4,
                    {size(w.groups * w.group_channels), size(p.in_w), size(p.in_h), size(p.batch)},
                    {size(p.input_stride), size(p.input_stride * p.in_w), size(p.input_stride * p.in_w * p.in_h)}},
                   window_of(p), Tile::kSpan, Tile::kRows);
    k.weight = box_map({p.packed,
                        3,
                        {size(w.group_channels), size(w.kernel_h * w.kernel_w), outputs},
                        {size(w.group_channels), size(weight_row(w))}},
                       {Tile::kSpan, 1, Tile::kColumns, 1});
    const uint32_t box[4] = {Tile::kBox, kTileRows, 1, 1};
    if (!p.float_output) k.output = box_map({p.output, 2, {outputs, pixels}, {size(p.output_stride)}}, box);
    if (p.residual) k.residual = box_map({p.residual, 2, {outputs, pixels}, {size(p.residual_stride)}}, box);
    const int64_t tiles = wgmma_tiles<Tile>(p), room = launch.processors() * Tile::kBlocks;
    launch.overlapping(wgmma_conv<Tile>, static_cast<unsigned>(tiles < room ? tiles : room), Tile::kThreads,
                       Tile::kShared, k, tiles);
}

}  // namespace
}  // namespace imgopt

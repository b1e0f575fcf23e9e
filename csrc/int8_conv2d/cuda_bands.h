// int8_conv2d on Hopper, 3 × 3 with stride 1 between at most 64 channels: the copy engine brings each pixel once, not
// once per tap. A tile is a band of output rows; the ring's stages hold the band's input rows with their borders, a row
// of 64 bytes per pixel, one line of the image right behind the other. The left operand of a tap is then the same
// memory from another pixel on, because a product's rows may start anywhere; what it computes between the lines is not
// written.
//
// The tile of cuda_wgmma.h, nine windows of 64 bytes per pixel, was held up by the copies: 57 microseconds for 128
// images of 56² on an H100.
#pragma once

#include "cuda_wgmma.h"

namespace imgopt {
namespace {

// kGroups groups of four warps, 64 pixels each, and kBlocks blocks on a processor.
template <int kGroups_, int kBlocks_>
struct BandTile {
    static constexpr int kGroups = kGroups_, kBlocks = kBlocks_, kColumns = 64, kSpan = 64, kBox = 64;
    static constexpr int kKernel = 3, kTaps = kKernel * kKernel;
    static constexpr int kRows = kGroups * kTileRows, kSums = kColumns / 2;
    static constexpr int kThreads = kGroups * kWarpGroup + 32;
    static constexpr int kRight = kColumns * kSpan, kOutput = kRows * kColumns, kNumbers = kColumns * 8;
    static constexpr int kFixed = kTaps * kRight + kOutput + kNumbers + (2 * kMostStages + 2) * 8 + kTileAlignment;
    static constexpr int kRoom = kBlocks == 1 ? kSharedPerBlock : kSharedPerProcessor / kBlocks - kReserved;
};

// The bands of an image. Lines are `pitch` pixels long in shared memory, those of a stage take `bytes` of `stage`.
struct Bands {
    int pitch, rows, count, bytes, stage, stages;
};

template <class Tile>
inline Bands bands_of(const Int8Conv2d& p) {
    Bands b{};
    b.pitch = static_cast<int>(p.out_w) + Tile::kKernel - 1;
    b.rows = Tile::kRows / b.pitch;
    if (b.rows == 0) return b;
    b.count = static_cast<int>(ceil_div(p.out_h, b.rows));
    b.bytes = (b.rows + Tile::kKernel - 1) * b.pitch * Tile::kSpan;
    b.stage = static_cast<int>(ceil_div(b.bytes, kTileAlignment)) * kTileAlignment;
    b.stages = (Tile::kRoom - Tile::kFixed) / b.stage;
    if (b.stages > kMostStages) b.stages = kMostStages;
    return b;
}

// Of layers that wgmma_serves(). At least three quarters of the products are to count.
template <class Tile>
inline bool bands_serve(const Int8Conv2d& p) {
    const Int8Weight& w = p.weight;
    if (w.groups != 1 || w.group_channels > Tile::kSpan || w.out_channels > Tile::kColumns || p.float_output ||
        w.kernel_h != Tile::kKernel || w.kernel_w != Tile::kKernel || p.stride_h != 1 || p.stride_w != 1 ||
        p.dilation_h != 1 || p.dilation_w != 1)
        return false;
    const Bands b = bands_of<Tile>(p);
    return b.stages >= 2 && 4 * p.out_h * p.out_w >= 3 * int64_t{b.count} * Tile::kRows;
}

#if defined(IMGOPT_HOPPER)

// The parts of a block's shared memory. Behind the ring there is always more: the last pixels of a tile read beyond it.
template <class Tile>
struct BandMemory {
    uint8_t *ring, *kept, *results;
    ChannelPair* numbers;
    Barrier *full, *empty, *residual, *weights;

    __device__ BandMemory(uint8_t* shared, const Bands& b) {
        ring = shared + (-reinterpret_cast<uintptr_t>(shared) & (kTileAlignment - 1));
        kept = ring + b.stages * b.stage;
        results = kept + Tile::kTaps * Tile::kRight;
        numbers = reinterpret_cast<ChannelPair*>(results + Tile::kOutput);
        full = reinterpret_cast<Barrier*>(results + Tile::kOutput + Tile::kNumbers);
        empty = full + kMostStages;
        residual = empty + kMostStages;
        weights = residual + 1;
    }
};

// One thread: keeps the ring full, band after band.
template <class Tile>
__device__ inline void load_bands(const WgmmaConv& k, const BandMemory<Tile>& m, const Bands& b, int tiles) {
    const Int8Conv2d& p = k.conv;
    arrive_expecting(m.weights, Tile::kTaps * Tile::kRight);
    for (int tap = 0; tap < Tile::kTaps; ++tap) load_box(m.kept + tap * Tile::kRight, k.weight, m.weights, 0, tap, 0);
    RingPlace at;
    for (int t = static_cast<int>(blockIdx.x); t < tiles; t += static_cast<int>(gridDim.x)) {
        Barrier* full = m.full + at.stage;
        wait_for(m.empty + at.stage, at.parity ^ 1);
        arrive_expecting(full, b.bytes);
        load_box(m.ring + at.stage * b.stage, k.input, full, 0, static_cast<int>(-p.pad_left),
                 t % b.count * b.rows - static_cast<int>(p.pad_top), t / b.count);
        at.advance(b.stages);
    }
}

// A group of warps: 64 pixels of every band. The groups write one box together.
template <class Tile>
__device__ inline void multiply_bands(const WgmmaConv& k, const BandMemory<Tile>& m, const Bands& b, int tiles) {
    const Int8Conv2d& p = k.conv;
    const int group = threadIdx.x / kWarpGroup;
    const bool leads = threadIdx.x == 0;
    uint8_t* results = m.results + group * kTileRows * Tile::kColumns;
    if (group == 0) load_numbers<Tile>(p, 0, m.numbers);
    uint32_t turn = 0;
    RingPlace at;
    wait_for(m.weights, 0);
    for (int t = static_cast<int>(blockIdx.x); t < tiles; t += static_cast<int>(gridDim.x), turn ^= 1) {
        const int y = t % b.count * b.rows, n = t / b.count;
        if (leads && p.residual) {
            wait_until_read();
            arrive_expecting(m.residual, b.rows * b.pitch * Tile::kColumns);
            load_box(m.results, k.residual, m.residual, 0, 0, y, n);
        }
        wait_for(m.full + at.stage, at.parity);
        const uint8_t* left = m.ring + at.stage * b.stage + group * kTileRows * Tile::kSpan;
        int32_t sums[Tile::kSums];
        begin_products();
#pragma unroll
        for (int tap = 0; tap < Tile::kTaps; ++tap) {
            const int pixel = tap / Tile::kKernel * b.pitch + tap % Tile::kKernel;
            const uint64_t a = tile_of<Tile::kSpan>(left + pixel * Tile::kSpan);
            const uint64_t c = tile_of<Tile::kSpan>(m.kept + tap * Tile::kRight);
#pragma unroll
            for (int i = 0; i < Tile::kSpan / kProductDepth; ++i)
                multiply_tiles<Tile::kColumns>(sums, a + 2 * i, c + 2 * i, tap + i);
        }
        commit_products();
        wait_products();
        if (threadIdx.x % kWarpGroup == 0) arrive(m.empty + at.stage);
        at.advance(b.stages);
        if (leads && !p.residual) wait_until_read();
        groups_barrier<Tile::kGroups>();  // the numbers are there, and the last band's results are gone
        if (p.residual) {
            wait_for(m.residual, turn);
            requantize<Tile, true>(p, sums, m.numbers, results);
        } else {
            requantize<Tile, false>(p, sums, m.numbers, results);
        }
        publish_stores();
        groups_barrier<Tile::kGroups>();
        if (leads) {
            store_box(m.results, k.output, 0, 0, y, n);
            commit_stores();
        }
    }
    if (leads) wait_until_stored();
}

#endif

template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocks)
    band_conv(const __grid_constant__ WgmmaConv k, const Bands b, const int tiles) {
#if defined(IMGOPT_HOPPER)
    const BandMemory<Tile> m(dynamic_shared<uint8_t>(), b);
    let_successor_start();
    if (threadIdx.x == 0) {
        for (int i = 0; i < b.stages; ++i) {
            start_barrier(m.full + i, 1);
            start_barrier(m.empty + i, Tile::kGroups);
        }
        start_barrier(m.residual, 1);
        start_barrier(m.weights, 1);
        publish_barriers();
    }
    __syncthreads();
    wait_for_predecessor();
    if (threadIdx.x < Tile::kGroups * kWarpGroup)
        multiply_bands<Tile>(k, m, b, tiles);
    else if (threadIdx.x == Tile::kGroups * kWarpGroup)
        load_bands<Tile>(k, m, b, tiles);
#endif
}

template <class Tile>
void launch_bands(const Launcher& launch, const Int8Conv2d& p) {
    const auto size = [](int64_t n) { return static_cast<uint64_t>(n); };
    const auto image = [&](const void* data, int64_t channels, int64_t stride, int64_t w, int64_t h) -> ByteTensor {
        return {data,
                4,
                {size(channels), size(w), size(h), size(p.batch)},
                {size(stride), size(stride * w), size(stride * w * h)}};
    };
    const Int8Weight& w = p.weight;
    const Bands b = bands_of<Tile>(p);
    const uint32_t pitch = static_cast<uint32_t>(b.pitch), rows = static_cast<uint32_t>(b.rows);
    const uint32_t in[4] = {Tile::kSpan, pitch, rows + Tile::kKernel - 1, 1}, out[4] = {Tile::kBox, pitch, rows, 1};
    WgmmaConv k;
    k.conv = p;
    k.input = box_map(image(p.input, w.group_channels, p.input_stride, p.in_w, p.in_h), in);
    k.weight = box_map({p.packed,
                        3,
                        {size(w.group_channels), Tile::kTaps, size(w.out_channels)},
                        {size(w.group_channels), size(weight_row(w))}},
                       {Tile::kSpan, 1, Tile::kColumns, 1});
    k.output = box_map(image(p.output, w.out_channels, p.output_stride, p.out_w, p.out_h), out);
    if (p.residual) k.residual = box_map(image(p.residual, w.out_channels, p.residual_stride, p.out_w, p.out_h), out);
    const int64_t tiles = p.batch * b.count, room = launch.processors() * Tile::kBlocks;
    launch.overlapping(band_conv<Tile>, static_cast<unsigned>(tiles < room ? tiles : room), Tile::kThreads,
                       static_cast<size_t>(b.stages * b.stage + Tile::kFixed), k, b, static_cast<int>(tiles));
}

}  // namespace
}  // namespace imgopt

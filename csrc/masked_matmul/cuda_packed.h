// masked_matmul on Hopper where the mask consists of blocks of 16 × 16 or 32 × 32 that were packed for inference
// (ops/masked_matmul/cuda.py): wgmma with x as the left operand and a block of the weight as the right one. A block of
// threads has 128 samples and up to 384 outputs, whose sums three groups of warps hold; a fourth starts the copies: x
// by boxes of 64 of the common axis, which the blocks of a cluster, who have other outputs of the same samples, load
// for each other, and the blocks of the weight that such a stage has, which lie in a row in memory. What exists is a
// bit of a word, alike in all lanes; an absent row of blocks costs one test and a jump.
#pragma once

#include "../cuda_hopper.h"
#include "arithmetic.h"

namespace imgopt {
namespace {

constexpr int kPackedGroups = 3;                           // of warps that multiply
constexpr int kPackedSamples = 128, kPackedOutputs = 384;  // of a block of threads: 128 sums per thread that multiplies
constexpr int kPackedDepth = 64;                           // of a stage: rows of x of 128 bytes
constexpr int kPackedCluster = 2;
constexpr int kPackedThreads = (kPackedGroups + 1) * kWarpGroup, kMultiplying = kPackedGroups * kWarpGroup;
constexpr int kGivenRegisters = 32, kTakenRegisters = 160;

// A stage in shared memory: x, blocks of the weight (denser stages are split), and what exists.
constexpr int kPackedInput = kPackedSamples * kPackedDepth * 2, kPackedValues = 16 << 10;
constexpr int kPackedStage = kPackedInput + kPackedValues + 1024;
constexpr int kPackedStages = 6;
constexpr size_t kPackedShared = size_t{kPackedStages} * kPackedStage + 1024 + 2 * kPackedStages * sizeof(uint64_t);

// What a block of threads multiplies in a stage: for each group of warps a word with 64 / side bits for each of its
// rows of blocks, which tell the columns of blocks that exist there, and in a byte of `before` how many blocks those of
// the groups before it are. The blocks lie in the order of these bits.
struct PackedStage {
    uint32_t bits[kPackedGroups], before;
    int32_t first, count;  // blocks
    int32_t column;        // of x
    int32_t unused;
};

struct PackedBlocks {
    TensorMap x;
    const uint16_t* values;     // (blocks, side, side) as multiply_block() reads them
    const PackedStage* stages;  // (stages, cluster)
    const int32_t* tiles;       // first stage of each tile of tile_rows · cluster outputs
    const uint16_t* bias;       // (rows,) or null
    uint16_t* output;           // (samples, rows)
    int64_t samples, rows;
    int32_t tile_rows, tiles_across;
    int64_t tiles_count;
};

#if defined(IMGOPT_HOPPER)

struct PackedRing {
    uint8_t* stages;
    Barrier *full, *empty;
    int stage = 0;
    uint32_t parity = 0;

    __device__ explicit PackedRing(uint8_t* shared) {
        stages = shared + (-reinterpret_cast<uintptr_t>(shared) & 1023);
        full = reinterpret_cast<Barrier*>(stages + kPackedStages * kPackedStage);
        empty = full + kPackedStages;
    }
    __device__ uint8_t* current() const { return stages + stage * kPackedStage; }
    __device__ void advance() {
        if (++stage == kPackedStages) {
            stage = 0;
            parity ^= 1;
        }
    }
};

// One warp: keeps the ring full, tile after tile. Its lanes read what 32 stages need at once, a turn ahead: one after
// the other, those reads would take longer than the stages.
template <int side, int cluster>
__device__ inline void load_packed(const PackedBlocks& p, PackedRing ring, int rank) {
    constexpr int block_bytes = side * side * 2, samples = kPackedSamples / cluster;
    const int lane = threadIdx.x % 32;
    for (int64_t t = blockIdx.x / cluster; t < p.tiles_count; t += gridDim.x / cluster) {
        const int across = static_cast<int>(t % p.tiles_across);
        const int begin = load_cached(p.tiles + across), end = load_cached(p.tiles + across + 1);
        const int sample = static_cast<int>(t / p.tiles_across) * kPackedSamples + rank * samples;
        const auto read = [&](int i) {
            const PackedStage* from = p.stages + static_cast<int64_t>(i < end ? i : begin) * cluster + rank;
            return load_cached(reinterpret_cast<const uint4*>(&from->first));
        };
        uint4 ahead = begin < end ? read(begin + lane) : make_uint4(0, 0, 0, 0);
        for (int turn = begin; turn < end; turn += 32) {
            const uint4 now = ahead;
            if (turn + 32 < end) ahead = read(turn + 32 + lane);
            for (int i = 0; i < 32 && turn + i < end; ++i, ring.advance()) {
                const uint32_t first = of_lane(now.x, i), count = of_lane(now.y, i), column = of_lane(now.z, i);
                if (lane == 0) {
                    const int bytes = static_cast<int>(count) * block_bytes;
                    uint8_t* to = ring.current();
                    Barrier* full = ring.full + ring.stage;
                    wait_for(ring.empty + ring.stage, ring.parity ^ 1);
                    arrive_expecting(full, kPackedInput + static_cast<int>(sizeof(PackedStage)) + bytes);
                    load_box_for_all<cluster>(to + rank * samples * kPackedDepth * 2, p.x, full,
                                              static_cast<int>(column) * 2, sample);
                    load_bytes(to + kPackedInput + kPackedValues,
                               p.stages + static_cast<int64_t>(turn + i) * cluster + rank, sizeof(PackedStage), full);
                    if (bytes) load_bytes(to + kPackedInput, p.values + int64_t{first} * side * side, bytes, full);
                }
                __syncwarp();
            }
        }
    }
}

// Four lanes have two neighbouring outputs each of four groups of eight: afterwards each has a group.
__device__ inline void exchange_quarters(uint32_t (&words)[4]) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int bit = 1; bit <= 2; bit *= 2)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            if (i & bit) continue;
            const bool upper = lane & bit;
            const uint32_t other = __shfl_xor_sync(~0u, upper ? words[i] : words[i | bit], bit);
            (upper ? words[i] : words[i | bit]) = other;
        }
}

// The sums of a group of warps go out, as sixteen bytes of a sample: outputs from row0 on, before `end`.
template <bool brain, int side, int halves, int rows>
__device__ inline void store_packed(const PackedBlocks& p, const float (&sums)[halves][rows][side / 2], int64_t sample0,
                                    int64_t row0, int64_t end) {
    const int lane = threadIdx.x % 32;
    const int64_t first = sample0 + threadIdx.x / 32 % 4 * 16 + lane / 4;
#pragma unroll
    for (int c = 0; c < rows * side; c += 32) {
        float offset[4][2] = {};  // of this lane's outputs, read once for all samples
        if (p.bias)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int64_t row = row0 + c + 8 * i + lane % 4 * 2;
                if (row >= end) continue;
                const uint32_t two = load_cached(reinterpret_cast<const uint32_t*>(p.bias + row));
                offset[i][0] = widened_half<brain>(static_cast<uint16_t>(two));
                offset[i][1] = widened_half<brain>(static_cast<uint16_t>(two >> 16));
            }
#pragma unroll
        for (int h = 0; h < halves; ++h)
#pragma unroll
            for (int v = 0; v < 2; ++v) {
                uint32_t words[4];
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const float* sum = &sums[h][(c + 8 * i) / side][(c + 8 * i) % side / 2 + 2 * v];
                    const float low = sum[0] + offset[i][0], high = sum[1] + offset[i][1];
                    words[i] = brain ? bfloat16s_of_floats(low, high) : halves_of_floats(low, high);
                }
                exchange_quarters(words);
                const int64_t sample = first + h * kTileRows + v * 8, row = row0 + c + lane % 4 * 8;
                if (sample < p.samples && row < end)
                    *reinterpret_cast<uint4*>(p.output + sample * p.rows + row) =
                        make_uint4(words[0], words[1], words[2], words[3]);
            }
    }
}

// First row of blocks, of `rows` in a tile, of a group of warps.
__device__ inline int first_row(int rows, int group) { return rows * group / kPackedGroups; }

// A group of warps: all 128 samples and a third of the rows of blocks of every tile. A stage's products are under way
// while the next stage's are started.
template <bool brain, int side, int cluster>
__device__ inline void multiply_packed(const PackedBlocks& p, PackedRing ring, int rank) {
    constexpr int halves = kPackedSamples / kTileRows, rows = kPackedOutputs / kPackedGroups / side;
    constexpr int columns = kPackedDepth / side, half_chunks = kTileRows * kPackedDepth * 2 / 16;
    constexpr int block_chunks = side * side * 2 / 16;
    const int lane = threadIdx.x % 32, group = static_cast<int>(warp_uniform(threadIdx.x / kWarpGroup));
    const auto stages_of = [&](int64_t t) {
        const int32_t* tile = p.tiles + t % p.tiles_across;
        return t < p.tiles_count ? load_cached(tile + 1) - load_cached(tile) : 0;
    };
    int left = stages_of(blockIdx.x / cluster);
    for (int64_t t = blockIdx.x / cluster; t < p.tiles_count; t += gridDim.x / cluster) {
        float sums[halves][rows][side / 2] = {};
        int last = -1;
        const auto release = [&](int stage) {
            __syncwarp();
            if (stage >= 0 && lane < cluster) arrive_in(ring.empty + stage, lane);
        };
        for (; left > 0; --left) {
            wait_for(ring.full + ring.stage, ring.parity);
            const auto* stage = reinterpret_cast<const PackedStage*>(ring.current() + kPackedInput + kPackedValues);
            const uint32_t bits = warp_uniform(stage->bits[group]);
            const uint32_t x = tile_place(ring.current());
            uint32_t block = block_place(ring.current() + kPackedInput) +
                             (warp_uniform(stage->before) >> (8 * group) & 255) * block_chunks;
#pragma unroll
            for (int j = 0; j < rows; ++j)
                for (uint32_t row = bits >> (columns * j) & ((1u << columns) - 1); row; row &= row - 1) {
                    const uint32_t column = static_cast<uint32_t>(lowest_bit(row));
                    begin_products();
#pragma unroll
                    for (int i = 0; i < side / 16; ++i)
#pragma unroll
                        for (int h = 0; h < halves; ++h)
                            multiply_block<brain, side>(sums[h][j], x + column * (side / 8) + h * half_chunks + 2 * i,
                                                        block + 16 * i);
                    block += block_chunks;
                }
            commit_products();
            wait_products<1>();
            release(last);
            last = ring.stage;
            ring.advance();
        }
        wait_products();
        release(last);
        left = stages_of(t + gridDim.x / cluster);  // there when the sums are out
        const int64_t tile = (t % p.tiles_across * cluster + rank) * p.tile_rows;
        const int64_t end = tile + first_row(p.tile_rows / side, group + 1) * side;
        store_packed<brain, side, halves, rows>(p, sums, t / p.tiles_across * kPackedSamples,
                                                tile + first_row(p.tile_rows / side, group) * side,
                                                end < p.rows ? end : p.rows);
    }
}

#endif

template <bool brain, int side, int cluster>
__global__ void __launch_bounds__(kPackedThreads, 1) packed_product(const __grid_constant__ PackedBlocks p) {
#if defined(IMGOPT_HOPPER)
    const PackedRing ring(dynamic_shared<uint8_t>());
    const int rank = cluster > 1 ? cluster_rank() : 0;
    if (threadIdx.x == 0) {
        for (int i = 0; i < kPackedStages; ++i) {
            start_barrier(ring.full + i, 1);
            start_barrier(ring.empty + i, cluster * kMultiplying / 32);
        }
        publish_barriers();
    }
    __syncthreads();
    if (cluster > 1) cluster_barrier();
    if (warp_uniform(threadIdx.x / kWarpGroup) == kPackedGroups) {
        give_registers<kGivenRegisters>();
        if (threadIdx.x < kMultiplying + 32) load_packed<side, cluster>(p, ring, rank);
    } else {
        take_registers<kTakenRegisters>();
        multiply_packed<brain, side, cluster>(p, ring, rank);
    }
    if (cluster > 1) cluster_barrier();  // the others still arrive at this block's barriers
#endif
}

template <bool brain, int side>
void launch_packed(const Launcher& launch, const PackedBlocks& p) {
    const auto kernel = packed_product<brain, side, kPackedCluster>;
    static const int64_t room = launch.resident_clusters(kernel, kPackedCluster, kPackedThreads, kPackedShared);
    STD_TORCH_CHECK(room > 0, "CUDA: no room for a cluster of ", kPackedCluster, " blocks");
    const int64_t clusters = p.tiles_count < room ? p.tiles_count : room;
    launch.clusters(kernel, kPackedCluster, static_cast<unsigned>(clusters * kPackedCluster), kPackedThreads,
                    kPackedShared, p);
}

}  // namespace
}  // namespace imgopt

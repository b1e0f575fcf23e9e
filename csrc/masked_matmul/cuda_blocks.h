// masked_matmul on CUDA where the mask consists of 16 × 16 blocks, in float16 or bfloat16 on tensor cores, sums in
// float32. A block of threads has 128 samples and 256 outputs, 32 of them per warp, and walks all of x through a ring
// of shared memory as a dense product would; a warp multiplies where its bits say so. So x is read once per 256
// outputs, whatever the mask, and at 80 % sparsity about 25 multiply-adds go with every byte of it. The weights come
// from where they are, as fragments: the values of a mask in training need no packing.
#pragma once

#include "../cuda.h"
#include "arithmetic.h"

namespace imgopt {
namespace {

constexpr int kBlockSide = 16;
constexpr int kBlockThreads = 256;
constexpr int kBlockSamples = 128;
constexpr int kBlockRows = 256;  // outputs; 32 of a warp, two blocks' sides
constexpr int kBlockDepth = 64;  // elements of x per stage and sample: four blocks' sides
constexpr int kBlockStages = 4;
constexpr int kBlockStageBytes = kBlockSamples * kBlockDepth * 2;
constexpr int kOutputPitch = kBlockRows + 8;  // 16-bit elements: rows stay aligned and off each other's banks

// The transposed product (the input's gradient) reads the same weight.
struct BlockMatmul {
    const uint16_t* x;       // (samples, depth)
    const uint16_t* weight;  // (rows, depth), transposed: (depth, rows)
    const uint32_t* blocks;  // (rows / 16, words)
    const uint16_t* bias;    // (rows,) or null
    uint16_t* output;        // (samples, rows)
    int64_t samples, rows, depth, words;
};

constexpr size_t block_shared() {
    constexpr size_t ring = size_t{kBlockStages} * kBlockStageBytes, output = size_t{kBlockSamples} * kOutputPitch * 2;
    return ring > output ? ring : output;
}

// Eight chunks of 16 bytes to a row; eight rows of one chunk hit different banks.
__device__ inline int swizzled_chunk(int row, int chunk) { return row * kBlockDepth * 2 + (chunk ^ (row & 7)) * 16; }

// The fragment of 16 outputs from `row` by 16 of the common axis from `k`.
template <bool transposed>
__device__ inline void load_weight(const BlockMatmul& p, int64_t row, int64_t k, int lane, uint32_t (&a)[4]) {
    const int64_t pitch = transposed ? p.rows : p.depth;
    const uint16_t* from = p.weight + (transposed ? k * pitch + row : row * pitch + k);
    from += lane / 4 * pitch + lane % 4 * 2;
    const auto word = [&](int down, int across) {
        return load_cached(reinterpret_cast<const uint32_t*>(from + down * 8 * pitch + across * 8));
    };
    if constexpr (transposed) {
        a[0] = transposed_matrix(word(0, 0));
        a[1] = transposed_matrix(word(0, 1));
        a[2] = transposed_matrix(word(1, 0));
        a[3] = transposed_matrix(word(1, 1));
    } else {
        a[0] = word(0, 0);
        a[1] = word(1, 0);
        a[2] = word(0, 1);
        a[3] = word(1, 1);
    }
}

template <bool brain>
__device__ inline float widened_half(uint16_t bits) {
    return brain ? widen(BFloat16{bits}) : float_of_half(bits);
}
template <bool brain>
__device__ inline uint16_t narrowed_half(float v) {
    return brain ? bfloat16_of_float(v) : half_of_float(v);
}

template <bool brain, bool transposed>
__global__ void __launch_bounds__(kBlockThreads) block_product(const BlockMatmul p) {
    uint8_t* shared = dynamic_shared<uint8_t>();
    const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
    const int64_t across = (p.rows + kBlockRows - 1) / kBlockRows;
    const int64_t row0 = blockIdx.x % across * kBlockRows, sample0 = blockIdx.x / across * kBlockSamples;
    const int64_t block_rows = p.rows / kBlockSide, first = row0 / kBlockSide + warp * 2;
    const int stages = static_cast<int>((p.depth + kBlockDepth - 1) / kBlockDepth);

    const auto load_stage = [&](int stage) {
        if (stage < stages) {
            uint8_t* to = shared + stage % kBlockStages * kBlockStageBytes;
            const int chunk = thread % 8;
            const int64_t k = int64_t{stage} * kBlockDepth + chunk * 8;
#pragma unroll
            for (int i = 0; i < kBlockSamples * 8 / kBlockThreads; ++i) {
                const int row = thread / 8 + i * (kBlockThreads / 8);
                const bool there = sample0 + row < p.samples && k < p.depth;
                copy_16_async(to + swizzled_chunk(row, chunk), there ? p.x + (sample0 + row) * p.depth + k : p.x,
                              there ? 16 : 0);
            }
        }
        commit_copies();
    };
    // A bit for each of the stage's four blocks, of the warp's row of blocks `side`.
    const auto bits_of = [&](int stage, int side) {
        if (first + side >= block_rows) return 0u;
        return load_cached(p.blocks + (first + side) * p.words + stage / 8) >> (stage % 8 * 4) & 15u;
    };

    float sums[2][kBlockSamples / 8][4] = {};
    for (int stage = 0; stage < kBlockStages - 1; ++stage) load_stage(stage);
    for (int stage = 0; stage < stages; ++stage) {
        const uint32_t bits[2] = {bits_of(stage, 0), bits_of(stage, 1)};
        wait_copies<kBlockStages - 2>();
        __syncthreads();  // this stage is there for all, and all are done with the one that is loaded next
        load_stage(stage + kBlockStages - 1);
        const uint8_t* x = shared + stage % kBlockStages * kBlockStageBytes;
#pragma unroll
        for (int step = 0; step < kBlockDepth / kBlockSide; ++step) {
            const bool has[2] = {(bits[0] >> step & 1) != 0, (bits[1] >> step & 1) != 0};
            if (!has[0] && !has[1]) continue;
            uint32_t a[2][4] = {};
#pragma unroll
            for (int side = 0; side < 2; ++side)
                if (has[side])
                    load_weight<transposed>(p, (first + side) * kBlockSide,
                                            int64_t{stage} * kBlockDepth + step * kBlockSide, lane, a[side]);
#pragma unroll
            for (int pair = 0; pair < kBlockSamples / 16; ++pair) {
                uint32_t b[4];
                load_matrices(b, x + swizzled_chunk(pair * 16 + lane / 16 * 8 + lane % 8, step * 2 + lane / 8 % 2));
#pragma unroll
                for (int side = 0; side < 2; ++side) {
                    if (!has[side]) continue;
                    multiply_half<brain>(sums[side][2 * pair], a[side], b[0], b[1]);
                    multiply_half<brain>(sums[side][2 * pair + 1], a[side], b[2], b[3]);
                }
            }
        }
    }

    // Through shared memory: a lane holds an output of neighbouring samples, memory wants the outputs of a sample.
    wait_copies<0>();
    __syncthreads();
    uint16_t* staged = reinterpret_cast<uint16_t*>(shared);
#pragma unroll
    for (int side = 0; side < 2; ++side)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int row = warp * 32 + side * kBlockSide + lane / 4 + i / 2 * 8;
            const float offset = p.bias && row0 + row < p.rows ? widened_half<brain>(p.bias[row0 + row]) : 0.0f;
#pragma unroll
            for (int n = 0; n < kBlockSamples / 8; ++n)
                staged[(n * 8 + lane % 4 * 2 + i % 2) * kOutputPitch + row] =
                    narrowed_half<brain>(sums[side][n][i] + offset);
        }
    __syncthreads();
    for (int i = thread; i < kBlockSamples * kBlockRows / 8; i += kBlockThreads) {
        const int row = i % (kBlockRows / 8) * 8, sample = i / (kBlockRows / 8);
        if (row0 + row >= p.rows || sample0 + sample >= p.samples) continue;
        *reinterpret_cast<uint4*>(p.output + (sample0 + sample) * p.rows + row0 + row) =
            *reinterpret_cast<const uint4*>(staged + sample * kOutputPitch + row);
    }
}

}  // namespace
}  // namespace imgopt

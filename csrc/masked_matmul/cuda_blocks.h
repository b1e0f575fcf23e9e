// masked_matmul on CUDA where the mask consists of 16 × 16 blocks, in float16 or bfloat16 on tensor cores, sums in
// float32. A block of threads has 128 samples and 384 outputs and walks all of x through a ring of shared memory as a
// dense product would, with those blocks of the weight that exist beside it; a warp has 64 samples and six rows of
// blocks, and multiplies where its bits say so. The weights come from where they are: the values of a mask in training
// need no packing.
//
// What bounds it is the way from the second-level cache: x goes there once per 384 outputs, whatever the mask, hence
// as many outputs as registers hold. 4096^3 at 80 % sparsity is 0.6 GB that way.
#pragma once

#include "../cuda.h"
#include "arithmetic.h"

namespace imgopt {
namespace {

constexpr int kBlockSide = 16;
constexpr int kBlockThreads = 256;
constexpr int kBlockSamples = 128, kWarpSamples = 64;
constexpr int kWarpBlocks = 6;                            // rows of blocks
constexpr int kBlockRows = 4 * kWarpBlocks * kBlockSide;  // outputs
constexpr int kBlockDepth = 64;                           // elements of x per stage and sample
constexpr int kStageSteps = kBlockDepth / kBlockSide;
constexpr int kBlockBytes = kBlockSide * kBlockSide * 2;
constexpr int kInputBytes = kBlockSamples * kBlockDepth * 2;
constexpr int kLoadBlocks = kBlockRows / kBlockSide / (kBlockThreads / 32);  // rows of blocks whose loads a warp issues
constexpr int kBitsAt = kInputBytes + kBlockRows / kBlockSide * kStageSteps * kBlockBytes;
constexpr int kStageBytes = kBitsAt + 128;    // a word of bits per warp
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

// `stages` of the ring: three on sm_90, two where that is more shared memory than a block can have.
constexpr size_t block_shared(int stages) {
    const size_t ring = size_t{kStageBytes} * static_cast<size_t>(stages),
                 output = size_t{kBlockSamples} * kOutputPitch * 2;
    return ring > output ? ring : output;
}

// Of x, eight chunks of 16 bytes to a row: eight rows of one chunk hit different banks. Of a block, two chunks.
__device__ inline int swizzled_chunk(int row, int chunk) { return row * kBlockDepth * 2 + (chunk ^ (row & 7)) * 16; }
__device__ inline int swizzled_half(int row, int half) { return row * kBlockSide * 2 + (half ^ (row >> 2 & 1)) * 16; }

// The fragment of 16 outputs by 16 of the common axis: words 0 and 1 for the first eight outputs. A block of the
// transposed weight lies with the common axis down.
template <bool transposed>
__device__ inline void load_block(const uint8_t* block, int lane, uint32_t (&b)[4]) {
    const int row = lane % 8 + (transposed ? lane / 8 % 2 : lane / 16) * 8,
              half = transposed ? lane / 16 : lane / 8 % 2;
    load_matrices(b, block + swizzled_half(row, half));
    if constexpr (transposed)
#pragma unroll
        for (int i = 0; i < 4; ++i) b[i] = transposed_matrix(b[i]);
}

template <bool brain>
__device__ inline float widened_half(uint16_t bits) {
    return brain ? widened(BFloat16{bits}) : float_of_half(bits);
}
template <bool brain, bool transposed, int ring>
__global__ void __launch_bounds__(kBlockThreads, 1) block_product(const BlockMatmul p) {
    uint8_t* shared = dynamic_shared<uint8_t>();
    const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
    const int64_t across = (p.rows + kBlockRows - 1) / kBlockRows;
    const int64_t row0 = blockIdx.x % across * kBlockRows, sample0 = blockIdx.x / across * kBlockSamples;
    const int64_t block_row0 = row0 / kBlockSide;
    const int stages = static_cast<int>((p.depth + kBlockDepth - 1) / kBlockDepth);

    // Of x four chunks per thread, of the weight the existing blocks of three rows per warp, a chunk per lane. Their
    // bits are read a stage ahead and left beside them.
    const int chunk = thread % 8, x_row = thread / 8;
    const int64_t x_step = kBlockThreads / 8 * p.depth;
    const uint16_t* x_from = p.x + (sample0 + x_row) * p.depth + chunk * 8;
    const int there = static_cast<int>(p.samples - sample0 < kBlockSamples ? p.samples - sample0 : kBlockSamples);
    const int64_t load_row = block_row0 + warp * kLoadBlocks, pitch = transposed ? p.rows : p.depth;
    const uint16_t* w_from =
        p.weight +
        (transposed ? lane / 2 * pitch + load_row * kBlockSide : (load_row * kBlockSide + lane / 2) * pitch) +
        lane % 2 * 8;
    const int64_t along = transposed ? kBlockSide * pitch : kBlockSide,
                  down = transposed ? kBlockSide : kBlockSide * pitch;
    const uint32_t* bits_from = p.blocks + load_row * p.words;
    const int64_t rows_left = p.rows / kBlockSide - load_row;
    const auto bits_of = [&](int stage) {  // four for the stage's steps, of each row
        uint32_t bits = 0;
#pragma unroll
        for (int i = 0; i < kLoadBlocks; ++i)
            if (i < rows_left)
                bits |= (load_cached(bits_from + i * p.words + stage / 8) >> (stage % 8 * kStageSteps) & 15u)
                        << (kStageSteps * i);
        return bits;
    };
    uint32_t ahead = bits_of(0);
    const auto load_stage = [&](int stage) {
        if (stage < stages) {
            uint8_t* to = shared + stage % ring * kStageBytes;
            const bool inside = stage * kBlockDepth + chunk * 8 < p.depth;
#pragma unroll
            for (int i = 0; i < kBlockSamples * 8 / kBlockThreads; ++i) {
                const bool valid = inside && x_row + i * (kBlockThreads / 8) < there;
                copy_16_async(to + swizzled_chunk(x_row, chunk) + i * (kBlockThreads / 8) * kBlockDepth * 2,
                              valid ? x_from + i * x_step + stage * kBlockDepth : p.x, valid ? 16 : 0);
            }
            if (lane == 0) *reinterpret_cast<uint32_t*>(to + kBitsAt + warp * 4) = ahead;
            to += kInputBytes + warp * kLoadBlocks * kStageSteps * kBlockBytes + swizzled_half(lane / 2, lane % 2);
            const uint16_t* from = w_from + stage * kStageSteps * along;
            for (uint32_t bits = ahead; bits; bits &= bits - 1) {
                const int block = lowest_bit(bits);
                copy_16_async(to + block * kBlockBytes, from + block % kStageSteps * along + block / kStageSteps * down,
                              16);
            }
            if (stage + 1 < stages) ahead = bits_of(stage + 1);
        }
        commit_copies();
    };

    const int first_block = warp % 4 * kWarpBlocks, first_sample = warp / 4 * kWarpSamples;
    float sums[kWarpBlocks][kWarpSamples / 16][2][4] = {};
    for (int stage = 0; stage < ring - 1; ++stage) load_stage(stage);
    for (int stage = 0; stage < stages; ++stage) {
        wait_copies<ring - 2>();
        __syncthreads();  // this stage is there for all, and all are done with the one that is loaded next
        load_stage(stage + ring - 1);
        const uint8_t* x = shared + stage % ring * kStageBytes;
        const uint8_t* blocks = x + kInputBytes + first_block * kStageSteps * kBlockBytes;
        const uint32_t* words = reinterpret_cast<const uint32_t*>(x + kBitsAt + warp % 4 * 8);
        const uint32_t bits = words[0] | words[1] << (kLoadBlocks * kStageSteps);
#pragma unroll 1
        for (int step = 0; step < kStageSteps; ++step) {
            const uint32_t mine = bits >> step & 0x111111u;
            if (!mine) continue;
            uint32_t a[kWarpSamples / 16][4];
#pragma unroll
            for (int m = 0; m < kWarpSamples / 16; ++m)
                load_matrices(a[m], x + swizzled_chunk(first_sample + lane % 16, step * 2 + lane / 16) +
                                        m * 16 * kBlockDepth * 2);
#pragma unroll
            for (int j = 0; j < kWarpBlocks; ++j) {
                if (!(mine >> (kStageSteps * j) & 1)) continue;
                uint32_t b[4];
                load_block<transposed>(blocks + (j * kStageSteps + step) * kBlockBytes, lane, b);
#pragma unroll
                for (int m = 0; m < kWarpSamples / 16; ++m) {
                    multiply_half<brain>(sums[j][m][0], a[m], b[0], b[1]);
                    multiply_half<brain>(sums[j][m][1], a[m], b[2], b[3]);
                }
            }
        }
    }

    // Through shared memory: memory wants sixteen bytes of a sample, a lane holds four.
    wait_copies<0>();
    __syncthreads();
    uint16_t* staged = reinterpret_cast<uint16_t*>(shared);
#pragma unroll
    for (int j = 0; j < kWarpBlocks; ++j)
#pragma unroll
        for (int n = 0; n < 2; ++n) {
            const int row = (first_block + j) * kBlockSide + n * 8 + lane % 4 * 2;
            const bool offset = p.bias && row0 + row < p.rows;
            const float low = offset ? widened_half<brain>(p.bias[row0 + row]) : 0.0f;
            const float high = offset ? widened_half<brain>(p.bias[row0 + row + 1]) : 0.0f;
#pragma unroll
            for (int i = 0; i < kWarpSamples / 8; ++i) {
                const float* sum = &sums[j][i / 2][n][i % 2 * 2];
                *reinterpret_cast<uint32_t*>(staged + (first_sample + i * 8 + lane / 4) * kOutputPitch + row) =
                    brain ? bfloat16s_of_floats(sum[0] + low, sum[1] + high)
                          : halves_of_floats(sum[0] + low, sum[1] + high);
            }
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

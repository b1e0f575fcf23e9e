// int8_conv2d on tensor cores: an implicit matrix product of pixels × (taps · channels) and output channels × the same,
// with mma.sync m16n8k32 u8 × s8 and a ring of stages filled by cp.async. It serves every layer from sm_80 on; on
// Hopper, where mma.sync reaches about 62 % of the peak (arXiv 2402.13499), cuda_wgmma.h takes the layers it can.
//
// Why not CUTLASS. The contract is bits: a padded tap is the zero point (its loads fill with zero), the epilogue is
// arithmetic.h's store_sum() with float or integer requantization, residual and clamp, and int8 input is uint8 with its
// top bit flipped, one exclusive or per fragment. Against that stand some 200 lines, no package at build time, and
// seconds of compilation.
#pragma once

#include "../cuda.h"
#include "arithmetic.h"

namespace imgopt {
namespace {

constexpr int kGemmThreads = 256, kGemmWarps = kGemmThreads / 32;
constexpr int kDepth = 64;  // bytes of the common axis per stage
constexpr int kChunk = 16;  // bytes of one asynchronous copy
constexpr int kStages = 4;
constexpr int kRowChunks = kDepth / kChunk;
constexpr int kWarpColumns = 32;  // output channels of a warp
constexpr int kStagePad = 4;      // sums: keeps rows off each other's banks

// Bytes per output channel of the packed weight: (tap, channel), zero up to whole stages.
inline __host__ __device__ int64_t weight_row(const Int8Weight& w) {
    return (w.kernel_h * w.kernel_w * w.group_channels + kDepth - 1) / kDepth * kDepth;
}

template <int kRows, int kColumns>
constexpr int gemm_shared() {
    constexpr int ring = kStages * (kRows + kColumns) * kDepth, sums = kRows * (kColumns + kStagePad) * 4;
    return ring > sums ? ring : sums;
}

// Where chunk `chunk` of row `row` lies: eight rows of one chunk hit different banks.
__device__ inline int swizzled(int row, int chunk) { return row * kDepth + (chunk ^ (row >> 1 & 3)) * kChunk; }

// A pixel of the output as a row of the left matrix.
struct GemmRow {
    const uint8_t* image;  // null beyond the last pixel
    int64_t y, x;          // input position of the first tap
};

__device__ inline GemmRow gemm_row(const Int8Conv2d& p, int64_t pixel, int64_t group) {
    if (pixel >= p.batch * p.out_h * p.out_w) return {nullptr, 0, 0};
    const int64_t n = pixel / p.out_w / p.out_h, oy = pixel / p.out_w % p.out_h, ox = pixel % p.out_w;
    return {p.input + n * p.in_h * p.in_w * p.input_stride + group * p.weight.group_channels,
            oy * p.stride_h - p.pad_top, ox * p.stride_w - p.pad_left};
}

// A position along the common axis.
struct Depth {
    int64_t channel;
    int ty, tx;

    __device__ void advance(const Int8Weight& w, int64_t channels) {
        for (channel += channels; channel >= w.group_channels; channel -= w.group_channels)
            if (++tx == w.kernel_w) {
                tx = 0;
                ++ty;
            }
    }
};

// What a row reads at a depth: null outside of the image, where the value is the zero point.
__device__ inline const uint8_t* pixel_at(const Int8Conv2d& p, const GemmRow& row, const Depth& at) {
    const int64_t y = row.y + at.ty * p.dilation_h, x = row.x + at.tx * p.dilation_w;
    if (y < 0 || y >= p.in_h || x < 0 || x >= p.in_w) return nullptr;
    return row.image + (y * p.in_w + x) * p.input_stride + at.channel;
}

__device__ inline uint32_t four_times(uint8_t byte) { return byte * 0x01010101u; }

// One chunk of the left matrix. `vector`: a chunk lies within a tap and is aligned; otherwise byte by byte.
template <bool vector>
__device__ inline void load_chunk(const Int8Conv2d& p, const GemmRow& row, Depth at, uint8_t* to) {
    const uint8_t padding = p.input_zero_point ^ p.input_flip;
    if constexpr (vector) {
        const bool counts = row.image && at.ty < p.weight.kernel_h;
        const uint8_t* from = counts ? pixel_at(p, row, at) : nullptr;
        if (from || !counts) {
            copy_16_async(to, from ? from : p.input, from ? kChunk : 0);
        } else {
            const uint32_t word = four_times(padding);
            *reinterpret_cast<uint4*>(to) = make_uint4(word, word, word, word);
        }
    } else {
        uint32_t words[4] = {};
        for (int i = 0; i < kChunk; ++i) {
            if (!row.image || at.ty >= p.weight.kernel_h) break;
            const uint8_t* from = pixel_at(p, row, at);
            words[i / 4] |= uint32_t{from ? load_cached(from) : padding} << (i % 4 * 8);
            at.advance(p.weight, 1);
        }
        *reinterpret_cast<uint4*>(to) = make_uint4(words[0], words[1], words[2], words[3]);
    }
}

// --- epilogue ------------------------------------------------------------------------------------------------------

inline __host__ __device__ bool aligned_to_16(const void* data, int64_t stride_bytes) {
    return (reinterpret_cast<uintptr_t>(data) | static_cast<uintptr_t>(stride_bytes)) % 16 == 0;
}

// Whether sixteen channels of a pixel can be read and written as vectors.
inline __host__ __device__ bool has_vector_epilogue(const Int8Conv2d& p) {
    const int64_t size = p.float_output ? 4 : 1;
    return (p.weight.out_channels / p.weight.groups) % 16 == 0 && aligned_to_16(p.output, p.output_stride * size) &&
           (!p.residual || aligned_to_16(p.residual, p.residual_stride));
}

__device__ inline int32_t wrapping_sum(int32_t a, int32_t b) {
    return static_cast<int32_t>(static_cast<uint32_t>(a) + static_cast<uint32_t>(b));
}

constexpr float kWholeFloat = 8388608.0f;  // 2^23: from here on to 2^24, the low bits of a float are a whole number

// float(byte) + kWholeFloat
__device__ inline float whole_float(uint32_t byte) { return __uint_as_float(0x4B000000u | byte); }

// to_byte() of arithmetic.h for two values at once. y + kRound has the rounded y in its low bits, 256 too many so that
// nothing borrows; kRound is even, so ties go where round_half_even() sends them. A flip of the top bit is the addition
// of 128.
struct ByteRounding {
    float low, high;
    uint32_t zero_points;

    __device__ explicit ByteRounding(const Int8Conv2d& p)
        : low(p.low), high(p.high), zero_points((p.output_zero_point + p.output_flip) * 0x00010001u) {}

    // In the low half of the result.
    __device__ uint32_t two(float y0, float y1) const {
        constexpr float kRound = 1.5f * kWholeFloat + 256.0f;
        const uint32_t q0 = __float_as_uint(fminf(fmaxf(y0, low), high) + kRound);
        const uint32_t q1 = __float_as_uint(fminf(fmaxf(y1, low), high) + kRound);
        const uint32_t both = bytes_of(q0, q1, 0x5410) + zero_points;
        return bytes_of(both, both, 0x2020);
    }
};

// Requantizes and stores `count` <= 16 neighbouring channels of one pixel; offsets are not yet in the sums.
__device__ inline void store_channels(const Int8Conv2d& p, bool vectors, int64_t pixel, int64_t channel, int count,
                                      const int32_t* sums) {
    if (!vectors || count < 16) {
        for (int i = 0; i < count; ++i) store_sum(p, pixel, channel + i, wrapping_sum(sums[i], p.offset[channel + i]));
        return;
    }
    // The same function on registers: a pixel of sixteen channels of its own.
    alignas(16) uint8_t residual[16];
    alignas(16) float output[16];
    Int8Conv2d own = p;
    own.multiplier = p.multiplier + channel;
    if (p.shift) own.shift = p.shift + channel;
    if (p.residual) {
        *reinterpret_cast<uint4*>(residual) =
            *reinterpret_cast<const uint4*>(p.residual + pixel * p.residual_stride + channel);
        own.residual = residual;
    }
    own.output = output;
#pragma unroll
    for (int i = 0; i < 16; ++i) store_sum(own, 0, i, wrapping_sum(sums[i], p.offset[channel + i]));
    const int64_t at = pixel * p.output_stride + channel;
    const uint4* from = reinterpret_cast<const uint4*>(output);
    if (p.float_output)
        for (int i = 0; i < 4; ++i) reinterpret_cast<uint4*>(static_cast<float*>(p.output) + at)[i] = from[i];
    else
        *reinterpret_cast<uint4*>(static_cast<uint8_t*>(p.output) + at) = from[0];
}

// --- the kernel ----------------------------------------------------------------------------------------------------

template <int kRows, int kColumns, bool vector>
__global__ void __launch_bounds__(kGemmThreads, vector ? 2 : 1) gemm_conv(const Int8Conv2d p) {
    constexpr int kWarpsAcross = kColumns / kWarpColumns, kWarpsDown = kGemmWarps / kWarpsAcross;
    constexpr int kWarpRows = kRows / kWarpsDown, kFragments = kWarpRows / 16;
    constexpr int kOwnRows = kRows * kRowChunks / kGemmThreads, kOwnColumns = kColumns * kRowChunks / kGemmThreads;
    constexpr int kStageBytes = (kRows + kColumns) * kDepth;
    uint8_t* shared = dynamic_shared<uint8_t>();
    const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
    const Int8Weight& w = p.weight;
    const int64_t group_outputs = w.out_channels / w.groups, pixels = p.batch * p.out_h * p.out_w;
    const int64_t across = (group_outputs + kColumns - 1) / kColumns, down = (pixels + kRows - 1) / kRows;
    const int64_t column0 = blockIdx.x % across * kColumns, row0 = blockIdx.x / across % down * kRows;
    const int64_t group = blockIdx.x / across / down;

    // This thread's share of every stage: the same chunk of some rows and columns.
    const int chunk = thread % kRowChunks, first = thread / kRowChunks;
    constexpr int kStep = kGemmThreads / kRowChunks;
    GemmRow rows[kOwnRows];
#pragma unroll
    for (int i = 0; i < kOwnRows; ++i) rows[i] = gemm_row(p, row0 + first + i * kStep, group);
    Depth depth{0, 0, 0};
    depth.advance(w, chunk * kChunk);
    const int64_t weight_bytes = weight_row(w);
    const int stages = static_cast<int>(weight_bytes / kDepth);
    const auto load_stage = [&](int stage) {
        uint8_t* to = shared + stage % kStages * kStageBytes;
        if (stage < stages) {
#pragma unroll
            for (int i = 0; i < kOwnRows; ++i)
                load_chunk<vector>(p, rows[i], depth, to + swizzled(first + i * kStep, chunk));
#pragma unroll
            for (int i = 0; i < kOwnColumns; ++i) {
                const int64_t column = column0 + first + i * kStep;
                const int64_t output = group * group_outputs + (column < group_outputs ? column : 0);
                copy_16_async(to + kRows * kDepth + swizzled(first + i * kStep, chunk),
                              p.packed + output * weight_bytes + stage * kDepth + chunk * kChunk,
                              column < group_outputs ? kChunk : 0);
            }
            depth.advance(w, kDepth);
        }
        commit_copies();
    };

    int32_t sums[kFragments][4][4] = {};
    const uint32_t flip = four_times(p.input_flip);
    const int warp_row = warp / kWarpsAcross * kWarpRows, warp_column = warp % kWarpsAcross * kWarpColumns;
    for (int stage = 0; stage < kStages - 1; ++stage) load_stage(stage);
    for (int stage = 0; stage < stages; ++stage) {
        wait_copies<kStages - 2>();
        __syncthreads();  // this stage is there for all, and all are done with the one that is loaded next
        load_stage(stage + kStages - 1);
        const uint8_t* left = shared + stage % kStages * kStageBytes;
        const uint8_t* right = left + kRows * kDepth;
#pragma unroll
        for (int half = 0; half < kDepth / 32; ++half) {
            uint32_t b[2][4];
#pragma unroll
            for (int pair = 0; pair < 2; ++pair)
                load_matrices(b[pair], right + swizzled(warp_column + pair * 16 + lane / 16 * 8 + lane % 8,
                                                        half * 2 + lane / 8 % 2));
#pragma unroll
            for (int f = 0; f < kFragments; ++f) {
                uint32_t a[4];
                load_matrices(a, left + swizzled(warp_row + f * 16 + lane % 16, half * 2 + lane / 16));
#pragma unroll
                for (int i = 0; i < 4; ++i) a[i] ^= flip;
#pragma unroll
                for (int n = 0; n < 4; ++n) multiply_u8_s8(sums[f][n], a, b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1]);
            }
        }
    }

    // Through shared memory, so that a thread has sixteen neighbouring channels of a pixel.
    wait_copies<0>();
    __syncthreads();
    constexpr int kPitch = kColumns + kStagePad;
    int32_t* staged = reinterpret_cast<int32_t*>(shared);
    for (int f = 0; f < kFragments; ++f)
        for (int n = 0; n < 4; ++n)
            for (int i = 0; i < 4; ++i)
                staged[(warp_row + f * 16 + lane / 4 + i / 2 * 8) * kPitch + warp_column + n * 8 + lane % 4 * 2 +
                       i % 2] = sums[f][n][i];
    __syncthreads();
    const bool vectors = has_vector_epilogue(p);
    for (int i = thread; i < kRows * kColumns / 16; i += kGemmThreads) {
        const int row = i / (kColumns / 16), column = i % (kColumns / 16) * 16;
        const int64_t left = group_outputs - column0 - column;
        if (row0 + row >= pixels || left <= 0) continue;
        store_channels(p, vectors, row0 + row, group * group_outputs + column0 + column,
                       static_cast<int>(left < 16 ? left : 16), staged + row * kPitch + column);
    }
}

}  // namespace
}  // namespace imgopt

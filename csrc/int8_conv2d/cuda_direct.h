// int8_conv2d on CUDA where a matrix product would be mostly padding: depthwise, and groups of a few channels. A dot
// product of four bytes is one instruction; depthwise layers, whose taps lie apart, first turn 4 channels × 4 taps.
#pragma once

#include "cuda_gemm.h"

namespace imgopt {
namespace {

constexpr int kDirectThreads = 256;

// Four neighbouring channels behind `at`, or `count` of them one by one.
__device__ inline uint32_t load_4(const uint8_t* at, bool vector, int count) {
    if (vector) return load_cached(reinterpret_cast<const uint32_t*>(at));
    uint32_t word = 0;
    for (int i = 0; i < count; ++i) word |= uint32_t{load_cached(at + i)} << (8 * i);
    return word;
}
__device__ inline void store_4(uint32_t word, uint8_t* at, bool vector, int count) {
    if (vector)
        *reinterpret_cast<uint32_t*>(at) = word;
    else
        for (int i = 0; i < count; ++i) at[i] = static_cast<uint8_t>(word >> (8 * i));
}
inline __host__ __device__ bool aligned_to_4(const void* data, int64_t stride) {
    return (reinterpret_cast<uintptr_t>(data) | static_cast<uintptr_t>(stride)) % 4 == 0;
}

// As many output as input channels, one per group. A thread has four channels of one pixel.
__global__ void __launch_bounds__(kDirectThreads) depthwise_conv(const Int8Conv2d p) {
    const Int8Weight& w = p.weight;
    const int64_t quads = (w.out_channels + 3) / 4, items = p.batch * p.out_h * p.out_w * quads;
    const int64_t weight_bytes = weight_row(w);
    const int taps = static_cast<int>(w.kernel_h * w.kernel_w), kernel_w = static_cast<int>(w.kernel_w);
    const uint32_t flip = four_times(p.input_flip), padding = four_times(p.input_zero_point);
    const bool aligned = aligned_to_4(p.input, p.input_stride);
    const int64_t step = int64_t{gridDim.x} * kDirectThreads;
    for (int64_t item = int64_t{blockIdx.x} * kDirectThreads + threadIdx.x; item < items; item += step) {
        const int64_t pixel = item / quads, channel = item % quads * 4;
        const int count = static_cast<int>(w.out_channels - channel < 4 ? w.out_channels - channel : 4);
        const bool vector = aligned && count == 4;
        const GemmRow row = gemm_row(p, pixel, 0);
        int32_t sums[4] = {};
        for (int tap = 0; tap < taps; tap += 4) {
            uint32_t u[4];  // four channels of a tap
            for (int i = 0; i < 4; ++i) {
                const int t = tap + i < taps ? tap + i : tap;  // the weights beyond the last tap are zero
                const uint8_t* from = pixel_at(p, row, {channel, t / kernel_w, t % kernel_w});
                u[i] = from ? load_4(from, vector, count) ^ flip : padding;
            }
            const uint32_t a = bytes_of(u[0], u[1], 0x5140), b = bytes_of(u[2], u[3], 0x5140);  // channels 0 0 1 1
            const uint32_t c = bytes_of(u[0], u[1], 0x7362), d = bytes_of(u[2], u[3], 0x7362);  // 2 2 3 3
            const uint32_t turned[4] = {bytes_of(a, b, 0x5410), bytes_of(a, b, 0x7632), bytes_of(c, d, 0x5410),
                                        bytes_of(c, d, 0x7632)};
            for (int i = 0; i < 4; ++i) {
                if (i >= count) break;
                const uint8_t* weight = p.packed + (channel + i) * weight_bytes + tap;
                sums[i] = dot4(turned[i], load_cached(reinterpret_cast<const uint32_t*>(weight)), sums[i]);
            }
        }
        store_channels(p, false, pixel, channel, count, sums);
    }
}

// Any geometry: a thread has one output value.
__global__ void __launch_bounds__(kDirectThreads) direct_conv(const Int8Conv2d p) {
    const Int8Weight& w = p.weight;
    const int64_t items = p.batch * p.out_h * p.out_w * w.out_channels, weight_bytes = weight_row(w);
    const uint32_t flip = four_times(p.input_flip), padding = four_times(p.input_zero_point);
    const int64_t step = int64_t{gridDim.x} * kDirectThreads;
    const bool aligned = w.group_channels % 4 == 0 && aligned_to_4(p.input, p.input_stride);
    for (int64_t item = int64_t{blockIdx.x} * kDirectThreads + threadIdx.x; item < items; item += step) {
        const int64_t pixel = item / w.out_channels, o = item % w.out_channels;
        const GemmRow row = gemm_row(p, pixel, o / (w.out_channels / w.groups));
        const uint8_t* weight = p.packed + o * weight_bytes;
        const bool whole_words = w.group_channels % 4 == 0;
        int32_t sum = 0;
        for (int ty = 0; ty < w.kernel_h; ++ty)
            for (int tx = 0; tx < w.kernel_w; ++tx, weight += w.group_channels) {
                const uint8_t* from = pixel_at(p, row, {0, ty, tx});
                for (int64_t c = 0; c < w.group_channels; c += 4) {
                    const int count = static_cast<int>(w.group_channels - c < 4 ? w.group_channels - c : 4);
                    const uint32_t u = from ? load_4(from + c, aligned, count) ^ flip : padding;
                    sum = dot4(u, load_4(weight + c, whole_words, count), sum);
                }
            }
        store_channels(p, false, pixel, o, 1, &sum);
    }
}

}  // namespace
}  // namespace imgopt

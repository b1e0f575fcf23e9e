// The steps of int8_graph beside convolution, on CUDA: bound by memory, a thread has four channels of a pixel. The
// arithmetic is that of steps.h, with the same functions per value.
#pragma once

#include "cuda_direct.h"

namespace imgopt {
namespace {

constexpr int kStepThreads = 256;

// The item of this thread and the distance to its next one.
struct Items {
    int64_t at, step;
    __device__ Items()
        : at(int64_t{blockIdx.x} * kStepThreads + threadIdx.x), step(int64_t{gridDim.x} * kStepThreads) {}
};

__device__ inline int byte_of(uint32_t word, int i) { return static_cast<int>(word >> (8 * i) & 0xff); }

// Neighbouring threads take neighbouring pixels of a plane, or neighbouring channels where those are adjacent.
__global__ void __launch_bounds__(kStepThreads) quantize_values(const Int8Quantize p) {
    const int64_t area = p.height * p.width, count = p.batch * area * p.channels;
    const bool planes = p.stride_c != 1;
    for (Items i; i.at < count; i.at += i.step) {
        const int64_t c = planes ? i.at / area % p.channels : i.at % p.channels;
        const int64_t pixel = planes ? i.at % area + i.at / area / p.channels * area : i.at / p.channels;
        const int64_t n = pixel / area, y = pixel / p.width % p.height, x = pixel % p.width;
        const float v = p.input[n * p.stride_n + c * p.stride_c + y * p.stride_h + x * p.stride_w];
        p.output[pixel * p.output_stride + c] = to_byte(v * p.inverse_scale, p.format);
    }
}

__device__ inline uint8_t added(const Int8Add& p, int a, int b) {
    a = (a ^ p.a_flip) - p.a_zero_point;
    b = (b ^ p.b_flip) - p.b_zero_point;
    if (p.shifted) {
        int64_t t = int64_t{a} * (int64_t{1} << p.a_left);
        if (p.b) t += int64_t{b} * (int64_t{1} << p.b_left);
        return saturate(shift_right(t, p.right), p.format);
    }
    const float y = static_cast<float>(a) * p.a_multiplier;
    if (!p.b) return to_byte(y, p.format);
    const float z = static_cast<float>(b) * p.b_multiplier;
    return to_byte(y + z, p.format);
}

__global__ void __launch_bounds__(kStepThreads) add_values(const Int8Add p, int64_t pixels) {
    const int64_t quads = (p.channels + 3) / 4;
    const bool aligned = aligned_to_4(p.a, p.a_stride) && (!p.b || aligned_to_4(p.b, p.b_stride));
    const bool aligned_output = aligned_to_4(p.output, p.output_stride);
    for (Items i; i.at < pixels * quads; i.at += i.step) {
        const int64_t pixel = i.at / quads, c = i.at % quads * 4;
        const int count = static_cast<int>(p.channels - c < 4 ? p.channels - c : 4);
        const uint32_t a = load_4(p.a + pixel * p.a_stride + c, aligned && count == 4, count);
        const uint32_t b = p.b ? load_4(p.b + pixel * p.b_stride + c, aligned && count == 4, count) : 0;
        uint32_t word = 0;
        for (int k = 0; k < count; ++k) word |= uint32_t{added(p, byte_of(a, k), byte_of(b, k))} << (8 * k);
        store_4(word, p.output + pixel * p.output_stride + c, aligned_output && count == 4, count);
    }
}

__device__ inline uint8_t mean_byte(const Int8Pool& p, int32_t sum, int64_t count) {
    if (!p.shifted) {
        const float factor = static_cast<float>(p.ratio / static_cast<double>(count));
        return to_byte(static_cast<float>(sum) * factor, p.format);
    }
    const int64_t divisor = count * (int64_t{1} << (p.right > 0 ? p.right : 0));
    const int64_t numerator = 2 * (int64_t{sum} * (int64_t{1} << (p.right < 0 ? -p.right : 0))) + divisor;
    int64_t q = numerator / (2 * divisor);
    q -= q * 2 * divisor > numerator;  // towards minus infinity
    return saturate(q, p.format);
}

__global__ void __launch_bounds__(kStepThreads) pool_values(const Int8Pool p) {
    const int64_t quads = (p.channels + 3) / 4, items = p.batch * p.out_h * p.out_w * quads;
    const bool aligned = aligned_to_4(p.input, p.input_stride),
               aligned_output = aligned_to_4(p.output, p.output_stride);
    for (Items i; i.at < items; i.at += i.step) {
        const int64_t pixel = i.at / quads, c = i.at % quads * 4;
        const int count = static_cast<int>(p.channels - c < 4 ? p.channels - c : 4);
        const int64_t n = pixel / p.out_w / p.out_h;
        const int64_t top = pixel / p.out_w % p.out_h * p.stride_h - p.pad_top;
        const int64_t left = pixel % p.out_w * p.stride_w - p.pad_left;
        const int64_t y0 = top > 0 ? top : 0, y1 = top + p.kernel_h < p.in_h ? top + p.kernel_h : p.in_h;
        const int64_t x0 = left > 0 ? left : 0, x1 = left + p.kernel_w < p.in_w ? left + p.kernel_w : p.in_w;
        const uint8_t* image = p.input + n * p.in_h * p.in_w * p.input_stride + c;
        int32_t sums[4] = {}, most[4] = {};
        for (int64_t y = y0; y < y1; ++y)
            for (int64_t x = x0; x < x1; ++x) {
                const uint32_t word = load_4(image + (y * p.in_w + x) * p.input_stride, aligned && count == 4, count);
                for (int k = 0; k < 4; ++k) {
                    const int u = byte_of(word, k) ^ p.input_flip;
                    sums[k] += u - p.input_zero_point;
                    most[k] = u > most[k] ? u : most[k];
                }
            }
        const int64_t inside = (y1 - y0) * (x1 - x0), area = p.count_padding ? p.kernel_h * p.kernel_w : inside;
        uint32_t result = 0;
        for (int k = 0; k < 4; ++k) {
            if (k >= count) break;
            const int byte = p.average ? mean_byte(p, sums[k], area) : most[k] ^ p.input_flip;
            result |= static_cast<uint32_t>(byte) << (8 * k);
        }
        store_4(result, p.output + pixel * p.output_stride + c, aligned_output && count == 4, count);
    }
}

__global__ void __launch_bounds__(kStepThreads) dequantize_values(const Int8Dequantize p, int64_t pixels) {
    for (Items i; i.at < pixels * p.channels; i.at += i.step) {
        const int64_t pixel = i.at / p.channels, c = i.at % p.channels;
        const int difference = (p.input[pixel * p.input_stride + c] ^ p.flip) - p.zero_point;
        p.output[pixel * p.output_stride + c] = static_cast<float>(difference) * p.scale;
    }
}

// (h, w, c) to (c, h, w), the order of torch.flatten.
__global__ void __launch_bounds__(kStepThreads)
    flatten_values(const uint8_t* input, uint8_t* output, int64_t batch, int64_t area, int64_t channels) {
    for (Items i; i.at < batch * area * channels; i.at += i.step) {
        const int64_t at = i.at % area, c = i.at / area % channels, n = i.at / area / channels;
        output[i.at] = input[(n * area + at) * channels + c];
    }
}

}  // namespace
}  // namespace imgopt

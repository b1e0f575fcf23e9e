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

// The same for four neighbours of `channels` planes, and their bytes in whole words. A dense tensor is one plane.
template <int channels>
__global__ void __launch_bounds__(kStepThreads) quantize_quads(const Int8Quantize p, int64_t area, int64_t quads) {
    for (Items i; i.at < quads; i.at += i.step) {
        const int64_t first = 4 * i.at, plane = first / area * channels * area + first % area;
        uint32_t words[channels] = {};
#pragma unroll
        for (int c = 0; c < channels; ++c) {
            const float4 v = load_cached(reinterpret_cast<const float4*>(p.input + plane + c * area));
            const float values[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                const int at = k * channels + c;
                words[at / 4] |= uint32_t{to_byte(values[k] * p.inverse_scale, p.format)} << (at % 4 * 8);
            }
        }
#pragma unroll
        for (int w = 0; w < channels; ++w) reinterpret_cast<uint32_t*>(p.output)[i.at * channels + w] = words[w];
    }
}

// Planes that quantize_quads() may take the input as; 0: neither.
inline int quad_channels(const Int8Quantize& p) {
    const int64_t area = p.height * p.width, count = p.batch * area * p.channels;
    if (!aligned_to_16(p.input, 0) || !aligned_to_4(p.output, 0) || p.output_stride != p.channels) return 0;
    const bool dense = p.stride_c == 1 && (p.width == 1 || p.stride_w == p.channels) &&
                       (p.height == 1 || p.stride_h == p.width * p.channels) &&
                       (p.batch == 1 || p.stride_n == area * p.channels);
    if (dense && count % 4 == 0) return 1;
    const bool planes = p.stride_w == 1 && p.stride_h == p.width && p.stride_c == area &&
                        (p.batch == 1 || p.stride_n == area * p.channels);
    return planes && area % 4 == 0 && p.channels == 3 ? 3 : 0;
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

// Maximum of k × k windows, sixteen channels per thread. Pixels beyond the border are replaced by the nearest inside,
// which is in the window too.
template <int k>
__global__ void __launch_bounds__(kStepThreads) max_pool(const Int8Pool p) {
    const int in_h = static_cast<int>(p.in_h), in_w = static_cast<int>(p.in_w);
    const uint32_t chunks = static_cast<uint32_t>(p.channels / 16), flip = p.input_flip * 0x01010101u;
    for (Items i; i.at < p.batch * p.out_h * p.out_w * chunks; i.at += i.step) {
        const int64_t pixel = i.at / chunks, c = i.at % chunks * 16, line = pixel / p.out_w;
        const int top = static_cast<int>(line % p.out_h * p.stride_h - p.pad_top);
        const int left = static_cast<int>(pixel % p.out_w * p.stride_w - p.pad_left);
        const uint8_t* image = p.input + line / p.out_h * in_h * in_w * p.input_stride + c;
        uint32_t most[4] = {};
#pragma unroll
        for (int tap = 0; tap < k * k; ++tap) {
            const int y = top + tap / k, x = left + tap % k;
            const int64_t at = (y < 0 ? 0 : y < in_h ? y : in_h - 1) * in_w + (x < 0 ? 0 : x < in_w ? x : in_w - 1);
            const uint4 v = load_cached(reinterpret_cast<const uint4*>(image + at * p.input_stride));
            const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
            for (int w = 0; w < 4; ++w) most[w] = larger_bytes(most[w], words[w] ^ flip);
        }
        *reinterpret_cast<uint4*>(p.output + pixel * p.output_stride + c) =
            make_uint4(most[0] ^ flip, most[1] ^ flip, most[2] ^ flip, most[3] ^ flip);
    }
}

inline bool has_vector_maximum(const Int8Pool& p) {
    const bool no_empty_window = p.pad_top < p.kernel_h && p.pad_left < p.kernel_w &&
                                 (p.out_h - 1) * p.stride_h - p.pad_top < p.in_h &&
                                 (p.out_w - 1) * p.stride_w - p.pad_left < p.in_w;
    return !p.average && p.kernel_h == p.kernel_w && (p.kernel_h == 2 || p.kernel_h == 3) && no_empty_window &&
           p.channels % 16 == 0 && p.in_h * p.in_w < int64_t{1} << 31 && aligned_to_16(p.input, p.input_stride) &&
           aligned_to_16(p.output, p.output_stride);
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

// The steps of int8_graph beside convolution: quantize, add, pools, dequantize. Plain loops over channels that any
// compiler vectorises with the flags of the unit that includes them; they are bound by memory, not by arithmetic.
#pragma once

#include <string.h>

#include "arithmetic.h"

namespace imgopt {
namespace {

// Planes are quantized a chunk of pixels at a time, which vectorises, and then interleaved.
constexpr int64_t kChunkPixels = 128;
constexpr int64_t kMaxPlanes = 4;

template <int CHANNELS>
void interleave_planes(const uint8_t planes[kMaxPlanes][kChunkPixels], int64_t pixels, int64_t stride, uint8_t* out) {
    if (stride == CHANNELS) {
        for (int64_t x = 0; x < pixels; ++x)
            for (int c = 0; c < CHANNELS; ++c) out[x * CHANNELS + c] = planes[c][x];
    } else {
        for (int64_t x = 0; x < pixels; ++x)
            for (int c = 0; c < CHANNELS; ++c) out[x * stride + c] = planes[c][x];
    }
}

template <int CHANNELS>
void quantize_planes(const Int8Quantize& p, const float* in, uint8_t* out) {
    const Int8Format f = p.format;
    const float inverse_scale = p.inverse_scale;
    alignas(64) uint8_t planes[kMaxPlanes][kChunkPixels];
    for (int64_t x = 0; x < p.width; x += kChunkPixels) {
        const int64_t pixels = p.width - x < kChunkPixels ? p.width - x : kChunkPixels;
        for (int c = 0; c < CHANNELS; ++c) {
            const float* plane = in + c * p.stride_c + x;
            for (int64_t i = 0; i < pixels; ++i) planes[c][i] = to_byte(plane[i] * inverse_scale, f);
        }
        interleave_planes<CHANNELS>(planes, pixels, p.output_stride, out + x * p.output_stride);
    }
}

void quantize(const Int8Quantize& p, int64_t begin, int64_t end) {
    const Int8Format f = p.format;
    const float inverse_scale = p.inverse_scale;
    const int64_t channels = p.channels;
    for (int64_t row = begin; row < end; ++row) {
        const int64_t n = row / p.height, y = row % p.height;
        const float* in = p.input + n * p.stride_n + y * p.stride_h;
        uint8_t* out = p.output + row * p.width * p.output_stride;
        if (p.stride_w == 1 && channels == 3) {
            quantize_planes<3>(p, in, out);
        } else if (p.stride_w == 1 && channels == 1) {
            quantize_planes<1>(p, in, out);
        } else if (p.stride_c == 1) {
            // Pixels without gaps are one run of values, which vectorises however few channels they have.
            const bool dense = p.stride_w == channels && p.output_stride == channels;
            const int64_t runs = dense ? 1 : p.width, length = dense ? p.width * channels : channels;
            for (int64_t x = 0; x < runs; ++x) {
                const float* from = in + x * p.stride_w;
                uint8_t* to = out + x * p.output_stride;
                for (int64_t i = 0; i < length; ++i) to[i] = to_byte(from[i] * inverse_scale, f);
            }
        } else {
            for (int64_t c = 0; c < channels; ++c)
                for (int64_t x = 0; x < p.width; ++x)
                    out[x * p.output_stride + c] = to_byte(in[c * p.stride_c + x * p.stride_w] * inverse_scale, f);
        }
    }
}

void add_shifted(const Int8Add& p, int64_t pixel) {
    for (int64_t c = 0; c < p.channels; ++c) {
        int64_t t = int64_t{(p.a[pixel * p.a_stride + c] ^ p.a_flip) - p.a_zero_point} * (int64_t{1} << p.a_left);
        if (p.b) t += int64_t{(p.b[pixel * p.b_stride + c] ^ p.b_flip) - p.b_zero_point} * (int64_t{1} << p.b_left);
        p.output[pixel * p.output_stride + c] = saturate(shift_right(t, p.right), p.format);
    }
}

void add(const Int8Add& p, int64_t begin, int64_t end) {
    for (int64_t pixel = begin; pixel < end; ++pixel) {
        if (p.shifted) {
            add_shifted(p, pixel);
            continue;
        }
        const uint8_t* a = p.a + pixel * p.a_stride;
        const uint8_t* b = p.b + pixel * p.b_stride;
        uint8_t* out = p.output + pixel * p.output_stride;
        const Int8Format f = p.format;
        const int a_zero = p.a_zero_point, b_zero = p.b_zero_point;
        const uint8_t a_flip = p.a_flip, b_flip = p.b_flip;
        const float a_multiplier = p.a_multiplier, b_multiplier = p.b_multiplier;
        if (p.b) {
            for (int64_t c = 0; c < p.channels; ++c) {
                const float y = static_cast<float>((a[c] ^ a_flip) - a_zero) * a_multiplier;
                const float z = static_cast<float>((b[c] ^ b_flip) - b_zero) * b_multiplier;
                out[c] = to_byte(y + z, f);
            }
        } else {
            for (int64_t c = 0; c < p.channels; ++c)
                out[c] = to_byte(static_cast<float>((a[c] ^ a_flip) - a_zero) * a_multiplier, f);
        }
    }
}

// The part of a window that lies inside the image.
struct Window {
    int64_t y0, y1, x0, x1;
};

Window window_at(const Int8Pool& p, int64_t oy, int64_t ox) {
    Window w{oy * p.stride_h - p.pad_top, 0, ox * p.stride_w - p.pad_left, 0};
    w.y1 = w.y0 + p.kernel_h < p.in_h ? w.y0 + p.kernel_h : p.in_h;
    w.x1 = w.x0 + p.kernel_w < p.in_w ? w.x0 + p.kernel_w : p.in_w;
    w.y0 = w.y0 > 0 ? w.y0 : 0;
    w.x0 = w.x0 > 0 ? w.x0 : 0;
    return w;
}

// A vector of the compiler's, lowered to whatever the unit's flags offer; the maximum of a window stays in registers.
typedef uint8_t Bytes64 __attribute__((vector_size(64)));
constexpr int64_t kPoolChannels = 64;

// int8 bytes are flipped before they are compared, and flipped back.
template <class Bytes>
void max_channels(const Int8Pool& p, const uint8_t* image, const Window& w, uint8_t* out) {
    Bytes most = {};
    const Bytes flip = most + p.input_flip;
    for (int64_t y = w.y0; y < w.y1; ++y) {
        const uint8_t* in = image + (y * p.in_w + w.x0) * p.input_stride;
        for (int64_t x = w.x0; x < w.x1; ++x, in += p.input_stride) {
            Bytes u;
            memcpy(&u, in, sizeof(u));
            u ^= flip;
            most = u > most ? u : most;
        }
    }
    most ^= flip;
    memcpy(out, &most, sizeof(most));
}

void max_pixel(const Int8Pool& p, const uint8_t* image, const Window& w, uint8_t* out) {
    typedef uint8_t Bytes1 __attribute__((vector_size(1)));
    int64_t c = 0;
    for (; c + kPoolChannels <= p.channels; c += kPoolChannels) max_channels<Bytes64>(p, image + c, w, out + c);
    for (; c < p.channels; ++c) max_channels<Bytes1>(p, image + c, w, out + c);
}

void mean_pixel(const Int8Pool& p, const uint8_t* image, const Window& w, uint8_t* out, int32_t* sums) {
    for (int64_t c = 0; c < p.channels; ++c) sums[c] = 0;
    for (int64_t y = w.y0; y < w.y1; ++y) {
        for (int64_t x = w.x0; x < w.x1; ++x) {
            const uint8_t* in = image + (y * p.in_w + x) * p.input_stride;
            for (int64_t c = 0; c < p.channels; ++c) sums[c] += (in[c] ^ p.input_flip) - p.input_zero_point;
        }
    }
    const int64_t inside = (w.y1 - w.y0) * (w.x1 - w.x0);
    const int64_t count = p.count_padding ? p.kernel_h * p.kernel_w : inside;
    if (p.shifted) {
        const int64_t divisor = count * (int64_t{1} << (p.right > 0 ? p.right : 0));
        const int64_t up = int64_t{1} << (p.right < 0 ? -p.right : 0);
        for (int64_t c = 0; c < p.channels; ++c) {
            const int64_t numerator = 2 * sums[c] * up + divisor;
            int64_t q = numerator / (2 * divisor);
            q -= q * 2 * divisor > numerator;  // towards minus infinity
            out[c] = saturate(q, p.format);
        }
        return;
    }
    const float factor = static_cast<float>(p.ratio / static_cast<double>(count));
    const Int8Format f = p.format;
    for (int64_t c = 0; c < p.channels; ++c) out[c] = to_byte(static_cast<float>(sums[c]) * factor, f);
}

void pool(const Int8Pool& p, int64_t begin, int64_t end) {
    int32_t* sums = static_cast<int32_t*>(thread_scratch(p.channels * 4));
    for (int64_t row = begin; row < end; ++row) {
        const int64_t n = row / p.out_h, oy = row % p.out_h;
        const uint8_t* image = p.input + n * p.in_h * p.in_w * p.input_stride;
        for (int64_t ox = 0; ox < p.out_w; ++ox) {
            uint8_t* out = p.output + (row * p.out_w + ox) * p.output_stride;
            const Window w = window_at(p, oy, ox);
            if (p.average)
                mean_pixel(p, image, w, out, sums);
            else
                max_pixel(p, image, w, out);
        }
    }
}

void dequantize(const Int8Dequantize& p, int64_t begin, int64_t end) {
    for (int64_t pixel = begin; pixel < end; ++pixel) {
        const uint8_t* in = p.input + pixel * p.input_stride;
        float* out = p.output + pixel * p.output_stride;
        for (int64_t c = 0; c < p.channels; ++c) out[c] = static_cast<float>((in[c] ^ p.flip) - p.zero_point) * p.scale;
    }
}

void fill_steps(KernelTable& table) {
    table.int8_quantize = quantize;
    table.int8_add = add;
    table.int8_pool = pool;
    table.int8_dequantize = dequantize;
}

}  // namespace
}  // namespace imgopt

// The steps of int8_graph beside convolution: quantize, add, pools, dequantize. Plain loops over channels that any
// compiler vectorises with the flags of the unit that includes them; they are bound by memory, not by arithmetic.
#pragma once

#include "arithmetic.h"

namespace imgopt {
namespace {

void quantize(const Int8Quantize& p, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
        const int64_t n = row / p.height, y = row % p.height;
        const float* in = p.input + n * p.stride_n + y * p.stride_h;
        uint8_t* out = p.output + row * p.width * p.output_stride;
        const Int8Format f = p.format;
        if (p.stride_c == 1) {
            for (int64_t x = 0; x < p.width; ++x)
                for (int64_t c = 0; c < p.channels; ++c)
                    out[x * p.output_stride + c] = to_byte(in[x * p.stride_w + c] * p.inverse_scale, f);
        } else {
            for (int64_t c = 0; c < p.channels; ++c) {
                const float* plane = in + c * p.stride_c;
                for (int64_t x = 0; x < p.width; ++x)
                    out[x * p.output_stride + c] = to_byte(plane[x * p.stride_w] * p.inverse_scale, f);
            }
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

// int8 bytes are flipped before they are compared, and flipped back.
void max_pixel(const Int8Pool& p, const uint8_t* image, const Window& w, uint8_t* out) {
    const uint8_t flip = p.input_flip;
    for (int64_t c = 0; c < p.channels; ++c) out[c] = 0;
    for (int64_t y = w.y0; y < w.y1; ++y) {
        for (int64_t x = w.x0; x < w.x1; ++x) {
            const uint8_t* in = image + (y * p.in_w + x) * p.input_stride;
            for (int64_t c = 0; c < p.channels; ++c) {
                const uint8_t u = in[c] ^ flip;
                out[c] = u > out[c] ? u : out[c];
            }
        }
    }
    for (int64_t c = 0; c < p.channels; ++c) out[c] ^= flip;
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

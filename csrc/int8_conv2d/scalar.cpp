// int8_conv2d as it is defined: a sum of products per output value, then one requantization. It reads the weights in
// (out, kernel_h, kernel_w, group_channels) order, so that the innermost loop runs along memory in both operands.
#include "arithmetic.h"
#include "steps.h"

namespace imgopt::scalar {
namespace {

int64_t weight_bytes(const Int8Weight& w) { return w.out_channels * w.group_channels * w.kernel_h * w.kernel_w; }

void weight_pack(const Int8Weight& w, const int8_t* weight, uint8_t* packed) {
    const int64_t taps = w.kernel_h * w.kernel_w;
    for (int64_t o = 0; o < w.out_channels; ++o)
        for (int64_t c = 0; c < w.group_channels; ++c)
            for (int64_t t = 0; t < taps; ++t)
                packed[(o * taps + t) * w.group_channels + c] =
                    static_cast<uint8_t>(weight[(o * w.group_channels + c) * taps + t]);
}

// A unit is one output row of one image.
int64_t units(const Int8Conv2d& p) { return p.batch * p.out_h; }

// uint32 arithmetic: the parts of a sum may wrap, its final value does not.
uint32_t products(const uint8_t* input, uint8_t flip, const int8_t* weight, int64_t channels) {
    uint32_t sum = 0;
    for (int64_t c = 0; c < channels; ++c) sum += static_cast<uint32_t>(weight[c] * (input[c] ^ flip));
    return sum;
}

uint32_t padding_products(uint8_t zero_point, const int8_t* weight, int64_t channels) {
    uint32_t sum = 0;
    for (int64_t c = 0; c < channels; ++c) sum += static_cast<uint32_t>(weight[c] * zero_point);
    return sum;
}

int32_t sum_at(const Int8Conv2d& p, int64_t n, int64_t oy, int64_t ox, int64_t o) {
    const Int8Weight& w = p.weight;
    const int64_t group = o / (w.out_channels / w.groups);
    const int8_t* weight = reinterpret_cast<const int8_t*>(p.packed) + o * w.kernel_h * w.kernel_w * w.group_channels;
    uint32_t sum = static_cast<uint32_t>(p.offset[o]);
    for (int64_t ky = 0; ky < w.kernel_h; ++ky) {
        const int64_t y = oy * p.stride_h - p.pad_top + ky * p.dilation_h;
        for (int64_t kx = 0; kx < w.kernel_w; ++kx, weight += w.group_channels) {
            const int64_t x = ox * p.stride_w - p.pad_left + kx * p.dilation_w;
            if (y < 0 || y >= p.in_h || x < 0 || x >= p.in_w) {
                sum += padding_products(p.input_zero_point, weight, w.group_channels);
                continue;
            }
            const uint8_t* pixel = p.input + ((n * p.in_h + y) * p.in_w + x) * p.input_stride;
            sum += products(pixel + group * w.group_channels, p.input_flip, weight, w.group_channels);
        }
    }
    return static_cast<int32_t>(sum);
}

void kernel(const Int8Conv2d& p, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
        for (int64_t ox = 0; ox < p.out_w; ++ox)
            for (int64_t o = 0; o < p.weight.out_channels; ++o)
                store_sum(p, row * p.out_w + ox, o, sum_at(p, row / p.out_h, row % p.out_h, ox, o));
}

}  // namespace

void int8_conv2d(KernelTable& table) {
    table.int8_weight_layout = "scalar";
    table.int8_weight_bytes = weight_bytes;
    table.int8_weight_pack = weight_pack;
    table.int8_conv2d_units = units;
    table.int8_conv2d = kernel;
    fill_steps(table);
}

}  // namespace imgopt::scalar

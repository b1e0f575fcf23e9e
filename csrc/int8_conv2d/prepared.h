// A call of int8_conv2d as far as it does not depend on the images: geometry, quantization and the numbers of every
// channel, as one block of bytes. Whoever makes the same call again hands the block over in place of fifteen arguments:
// handing them over and working out the numbers took 6 us, as long as the arithmetic of a small layer.
// Host code, never included by a kernel.
#pragma once

#include <cmath>

#include "layer.h"

namespace imgopt {

// [top, bottom, left, right] of padding, as in Python.
struct ConvGeometry {
    int64_t stride_h, stride_w;
    int64_t pad_top, pad_bottom, pad_left, pad_right;
    int64_t dilation_h, dilation_w;
};

// Top bits of the bytes that the call reads and writes: 0x80 for int8.
struct ConvFlips {
    uint8_t input, residual, output;
    bool has_residual;
};

// Behind it stand the arrays that Int8Conv2d points to: offset, multiplier, shift.
struct PreparedCall {
    char magic[8];
    int64_t version;
    Int8Weight weight;
    ConvGeometry geometry;
    ConvFlips flips;
    uint8_t input_zero_point, residual_zero_point, output_zero_point;
    bool float_output, shifts;
    float low, high, residual_multiplier;
};
constexpr char kPreparedMagic[8] = "callim8";
constexpr int64_t kPreparedVersion = 1;
constexpr int64_t kPreparedHeaderBytes = 256;
constexpr int64_t kMaxExtent = int64_t{1} << 31;  // of strides, padding, dilation: no product with a size overflows
static_assert(sizeof(PreparedCall) <= kPreparedHeaderBytes);

inline int64_t channel_array_bytes(int64_t channels) { return ((channels + kChannelSlack) * 4 + 63) / 64 * 64; }
inline int64_t prepared_bytes(const Int8Weight& weight) {
    return kPreparedHeaderBytes + 3 * channel_array_bytes(weight.out_channels);
}

// p of scale = 2^-p.
inline int exponent_of(double scale) {
    int exponent;
    std::frexp(scale, &exponent);
    return 1 - exponent;
}

inline int clamp_shift(int value, int low, int high) { return value < low ? low : value > high ? high : value; }

inline Int8Shift channel_shift(double sum_scale, double residual_scale, bool residual, double output_scale) {
    const int fine = exponent_of(sum_scale);
    const int residual_fine = residual ? exponent_of(residual_scale) : fine;
    const int finest = fine > residual_fine ? fine : residual_fine;
    return {static_cast<int8_t>(clamp_shift(finest - exponent_of(output_scale), -31, 62)),
            static_cast<int8_t>(clamp_shift(finest - fine, 0, 29)),
            static_cast<int8_t>(clamp_shift(finest - residual_fine, 0, 51)), 0};
}

inline void set_range(PreparedCall& call, const Quantization& q) {
    const float least = static_cast<float>(q.output_min / q.output_scale);
    const float most = static_cast<float>(q.output_max / q.output_scale);
    if (q.float_output) {
        call.low = least;
        call.high = most;
        return;
    }
    const float bottom = -static_cast<float>(call.output_zero_point);
    const float top = 255.0f - static_cast<float>(call.output_zero_point);
    call.low = least > bottom ? (least < top ? least : top) : bottom;
    call.high = most < top ? (most > call.low ? most : call.low) : top;
}

// Writes prepared_bytes(weight) to `out`, aligned to 8 bytes. `packed` begins with its header.
inline void prepare(const Int8Weight& weight, const ConvGeometry& geometry, const Quantization& q,
                    const ConvFlips& flips, const uint8_t* packed, const int32_t* bias, const float* weight_scale,
                    uint8_t* out) {
    std::memset(out, 0, static_cast<size_t>(prepared_bytes(weight)));
    PreparedCall& call = *reinterpret_cast<PreparedCall*>(out);
    std::memcpy(call.magic, kPreparedMagic, sizeof(call.magic));
    call.version = kPreparedVersion;
    call.weight = weight;
    call.geometry = geometry;
    call.flips = flips;
    call.input_zero_point = static_cast<uint8_t>(q.input_zero_point + flips.input);
    call.residual_zero_point = static_cast<uint8_t>(q.residual_zero_point + flips.residual);
    call.output_zero_point = static_cast<uint8_t>(q.output_zero_point + flips.output);
    call.residual_multiplier = static_cast<float>(q.residual_scale / q.output_scale);
    call.float_output = q.float_output;
    call.shifts = q.shift && !q.float_output;
    set_range(call, q);

    const int64_t channels = weight.out_channels, array = channel_array_bytes(channels);
    auto* offset = reinterpret_cast<int32_t*>(out + kPreparedHeaderBytes);
    auto* multiplier = reinterpret_cast<float*>(out + kPreparedHeaderBytes + array);
    auto* shift = reinterpret_cast<Int8Shift*>(out + kPreparedHeaderBytes + 2 * array);
    for (int64_t o = 0; o < channels; ++o) {
        int32_t sum;
        std::memcpy(&sum, packed + kPackedHeaderBytes + 4 * o, 4);
        const double sum_scale = q.input_scale * static_cast<double>(weight_scale[o]);
        offset[o] = static_cast<int32_t>(static_cast<uint32_t>(bias[o] - int64_t{call.input_zero_point} * sum));
        multiplier[o] = static_cast<float>(sum_scale / q.output_scale);
        if (call.shifts) shift[o] = channel_shift(sum_scale, q.residual_scale, flips.has_residual, q.output_scale);
    }
}

// Whether the bytes are what prepare() wrote for some weight; those of another origin must do no harm.
inline bool is_prepared(const uint8_t* data, int64_t bytes) {
    if (bytes < kPreparedHeaderBytes || reinterpret_cast<uintptr_t>(data) % alignof(PreparedCall)) return false;
    const PreparedCall& call = *reinterpret_cast<const PreparedCall*>(data);
    const Int8Weight& w = call.weight;
    const ConvGeometry& g = call.geometry;
    const auto within = [](int64_t value, int64_t low) { return value >= low && value < kMaxExtent; };
    const bool positive = within(w.out_channels, 1) && within(w.group_channels, 1) && within(w.groups, 1) &&
                          within(w.kernel_h, 1) && within(w.kernel_w, 1) && w.out_channels % w.groups == 0;
    const double weights = static_cast<double>(w.out_channels) * static_cast<double>(w.group_channels) *
                           static_cast<double>(w.kernel_h) * static_cast<double>(w.kernel_w);
    return std::memcmp(call.magic, kPreparedMagic, sizeof(call.magic)) == 0 && call.version == kPreparedVersion &&
           positive && weights < 0x1p40 && bytes == prepared_bytes(w) && within(g.stride_h, 1) &&
           within(g.stride_w, 1) && within(g.dilation_h, 1) && within(g.dilation_w, 1) && within(g.pad_top, 0) &&
           within(g.pad_bottom, 0) && within(g.pad_left, 0) && within(g.pad_right, 0);
}

// Everything of a call but its images; false where an image of this size is smaller than the dilated kernel.
inline bool set_call(Int8Conv2d& conv, const uint8_t* prepared, const uint8_t* packed, int64_t batch, int64_t in_h,
                     int64_t in_w) {
    const PreparedCall& call = *reinterpret_cast<const PreparedCall*>(prepared);
    const ConvGeometry& g = call.geometry;
    const Int8Weight& w = call.weight;
    const int64_t room_h = in_h + g.pad_top + g.pad_bottom - (g.dilation_h * (w.kernel_h - 1) + 1);
    const int64_t room_w = in_w + g.pad_left + g.pad_right - (g.dilation_w * (w.kernel_w - 1) + 1);
    if (room_h < 0 || room_w < 0) return false;
    conv.weight = w;
    conv.packed = packed + kernel_bytes_at(w);
    conv.batch = batch;
    conv.in_h = in_h;
    conv.in_w = in_w;
    conv.input_stride = w.groups * w.group_channels;
    conv.stride_h = g.stride_h;
    conv.stride_w = g.stride_w;
    conv.dilation_h = g.dilation_h;
    conv.dilation_w = g.dilation_w;
    conv.pad_top = g.pad_top;
    conv.pad_left = g.pad_left;
    conv.input_flip = call.flips.input;
    conv.input_zero_point = call.input_zero_point;
    const uint8_t* arrays = prepared + kPreparedHeaderBytes;
    const int64_t array = channel_array_bytes(w.out_channels);
    conv.offset = reinterpret_cast<const int32_t*>(arrays);
    conv.multiplier = reinterpret_cast<const float*>(arrays + array);
    conv.shift = call.shifts ? reinterpret_cast<const Int8Shift*>(arrays + 2 * array) : nullptr;
    conv.residual_stride = w.out_channels;
    conv.residual_multiplier = call.residual_multiplier;
    conv.residual_flip = call.flips.residual;
    conv.residual_zero_point = call.residual_zero_point;
    conv.out_h = room_h / g.stride_h + 1;
    conv.out_w = room_w / g.stride_w + 1;
    conv.output_stride = w.out_channels;
    conv.low = call.low;
    conv.high = call.high;
    conv.output_flip = call.flips.output;
    conv.output_zero_point = call.output_zero_point;
    conv.float_output = call.float_output;
    return true;
}

}  // namespace imgopt

// What the bindings share about a layer: the packed bytes with their header, and the per-channel numbers of one call.
// Host code, never included by a kernel.
#pragma once

#include <cmath>
#include <cstring>
#include <vector>

#include "../kernels.h"

namespace imgopt {

// In front of the kernel's bytes. Another layout, version or geometry: the bytes are not for this table.
struct PackedHeader {
    char magic[8];
    int64_t version;
    char layout[16];
    Int8Weight weight;
};
constexpr int64_t kPackedHeaderBytes = 128;
constexpr int64_t kPackedVersion = 2;
static_assert(sizeof(PackedHeader) <= kPackedHeaderBytes);

inline PackedHeader packed_header(const Int8Weight& weight) {
    PackedHeader header{};
    std::memcpy(header.magic, "imgopt8", 8);
    header.version = kPackedVersion;
    std::strncpy(header.layout, kernels().int8_weight_layout, sizeof(header.layout) - 1);
    header.weight = weight;
    return header;
}

// Offset of the kernel's bytes; between them and the header stands the sum of every output channel's weights, int32.
inline int64_t kernel_bytes_at(const Int8Weight& weight) {
    return kPackedHeaderBytes + (weight.out_channels * 4 + 63) / 64 * 64;
}

inline int64_t packed_bytes(const Int8Weight& weight) {
    return kernel_bytes_at(weight) + kernels().int8_weight_bytes(weight);
}

inline void pack(const Int8Weight& weight, const int8_t* canonical, uint8_t* packed) {
    const PackedHeader header = packed_header(weight);
    std::memset(packed, 0, static_cast<size_t>(kernel_bytes_at(weight)));
    std::memcpy(packed, &header, sizeof(header));
    const int64_t k = weight.group_channels * weight.kernel_h * weight.kernel_w;
    for (int64_t o = 0; o < weight.out_channels; ++o) {
        int32_t sum = 0;
        for (int64_t i = 0; i < k; ++i) sum += canonical[o * k + i];
        std::memcpy(packed + kPackedHeaderBytes + 4 * o, &sum, 4);
    }
    kernels().int8_weight_pack(weight, canonical, packed + kernel_bytes_at(weight));
}

// Whether the active table's kernel can read the bytes.
inline bool is_packed_for_kernel(const Int8Weight& weight, const uint8_t* packed, int64_t bytes) {
    if (bytes < packed_bytes(weight)) return false;
    const PackedHeader header = packed_header(weight);
    return std::memcmp(packed, &header, sizeof(header)) == 0;
}

// Quantization of one call, in the caller's terms.
struct Quantization {
    double input_scale;
    int64_t input_zero_point;
    bool float_output;
    double output_scale;  // 1 for float output
    int64_t output_zero_point;
    double output_min, output_max;  // infinite where absent
    double residual_scale;
    int64_t residual_zero_point;
    bool shift;
};

// The per-channel numbers that Int8Conv2d points to.
struct ChannelNumbers {
    std::vector<int32_t> offset;
    std::vector<float> multiplier;
    std::vector<Int8Shift> shift;
};

inline uint8_t flip_of(DType dtype) { return dtype == DType::i8 ? 0x80 : 0; }

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

// Fills everything in `conv` that follows from the packed weight (with its header) and the quantization; the geometry,
// input_flip, residual and output_flip are set before. `numbers` must outlive the call of the kernel.
inline void set_layer(Int8Conv2d& conv, ChannelNumbers& numbers, const Quantization& q, const uint8_t* packed,
                      const int32_t* bias, const float* weight_scale) {
    const int64_t channels = conv.weight.out_channels;
    conv.packed = packed + kernel_bytes_at(conv.weight);
    conv.input_zero_point = static_cast<uint8_t>(q.input_zero_point + conv.input_flip);
    conv.residual_zero_point = static_cast<uint8_t>(q.residual_zero_point + conv.residual_flip);
    conv.output_zero_point = static_cast<uint8_t>(q.output_zero_point + conv.output_flip);
    conv.residual_multiplier = static_cast<float>(q.residual_scale / q.output_scale);
    conv.float_output = q.float_output;

    numbers.offset.assign(static_cast<size_t>(channels + kChannelSlack), 0);
    numbers.multiplier.assign(static_cast<size_t>(channels + kChannelSlack), 0.0f);
    for (int64_t o = 0; o < channels; ++o) {
        int32_t sum;
        std::memcpy(&sum, packed + kPackedHeaderBytes + 4 * o, 4);
        numbers.offset[o] = static_cast<int32_t>(static_cast<uint32_t>(bias[o] - int64_t{conv.input_zero_point} * sum));
        numbers.multiplier[o] =
            static_cast<float>(q.input_scale * static_cast<double>(weight_scale[o]) / q.output_scale);
    }
    conv.offset = numbers.offset.data();
    conv.multiplier = numbers.multiplier.data();
    conv.shift = nullptr;
    if (q.shift && !q.float_output) {
        numbers.shift.assign(static_cast<size_t>(channels + kChannelSlack), Int8Shift{});
        for (int64_t o = 0; o < channels; ++o)
            numbers.shift[o] = channel_shift(q.input_scale * static_cast<double>(weight_scale[o]), q.residual_scale,
                                             conv.residual != nullptr, q.output_scale);
        conv.shift = numbers.shift.data();
    }

    const float least = static_cast<float>(q.output_min / q.output_scale);
    const float most = static_cast<float>(q.output_max / q.output_scale);
    if (q.float_output) {
        conv.low = least;
        conv.high = most;
        return;
    }
    const float bottom = -static_cast<float>(conv.output_zero_point);
    const float top = 255.0f - static_cast<float>(conv.output_zero_point);
    conv.low = least > bottom ? (least < top ? least : top) : bottom;
    conv.high = most < top ? (most > conv.low ? most : conv.low) : top;
}

}  // namespace imgopt

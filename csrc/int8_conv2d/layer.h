// What the bindings share about a layer: the packed bytes with their header, and its quantization in the caller's
// terms. Host code, never included by a kernel.
#pragma once

#include <cstring>

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
constexpr int64_t kPackedVersion = 4;
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

inline uint8_t flip_of(DType dtype) { return dtype == DType::i8 ? 0x80 : 0; }

}  // namespace imgopt

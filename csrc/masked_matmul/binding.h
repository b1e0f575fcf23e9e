// What the torch bindings of masked_matmul on the CPU and on CUDA check and describe alike.
#pragma once

#include <algorithm>
#include <limits>

#include "../torch_stable.h"

namespace imgopt {
namespace {

inline void check_structure(const Tensor& quads, const Tensor& columns, const std::vector<int64_t>& shape) {
    STD_TORCH_CHECK(quads.scalar_type() == ScalarType::Int && quads.dim() == 3 && quads.is_contiguous() &&
                        quads.size(2) == RowQuads::kFields && quads.size(1) == (shape[0] + 3) / 4,
                    "quads: expected contiguous int32 (blocks, ceil(outputs / 4), 9)");
    STD_TORCH_CHECK(columns.is_contiguous() &&
                        (columns.scalar_type() == ScalarType::Byte || columns.scalar_type() == ScalarType::Int),
                    "columns: expected contiguous uint8 or int32");
}

inline RowQuads row_quads(const Tensor& quads, const Tensor& columns, const std::vector<int64_t>& shape) {
    STD_TORCH_CHECK(shape.size() >= 3 && shape[2] > 0, "shape: expected (outputs, inputs, block, ...)");
    check_structure(quads, columns, shape);
    return {static_cast<const int32_t*>(quads.const_data_ptr()),
            columns.const_data_ptr(),
            shape[0],
            quads.size(0),
            shape[2],
            columns.scalar_type() == ScalarType::Int};
}

// Asking first saves the dispatcher's 0.7 us.
inline Tensor as_contiguous(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

// The rows of a linear's input, or the windows of a convolution's; `keep` holds the memory that the result points to.
inline MaskedInput masked_input(const Tensor& input, const std::vector<int64_t>& shape,
                                const std::vector<int64_t>& window, Tensor& keep) {
    const DType dtype = dtype_of(input, "input");
    STD_TORCH_CHECK(dtype >= DType::f16, "input: expected a floating dtype");
    if (window.empty()) {
        keep = as_contiguous(input);
        STD_TORCH_CHECK(input.dim() >= 1 && input.size(input.dim() - 1) == shape[1], "input: expected (..., inputs)");
        int64_t samples = 1;
        for (int64_t d = 0; d + 1 < input.dim(); ++d) samples *= input.size(d);
        return {
            dtype, keep.const_data_ptr(), samples, shape[1], shape[1], {1, 1}, {1, 1}, {1, 1}, {1, 1}, {0, 0}, {1, 1},
            {1, 1}};
    }
    STD_TORCH_CHECK(window.size() == 12 && input.dim() == 4 && input.size(1) == shape[1],
                    "input: expected (N, channels, H, W) and a window of 12 numbers");
    keep = torch::stable::contiguous(input, torch::headeronly::MemoryFormat::ChannelsLast);
    MaskedInput x{dtype,
                  keep.const_data_ptr(),
                  input.size(0) * window[0] * window[1],
                  shape[1],
                  shape[1],
                  {input.size(2), input.size(3)},
                  {window[0], window[1]},
                  {window[2], window[3]},
                  {window[4], window[5]},
                  {window[6], window[7]},
                  {window[8], window[9]},
                  {window[10], window[11]}};
    STD_TORCH_CHECK(
        x.out[0] > 0 && x.out[1] > 0 && x.taps[0] > 0 && x.taps[1] > 0 && x.divide[0] > 0 && x.divide[1] > 0,
        "window: expected positive sizes and divisors");
    return x;
}

inline void check_blocks(const RowQuads& weight, const MaskedInput& x) {
    const int64_t columns = x.channels * x.taps[0] * x.taps[1];
    STD_TORCH_CHECK(weight.blocks == (columns + weight.block - 1) / weight.block, "quads: expected a block for every ",
                    weight.block, " of ", columns, " columns");
}

inline ScalarType sum_type(DType dtype) { return dtype == DType::f64 ? ScalarType::Double : ScalarType::Float; }

inline void check_source(const Tensor& source) {
    STD_TORCH_CHECK(source.scalar_type() == ScalarType::Int && source.is_contiguous(),
                    "source: expected contiguous int32");
}

// Of the result before it is an image: (..., rows), or (N, outH, outW, rows).
inline std::vector<int64_t> output_size(const Tensor& input, int64_t rows, const std::vector<int64_t>& window) {
    std::vector<int64_t> size;
    if (window.empty()) {
        for (int64_t d = 0; d + 1 < input.dim(); ++d) size.push_back(input.size(d));
    } else {
        size = {input.size(0), window[0], window[1]};
    }
    size.push_back(rows);
    return size;
}

inline Tensor as_image(const Tensor& output, const std::vector<int64_t>& window) {
    if (window.empty()) return output;
    return torch::stable::transpose(torch::stable::transpose(output, 1, 3), 2, 3);  // channels_last
}

inline RowQuads int8_row_quads(const Tensor& input, const Tensor& values, const Tensor& bias,
                               const Tensor& weight_scale, const Tensor& quads, const Tensor& columns,
                               const std::vector<int64_t>& shape) {
    const RowQuads weight = row_quads(quads, columns, shape);
    STD_TORCH_CHECK(shape.size() == 4 && shape[3] > 0, "shape: expected (outputs, inputs, block, group)");
    const int64_t groups = (shape[1] + shape[3] - 1) / shape[3];
    STD_TORCH_CHECK(!weight.wide && weight.block <= Int8MaskedMatmul::kLargestBlock &&
                        weight.blocks == (groups + shape[2] - 1) / shape[2],
                    "columns: expected uint8 in blocks of at most 256");
    const DType dtype = dtype_of(input, "input");
    STD_TORCH_CHECK(dtype == DType::u8 || dtype == DType::i8, "input: expected uint8 or int8");
    STD_TORCH_CHECK(input.dim() >= 1 && input.size(input.dim() - 1) == shape[1], "input: expected (..., inputs)");
    STD_TORCH_CHECK(values.scalar_type() == ScalarType::Char && values.is_contiguous(),
                    "values: expected contiguous int8");
    STD_TORCH_CHECK(bias.scalar_type() == ScalarType::Int && bias.numel() == shape[0] && bias.is_contiguous(),
                    "bias: expected contiguous int32 (outputs,)");
    STD_TORCH_CHECK(weight_scale.scalar_type() == ScalarType::Float && weight_scale.numel() == shape[0] &&
                        weight_scale.is_contiguous(),
                    "weight_scale: expected contiguous float32 (outputs,)");
    return weight;
}

// Of y before the zero point is added.
struct OutputRange {
    float low, high;
};

inline OutputRange output_range(DType result, double scale, int64_t output_zero_point, std::optional<double> output_min,
                                std::optional<double> output_max) {
    constexpr float kInfinity = std::numeric_limits<float>::infinity();
    float low = result == DType::u8 ? 0.0f : result == DType::i8 ? -128.0f : -kInfinity;
    float high = result == DType::u8 ? 255.0f : result == DType::i8 ? 127.0f : kInfinity;
    low -= static_cast<float>(output_zero_point);
    high -= static_cast<float>(output_zero_point);
    if (output_min) low = std::min(std::max(low, static_cast<float>(*output_min / scale)), high);
    if (output_max) high = std::max(std::min(high, static_cast<float>(*output_max / scale)), low);
    return {low, high};
}

}  // namespace
}  // namespace imgopt

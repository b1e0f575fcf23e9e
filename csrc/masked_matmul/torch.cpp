// masked_matmul for torch on the CPU: checks, allocation, and the loop over threads. Activations of a convolution are
// used in channels_last memory, where a tap's channels are adjacent; what comes otherwise is copied once.
#include <cstring>

#include "../outputs.h"
#include "binding.h"

namespace imgopt {
namespace {

constexpr int64_t kWorthThread = 1 << 18;  // multiply-adds: about 5 us of a core, the cost of waking another

int64_t windows_of(const RowQuads& weight) { return (weight.rows + RowQuads::kWindow - 1) / RowQuads::kWindow; }

// Units that make a thread worth waking.
int64_t grain(int64_t work, int64_t units) { return units == 0 ? 1 : 1 + kWorthThread * units / (work + 1); }

// A dense tensor on the CPU, its values not set, made as in outputs.h: that of a large weight's gradient there, because
// 64 MB fresh from the system took longer to clear than to compute (29 of 45 ms in small pages).
Tensor new_rows(const std::vector<int64_t>& size, ScalarType dtype) {
    if (large_bytes(size, dtype) > 0) {
        int64_t count = 1;
        for (const int64_t n : size) count *= n;
        return torch::stable::view(new_output({1, 1, 1, count}, dtype, MemoryFormat::Contiguous), size);
    }
    std::vector<int64_t> strides(size.size(), 1);
    for (size_t d = size.size(); d-- > 1;) strides[d - 1] = strides[d] * std::max<int64_t>(size[d], 1);
    const auto code = [](auto v) { return torch::stable::detail::to<int32_t>(torch::stable::detail::from(v)); };
    AtenTensorHandle made;
    TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(size.size()), size.data(), strides.data(),
                                                    code(dtype), code(torch::headeronly::DeviceType::CPU), -1, &made));
    return Tensor(made);
}

Tensor widened(const Tensor& weight, const int32_t* source, int64_t count) {
    const DType dtype = dtype_of(weight, "weight");
    Tensor values = torch::stable::new_empty(weight, {count}, sum_type(dtype));
    const MaskedValues p{dtype, weight.const_data_ptr(), source, values.mutable_data_ptr()};
    parallel_units(count, kWorthThread / 4,
                   [&](int64_t begin, int64_t end) { kernels().masked.values(p, begin, end); });
    return values;
}

// `values` in visiting order, of x's dtype or already wide.
Tensor run(const Tensor& input, const Tensor& values, const std::optional<Tensor>& bias, const Tensor& quads,
           const Tensor& columns, const std::vector<int64_t>& shape, const std::vector<int64_t>& window,
           std::optional<double> output_min, std::optional<double> output_max, const void* dense = nullptr) {
    const RowQuads weight = row_quads(quads, columns, shape);
    Tensor keep;
    const MaskedInput x = masked_input(input, shape, window, keep);
    check_blocks(weight, x);
    const bool wide = values.scalar_type() == sum_type(x.dtype);
    const Tensor all = wide ? as_contiguous(values) : widened(values, nullptr, values.numel());
    std::optional<Tensor> offsets;
    if (bias) {
        STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == shape[0] && bias->scalar_type() == input.scalar_type(),
                        "bias: expected (outputs,) of the input's dtype");
        offsets = as_contiguous(*bias);
    }

    Tensor output = new_rows(output_size(input, shape[0], window), input.scalar_type());
    constexpr double kInfinity = std::numeric_limits<double>::infinity();
    const MaskedMatmul p{weight,
                         x,
                         all.const_data_ptr(),
                         offsets ? offsets->const_data_ptr() : nullptr,
                         output.mutable_data_ptr(),
                         output_min.value_or(-kInfinity),
                         output_max.value_or(kInfinity),
                         dense};
    const int64_t panels = (x.samples + MaskedMatmul::kPanel - 1) / MaskedMatmul::kPanel;
    const int64_t units = panels * windows_of(weight);
    parallel_units(units, grain(values.numel() * x.samples, units),
                   [&](int64_t begin, int64_t end) { kernels().masked.matmul(p, begin, end); });
    return as_image(output, window);
}

Tensor masked_matmul_packed(const Tensor& input, const Tensor& values, const std::optional<Tensor>& bias,
                            const Tensor& quads, const Tensor& columns, const std::optional<Tensor>& dense,
                            std::vector<int64_t> shape, std::vector<int64_t> window, std::optional<double> output_min,
                            std::optional<double> output_max) {
    STD_TORCH_CHECK(values.scalar_type() == input.scalar_type(), "values: expected the input's dtype");
    STD_TORCH_CHECK(!dense || (window.empty() && shape.size() >= 3 && dense->is_contiguous() && dense->dim() == 2 &&
                               dense->size(0) == shape[0] && dense->size(1) == shape[1] &&
                               dense->scalar_type() == input.scalar_type()),
                    "dense: expected contiguous (outputs, inputs) of the input's dtype, and no window");
    return run(input, values, bias, quads, columns, shape, window, output_min, output_max,
               dense ? dense->const_data_ptr() : nullptr);
}

Tensor masked_matmul(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& quads,
                     const Tensor& columns, const Tensor& source, const Tensor&, const Tensor&, const Tensor&,
                     std::vector<int64_t> shape, std::vector<int64_t> window, std::optional<double> output_min,
                     std::optional<double> output_max) {
    STD_TORCH_CHECK(weight.scalar_type() == input.scalar_type(), "weight: expected the input's dtype");
    check_source(source);
    const Tensor dense = as_contiguous(weight);
    const Tensor values = widened(dense, static_cast<const int32_t*>(source.const_data_ptr()), source.numel());
    return run(input, values, bias, quads, columns, shape, window, output_min, output_max);
}

// With the weight's values in visiting order, as an optimizer keeps them; the weight itself is for autograd.
Tensor masked_matmul_ordered(const Tensor& input, const Tensor&, const std::optional<Tensor>& bias,
                             const Tensor& values, const std::optional<Tensor>&, const Tensor& quads,
                             const Tensor& columns, const Tensor& source, const Tensor&, const Tensor&, const Tensor&,
                             std::vector<int64_t> shape, std::vector<int64_t> window, std::optional<double> output_min,
                             std::optional<double> output_max) {
    check_source(source);
    STD_TORCH_CHECK(values.scalar_type() == input.scalar_type() && values.numel() == source.numel(),
                    "values: expected the input's dtype, one for every place in source");
    return run(input, values, bias, quads, columns, shape, window, output_min, output_max);
}

Tensor masked_matmul_weight_grad(const Tensor& input, const Tensor& grad, const Tensor& quads, const Tensor& columns,
                                 const Tensor& source, const Tensor&, const Tensor&, const Tensor&,
                                 std::vector<int64_t> shape, std::vector<int64_t> window,
                                 std::vector<int64_t> weight_shape) {
    const RowQuads weight = row_quads(quads, columns, shape);
    Tensor keep;
    const MaskedInput x = masked_input(input, shape, window, keep);
    check_blocks(weight, x);
    check_source(source);
    STD_TORCH_CHECK(grad.scalar_type() == input.scalar_type() && grad.numel() == x.samples * shape[0],
                    "grad: expected the output's shape and dtype");
    const Tensor rows = window.empty() ? as_contiguous(grad)
                                       : torch::stable::contiguous(grad, torch::headeronly::MemoryFormat::ChannelsLast);
    const Tensor sums = torch::stable::new_empty(input, {source.numel()}, sum_type(x.dtype));
    const bool transposed = shape.size() < 5 || shape[4] != 0;
    Tensor gradient =
        transposed ? torch::stable::new_zeros(input, weight_shape) : new_rows(weight_shape, input.scalar_type());
    const MaskedWeightGrad p{weight,
                             x,
                             rows.const_data_ptr(),
                             static_cast<const int32_t*>(source.const_data_ptr()),
                             sums.mutable_data_ptr(),
                             gradient.mutable_data_ptr(),
                             shape[0],
                             transposed || shape[0] == 0 ? 0 : gradient.numel() / shape[0]};
    const int64_t units = windows_of(weight);
    parallel_units(units, grain(source.numel() * x.samples, units),
                   [&](int64_t begin, int64_t end) { kernels().masked.weight_grad(p, begin, end); });
    return gradient;
}

// (samples, columns) with rows padded to whole groups, so that the last one may be read whole.
Tensor in_groups(const Tensor& rows, int64_t columns) {
    constexpr int64_t kGroup = Int8MaskedMatmul::kGroup;
    if (columns % kGroup == 0) return rows;
    const int64_t samples = columns == 0 ? 0 : rows.numel() / columns, padded = (columns / kGroup + 1) * kGroup;
    Tensor result = torch::stable::new_empty(rows, {samples, padded});
    const uint8_t* from = static_cast<const uint8_t*>(rows.const_data_ptr());
    uint8_t* to = static_cast<uint8_t*>(result.mutable_data_ptr());
    for (int64_t n = 0; n < samples; ++n) {
        memcpy(to + n * padded, from + n * columns, static_cast<size_t>(columns));
        memset(to + n * padded + columns, 0, static_cast<size_t>(padded - columns));
    }
    return result;
}

Tensor int8_masked_matmul(const Tensor& input, const Tensor& values, const Tensor& bias, const Tensor& weight_scale,
                          const Tensor& weight_sum, const Tensor& quads, const Tensor& columns,
                          std::vector<int64_t> shape, double input_scale, int64_t input_zero_point,
                          std::optional<double> output_scale, int64_t output_zero_point, ScalarType output_dtype,
                          std::optional<double> output_min, std::optional<double> output_max) {
    const RowQuads weight = int8_row_quads(input, values, bias, weight_scale, quads, columns, shape);
    constexpr int64_t kGroup = Int8MaskedMatmul::kGroup;
    STD_TORCH_CHECK(shape[3] == kGroup, "shape: expected groups of ", kGroup, " on this device");
    STD_TORCH_CHECK(
        weight_sum.scalar_type() == ScalarType::Int && weight_sum.numel() == shape[0] && weight_sum.is_contiguous(),
        "weight_sum: expected contiguous int32 (outputs,)");
    const DType dtype = dtype_of(input, "input");
    const Tensor rows = in_groups(torch::stable::contiguous(input), shape[1]);
    std::vector<int64_t> size;
    int64_t samples = 1;
    for (int64_t d = 0; d + 1 < input.dim(); ++d) {
        size.push_back(input.size(d));
        samples *= input.size(d);
    }
    size.push_back(shape[0]);
    Tensor output = torch::stable::new_empty(input, size, output_dtype);

    const double scale = output_scale.value_or(1.0);
    const float* per_channel = weight_scale.const_data_ptr<float>();
    std::vector<float> multiplier(static_cast<size_t>(shape[0]));
    for (size_t o = 0; o < multiplier.size(); ++o)
        multiplier[o] = static_cast<float>(input_scale * static_cast<double>(per_channel[o]) / scale);
    const DType result = dtype_of(output, "output_dtype");
    const OutputRange range = output_range(result, scale, output_zero_point, output_min, output_max);
    const Int8MaskedMatmul p{weight,
                             dtype,
                             result,
                             rows.const_data_ptr(),
                             static_cast<const int8_t*>(values.const_data_ptr()),
                             bias.const_data_ptr<int32_t>(),
                             multiplier.data(),
                             output.mutable_data_ptr(),
                             samples,
                             (shape[1] + kGroup - 1) / kGroup * kGroup,
                             static_cast<int32_t>(input_zero_point),
                             static_cast<int32_t>(output_zero_point),
                             range.low,
                             range.high,
                             weight_sum.const_data_ptr<int32_t>()};
    const int64_t units = (samples + MaskedMatmul::kPanel - 1) / MaskedMatmul::kPanel * windows_of(weight);
    parallel_units(units, grain(values.numel() / kGroup * samples, units),
                   [&](int64_t begin, int64_t end) { kernels().masked.int8_matmul(p, begin, end); });
    return output;
}

}  // namespace
}  // namespace imgopt

STABLE_TORCH_LIBRARY_IMPL(imgopt_fast, CPU, m) {
    m.impl("masked_matmul", TORCH_BOX(&imgopt::masked_matmul));
    m.impl("masked_matmul_ordered", TORCH_BOX(&imgopt::masked_matmul_ordered));
    m.impl("masked_matmul_packed", TORCH_BOX(&imgopt::masked_matmul_packed));
    m.impl("masked_matmul_weight_grad", TORCH_BOX(&imgopt::masked_matmul_weight_grad));
    m.impl("int8_masked_matmul", TORCH_BOX(&imgopt::int8_masked_matmul));
}

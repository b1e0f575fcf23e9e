// int8_conv2d for torch on the CPU: checks what memory safety needs, brings the images to channels_last, and spreads
// the kernel over torch's threads. Argument errors are reported in Python; what is checked here is shapes and dtypes.
#include <limits>

#include "../outputs.h"
#include "../torch_stable.h"
#include "prepared.h"

namespace imgopt {
namespace {

// Units worth a thread: about 2^18 multiply-adds take longer than waking one up.
constexpr int64_t kGrainProducts = int64_t{1} << 18;

// True channels_last memory; strides of axes of one element do not matter.
bool is_channels_last(const Tensor& t) {
    const auto size = t.sizes(), stride = t.strides();
    const int64_t expected[] = {size[1] * size[2] * size[3], 1, size[1] * size[3], size[1]};
    for (size_t axis = 0; axis < 4; ++axis)
        if (size[axis] > 1 && stride[axis] != expected[axis]) return false;
    return true;
}

Tensor channels_last(const Tensor& t) {
    return is_channels_last(t) ? t : torch::stable::contiguous(t, MemoryFormat::ChannelsLast);
}

void check_image(const Tensor& t, const char* name) {
    STD_TORCH_CHECK(t.dim() == 4, name, ": expected 4 axes, got ", t.dim());
    const DType dtype = dtype_of(t, name);
    STD_TORCH_CHECK(dtype == DType::u8 || dtype == DType::i8, name, ": expected uint8 or int8");
    STD_TORCH_CHECK(t.is_cpu(), name, ": expected on the CPU");
}

template <class T>
const T* channel_data(const Tensor& t, const char* name, ScalarType dtype, int64_t channels) {
    STD_TORCH_CHECK(t.is_cpu() && t.scalar_type() == dtype && t.dim() == 1 && t.size(0) == channels &&
                        (channels == 1 || t.stride(0) == 1),
                    name, ": expected a contiguous array with one entry per output channel");
    return static_cast<const T*>(t.const_data_ptr());
}

Int8Weight geometry_of(const Tensor& weight, int64_t groups) {
    STD_TORCH_CHECK(weight.is_cpu() && weight.scalar_type() == ScalarType::Char && weight.dim() == 4,
                    "weight: expected a 4-dimensional int8 tensor on the CPU");
    STD_TORCH_CHECK(weight.numel() > 0 && groups > 0 && weight.size(0) % groups == 0,
                    "groups: expected a divisor of the output channels, and no empty axis in weight");
    return {weight.size(0), weight.size(1), groups, weight.size(2), weight.size(3)};
}

// Bytes that begin on a cache line, as a tensor's do.
struct Line {
    alignas(64) uint8_t bytes[64];
};

// `packed` and `prepared` belong to each other and to the active kernel.
Tensor convolve(const Tensor& input, const std::optional<Tensor>& residual, const uint8_t* packed,
                const uint8_t* prepared) {
    const PreparedCall& call = *reinterpret_cast<const PreparedCall*>(prepared);
    const int64_t channels = call.weight.out_channels;
    check_image(input, "input");
    STD_TORCH_CHECK(flip_of(dtype_of(input, "input")) == call.flips.input, "input: not of the dtype prepared for");
    STD_TORCH_CHECK(input.size(1) == call.weight.group_channels * call.weight.groups,
                    "input: wrong number of channels");
    Int8Conv2d conv{};
    STD_TORCH_CHECK(set_call(conv, prepared, packed, input.size(0), input.size(2), input.size(3)),
                    "input: smaller than the dilated kernel");
    const Tensor image = channels_last(input);
    conv.input = static_cast<const uint8_t*>(image.const_data_ptr());
    STD_TORCH_CHECK(residual.has_value() == call.flips.has_residual, "residual: not as prepared for");
    Tensor added;
    if (residual) {
        check_image(*residual, "residual");
        STD_TORCH_CHECK(flip_of(dtype_of(*residual, "residual")) == call.flips.residual &&
                            residual->size(0) == conv.batch && residual->size(1) == channels &&
                            residual->size(2) == conv.out_h && residual->size(3) == conv.out_w,
                        "residual: expected the output's shape, and the dtype prepared for");
        added = channels_last(*residual);
        conv.residual = static_cast<const uint8_t*>(added.const_data_ptr());
    }
    const ScalarType dtype = call.float_output   ? ScalarType::Float
                             : call.flips.output ? ScalarType::Char
                                                 : ScalarType::Byte;
    Tensor output = new_output({conv.batch, channels, conv.out_h, conv.out_w}, dtype, MemoryFormat::ChannelsLast);
    conv.output = output.mutable_data_ptr();

    const KernelTable& table = kernels();
    const int64_t units = table.int8_conv2d_units(conv);
    if (units == 0) return output;
    const Int8Weight& w = call.weight;
    const int64_t products =
        conv.batch * conv.out_h * conv.out_w * channels * w.group_channels * w.kernel_h * w.kernel_w;
    parallel_units(units, kGrainProducts * units / (products + 1) + 1,
                   [&](int64_t begin, int64_t end) { table.int8_conv2d(conv, begin, end); });
    return output;
}

Tensor int8_conv2d(Tensor input, Tensor weight, Tensor bias, Tensor weight_scale, Tensor packed,
                   std::optional<Tensor> residual, double input_scale, int64_t input_zero_point,
                   std::optional<double> output_scale, int64_t output_zero_point, ScalarType output_dtype,
                   std::vector<int64_t> stride, std::vector<int64_t> padding, std::vector<int64_t> dilation,
                   int64_t groups, std::optional<double> output_min, std::optional<double> output_max,
                   double residual_scale, int64_t residual_zero_point, bool shift) {
    check_image(input, "input");
    if (residual) check_image(*residual, "residual");
    STD_TORCH_CHECK(stride.size() == 2 && padding.size() == 4 && dilation.size() == 2,
                    "stride, padding, dilation: expected 2, 4 and 2 numbers");
    STD_TORCH_CHECK(output_scale ? output_dtype == ScalarType::Byte || output_dtype == ScalarType::Char
                                 : output_dtype == ScalarType::Float,
                    "output_dtype: expected uint8 or int8 with output_scale, float32 without");
    const Int8Weight geometry = geometry_of(weight, groups);
    const int32_t* bias_data = channel_data<int32_t>(bias, "bias", ScalarType::Int, geometry.out_channels);
    const float* scale_data =
        channel_data<float>(weight_scale, "weight_scale", ScalarType::Float, geometry.out_channels);

    STD_TORCH_CHECK(packed.is_cpu() && packed.scalar_type() == ScalarType::Byte && packed.is_contiguous(),
                    "packed: expected contiguous bytes");
    const auto* packed_data = static_cast<const uint8_t*>(packed.const_data_ptr());
    std::vector<Line> repacked;
    if (!is_packed_for_kernel(geometry, packed_data, packed.numel())) {
        repacked.resize(static_cast<size_t>(packed_bytes(geometry) / 64 + 1));
        const Tensor canonical = torch::stable::contiguous(weight);
        pack(geometry, static_cast<const int8_t*>(canonical.const_data_ptr()), repacked[0].bytes);
        packed_data = repacked[0].bytes;
    }
    constexpr double kInfinity = std::numeric_limits<double>::infinity();
    const ConvFlips flips = {flip_of(dtype_of(input, "input")),
                             residual ? flip_of(dtype_of(*residual, "residual")) : uint8_t{0},
                             static_cast<uint8_t>(output_dtype == ScalarType::Char ? 0x80 : 0), residual.has_value()};
    std::vector<Line> prepared(static_cast<size_t>(prepared_bytes(geometry) / 64));
    prepare(
        geometry, {stride[0], stride[1], padding[0], padding[1], padding[2], padding[3], dilation[0], dilation[1]},
        {input_scale, input_zero_point, !output_scale, output_scale.value_or(1.0), output_zero_point,
         output_min.value_or(-kInfinity), output_max.value_or(kInfinity), residual_scale, residual_zero_point, shift},
        flips, packed_data, bias_data, scale_data, prepared[0].bytes);
    STD_TORCH_CHECK(is_prepared(prepared[0].bytes, prepared_bytes(geometry)),
                    "padding, stride, dilation: expected non-negative, positive, positive");
    return convolve(input, residual, packed_data, prepared[0].bytes);
}

// The same call again; _prepared.py says for whom.
Tensor int8_conv2d_prepared(Tensor input, Tensor packed, Tensor prepared, std::optional<Tensor> residual) {
    STD_TORCH_CHECK(packed.is_cpu() && packed.scalar_type() == ScalarType::Byte && packed.is_contiguous() &&
                        prepared.is_cpu() && prepared.scalar_type() == ScalarType::Byte && prepared.is_contiguous(),
                    "packed, prepared: expected contiguous bytes");
    const auto* call = static_cast<const uint8_t*>(prepared.const_data_ptr());
    const auto* bytes = static_cast<const uint8_t*>(packed.const_data_ptr());
    STD_TORCH_CHECK(is_prepared(call, prepared.numel()), "prepared: not what int8_conv2d_prepare wrote");
    STD_TORCH_CHECK(is_packed_for_kernel(reinterpret_cast<const PreparedCall*>(call)->weight, bytes, packed.numel()),
                    "packed: of another kernel or layer");
    return convolve(input, residual, bytes, call);
}

}  // namespace
}  // namespace imgopt

STABLE_TORCH_LIBRARY_IMPL(imgopt_fast, CPU, m) {
    m.impl("int8_conv2d", TORCH_BOX(&imgopt::int8_conv2d));
    m.impl("int8_conv2d_prepared", TORCH_BOX(&imgopt::int8_conv2d_prepared));
}

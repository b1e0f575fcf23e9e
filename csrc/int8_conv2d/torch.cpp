// int8_conv2d for torch on the CPU: checks what memory safety needs, brings the images to channels_last, and spreads
// the kernel over torch's threads. Argument errors are reported in Python; what is checked here is shapes and dtypes.
#include <limits>

#include "../outputs.h"
#include "../torch_stable.h"
#include "layer.h"

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

// Output length of one axis.
int64_t output_length(int64_t in, int64_t before, int64_t after, int64_t kernel, int64_t stride, int64_t dilation) {
    STD_TORCH_CHECK(before >= 0 && after >= 0 && stride > 0 && dilation > 0,
                    "padding, stride, dilation: expected non-negative, positive, positive");
    const int64_t window = dilation * (kernel - 1) + 1;
    STD_TORCH_CHECK(in + before + after >= window, "input: smaller than the dilated kernel");
    return (in + before + after - window) / stride + 1;
}

Tensor int8_conv2d(Tensor input, Tensor weight, Tensor bias, Tensor weight_scale, Tensor packed,
                   std::optional<Tensor> residual, double input_scale, int64_t input_zero_point,
                   std::optional<double> output_scale, int64_t output_zero_point, ScalarType output_dtype,
                   std::vector<int64_t> stride, std::vector<int64_t> padding, std::vector<int64_t> dilation,
                   int64_t groups, std::optional<double> output_min, std::optional<double> output_max,
                   double residual_scale, int64_t residual_zero_point, bool shift) {
    check_image(input, "input");
    STD_TORCH_CHECK(stride.size() == 2 && padding.size() == 4 && dilation.size() == 2,
                    "stride, padding, dilation: expected 2, 4 and 2 numbers");
    STD_TORCH_CHECK(output_scale ? output_dtype == ScalarType::Byte || output_dtype == ScalarType::Char
                                 : output_dtype == ScalarType::Float,
                    "output_dtype: expected uint8 or int8 with output_scale, float32 without");
    Int8Conv2d conv{};
    conv.weight = geometry_of(weight, groups);
    STD_TORCH_CHECK(input.size(1) == conv.weight.group_channels * groups, "input: wrong number of channels");
    conv.batch = input.size(0);
    conv.in_h = input.size(2);
    conv.in_w = input.size(3);
    conv.stride_h = stride[0];
    conv.stride_w = stride[1];
    conv.dilation_h = dilation[0];
    conv.dilation_w = dilation[1];
    conv.pad_top = padding[0];
    conv.pad_left = padding[2];
    conv.out_h = output_length(conv.in_h, padding[0], padding[1], conv.weight.kernel_h, stride[0], dilation[0]);
    conv.out_w = output_length(conv.in_w, padding[2], padding[3], conv.weight.kernel_w, stride[1], dilation[1]);

    const int64_t channels = conv.weight.out_channels;
    const int32_t* bias_data = channel_data<int32_t>(bias, "bias", ScalarType::Int, channels);
    const float* scale_data = channel_data<float>(weight_scale, "weight_scale", ScalarType::Float, channels);

    const Tensor image = channels_last(input);
    conv.input = static_cast<const uint8_t*>(image.const_data_ptr());
    conv.input_stride = input.size(1);
    conv.input_flip = flip_of(dtype_of(input, "input"));
    Tensor added;
    if (residual) {
        check_image(*residual, "residual");
        STD_TORCH_CHECK(residual->size(0) == conv.batch && residual->size(1) == channels &&
                            residual->size(2) == conv.out_h && residual->size(3) == conv.out_w,
                        "residual: expected the output's shape");
        added = channels_last(*residual);
        conv.residual = static_cast<const uint8_t*>(added.const_data_ptr());
        conv.residual_stride = channels;
        conv.residual_flip = flip_of(dtype_of(added, "residual"));
    }
    Tensor output =
        new_output({conv.batch, channels, conv.out_h, conv.out_w}, output_dtype, MemoryFormat::ChannelsLast);
    conv.output = output.mutable_data_ptr();
    conv.output_stride = channels;
    conv.output_flip = output_dtype == ScalarType::Char ? 0x80 : 0;

    STD_TORCH_CHECK(packed.is_cpu() && packed.scalar_type() == ScalarType::Byte && packed.is_contiguous(),
                    "packed: expected contiguous bytes");
    const auto* packed_data = static_cast<const uint8_t*>(packed.const_data_ptr());
    Tensor repacked;
    if (!is_packed_for_kernel(conv.weight, packed_data, packed.numel())) {
        repacked = torch::stable::empty({packed_bytes(conv.weight)}, ScalarType::Byte);
        auto* bytes = static_cast<uint8_t*>(repacked.mutable_data_ptr());
        const Tensor canonical = torch::stable::contiguous(weight);
        pack(conv.weight, static_cast<const int8_t*>(canonical.const_data_ptr()), bytes);
        packed_data = bytes;
    }
    constexpr double kInfinity = std::numeric_limits<double>::infinity();
    ChannelNumbers numbers;
    set_layer(
        conv, numbers,
        {input_scale, input_zero_point, !output_scale, output_scale.value_or(1.0), output_zero_point,
         output_min.value_or(-kInfinity), output_max.value_or(kInfinity), residual_scale, residual_zero_point, shift},
        packed_data, bias_data, scale_data);

    const KernelTable& table = kernels();
    const int64_t units = table.int8_conv2d_units(conv);
    if (units == 0) return output;
    const int64_t products = output.numel() * weight.numel() / channels;
    parallel_units(units, kGrainProducts * units / (products + 1) + 1,
                   [&](int64_t begin, int64_t end) { table.int8_conv2d(conv, begin, end); });
    return output;
}

}  // namespace
}  // namespace imgopt

STABLE_TORCH_LIBRARY_IMPL(imgopt_fast, CPU, m) { m.impl("int8_conv2d", TORCH_BOX(&imgopt::int8_conv2d)); }

// int8_conv2d for NumPy: NHWC arrays, the GIL released around the kernel; and the packing of weights for every face.
#include <limits>
#include <optional>
#include <vector>

#include "../numpy_module.h"
#include "layer.h"

namespace imgopt {
namespace {

using Bytes = py::array_t<uint8_t, py::array::c_style>;
using Weights = py::array_t<int8_t, py::array::c_style>;

constexpr int64_t kGrainProducts = int64_t{1} << 18;

Int8Weight geometry_of(const std::vector<int64_t>& shape, int64_t groups) {
    if (shape.size() != 4 || groups < 1 || shape[0] % groups)
        throw std::invalid_argument("weight: expected (O, C/groups, kH, kW) with O divisible by groups");
    for (int64_t size : shape)
        if (size < 1) throw std::invalid_argument("weight: expected no empty axis");
    return {shape[0], shape[1], groups, shape[2], shape[3]};
}

std::vector<int64_t> shape_of(const py::array& array) { return {array.shape(), array.shape() + array.ndim()}; }

int64_t bytes_for(const std::vector<int64_t>& shape, int64_t groups) {
    return packed_bytes(geometry_of(shape, groups));
}

void pack_into(const Weights& weight, int64_t groups, Bytes& packed) {
    const Int8Weight geometry = geometry_of(shape_of(weight), groups);
    if (packed.size() != packed_bytes(geometry))
        throw std::invalid_argument("packed: expected int8_conv2d_packed_bytes(weight.shape, groups) bytes");
    pack(geometry, weight.data(), packed.mutable_data());
}

// A (N, H, W, C) array of bytes; `flip` is 0x80 for int8.
struct Image {
    const uint8_t* data;
    std::vector<int64_t> shape;
    uint8_t flip;
};

Image image_of(const py::array& array, const char* name) {
    const bool is_int8 = py::isinstance<py::array_t<int8_t>>(array);
    if (!is_int8 && !py::isinstance<py::array_t<uint8_t>>(array))
        throw py::type_error(std::string(name) + ": expected uint8 or int8");
    if (array.ndim() != 4 || !(array.flags() & py::array::c_style))
        throw std::invalid_argument(std::string(name) + ": expected a C-contiguous (N, H, W, C) array");
    return {static_cast<const uint8_t*>(array.data()), shape_of(array), static_cast<uint8_t>(is_int8 ? 0x80 : 0)};
}

int64_t output_length(int64_t in, int64_t padding, int64_t kernel, int64_t stride, int64_t dilation) {
    const int64_t window = dilation * (kernel - 1) + 1;
    if (in + padding < window) throw std::invalid_argument("input: smaller than the dilated kernel");
    return (in + padding - window) / stride + 1;
}

py::array convolve(const py::array& input, const Weights& weight, const py::array_t<int32_t, py::array::c_style>& bias,
                   const py::array_t<float, py::array::c_style>& weight_scale, const Bytes& packed,
                   const std::optional<py::array>& residual, double input_scale, int64_t input_zero_point,
                   std::optional<double> output_scale, int64_t output_zero_point, bool output_signed,
                   const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                   const std::vector<int64_t>& dilation, int64_t groups, std::optional<double> output_min,
                   std::optional<double> output_max, double residual_scale, int64_t residual_zero_point, bool shift) {
    const Image image = image_of(input, "input");
    Int8Conv2d conv{};
    conv.weight = geometry_of(shape_of(weight), groups);
    const int64_t channels = conv.weight.out_channels;
    if (image.shape[3] != conv.weight.group_channels * groups)
        throw std::invalid_argument("input: wrong number of channels");
    if (bias.size() != channels || weight_scale.size() != channels)
        throw std::invalid_argument("bias, weight_scale: expected one entry per output channel");
    conv.input = image.data;
    conv.input_flip = image.flip;
    conv.input_stride = image.shape[3];
    conv.batch = image.shape[0];
    conv.in_h = image.shape[1];
    conv.in_w = image.shape[2];
    conv.stride_h = stride.at(0);
    conv.stride_w = stride.at(1);
    conv.dilation_h = dilation.at(0);
    conv.dilation_w = dilation.at(1);
    conv.pad_top = padding.at(0);
    conv.pad_left = padding.at(2);
    conv.out_h = output_length(conv.in_h, padding[0] + padding.at(1), conv.weight.kernel_h, stride[0], dilation[0]);
    conv.out_w = output_length(conv.in_w, padding[2] + padding.at(3), conv.weight.kernel_w, stride[1], dilation[1]);
    const std::vector<int64_t> size = {conv.batch, conv.out_h, conv.out_w, channels};
    if (residual) {
        const Image added = image_of(*residual, "residual");
        if (added.shape != size) throw std::invalid_argument("residual: expected the output's shape");
        conv.residual = added.data;
        conv.residual_flip = added.flip;
        conv.residual_stride = channels;
    }
    const py::dtype dtype = !output_scale   ? py::dtype::of<float>()
                            : output_signed ? py::dtype::of<int8_t>()
                                            : py::dtype::of<uint8_t>();
    py::array output(dtype, size);
    conv.output = output.mutable_data();
    conv.output_stride = channels;
    conv.output_flip = output_scale && output_signed ? 0x80 : 0;

    constexpr double kInfinity = std::numeric_limits<double>::infinity();
    const Quantization quantization = {input_scale,
                                       input_zero_point,
                                       !output_scale,
                                       output_scale.value_or(1.0),
                                       output_zero_point,
                                       output_min.value_or(-kInfinity),
                                       output_max.value_or(kInfinity),
                                       residual_scale,
                                       residual_zero_point,
                                       shift};
    const int8_t* canonical = weight.data();
    const int32_t* bias_data = bias.data();
    const float* scale_data = weight_scale.data();
    const uint8_t* packed_data = packed.data();
    const int64_t packed_size = packed.size();
    {
        py::gil_scoped_release release;
        struct Line {
            alignas(64) uint8_t bytes[64];
        };
        std::vector<Line> repacked;
        if (reinterpret_cast<uintptr_t>(packed_data) % 64 != 0 ||
            !is_packed_for_kernel(conv.weight, packed_data, packed_size)) {
            repacked.resize(static_cast<size_t>(packed_bytes(conv.weight) / 64 + 1));
            pack(conv.weight, canonical, repacked[0].bytes);
            packed_data = repacked[0].bytes;
        }
        ChannelNumbers numbers;
        set_layer(conv, numbers, quantization, packed_data, bias_data, scale_data);
        const KernelTable& table = kernels();
        const int64_t units = table.int8_conv2d_units(conv);
        const int64_t products = conv.batch * conv.out_h * conv.out_w * weight.size();
        parallel_units(units, kGrainProducts * units / (products + 1) + 1,
                       [&](int64_t begin, int64_t end) { table.int8_conv2d(conv, begin, end); });
    }
    return output;
}

}  // namespace

void register_int8_conv2d(py::module_& m) {
    m.def("int8_conv2d_packed_bytes", &bytes_for, py::arg("shape"), py::arg("groups"),
          "Bytes of a packed weight of this shape for the active instruction set, header included.");
    m.def("int8_conv2d_pack", &pack_into, py::arg("weight").noconvert(), py::arg("groups"),
          py::arg("packed").noconvert(), "Write the packed weight into `packed`.");
    m.def("int8_conv2d", &convolve, py::arg("input"), py::arg("weight").noconvert(), py::arg("bias").noconvert(),
          py::arg("weight_scale").noconvert(), py::arg("packed").noconvert(), py::arg("residual"),
          py::arg("input_scale"), py::arg("input_zero_point"), py::arg("output_scale"), py::arg("output_zero_point"),
          py::arg("output_signed"), py::arg("stride"), py::arg("padding"), py::arg("dilation"), py::arg("groups"),
          py::arg("output_min"), py::arg("output_max"), py::arg("residual_scale"), py::arg("residual_zero_point"),
          py::arg("shift"), "Quantized convolution of a (N, H, W, C) array; see imgopt_fast.numpy.int8_conv2d.");
}

}  // namespace imgopt

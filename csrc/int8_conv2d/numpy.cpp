// int8_conv2d for NumPy: NHWC arrays, the GIL released around the kernel; and the packing of weights for every face.
#include <limits>
#include <optional>
#include <vector>

#include "../numpy_module.h"
#include "prepared.h"

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

uint8_t flip_of(bool is_signed) { return is_signed ? 0x80 : 0; }

// The block of bytes of prepared.h; None where `packed` belongs to another kernel.
std::optional<py::array> prepare_call(const std::vector<int64_t>& shape, int64_t groups, const Bytes& packed,
                                      const py::array_t<int32_t, py::array::c_style>& bias,
                                      const py::array_t<float, py::array::c_style>& weight_scale, bool input_signed,
                                      std::optional<bool> residual_signed, bool output_signed, double input_scale,
                                      int64_t input_zero_point, std::optional<double> output_scale,
                                      int64_t output_zero_point, const std::vector<int64_t>& stride,
                                      const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation,
                                      std::optional<double> output_min, std::optional<double> output_max,
                                      double residual_scale, int64_t residual_zero_point, bool shift) {
    const Int8Weight weight = geometry_of(shape, groups);
    if (bias.size() != weight.out_channels || weight_scale.size() != weight.out_channels)
        throw std::invalid_argument("bias, weight_scale: expected one entry per output channel");
    if (reinterpret_cast<uintptr_t>(packed.data()) % 64 != 0 ||
        !is_packed_for_kernel(weight, packed.data(), packed.size()))
        return std::nullopt;
    constexpr double kInfinity = std::numeric_limits<double>::infinity();
    Bytes prepared(prepared_bytes(weight));
    prepare(
        weight,
        {stride.at(0), stride.at(1), padding.at(0), padding.at(1), padding.at(2), padding.at(3), dilation.at(0),
         dilation.at(1)},
        {input_scale, input_zero_point, !output_scale, output_scale.value_or(1.0), output_zero_point,
         output_min.value_or(-kInfinity), output_max.value_or(kInfinity), residual_scale, residual_zero_point, shift},
        {flip_of(input_signed), flip_of(residual_signed.value_or(false)),
         flip_of(output_scale.has_value() && output_signed), residual_signed.has_value()},
        packed.data(), bias.data(), weight_scale.data(), prepared.mutable_data());
    if (!is_prepared(prepared.data(), prepared.size()))
        throw std::invalid_argument(
            "stride, padding, dilation: expected positive, non-negative and positive numbers below 2^31");
    return prepared;
}

py::array convolve(const py::array& input, const Bytes& packed, const Bytes& prepared,
                   const std::optional<py::array>& residual) {
    if (!is_prepared(prepared.data(), prepared.size()))
        throw std::invalid_argument("prepared: not what int8_conv2d_prepare wrote");
    const PreparedCall& call = *reinterpret_cast<const PreparedCall*>(prepared.data());
    if (reinterpret_cast<uintptr_t>(packed.data()) % 64 != 0 ||
        !is_packed_for_kernel(call.weight, packed.data(), packed.size()))
        throw std::invalid_argument("packed: of another kernel or layer");
    const Image image = image_of(input, "input");
    if (image.flip != call.flips.input || image.shape[3] != call.weight.group_channels * call.weight.groups)
        throw std::invalid_argument("input: not of the dtype or the channels prepared for");
    Int8Conv2d conv{};
    if (!set_call(conv, prepared.data(), packed.data(), image.shape[0], image.shape[1], image.shape[2]))
        throw std::invalid_argument("input: smaller than the dilated kernel");
    conv.input = image.data;
    const std::vector<int64_t> size = {conv.batch, conv.out_h, conv.out_w, call.weight.out_channels};
    if (residual.has_value() != call.flips.has_residual) throw std::invalid_argument("residual: not as prepared for");
    if (residual) {
        const Image added = image_of(*residual, "residual");
        if (added.flip != call.flips.residual || added.shape != size)
            throw std::invalid_argument("residual: expected the output's shape, and the dtype prepared for");
        conv.residual = added.data;
    }
    const py::dtype dtype = call.float_output   ? py::dtype::of<float>()
                            : call.flips.output ? py::dtype::of<int8_t>()
                                                : py::dtype::of<uint8_t>();
    py::array output(dtype, size);
    conv.output = output.mutable_data();
    {
        py::gil_scoped_release release;
        const KernelTable& table = kernels();
        const Int8Weight& w = call.weight;
        const int64_t units = table.int8_conv2d_units(conv);
        const int64_t products =
            conv.batch * conv.out_h * conv.out_w * w.out_channels * w.group_channels * w.kernel_h * w.kernel_w;
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
    m.def("int8_conv2d_prepare", &prepare_call, py::arg("shape"), py::arg("groups"), py::arg("packed").noconvert(),
          py::arg("bias").noconvert(), py::arg("weight_scale").noconvert(), py::arg("input_signed"),
          py::arg("residual_signed"), py::arg("output_signed"), py::arg("input_scale"), py::arg("input_zero_point"),
          py::arg("output_scale"), py::arg("output_zero_point"), py::arg("stride"), py::arg("padding"),
          py::arg("dilation"), py::arg("output_min"), py::arg("output_max"), py::arg("residual_scale"),
          py::arg("residual_zero_point"), py::arg("shift"),
          "All of a call but its images, as bytes; None where `packed` is not for the active instruction set.");
    m.def("int8_conv2d", &convolve, py::arg("input"), py::arg("packed").noconvert(), py::arg("prepared").noconvert(),
          py::arg("residual"), "Quantized convolution of a (N, H, W, C) array; see imgopt_fast.numpy.int8_conv2d.");
}

}  // namespace imgopt

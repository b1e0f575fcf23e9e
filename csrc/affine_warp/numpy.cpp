// affine_warp on NumPy arrays, which come as (N, C, H, W) views of whatever layout they have. The Python side has
// validated the values and allocated the output; here only what memory safety rests on is checked again.
#include "../numpy_module.h"
#include "binding.h"

namespace imgopt {
namespace {

using Doubles = py::array_t<double, py::array::c_style>;
using Bytes = py::array_t<uint8_t, py::array::c_style>;

void require(bool condition, const char* text) {
    if (!condition) throw py::value_error(text);
}

DType pixel_dtype(const py::array& a, const char* name) {
    const py::dtype type = a.dtype();
    if (type.kind() == 'u' && type.itemsize() == 1) return DType::u8;
    if (type.kind() == 'f' && type.itemsize() == 2) return DType::f16;
    if (type.kind() == 'f' && type.itemsize() == 4) return DType::f32;
    if (type.kind() == 'f' && type.itemsize() == 8) return DType::f64;
    throw py::type_error(std::string(name) + ": expected uint8, float16, float32 or float64, got " +
                         std::string(py::str(type)));
}

void set_strides(const py::array& a, int64_t* to, const char* text) {
    for (int i = 0; i < 4; ++i) {
        require(a.strides(i) >= 0 && a.strides(i) % a.itemsize() == 0, text);
        to[i] = a.strides(i) / a.itemsize();
    }
}

void affine_warp(const py::array& images, py::array output, const Doubles& matrix, const std::string& interpolation,
                 const std::string& padding_mode, const std::vector<double>& fill, bool antialias,
                 const std::optional<Bytes>& table, const std::optional<Doubles>& color_matrix,
                 const std::vector<double>& mean, const std::vector<double>& std) {
    require(images.ndim() == 4 && output.ndim() == 4, "images, output: expected four dimensions");
    AffineWarp p{};
    p.batch = images.shape(0);
    p.channels = images.shape(1);
    p.height = images.shape(2);
    p.width = images.shape(3);
    p.output_height = output.shape(2);
    p.output_width = output.shape(3);
    const auto side = [](int64_t v, int64_t least) { return v >= least && v < (1 << 30); };
    require(side(p.height, 1) && side(p.width, 1) && side(p.output_height, 0) && side(p.output_width, 0),
            "images, size: expected sides between 1 and 2^30 - 1");
    require(output.shape(0) == p.batch && output.shape(1) == p.channels && output.writeable(),
            "output: expected a writeable array of as many images and channels");
    p.images_dtype = pixel_dtype(images, "images");
    p.output_dtype = pixel_dtype(output, "dtype");
    set_strides(images, p.images_stride, "images: expected positive strides of whole elements");
    set_strides(output, p.output_stride, "output: expected positive strides of whole elements");
    p.images = images.data();
    p.output = output.mutable_data();
    const auto leading = [&](const py::array& a) {
        return a.ndim() == 3 && (a.shape(0) == 1 || a.shape(0) == p.batch);
    };
    require(leading(matrix) && matrix.shape(1) == 3 && matrix.shape(2) == 3, "matrix: expected shape (N or 1, 3, 3)");
    p.matrix = matrix.data();
    p.matrix_stride = matrix.shape(0) > 1 ? 9 : 0;
    const auto per_channel = [&](const std::vector<double>& v) { return static_cast<int64_t>(v.size()) == p.channels; };
    require(per_channel(fill) && (mean.empty() || per_channel(mean)) && (std.empty() || per_channel(std)),
            "fill, mean, std: expected one value per channel");
    p.fill = fill.data();
    if (table) {
        require(
            p.images_dtype == DType::u8 && leading(*table) && table->shape(1) == p.channels && table->shape(2) == 256,
            "table: expected uint8 images and shape (N or 1, C, 256)");
        p.table = table->data();
        p.table_stride = table->shape(0) > 1 ? p.channels * 256 : 0;
    }
    if (color_matrix) {
        require(p.channels == 3 && leading(*color_matrix) && color_matrix->shape(1) == 3 && color_matrix->shape(2) == 4,
                "color_matrix: expected three channels and shape (N or 1, 3, 4)");
        p.color_matrix = color_matrix->data();
        p.color_stride = color_matrix->shape(0) > 1 ? 12 : 0;
    }
    const ChannelFactors factors(mean, std, p.channels);
    p.scale = factors.scale.data();
    p.offset = factors.offset.data();
    require(set_modes(p, interpolation, padding_mode), kUnknownMode);
    p.antialias = antialias;
    if (output.size() == 0) return;
    const auto kernel = in_float64(p) ? kernels().affine_warp_f64 : kernels().affine_warp;
    const py::gil_scoped_release release;
    parallel_units(p.batch * p.output_height, row_grain(p.output_width * p.channels),
                   [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
}

}  // namespace

void register_affine_warp(py::module_& m) {
    m.def("affine_warp", &affine_warp, py::arg("images"), py::arg("output"), py::arg("matrix").noconvert(),
          py::arg("interpolation"), py::arg("padding_mode"), py::arg("fill"), py::arg("antialias"),
          py::arg("table").noconvert().none(true), py::arg("color_matrix").noconvert().none(true), py::arg("mean"),
          py::arg("std"), "Warp (N, C, H, W) views into `output`; imgopt_fast.numpy.affine_warp has the checks.");
}

}  // namespace imgopt

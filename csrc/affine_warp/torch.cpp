// affine_warp on torch's CPU tensors. The Python side has validated the arguments and named them in its errors; here
// only what memory safety rests on is checked again.
#include <algorithm>
#include <tuple>

#include "../outputs.h"
#include "torch_binding.h"

namespace imgopt {
namespace {

template <class T>
void read_doubles(const Tensor& t, int64_t n, int64_t rows, int64_t columns, double* to, int64_t step) {
    const T* data = t.const_data_ptr<T>();
    const auto strides = t.strides();
    for (int64_t i = 0; i < n; ++i)
        for (int64_t r = 0; r < rows; ++r)
            for (int64_t c = 0; c < columns; ++c)
                to[i * step + r * columns + c] = data[i * strides[0] + r * strides[1] + c * strides[2]];
}

void check_leading(const Tensor& t, int64_t batch, const char* name) {
    STD_TORCH_CHECK(t.dim() == 3 && (t.size(0) == batch || t.size(0) == 1), name,
                    ": expected 3 dimensions, N or 1 first");
}

// The matrices of (N or 1, R, C) as float64, `step` numbers each.
std::vector<double> doubles(const Tensor& t, int64_t batch, int64_t columns, int64_t step, const char* name) {
    check_leading(t, batch, name);
    STD_TORCH_CHECK(t.size(2) == columns && t.size(1) * columns <= step, name, ": wrong shape");
    std::vector<double> values(t.size(0) * step);
    if (t.scalar_type() == ScalarType::Double)
        read_doubles<double>(t, t.size(0), t.size(1), columns, values.data(), step);
    else {
        STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float, name, ": expected float32 or float64");
        read_doubles<float>(t, t.size(0), t.size(1), columns, values.data(), step);
    }
    return values;
}

std::vector<double> homographies(const Tensor& matrix, int64_t batch) {
    std::vector<double> values = doubles(matrix, batch, 3, 9, "matrix");
    STD_TORCH_CHECK(matrix.size(1) >= 2, "matrix: wrong shape");
    if (matrix.size(1) == 2)
        for (size_t i = 8; i < values.size(); i += 9) values[i] = 1;
    return values;
}

bool is_pixel_dtype(ScalarType dtype) {
    return dtype == ScalarType::Byte || dtype == ScalarType::Half || dtype == ScalarType::BFloat16 ||
           dtype == ScalarType::Float || dtype == ScalarType::Double;
}

// What forward and backward share; the vectors must outlive the struct.
AffineWarp describe(const Tensor& images, const std::vector<double>& matrix, const std::string& interpolation,
                    const std::string& padding_mode, const std::vector<double>& fill, bool antialias,
                    const std::vector<double>& colors, const ChannelFactors& factors) {
    AffineWarp p = warp_of(images, interpolation, padding_mode, fill.size(), antialias);
    STD_TORCH_CHECK(colors.empty() || p.channels == 3, "color_matrix: expected three channels");
    p.matrix = matrix.data();
    p.matrix_stride = matrix.size() > 9 ? 9 : 0;
    p.fill = fill.data();
    p.color_matrix = colors.empty() ? nullptr : colors.data();
    p.color_stride = colors.size() > 12 ? 12 : 0;
    p.scale = factors.scale.data();
    p.offset = factors.offset.data();
    return p;
}

Tensor affine_warp(Tensor images, Tensor matrix, std::vector<int64_t> size, std::string interpolation,
                   std::string padding_mode, std::vector<double> fill, bool antialias, std::optional<Tensor> table,
                   std::optional<Tensor> color_matrix, std::vector<double> mean, std::vector<double> std,
                   std::optional<ScalarType> dtype, MemoryFormat memory_format) {
    STD_TORCH_CHECK(images.dim() == 4 && size.size() == 2 && size[0] >= 0 && size[1] >= 0 && size[0] < (1 << 30) &&
                        size[1] < (1 << 30),
                    "images, size: expected (N, C, H, W) and (height, width)");
    const int64_t batch = images.size(0), channels = images.size(1);
    STD_TORCH_CHECK(factors_fit(mean, std, channels), kWrongFactors);
    const ChannelFactors factors(mean, std, channels);
    const std::vector<double> matrices = homographies(matrix, batch);
    const std::vector<double> colors =
        color_matrix ? doubles(*color_matrix, batch, 4, 12, "color_matrix") : std::vector<double>();
    STD_TORCH_CHECK(!color_matrix || color_matrix->size(1) == 3, "color_matrix: expected shape (N, 3, 4)");
    AffineWarp p = describe(images, matrices, interpolation, padding_mode, fill, antialias, colors, factors);
    Tensor levels;
    if (table) {
        check_leading(*table, batch, "table");
        STD_TORCH_CHECK(p.images_dtype == DType::u8 && table->scalar_type() == ScalarType::Byte &&
                            table->size(1) == channels && table->size(2) == 256,
                        "table: expected uint8 images and (N, C, 256) uint8");
        levels = torch::stable::contiguous(*table);
        p.table = levels.const_data_ptr<uint8_t>();
        p.table_stride = table->size(0) > 1 ? channels * 256 : 0;
    }
    p.output_height = size[0];
    p.output_width = size[1];
    const ScalarType wanted = dtype.value_or(images.scalar_type());
    STD_TORCH_CHECK(is_pixel_dtype(wanted), "dtype: expected uint8 or floating");
    Tensor output = new_output({batch, channels, size[0], size[1]}, wanted, memory_format);
    p.output = output.mutable_data_ptr();
    p.output_dtype = pixel_dtype(output, "dtype");
    set_strides(output, p.output_stride);
    if (output.numel() > 0) {
        const auto kernel = in_float64(p) ? kernels().affine_warp_f64 : kernels().affine_warp;
        parallel_units(batch * size[0], row_grain(p.output_width * p.channels),
                       [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
    }
    return output;
}

// As empty_like, but planes take over the memory of an output that was dropped.
Tensor like(const Tensor& images) {
    if (!images.is_contiguous()) return torch::stable::empty_like(images);
    const std::vector<int64_t> sizes(images.sizes().begin(), images.sizes().end());
    return new_output(sizes, images.scalar_type(), MemoryFormat::Contiguous);
}

// float64 sums per output row, as the gradient of `matrix`: its shape and dtype, summed in order over the rows, and
// over the batch where one matrix served all.
Tensor matrix_gradient(const std::vector<double>& sums, const AffineWarp& p, const Tensor& matrix) {
    const int64_t count = matrix.size(0), entries = matrix.size(1) * 3;
    Tensor result = torch::stable::empty({count, matrix.size(1), 3}, ScalarType::Double, std::nullopt, matrix.device());
    double* to = result.mutable_data_ptr<double>();
    std::fill(to, to + count * entries, 0.0);
    for (int64_t row = 0; row < p.batch * p.output_height; ++row) {
        const int64_t image = count > 1 ? row / p.output_height : 0;
        for (int64_t i = 0; i < entries; ++i) to[image * entries + i] += sums[row * 9 + i];
    }
    return torch::stable::to(result, matrix.scalar_type());
}

std::tuple<Tensor, Tensor> affine_warp_backward(Tensor grad, Tensor images, Tensor matrix, std::string interpolation,
                                                std::string padding_mode, std::vector<double> fill, bool antialias,
                                                std::optional<Tensor> color_matrix, std::vector<double> std,
                                                bool needs_images, bool needs_matrix) {
    STD_TORCH_CHECK(images.dim() == 4 && grad.dim() == 4 && grad.size(0) == images.size(0) &&
                        grad.size(1) == images.size(1) && grad.size(2) < (1 << 30) && grad.size(3) < (1 << 30),
                    "grad, images: expected (N, C, H, W) of as many images and channels");
    const int64_t batch = images.size(0);
    STD_TORCH_CHECK(factors_fit({}, std, images.size(1)), kWrongFactors);
    const ChannelFactors factors({}, std, images.size(1));
    const std::vector<double> matrices = homographies(matrix, batch);
    const std::vector<double> colors =
        color_matrix ? doubles(*color_matrix, batch, 4, 12, "color_matrix") : std::vector<double>();
    STD_TORCH_CHECK(!color_matrix || color_matrix->size(1) == 3, "color_matrix: expected shape (N, 3, 4)");
    AffineWarpBackward b{};
    b.warp = describe(images, matrices, interpolation, padding_mode, fill, antialias, colors, factors);
    b.warp.output_height = grad.size(2);
    b.warp.output_width = grad.size(3);
    b.warp.output_dtype = pixel_dtype(grad, "grad");
    set_strides(grad, b.warp.output_stride);
    STD_TORCH_CHECK(b.warp.images_dtype != DType::u8 && b.warp.output_dtype != DType::u8,
                    "grad, images: expected floating dtypes");
    b.grad = grad.const_data_ptr();
    Tensor grad_images = needs_images ? like(images) : torch::stable::new_empty(images, {0});
    const AffineWarpGradients kernel =
        in_float64(b.warp) ? kernels().affine_warp_backward_f64 : kernels().affine_warp_backward;
    if (needs_images) {
        b.grad_images = grad_images.mutable_data_ptr();
        set_strides(grad_images, b.grad_images_stride);
        parallel_units(batch * b.warp.height, row_grain(b.warp.width * b.warp.channels),
                       [&](int64_t begin, int64_t end) { kernel.images(b, begin, end); });
    }
    std::vector<double> sums(needs_matrix ? batch * b.warp.output_height * 9 : 0);
    b.grad_matrix = sums.data();
    if (needs_matrix)
        parallel_units(batch * b.warp.output_height, row_grain(b.warp.output_width * b.warp.channels),
                       [&](int64_t begin, int64_t end) { kernel.matrix(b, begin, end); });
    return {grad_images, needs_matrix ? matrix_gradient(sums, b.warp, matrix) : torch::stable::new_empty(matrix, {0})};
}

}  // namespace
}  // namespace imgopt

STABLE_TORCH_LIBRARY_IMPL(imgopt_fast, CPU, m) {
    m.impl("affine_warp", TORCH_BOX(&imgopt::affine_warp));
    m.impl("affine_warp_backward", TORCH_BOX(&imgopt::affine_warp_backward));
}

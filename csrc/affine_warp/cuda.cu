// affine_warp on torch's CUDA tensors: the two operations, and the forward pass's launches.
#include <algorithm>
#include <tuple>
#include <type_traits>

#include "cuda_backward_call.h"
#include "cuda_call.h"
#include "cuda_forward.h"

namespace imgopt {
namespace {

using torch::headeronly::MemoryFormat;

constexpr unsigned kMostAcross = 65535;  // of the grid's second and third axis

// --- forward -------------------------------------------------------------------------------------------------------

template <class R>
WarpNumbers<R> warp_numbers(const AffineWarp& p, const std::vector<double>& fill, const ChannelFactors& factors,
                            bool colored, int64_t first, int64_t count) {
    const bool bytes = p.images_dtype == DType::u8;
    const double whole = bytes && p.interpolation != Interpolation::nearest ? kWeightSum : 1;
    const double unit = bytes ? 1 / (255 * whole) : 1;
    WarpNumbers<R> n{};
    n.unit = static_cast<R>(unit);
    n.levels = static_cast<R>(colored || !bytes ? 255 : 1 / whole);
    for (int64_t i = 0; i < count; ++i) {
        const size_t c = static_cast<size_t>(first + i);
        n.fill[i] = static_cast<R>(fill[c]);
        n.fill_bytes[i] = bytes ? static_cast<uint8_t>(fill[c]) : 0;
        n.filled[i] = static_cast<R>(fill[c]) * static_cast<R>(whole);
        n.factor[i] = static_cast<R>(factors.scale[c] * (colored ? 1 : unit));
        n.add[i] = static_cast<R>(factors.offset[c]);
    }
    return n;
}

int64_t element_bytes(DType dtype) {
    switch (dtype) {
        case DType::u8: return 1;
        case DType::f16:
        case DType::bf16: return 2;
        case DType::f32: return 4;
        default: return 8;
    }
}

const void* moved(const void* p, int64_t bytes) { return p ? static_cast<const uint8_t*>(p) + bytes : nullptr; }
MatrixView moved(const MatrixView& m, int64_t images) {
    MatrixView to = m;
    to.data = moved(m.data, images * m.step * (m.wide ? 8 : 4));
    return to;
}

// The call of the images from one on.
WarpCall from_image(WarpCall call, int64_t image) {
    AffineWarp& p = call.p;
    const int64_t bytes = element_bytes(p.images_dtype);
    p.images = moved(p.images, image * p.images_stride[0] * bytes);
    p.output = const_cast<void*>(moved(p.output, image * p.output_stride[0] * element_bytes(p.output_dtype)));
    p.table = static_cast<const uint8_t*>(moved(p.table, image * p.table_stride));
    call.matrix = moved(call.matrix, image);
    call.color = moved(call.color, image);
    call.plans = static_cast<const ImagePlan*>(moved(call.plans, image * static_cast<int64_t>(sizeof(ImagePlan))));
    call.boxed = moved(call.boxed, image * call.boxed_stride * bytes);
    return call;
}

// What exceeds the grid's second and third axis takes further launches.
template <class Kernel, class R>
void launch_tiles(const Launcher& launch, Kernel kernel, int tile_rows, int threads, size_t shared,
                  const WarpCall& call, const WarpNumbers<R>& numbers) {
    const AffineWarp& p = call.p;
    const int64_t rows = ceil_div(p.output_height, tile_rows);
    for (int64_t image = 0; image < p.batch; image += kMostAcross)
        for (int64_t row = 0; row < rows; row += kMostAcross) {
            WarpCall part = from_image(call, image);
            part.first_row = static_cast<int32_t>(row * tile_rows);
            const dim3 grid(blocks_for(p.output_width, kTileSide),
                            static_cast<unsigned>(std::min<int64_t>(rows - row, kMostAcross)),
                            static_cast<unsigned>(std::min<int64_t>(p.batch - image, kMostAcross)));
            launch(kernel, grid, threads, shared, part, numbers);
        }
}

template <class T, class R, int C>
void launch_warp(const Launcher& launch, WarpCall call, const WarpNumbers<R>& numbers) {
    constexpr bool staged = sizeof(T) == 1 && sizeof(R) == 4;
    call.order = order_of(call.p, element_bytes(call.p.output_dtype), staged ? kTilePixels : kImagePixels, C);
    const auto run = [&]<Interpolation i>(std::integral_constant<Interpolation, i>) {
        if constexpr (staged)
            launch_tiles(launch, warp_tiles<C, i>, kTileRows, kTileThreads, kRegionBytes, call, numbers);
        else
            launch_tiles(launch, warp_images<T, R, C, i>, kTileSide, kImageThreads, 0, call, numbers);
    };
    switch (call.p.interpolation) {
        case Interpolation::nearest: return run(std::integral_constant<Interpolation, Interpolation::nearest>{});
        case Interpolation::bilinear: return run(std::integral_constant<Interpolation, Interpolation::bilinear>{});
        default: return run(std::integral_constant<Interpolation, Interpolation::bicubic>{});
    }
}

// Three channels and four go through together: the colour matrix mixes three, and pixels of both are often adjacent.
template <class T, class R>
void launch_channels(const Launcher& launch, const WarpCall& call, const WarpNumbers<R>& numbers) {
    if (call.p.channels == 3) return launch_warp<T, R, 3>(launch, call, numbers);
    if constexpr (sizeof(T) == 1 && sizeof(R) == 4)
        if (call.p.channels == 4) return launch_warp<T, R, 4>(launch, call, numbers);
    launch_warp<T, R, 1>(launch, call, numbers);
}

// Whether groups of four pixels can be loaded as words: rows and planes that start at whole words, packed pixels, and
// offsets within an image that take 32 bits.
void set_words(WarpCall& call) {
    const AffineWarp& p = call.p;
    const int64_t* stride = p.images_stride;
    call.planar = stride[3] == 1;
    const bool packed =
        call.planar || ((p.channels == 3 || p.channels == 4) && stride[1] == 1 && stride[3] == p.channels);
    const bool many = call.planar && p.channels > 1;
    const uint64_t starts = reinterpret_cast<uintptr_t>(p.images) | static_cast<uint64_t>(stride[0]) |
                            static_cast<uint64_t>(stride[2]) | static_cast<uint64_t>(many ? stride[1] : 0);
    call.words = packed && !p.table && starts % 4 == 0 && p.width >= 4 && stride[2] >= 0 &&
                 stride[2] * p.height < (int64_t{1} << 31) && (!many || (stride[1] >= 0 && stride[1] < (1 << 30)));
}

Tensor affine_warp(Tensor images, Tensor matrix, std::vector<int64_t> size, std::string interpolation,
                   std::string padding_mode, std::vector<double> fill, bool antialias, std::optional<Tensor> table,
                   std::optional<Tensor> color_matrix, std::vector<double> mean, std::vector<double> std,
                   std::optional<ScalarType> dtype, MemoryFormat memory_format) {
    STD_TORCH_CHECK(images.dim() == 4 && size.size() == 2 && size[0] >= 0 && size[1] >= 0 && size[0] < (1 << 30) &&
                        size[1] < (1 << 30),
                    "images, size: expected (N, C, H, W) and (height, width)");
    const Launcher launch(images);
    const int64_t batch = images.size(0), channels = images.size(1);
    STD_TORCH_CHECK(factors_fit(mean, std, channels), kWrongFactors);
    const ChannelFactors factors(mean, std, channels);
    AffineWarp p = describe(images, interpolation, padding_mode, fill.size(), antialias);
    Tensor levels;
    if (table) {
        check_device(*table, "table");
        STD_TORCH_CHECK(p.images_dtype == DType::u8 && table->scalar_type() == ScalarType::Byte && table->dim() == 3 &&
                            (table->size(0) == batch || table->size(0) == 1) && table->size(1) == channels &&
                            table->size(2) == 256,
                        "table: expected uint8 images and (N, C, 256) uint8");
        levels = torch::stable::contiguous(*table);
        p.table = levels.const_data_ptr<uint8_t>();
        p.table_stride = table->size(0) > 1 ? channels * 256 : 0;
    }
    p.output_height = size[0];
    p.output_width = size[1];
    Tensor output = torch::stable::empty({batch, channels, size[0], size[1]}, dtype.value_or(images.scalar_type()),
                                         std::nullopt, images.device(), std::nullopt, memory_format);
    p.output = output.mutable_data_ptr();
    p.output_dtype = pixel_dtype(output, "dtype");
    set_strides(output, p.output_stride);
    if (output.numel() == 0) return output;

    const ColorAndMatrix views(p, matrix, color_matrix);
    const Tensor plans = antialias ? make_plans(launch, p, images, views) : Tensor();
    const ImagePlan* plan_data = antialias ? static_cast<const ImagePlan*>(plans.const_data_ptr()) : nullptr;
    const Tensor boxed = filter_boxes(launch, p, images, plan_data);
    const bool colored = color_matrix.has_value();
    const bool wide = p.images_dtype == DType::f64 || p.output_dtype == DType::f64;
    for (int64_t first = 0; first < channels; first += kLaunchChannels) {
        const int64_t count = std::min<int64_t>(kLaunchChannels, channels - first);
        WarpCall call{p,
                      antialias ? matrices_of(plan_data) : views.matrix,
                      views.color,
                      plan_data,
                      boxed.const_data_ptr(),
                      boxed_elements(p),
                      first,
                      count};
        set_words(call);
        by_dtype(p.images_dtype, [&]<class T>(T) {
            if (sizeof(T) == 8 || wide)
                launch_channels<T>(launch, call, warp_numbers<double>(p, fill, factors, colored, first, count));
            else if constexpr (sizeof(T) < 8)
                launch_channels<T>(launch, call, warp_numbers<float>(p, fill, factors, colored, first, count));
        });
    }
    return output;
}

// --- backward ------------------------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor> affine_warp_backward(Tensor grad, Tensor images, Tensor matrix, std::string interpolation,
                                                std::string padding_mode, std::vector<double> fill, bool antialias,
                                                std::optional<Tensor> color_matrix, std::vector<double> std,
                                                bool needs_images, bool needs_matrix) {
    STD_TORCH_CHECK(images.dim() == 4 && grad.dim() == 4 && grad.size(0) == images.size(0) &&
                        grad.size(1) == images.size(1) && grad.size(2) < (1 << 30) && grad.size(3) < (1 << 30),
                    "grad, images: expected (N, C, H, W) of as many images and channels");
    const Launcher launch(images);
    check_device(grad, "grad");
    STD_TORCH_CHECK(factors_fit({}, std, images.size(1)), kWrongFactors);
    const ChannelFactors factors({}, std, images.size(1));
    AffineWarp p = describe(images, interpolation, padding_mode, fill.size(), antialias);
    p.output_height = grad.size(2);
    p.output_width = grad.size(3);
    p.output_dtype = pixel_dtype(grad, "grad");
    set_strides(grad, p.output_stride);
    STD_TORCH_CHECK(p.images_dtype != DType::u8 && p.output_dtype != DType::u8,
                    "grad, images: expected floating dtypes");
    Tensor grad_images = needs_images ? torch::stable::empty_like(images) : torch::stable::new_empty(images, {0});
    Tensor grad_matrix = needs_matrix ? torch::stable::new_zeros(matrix, {matrix.size(0), matrix.size(1), 3})
                                      : torch::stable::new_empty(matrix, {0});
    if (grad.numel() == 0) {
        if (needs_images) torch::stable::zero_(grad_images);
        return {grad_images, grad_matrix};
    }
    const Tensor plans = make_plans(launch, p, images, ColorAndMatrix(p, matrix, color_matrix));
    const ImagePlan* plan_data = static_cast<const ImagePlan*>(plans.const_data_ptr());
    const Tensor boxed = filter_boxes(launch, p, images, plan_data);
    const BackwardCall call{p, plan_data, boxed.const_data_ptr(), boxed_elements(p), color_matrix.has_value()};
    const auto run = [&](const auto& backward) {
        if (needs_images) backward.images(grad_images);
        if (needs_matrix)
            grad_matrix = torch::stable::to(backward.matrix(matrix.size(0), matrix.size(1)), matrix.scalar_type());
    };
    const bool wide = p.images_dtype == DType::f64 || p.output_dtype == DType::f64;
    by_dtype(p.images_dtype, [&]<class T>(T) {
        if constexpr (sizeof(T) == 8) {
            run(Backward<T, double>(launch, call, images, fill, factors, grad.const_data_ptr()));
        } else if constexpr (sizeof(T) > 1) {
            if (wide)
                run(Backward<T, double>(launch, call, images, fill, factors, grad.const_data_ptr()));
            else
                run(Backward<T, float>(launch, call, images, fill, factors, grad.const_data_ptr()));
        }
    });
    return {grad_images, grad_matrix};
}

}  // namespace
}  // namespace imgopt

STABLE_TORCH_LIBRARY_IMPL(imgopt_fast, IMGOPT_CUDA_KEY, m) {
    m.impl("affine_warp", TORCH_BOX(&imgopt::affine_warp));
    m.impl("affine_warp_backward", TORCH_BOX(&imgopt::affine_warp_backward));
}

// affine_warp on torch's CUDA tensors. The Python side has validated the arguments; here only what memory safety rests
// on is checked again. Matrices stay on the device: a small kernel turns them into plans, so nothing synchronizes.
#include <algorithm>
#include <tuple>
#include <type_traits>

#include "binding.h"
#include "cuda_backward.h"
#include "cuda_forward.h"

namespace imgopt {
namespace {

using torch::headeronly::MemoryFormat;

constexpr unsigned kMostAcross = 65535;  // of the grid's second and third axis

void set_strides(const Tensor& t, int64_t* to) {
    const auto strides = t.strides();
    for (int i = 0; i < 4; ++i) to[i] = strides[i];
}

DType pixel_dtype(const Tensor& t, const char* name) {
    const DType dtype = dtype_of(t, name);
    STD_TORCH_CHECK(dtype != DType::i8 && dtype != DType::i32, name, ": expected uint8 or floating");
    return dtype;
}

// A matrix per image, and what keeps its memory.
struct Matrices {
    Tensor memory;
    MatrixView view;

    Matrices(const Tensor& t, int64_t batch, int64_t columns, const char* name) : memory(torch::stable::contiguous(t)) {
        check_device(t, name);
        STD_TORCH_CHECK(t.dim() == 3 && (t.size(0) == batch || t.size(0) == 1) && t.size(2) == columns &&
                            (t.size(1) == 3 || (columns == 3 && t.size(1) == 2)),
                        name, ": wrong shape");
        const bool wide = t.scalar_type() == ScalarType::Double;
        STD_TORCH_CHECK(wide || t.scalar_type() == ScalarType::Float, name, ": expected float32 or float64");
        view = {memory.const_data_ptr(), t.size(0) > 1 ? t.size(1) * t.size(2) : 0, static_cast<int>(t.size(1)), wide};
    }
};

// What forward and backward share.
AffineWarp describe(const Tensor& images, const std::string& interpolation, const std::string& padding_mode,
                    size_t fills, bool antialias) {
    check_device(images, "images");
    AffineWarp p{};
    p.batch = images.size(0);
    p.channels = images.size(1);
    p.height = images.size(2);
    p.width = images.size(3);
    STD_TORCH_CHECK(p.height > 0 && p.width > 0 && p.height < (1 << 30) && p.width < (1 << 30),
                    "images: expected sides between 1 and 2^30 - 1");
    STD_TORCH_CHECK(static_cast<int64_t>(fills) == p.channels, "fill: expected one value per channel");
    p.images = images.const_data_ptr();
    p.images_dtype = pixel_dtype(images, "images");
    set_strides(images, p.images_stride);
    STD_TORCH_CHECK(set_modes(p, interpolation, padding_mode), kUnknownMode);
    p.antialias = antialias;
    return p;
}

struct ColorAndMatrix {
    Matrices matrices;
    std::optional<Matrices> colors;
    MatrixView matrix, color;  // color.data is null where there is none

    ColorAndMatrix(const AffineWarp& p, const Tensor& m, const std::optional<Tensor>& c)
        : matrices(m, p.batch, 3, "matrix") {
        STD_TORCH_CHECK(!c || p.channels == 3, "color_matrix: expected three channels");
        if (c) colors.emplace(*c, p.batch, 4, "color_matrix");
        matrix = matrices.view;
        color = colors ? colors->view : MatrixView{};
    }
};

Tensor make_plans(const Launcher& launch, const AffineWarp& p, const Tensor& images, const ColorAndMatrix& views) {
    Tensor plans = device_bytes(images, p.batch * static_cast<int64_t>(sizeof(ImagePlan)));
    launch(plan_images, blocks_for(p.batch, 32), 32, 0, p, views.matrix, views.color,
           static_cast<ImagePlan*>(plans.mutable_data_ptr()));
    return plans;
}

// Calls body(T{}) for the dtype of the images.
template <class Body>
void by_dtype(DType dtype, const Body& body) {
    switch (dtype) {
        case DType::u8: return body(uint8_t{});
        case DType::f16: return body(Half{});
        case DType::bf16: return body(BFloat16{});
        case DType::f32: return body(float{});
        default: return body(double{});
    }
}

// The averaged images where antialias is on: memory for all, written for those that have a box.
Tensor filter_boxes(const Launcher& launch, const AffineWarp& p, const Tensor& images, const ImagePlan* plans) {
    if (!p.antialias) return device_bytes(images, 1);
    const int64_t elements = boxed_elements(p);
    Tensor boxed = torch::stable::new_empty(images, {p.batch * elements});
    const dim3 grid(blocks_for(p.batch, 1), static_cast<unsigned>(std::min<int64_t>(1024, ceil_div(elements, 256))));
    by_dtype(p.images_dtype, [&]<class T>(T) {
        launch(box_filter<T>, grid, 256, 0, p, plans, static_cast<T*>(boxed.mutable_data_ptr()), elements);
    });
    return boxed;
}

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
        n.filled[i] = static_cast<R>(fill[c]) * static_cast<R>(whole);
        n.factor[i] = static_cast<R>(factors.scale[c] * (colored ? 1 : unit));
        n.add[i] = static_cast<R>(factors.offset[c]);
    }
    return n;
}

template <class T, class R, int C>
void launch_warp(const Launcher& launch, const WarpCall& call, const WarpNumbers<R>& numbers) {
    const AffineWarp& p = call.p;
    // A tile's place costs no division; what exceeds the second and third axis goes into the kernel's loops.
    const dim3 grid(static_cast<unsigned>(ceil_div(p.output_width, kTileSide)),
                    std::min(blocks_for(p.output_height, kTileSide), kMostAcross),
                    std::min(blocks_for(p.batch, 1), kMostAcross));
    constexpr int threads = kTileThreads<T, R, C>;
    constexpr size_t shared = can_be_staged<T, R, C>() ? kRegionBytes : 0;
    switch (p.interpolation) {
        case Interpolation::nearest:
            return launch(warp_images<T, R, C, Interpolation::nearest>, grid, threads, shared, call, numbers);
        case Interpolation::bilinear:
            return launch(warp_images<T, R, C, Interpolation::bilinear>, grid, threads, shared, call, numbers);
        default: return launch(warp_images<T, R, C, Interpolation::bicubic>, grid, threads, shared, call, numbers);
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
        const WarpCall call{p,     views.matrix, views.color, plan_data, boxed.const_data_ptr(), boxed_elements(p),
                            first, count};
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

// Blocks (images, pieces of `items` each) for kernels that loop along both.
dim3 image_grid(const AffineWarp& p, int64_t items, int64_t most) {
    const int64_t pieces = std::clamp<int64_t>(ceil_div(items, kBackwardThreads), 1, most);
    return dim3(blocks_for(p.batch, 1), static_cast<unsigned>(pieces));
}

// Calls body(std::integral_constant<int, taps>) for the interpolation.
template <class Body>
void by_taps(Interpolation interpolation, const Body& body) {
    switch (interpolation) {
        case Interpolation::nearest: return body(std::integral_constant<int, 1>{});
        case Interpolation::bilinear: return body(std::integral_constant<int, 2>{});
        default: return body(std::integral_constant<int, 4>{});
    }
}

template <class R>
WarpNumbers<R> backward_numbers(const std::vector<double>& fill, const ChannelFactors& factors, int64_t first,
                                int64_t count) {
    WarpNumbers<R> n{};
    for (int64_t i = 0; i < count; ++i) {
        n.fill[i] = static_cast<R>(fill[static_cast<size_t>(first + i)]);
        n.factor[i] = static_cast<R>(factors.scale[static_cast<size_t>(first + i)]);
    }
    return n;
}

// One backward call: T of the images, R of the arithmetic.
template <class T, class R>
class Backward {
  public:
    Backward(const Launcher& launch, const BackwardCall& call, const Tensor& like, const std::vector<double>& fill,
             const ChannelFactors& factors, const void* grad)
        : launch_(launch), call_(call), like_(like), fill_(fill), factors_(factors) {
        const AffineWarp& p = call.p;
        flow_ = workspace(p.batch * outputs() * p.channels, sizeof(R));
        largest_ = workspace(p.batch, sizeof(uint32_t));
        torch::stable::zero_(largest_);
        for_channels([&](int64_t first, int64_t count, const WarpNumbers<R>& n) {
            by_taps(p.interpolation, [&]<int taps>(std::integral_constant<int, taps>) {
                launch_(make_flow<T, R, taps>, image_grid(p, outputs(), 4096), kBackwardThreads, 0, call_, n, grad,
                        first, count, flow(), largest());
            });
        });
    }

    void images(const Tensor& gradient) const {
        const AffineWarp& p = call_.p;
        const int64_t values = p.batch * p.height * p.width * p.channels;
        const bool gather = p.padding == Padding::constant;
        Tensor memory = workspace(values, gather ? sizeof(R) : sizeof(uint64_t));
        R* source = gather ? static_cast<R*>(memory.mutable_data_ptr()) : nullptr;
        unsigned long long* sums = gather ? nullptr : static_cast<unsigned long long*>(memory.mutable_data_ptr());
        if (!gather) torch::stable::zero_(memory);
        by_taps(p.interpolation, [&]<int taps>(std::integral_constant<int, taps>) {
            if (gather)
                launch_(gather_flow<R, taps>, image_grid(p, p.height * p.width, 65535), kBackwardThreads, 0, call_,
                        flow(), source);
            else
                launch_(scatter_flow<R, taps>, image_grid(p, outputs(), 65535), kBackwardThreads, 0, call_, flow(),
                        largest(), sums);
        });
        AffineWarp to{};
        Tensor written = gradient;
        to.output = written.mutable_data_ptr();
        set_strides(gradient, to.output_stride);
        launch_(store_gradient<T, R>, image_grid(p, p.height * p.width * p.channels, 65535), kBackwardThreads, 0, call_,
                source, sums, largest(), to);
    }

    // float64, (count, rows, 3).
    Tensor matrix(int64_t count, int64_t rows) const {
        const AffineWarp& p = call_.p;
        Tensor result = torch::stable::new_zeros(like_, {count, rows, 3}, ScalarType::Double);
        if (p.interpolation == Interpolation::nearest) return result;
        const dim3 grid = image_grid(p, ceil_div(outputs(), 16), 64);
        Tensor partial = workspace(p.batch * grid.y * kMatrixEntries, sizeof(double));
        double* sums = static_cast<double*>(partial.mutable_data_ptr());
        for_channels([&](int64_t first, int64_t channels, const WarpNumbers<R>& n) {
            by_taps(p.interpolation, [&]<int taps>(std::integral_constant<int, taps>) {
                launch_(matrix_partial<T, R, taps>, grid, kBackwardThreads, 0, call_, n, flow(), first, channels, sums);
            });
        });
        launch_(matrix_total, blocks_for(count, 128), 128, 0, call_, sums, static_cast<int>(grid.y), count,
                static_cast<int>(3 * rows), static_cast<double*>(result.mutable_data_ptr()));
        return result;
    }

  private:
    int64_t outputs() const { return call_.p.output_height * call_.p.output_width; }
    R* flow() const { return static_cast<R*>(flow_.mutable_data_ptr()); }
    uint32_t* largest() const { return static_cast<uint32_t*>(largest_.mutable_data_ptr()); }
    Tensor workspace(int64_t count, size_t size) const {
        return device_bytes(like_, count * static_cast<int64_t>(size));
    }

    template <class Body>
    void for_channels(const Body& body) const {
        for (int64_t first = 0; first < call_.p.channels; first += kLaunchChannels) {
            const int64_t count = std::min<int64_t>(kLaunchChannels, call_.p.channels - first);
            body(first, count, backward_numbers<R>(fill_, factors_, first, count));
        }
    }

    const Launcher& launch_;
    BackwardCall call_;
    Tensor like_, flow_, largest_;
    const std::vector<double>& fill_;
    const ChannelFactors& factors_;
};

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

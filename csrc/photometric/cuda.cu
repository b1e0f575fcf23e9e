// adjust_hue and adjust_sharpness for torch on CUDA: a pass over memory each, with the arithmetic of the CPU, bit for
// bit. The amounts stay on the device.
#include "../cuda.h"
#include "arithmetic.h"

namespace imgopt {
namespace {

using torch::headeronly::MemoryFormat;

constexpr int kThreads = 256;

struct Hues {
    const double* shift;  // turns, per image
    int64_t batch, pixels, channel, pixel;
};

template <class T>
__global__ void __launch_bounds__(kThreads) hue_pixels(const Hues p, const T* images, T* output) {
    const int64_t step = int64_t{gridDim.x} * kThreads;
    for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < p.batch * p.pixels; i += step) {
        const auto [image, pixel] = split(i, p.pixels);
        const int64_t at = image * 3 * p.pixels + pixel * p.pixel;
        const double turns = p.shift[image];
        float rgb[3];
        for (int c = 0; c < 3; ++c) rgb[c] = static_cast<float>(load_cached(images + at + c * p.channel));
        const Places places_of = places(static_cast<float>(6.0 * (turns - __builtin_floor(turns))));
        turn_pixel(rgb[0], rgb[1], rgb[2], places_of);
        for (int c = 0; c < 3; ++c) store(rgb[c], output + at + c * p.channel);
    }
}

// Sharpness of contract.h; `weight` is not used, since the factors are on the device.
template <class T>
__global__ void __launch_bounds__(kThreads)
    sharpen_pixels(const Sharpness p, const double* factor, int64_t batch, float most) {
    const int64_t plane = p.height * p.row, count = batch * p.planes * plane, step = int64_t{gridDim.x} * kThreads;
    const T* images = static_cast<const T*>(p.images);
    T* output = static_cast<T*>(p.output);
    for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < count; i += step) {
        const auto [row, x] = split(i, p.row);
        const auto [plane_of, y] = split(row, p.height);
        const T* at = images + i;
        if (y == 0 || y == p.height - 1 || x < p.step || x >= p.row - p.step) {
            output[i] = *at;
            continue;
        }
        const float weight = static_cast<float>((1.0 - factor[split(plane_of, p.planes).quotient]) / 13.0);
        sharpen(*at, static_cast<float>(excess(at - p.row, at, at + p.row, p.step)), weight, most, output + i);
    }
}

// `images` in one of the two dense layouts.
struct Dense {
    Tensor tensor;
    bool interleaved;

    explicit Dense(const Tensor& images) {
        check_device(images, "images");
        STD_TORCH_CHECK(images.dim() == 4, "images: expected (N, C, H, W)");
        const DType dtype = dtype_of(images, "images");
        STD_TORCH_CHECK(dtype == DType::u8 || dtype == DType::f32, "images: expected uint8 or float32");
        interleaved = images.size(1) > 1 && images.stride(1) == 1;
        tensor = torch::stable::contiguous(images, interleaved ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
    }
};

Tensor amounts(const Tensor& values, int64_t batch, const char* name) {
    check_device(values, name);
    STD_TORCH_CHECK(values.dim() == 1 && values.size(0) == batch && values.scalar_type() == ScalarType::Double, name,
                    ": expected (N,) float64");
    return torch::stable::contiguous(values);
}

Tensor turn_images(Tensor images, Tensor shift) {
    const Dense dense(images);
    STD_TORCH_CHECK(images.size(1) == 3, "images: expected three channels");
    const Launcher launch(images);
    const Tensor turns = amounts(shift, images.size(0), "shift");
    Tensor output = torch::stable::empty_like(dense.tensor);
    if (output.numel() == 0) return output;
    const int64_t pixels = images.size(2) * images.size(3);
    const Hues p{turns.const_data_ptr<double>(), images.size(0), pixels, dense.interleaved ? 1 : pixels,
                 dense.interleaved ? 3 : 1};
    const unsigned blocks = blocks_for(p.batch * pixels, kThreads);
    if (images.scalar_type() == ScalarType::Byte)
        launch(hue_pixels<uint8_t>, blocks, kThreads, 0, p, dense.tensor.const_data_ptr<uint8_t>(),
               output.mutable_data_ptr<uint8_t>());
    else
        launch(hue_pixels<float>, blocks, kThreads, 0, p, dense.tensor.const_data_ptr<float>(),
               output.mutable_data_ptr<float>());
    return output;
}

Tensor sharpen_images(Tensor images, Tensor factor) {
    const Dense dense(images);
    const Launcher launch(images);
    const Tensor factors = amounts(factor, images.size(0), "factor");
    Tensor output = torch::stable::empty_like(dense.tensor);
    if (output.numel() == 0) return output;
    const int64_t channels = images.size(1), step = dense.interleaved ? channels : 1;
    const bool bytes = images.scalar_type() == ScalarType::Byte;
    const Sharpness p{bytes ? DType::u8 : DType::f32,
                      dense.tensor.const_data_ptr(),
                      output.mutable_data_ptr(),
                      nullptr,
                      dense.interleaved ? 1 : channels,
                      images.size(2),
                      images.size(3) * step,
                      step};
    launch(bytes ? sharpen_pixels<uint8_t> : sharpen_pixels<float>, blocks_for(output.numel(), kThreads), kThreads, 0,
           p, factors.const_data_ptr<double>(), images.size(0), bytes ? 255.0f : 1.0f);
    return output;
}

}  // namespace
}  // namespace imgopt

STABLE_TORCH_LIBRARY_IMPL(imgopt_fast, IMGOPT_CUDA_KEY, m) {
    m.impl("adjust_hue", TORCH_BOX(&imgopt::turn_images));
    m.impl("adjust_sharpness", TORCH_BOX(&imgopt::sharpen_images));
}

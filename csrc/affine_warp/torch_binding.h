// What the torch bindings of affine_warp on the CPU and on CUDA check and describe alike.
#pragma once

#include <string>

#include "../torch_stable.h"
#include "binding.h"

namespace imgopt {
namespace {

inline void set_strides(const Tensor& t, int64_t* to) {
    const auto strides = t.strides();
    for (int i = 0; i < 4; ++i) to[i] = strides[i];
}

inline DType pixel_dtype(const Tensor& t, const char* name) {
    const DType dtype = dtype_of(t, name);
    STD_TORCH_CHECK(dtype != DType::i8 && dtype != DType::i32, name, ": expected uint8 or floating");
    return dtype;
}

// A warp of `images` with `fills` values to fill with; the matrices and the epilogue are the caller's.
inline AffineWarp warp_of(const Tensor& images, const std::string& interpolation, const std::string& padding_mode,
                          size_t fills, bool antialias) {
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

}  // namespace
}  // namespace imgopt

// affine_warp on torch's CUDA tensors: what the forward and the backward call make of their arguments. The Python side
// has validated them; here only what memory safety rests on is checked again. Matrices stay on the device: a small
// kernel turns them into plans, so nothing synchronizes.
#pragma once

#include <algorithm>
#include <cstddef>
#include <optional>
#include <string>

#include "cuda_plan.h"
#include "torch_binding.h"

namespace imgopt {
namespace {

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
    return warp_of(images, interpolation, padding_mode, fills, antialias);
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

// The matrices that plan_images() has prepared.
MatrixView matrices_of(const ImagePlan* plans) {
    static_assert(offsetof(ImagePlan, map) == 0 && offsetof(Map, m) == 0 && sizeof(ImagePlan) % 8 == 0);
    return {plans, sizeof(ImagePlan) / 8, 3, true};
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

}  // namespace
}  // namespace imgopt

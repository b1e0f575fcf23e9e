// Gradients of affine_warp for every dtype, mode and layout: which of the loops of backward_images.h and
// backward_matrix.h serve a call. All instruction sets compile the same text, to the same bits; float64 the scalar unit
// alone.
#pragma once

#include "backward_images.h"
#include "backward_matrix.h"

namespace imgopt {
namespace {

// Calls body.template operator()<T>() for the type of the images, float64 where the arithmetic R is.
template <class R, class Body>
void by_type(const AffineWarp& p, const Body& body) {
    switch (p.images_dtype) {
        case DType::f16: return body.template operator()<Half>();
        case DType::bf16: return body.template operator()<BFloat16>();
        case DType::f32: return body.template operator()<float>();
        default:
            if constexpr (sizeof(R) == sizeof(double)) body.template operator()<double>();
    }
}

template <int taps, class R>
void images_gradient_of(const AffineWarpBackward& b, int64_t begin, int64_t end) {
    by_type<R>(b.warp, [&]<class T>() {
        b.warp.channels == 1 ? images_backward<taps, 1, T, R>(b, begin, end)
                             : images_backward<taps, kFlowChannels, T, R>(b, begin, end);
    });
}

template <class R>
void images_gradient(const AffineWarpBackward& b, int64_t begin, int64_t end) {
    switch (b.warp.interpolation) {
        case Interpolation::nearest: return images_gradient_of<1, R>(b, begin, end);
        case Interpolation::bilinear: return images_gradient_of<2, R>(b, begin, end);
        default: return images_gradient_of<4, R>(b, begin, end);
    }
}

template <class R>
void matrix_gradient(const AffineWarpBackward& b, int64_t begin, int64_t end) {
    switch (b.warp.interpolation) {
        case Interpolation::nearest:
            for (int64_t i = 9 * begin; i < 9 * end; ++i) b.grad_matrix[i] = 0;
            return;
        case Interpolation::bilinear:
            return by_type<R>(b.warp, [&]<class T>() { matrix_backward<2, T, R>(b, begin, end); });
        default: return by_type<R>(b.warp, [&]<class T>() { matrix_backward<4, T, R>(b, begin, end); });
    }
}

// In the arithmetic R: double where images or output are float64.
template <class R>
constexpr AffineWarpGradients kWarpBackward{images_gradient<R>, matrix_gradient<R>};

}  // namespace
}  // namespace imgopt

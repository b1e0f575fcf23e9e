// Gradients of affine_warp for every dtype, mode and layout: which of the loops of backward_images.h and
// backward_matrix.h serve a call. All instruction sets compile the same text, to the same bits.
#pragma once

#include "backward_images.h"
#include "backward_matrix.h"

namespace imgopt {
namespace {

// Calls body.template operator()<T, R>(): the type of the images, and that of the arithmetic.
template <class Body>
void by_types(const AffineWarp& p, const Body& body) {
    const bool wide = p.output_dtype == DType::f64;
    switch (p.images_dtype) {
        case DType::f16:
            return wide ? body.template operator()<Half, double>() : body.template operator()<Half, float>();
        case DType::bf16:
            return wide ? body.template operator()<BFloat16, double>() : body.template operator()<BFloat16, float>();
        case DType::f32:
            return wide ? body.template operator()<float, double>() : body.template operator()<float, float>();
        default: return body.template operator()<double, double>();
    }
}

template <int taps>
void images_backward_of(const AffineWarpBackward& b, int64_t begin, int64_t end) {
    by_types(b.warp, [&]<class T, class R>() {
        b.warp.channels == 1 ? images_backward<taps, 1, T, R>(b, begin, end)
                             : images_backward<taps, kFlowChannels, T, R>(b, begin, end);
    });
}

inline void images_backward(const AffineWarpBackward& b, int64_t begin, int64_t end) {
    switch (b.warp.interpolation) {
        case Interpolation::nearest: return images_backward_of<1>(b, begin, end);
        case Interpolation::bilinear: return images_backward_of<2>(b, begin, end);
        default: return images_backward_of<4>(b, begin, end);
    }
}

inline void matrix_backward(const AffineWarpBackward& b, int64_t begin, int64_t end) {
    switch (b.warp.interpolation) {
        case Interpolation::nearest:
            for (int64_t i = 9 * begin; i < 9 * end; ++i) b.grad_matrix[i] = 0;
            return;
        case Interpolation::bilinear:
            return by_types(b.warp, [&]<class T, class R>() { matrix_backward<2, T, R>(b, begin, end); });
        default: return by_types(b.warp, [&]<class T, class R>() { matrix_backward<4, T, R>(b, begin, end); });
    }
}

constexpr AffineWarpGradients warp_backward{images_backward, matrix_backward};

}  // namespace
}  // namespace imgopt

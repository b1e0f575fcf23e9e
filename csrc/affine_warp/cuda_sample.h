// affine_warp on CUDA, pixel by pixel: what a kernel knows of one image, and one sample of it. Coordinates, borders and
// weights are arithmetic.h's, so uint8 bilinear sums are the CPU's, bit for bit. This serves floating images, and what
// cuda_tile.h does not stage.
#pragma once

#include "../cuda.h"
#include "arithmetic.h"

namespace imgopt {
namespace {

// The numbers of up to this many channels travel in the kernel's parameters; more channels take more launches.
constexpr int kLaunchChannels = 32;

// An image's own numbers, prepared on the device, because the host never sees its matrix.
struct ImagePlan {
    Map map;
    double inverse[9];  // of map.m; all NaN where there is none
    double color[12];
};

// The epilogue in the arithmetic's type; as in window.h.
template <class R>
struct WarpNumbers {
    R fill[kLaunchChannels];              // of a tap
    uint8_t fill_bytes[kLaunchChannels];  // the same, of uint8 images
    R filled[kLaunchChannels];            // of a sample
    R factor[kLaunchChannels], add[kLaunchChannels];
    R unit;    // takes a sample to [0, 1]
    R levels;  // takes it to uint8, after the colour matrix if there is one
};

// The pixels of one image as they are sampled; strides count elements. `table` is null for all but uint8.
template <class T>
struct Pixels {
    const T* data;
    int64_t row, column, channel;
    int32_t height, width;
    const uint8_t* table;
};

__device__ inline float value_at(const Pixels<uint8_t>& s, int64_t at, int channel, float) {
    const uint8_t v = load_cached(s.data + at);
    return s.table ? load_cached(s.table + channel * 256 + v) : v;
}
__device__ inline float value_at(const Pixels<float>& s, int64_t at, int, float) { return load_cached(s.data + at); }
__device__ inline float value_at(const Pixels<BFloat16>& s, int64_t at, int, float) {
    return widened(BFloat16{load_cached(&s.data[at].bits)});
}
__device__ inline float value_at(const Pixels<Half>& s, int64_t at, int, float) {
    return float_of_half(load_cached(&s.data[at].bits));
}
__device__ inline double value_at(const Pixels<uint8_t>& s, int64_t at, int channel, double) {
    return value_at(s, at, channel, 0.0f);
}
__device__ inline double value_at(const Pixels<double>& s, int64_t at, int, double) { return s.data[at]; }
template <class T>
__device__ inline double value_at(const Pixels<T>& s, int64_t at, int channel, double) {
    return value_at(s, at, channel, 0.0f);
}

// --- taps ----------------------------------------------------------------------------------------------------------

// Indices of the pixels around a point along both axes; -1 is fill.
template <int taps>
struct TapIndices {
    int32_t column[taps], row[taps];

    __device__ TapIndices(int32_t height, int32_t width, int32_t x, int32_t y, Padding padding) {
        constexpr int first = taps == 4 ? -1 : 0;
        for (int i = 0; i < taps; ++i) {
            column[i] = tap_index(x + first + i, width, padding);
            row[i] = tap_index(y + first + i, height, padding);
        }
    }
};

template <class T, class R, int taps>
__device__ inline R tap_value(const Pixels<T>& s, const TapIndices<taps>& t, int i, int j, int channel, R fill) {
    if (t.row[i] < 0 || t.column[j] < 0) return fill;
    return value_at(s, t.row[i] * s.row + t.column[j] * s.column + channel * s.channel, channel, R(0));
}

// --- one sample of one channel -------------------------------------------------------------------------------------

// rows.h has the same sums for the CPU.
template <class T, class R>
__device__ inline R bilinear_sample(const Pixels<T>& s, const TapIndices<2>& t, const Point<R>& at, int channel,
                                    R fill) {
    R row[2];
    for (int i = 0; i < 2; ++i) {
        const R left = tap_value(s, t, i, 0, channel, fill);
        row[i] = fused(at.fx, tap_value(s, t, i, 1, channel, fill) - left, left);
    }
    return fused(at.fy, row[1] - row[0], row[0]);
}
template <class R>
__device__ inline R bilinear_sample(const Pixels<uint8_t>& s, const TapIndices<2>& t, const Point<R>& at, int channel,
                                    R fill) {
    const BilinearWeights w = bilinear_weights(at.fx, at.fy);
    const auto level_at = [&](int i, int j) { return static_cast<int32_t>(tap_value(s, t, i, j, channel, fill)); };
    return static_cast<R>(level_at(0, 0) * w.w00 + level_at(0, 1) * w.w01 + level_at(1, 0) * w.w10 +
                          level_at(1, 1) * w.w11);
}

template <class T, class R>
__device__ inline R bicubic_sample(const Pixels<T>& s, const TapIndices<4>& t, const R* wx, const R* wy, int channel,
                                   R fill) {
    R sum = 0;
    for (int i = 0; i < 4; ++i) {
        R row = 0;
        for (int j = 0; j < 4; ++j) {
            const R v = tap_value(s, t, i, j, channel, fill);
            row = j ? fused(wx[j], v, row) : wx[j] * v;
        }
        sum = i ? fused(wy[i], row, sum) : wy[i] * row;
    }
    return sum;
}

// `count` channels from `first` on; their numbers start at `first_number`.
template <class T, class R, int count, Interpolation interpolation>
__device__ inline void sample_anywhere(const Pixels<T>& s, const Point<R>& at, Padding padding, const WarpNumbers<R>& n,
                                       int first, int first_number, R (&to)[count]) {
    if (!at.finite) {
        for (int c = 0; c < count; ++c) to[c] = n.filled[first_number + c];
    } else if constexpr (interpolation == Interpolation::nearest) {
        const TapIndices<1> t(s.height, s.width, at.x, at.y, padding);
        for (int c = 0; c < count; ++c) to[c] = tap_value(s, t, 0, 0, first + c, n.fill[first_number + c]);
    } else if constexpr (interpolation == Interpolation::bilinear) {
        const TapIndices<2> t(s.height, s.width, at.x, at.y, padding);
        for (int c = 0; c < count; ++c) to[c] = bilinear_sample(s, t, at, first + c, n.fill[first_number + c]);
    } else {
        const TapIndices<4> t(s.height, s.width, at.x, at.y, padding);
        R wx[4], wy[4];
        bicubic_weights(at.fy, wy);
        if constexpr (sizeof(T) == 1) {  // integers whose sums are exact in R
            int32_t w[4];
            bicubic_integer_weights(at.fx, w);
            for (int j = 0; j < 4; ++j) wx[j] = static_cast<R>(w[j]);
        } else {
            bicubic_weights(at.fx, wx);
        }
        for (int c = 0; c < count; ++c) to[c] = bicubic_sample(s, t, wx, wy, first + c, n.fill[first_number + c]);
    }
}

// --- bilinear, all four taps inside the image ----------------------------------------------------------------------

template <class T>
__device__ inline bool is_inside(const Pixels<T>& s, int32_t x, int32_t y) {
    return static_cast<uint32_t>(x) < static_cast<uint32_t>(s.width - 1) &&
           static_cast<uint32_t>(y) < static_cast<uint32_t>(s.height - 1);
}

template <class T, class R, int C>
__device__ inline void sample_inside(const Pixels<T>& s, const Point<R>& at, int channel, R (&to)[C]) {
    const int64_t offset = at.y * s.row + at.x * s.column;
#pragma unroll
    for (int c = 0; c < C; ++c) {
        const int64_t from = offset + (channel + c) * s.channel;
        const auto tap = [&](int64_t further) { return value_at(s, from + further, channel + c, R(0)); };
        const R p00 = tap(0), p01 = tap(s.column), p10 = tap(s.row), p11 = tap(s.row + s.column);
        if constexpr (sizeof(T) == 1) {
            const BilinearWeights w = bilinear_weights(at.fx, at.fy);
            to[c] = static_cast<R>(static_cast<int32_t>(p00) * w.w00 + static_cast<int32_t>(p01) * w.w01 +
                                   static_cast<int32_t>(p10) * w.w10 + static_cast<int32_t>(p11) * w.w11);
        } else {
            const R above = fused(at.fx, p01 - p00, p00), below = fused(at.fx, p11 - p10, p10);
            to[c] = fused(at.fy, below - above, above);
        }
    }
}

}  // namespace
}  // namespace imgopt

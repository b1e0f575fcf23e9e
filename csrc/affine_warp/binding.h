// What the torch and the NumPy binding of affine_warp both prepare: the per-channel factors of the epilogue, the names
// of the modes, which of the kernels serves, and the least number of rows worth a thread.
#pragma once

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "../kernels.h"

namespace imgopt {

struct ChannelFactors {
    std::vector<double> scale, offset;

    // `mean` and `std` have one value per channel, or none.
    ChannelFactors(const std::vector<double>& mean, const std::vector<double>& std, int64_t channels)
        : scale(channels, 1.0), offset(channels, -0.0) {
        for (size_t c = 0; c < std.size(); ++c) {
            scale[c] = 1 / std[c];
            if (!mean.empty()) offset[c] = -mean[c] / std[c];
        }
    }
};

inline std::optional<Interpolation> interpolation_named(const std::string& name) {
    if (name == "nearest") return Interpolation::nearest;
    if (name == "bilinear") return Interpolation::bilinear;
    if (name == "bicubic") return Interpolation::bicubic;
    return std::nullopt;
}

inline std::optional<Padding> padding_named(const std::string& name) {
    if (name == "constant") return Padding::constant;
    if (name == "edge") return Padding::edge;
    if (name == "reflect") return Padding::reflect;
    if (name == "symmetric") return Padding::symmetric;
    return std::nullopt;
}

// Whether both modes have a name that exists.
inline bool set_modes(AffineWarp& p, const std::string& interpolation, const std::string& padding_mode) {
    const auto found = interpolation_named(interpolation);
    const auto padding = padding_named(padding_mode);
    if (!found || !padding) return false;
    p.interpolation = *found;
    p.padding = *padding;
    return true;
}
constexpr char kUnknownMode[] = "interpolation, padding_mode: unknown name";

// Whether `mean` and `std` have one value per channel, or none.
inline bool factors_fit(const std::vector<double>& mean, const std::vector<double>& std, int64_t channels) {
    const auto fits = [&](const std::vector<double>& v) {
        return v.empty() || static_cast<int64_t>(v.size()) == channels;
    };
    return fits(mean) && fits(std);
}
constexpr char kWrongFactors[] = "mean, std: expected one value per channel";

// Whether the kernels of the table that end in _f64 serve a call.
inline bool in_float64(const AffineWarp& p) { return p.images_dtype == DType::f64 || p.output_dtype == DType::f64; }

// A thread is worth about 20 microseconds of work, 16 thousand output values.
inline int64_t row_grain(int64_t values) { return std::max<int64_t>(1, 16384 / std::max<int64_t>(1, values)); }

}  // namespace imgopt

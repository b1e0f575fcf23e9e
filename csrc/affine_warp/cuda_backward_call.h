// One backward call of affine_warp on CUDA: its workspaces and its launches.
#pragma once

#include "cuda_backward_images.h"
#include "cuda_backward_matrix.h"
#include "cuda_call.h"

namespace imgopt {
namespace {

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
        : launch_(launch), call_(call), like_(like), fill_(fill), factors_(factors), grad_(grad) {
        const AffineWarp& p = call.p;
        made_ = call.colored || p.padding != Padding::constant || sizeof(R) == 8;
        if (!made_) return;
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
        Sums to{gradient.mutable_data_ptr(), p.images_dtype, {}, false};
        set_strides(gradient, to.stride);
        if (p.padding == Padding::constant && !p.antialias) return gather(to);

        const int64_t values = p.batch * p.height * p.width * p.channels;
        const bool gathered = p.padding == Padding::constant;
        Tensor memory = workspace(values, gathered ? sizeof(R) : sizeof(uint64_t));
        R* source = gathered ? static_cast<R*>(memory.mutable_data_ptr()) : nullptr;
        unsigned long long* sums = gathered ? nullptr : static_cast<unsigned long long*>(memory.mutable_data_ptr());
        if (gathered) {
            const int64_t row = p.width * p.channels;
            gather({source, sizeof(R) == 8 ? DType::f64 : DType::f32, {p.height * row, 1, row, p.channels}, true});
        } else {
            torch::stable::zero_(memory);
            by_taps(p.interpolation, [&]<int taps>(std::integral_constant<int, taps>) {
                launch_(scatter_flow<R, taps>, image_grid(p, outputs(), 65535), kBackwardThreads, 0, call_, flow(),
                        largest(), sums);
            });
        }
        AffineWarp out{};
        out.output = to.data;
        std::copy_n(to.stride, 4, out.output_stride);
        launch_(store_gradient<T, R>, image_grid(p, p.height * p.width * p.channels, 65535), kBackwardThreads, 0, call_,
                source, sums, largest(), out);
    }

    // float64, (count, rows, 3).
    Tensor matrix(int64_t count, int64_t rows) const {
        const AffineWarp& p = call_.p;
        Tensor result = torch::stable::new_zeros(like_, {count, rows, 3}, ScalarType::Double);
        if (p.interpolation == Interpolation::nearest) return result;
        const dim3 grid = image_grid(p, outputs(), 64);
        Tensor partial = workspace(p.batch * grid.y * kMatrixEntries, sizeof(double));
        double* sums = static_cast<double*>(partial.mutable_data_ptr());
        for_flows([&]<class G>(const Flow<G>& flow, int64_t first, int64_t channels, const WarpNumbers<R>& n) {
            by_taps(p.interpolation, [&]<int taps>(std::integral_constant<int, taps>) {
                launch_(matrix_partial<T, G, R, taps>, grid, kBackwardThreads, 0, call_, n, flow, first, channels,
                        sums);
            });
        });
        launch_(matrix_total, blocks_for(count, 1), 32, 0, call_, sums, static_cast<int>(grid.y), count,
                static_cast<int>(3 * rows), static_cast<double*>(result.mutable_data_ptr()));
        return result;
    }

  private:
    void gather(const Sums& to) const {
        const AffineWarp& p = call_.p;
        const dim3 grid = image_grid(p, p.height * p.width, 65535);
        for_flows([&]<class G>(const Flow<G>& flow, int64_t first, int64_t count, const WarpNumbers<R>& n) {
            by_taps(p.interpolation, [&]<int taps>(std::integral_constant<int, taps>) {
                launch_(gather_flow<G, R, taps>, grid, kBackwardThreads, 0, call_, n, flow, first, count, to);
            });
        });
    }

    // Calls body(flow, first, count, numbers) for the channels of each launch.
    template <class Body>
    void for_flows(const Body& body) const {
        const AffineWarp& p = call_.p;
        if (made_) {
            const int64_t row = p.output_width * p.channels;
            const Flow<R> flow{this->flow(), {p.output_height * row, 1, row, p.channels}};
            for_channels([&](int64_t first, int64_t count, WarpNumbers<R> n) {
                std::fill_n(n.factor, count, R(1));  // they are in it
                body(flow, first, count, n);
            });
            return;
        }
        const int64_t* s = p.output_stride;
        const auto run = [&]<class G>(G) {
            const Flow<G> flow{static_cast<const G*>(grad_), {s[0], s[1], s[2], s[3]}};
            for_channels([&](int64_t first, int64_t count, const WarpNumbers<R>& n) { body(flow, first, count, n); });
        };
        if constexpr (sizeof(R) == 4) {
            switch (p.output_dtype) {
                case DType::f16: return run(Half{});
                case DType::bf16: return run(BFloat16{});
                default: return run(float{});
            }
        }
    }

    int64_t outputs() const { return call_.p.output_height * call_.p.output_width; }
    R* flow() const { return static_cast<R*>(flow_.mutable_data_ptr()); }
    uint32_t* largest() const { return made_ ? static_cast<uint32_t*>(largest_.mutable_data_ptr()) : nullptr; }
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
    const void* grad_;
    bool made_;  // flow(), of all channels side by side; else the incoming gradient is read where it lies
};

}  // namespace
}  // namespace imgopt

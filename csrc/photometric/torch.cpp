// Hue, lookups, sharpness, channel sums and histograms for torch on the CPU: checks, allocation, and the loop over
// threads.
#include <cmath>

#include "../outputs.h"

namespace imgopt {
namespace {

constexpr int64_t kWorthThread = 1 << 14;  // pixels: some 10 us of a core

// `images` in one of the two dense layouts.
struct Dense {
    Tensor tensor;
    bool interleaved;

    explicit Dense(const Tensor& images) {
        STD_TORCH_CHECK(images.dim() == 4, "images: expected (N, C, H, W)");
        const DType dtype = dtype_of(images, "images");
        STD_TORCH_CHECK(dtype == DType::u8 || dtype == DType::f32, "images: expected uint8 or float32");
        interleaved = images.size(1) > 1 && images.stride(1) == 1;
        tensor = torch::stable::contiguous(images, layout());
    }

    MemoryFormat layout() const { return interleaved ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous; }
    Tensor output() const {
        const std::vector<int64_t> sizes(tensor.sizes().begin(), tensor.sizes().end());
        const bool large = large_bytes(sizes, tensor.scalar_type()) > 0;
        return large ? new_output(sizes, tensor.scalar_type(), layout()) : torch::stable::empty_like(tensor);
    }
};

std::vector<float> scaled(const Tensor& values, int64_t batch, const char* name, float (*scale)(double)) {
    STD_TORCH_CHECK(values.dim() == 1 && values.size(0) == batch && values.scalar_type() == ScalarType::Double, name,
                    ": expected (N,) float64");
    const Tensor dense = torch::stable::contiguous(values);
    const double* from = dense.const_data_ptr<double>();
    std::vector<float> result(batch);
    for (int64_t i = 0; i < batch; ++i) result[i] = scale(from[i]);
    return result;
}

int64_t runs_of(int64_t pixels) { return (pixels + kPixelRun - 1) / kPixelRun; }
int64_t runs_worth_thread(int64_t pixels) { return 1 + kWorthThread / (1 + (pixels < kPixelRun ? pixels : kPixelRun)); }

float sixths(double turns) { return static_cast<float>(6.0 * (turns - std::floor(turns))); }
float smoothing(double factor) { return static_cast<float>((1.0 - factor) / 13.0); }

Tensor adjust_hue(Tensor images, Tensor shift) {
    const Dense dense(images);
    STD_TORCH_CHECK(images.size(1) == 3, "images: expected three channels");
    const std::vector<float> turn = scaled(shift, images.size(0), "shift", sixths);
    Tensor output = dense.output();
    const Hue p{dtype_of(images, "images"),      dense.tensor.const_data_ptr(),
                output.mutable_data_ptr(),       turn.data(),
                images.size(2) * images.size(3), dense.interleaved};
    if (output.numel() == 0) return output;
    const KernelTable& table = kernels();
    parallel_units(images.size(0) * runs_of(p.pixels), runs_worth_thread(p.pixels),
                   [&](int64_t begin, int64_t end) { table.adjust_hue(p, begin, end); });
    return output;
}

Tensor apply_table(Tensor images, Tensor table) {
    const Dense dense(images);
    STD_TORCH_CHECK(images.scalar_type() == ScalarType::Byte, "images: expected uint8");
    STD_TORCH_CHECK(table.scalar_type() == ScalarType::Byte && table.dim() == 3 &&
                        (table.size(0) == 1 || table.size(0) == images.size(0)) && table.size(1) == images.size(1) &&
                        table.size(2) == 256,
                    "table: expected (N or 1, C, 256) uint8");
    const Tensor levels = torch::stable::contiguous(table);
    Tensor output = dense.output();
    const Lookup p{dense.tensor.const_data_ptr<uint8_t>(),
                   output.mutable_data_ptr<uint8_t>(),
                   levels.const_data_ptr<uint8_t>(),
                   table.size(0) > 1 ? images.size(1) * 256 : 0,
                   images.size(1),
                   images.size(2) * images.size(3),
                   dense.interleaved};
    if (output.numel() == 0) return output;
    const KernelTable& kernel = kernels();
    parallel_units(images.size(0) * runs_of(p.pixels), runs_worth_thread(p.pixels),
                   [&](int64_t begin, int64_t end) { kernel.lookup(p, begin, end); });
    return output;
}

Tensor adjust_sharpness(Tensor images, Tensor factor) {
    const Dense dense(images);
    const int64_t channels = images.size(1), height = images.size(2);
    const std::vector<float> weight = scaled(factor, images.size(0), "factor", smoothing);
    Tensor output = dense.output();
    const int64_t step = dense.interleaved ? channels : 1, planes = dense.interleaved ? 1 : channels;
    const Sharpness p{dtype_of(images, "images"),
                      dense.tensor.const_data_ptr(),
                      output.mutable_data_ptr(),
                      weight.data(),
                      planes,
                      height,
                      images.size(3) * step,
                      step};
    if (output.numel() == 0) return output;
    const KernelTable& table = kernels();
    parallel_units(images.size(0) * planes * height, 1 + kWorthThread / p.row,
                   [&](int64_t begin, int64_t end) { table.adjust_sharpness(p, begin, end); });
    return output;
}

// What the statistics share: `body` gets the images, dense, and where the results go.
template <class Body>
Tensor measured(const Tensor& images, std::vector<int64_t> shape, const Body& body) {
    const Dense dense(images);
    STD_TORCH_CHECK(images.scalar_type() == ScalarType::Byte, "images: expected uint8");
    Tensor result = torch::stable::empty(shape, ScalarType::Long, std::nullopt, images.device());
    if (result.numel() > 0)
        body(Levels{dense.tensor.const_data_ptr<uint8_t>(), images.size(1), images.size(2) * images.size(3),
                    dense.interleaved, result.mutable_data_ptr<int64_t>()});
    return result;
}

Tensor channel_sums(Tensor images) {
    return measured(images, {images.size(0), images.size(1)}, [&](const Levels& p) {
        const KernelTable& table = kernels();
        parallel_units(images.size(0), 1 + 8 * kWorthThread / (1 + p.channels * p.pixels),
                       [&](int64_t begin, int64_t end) { table.channel_sums(p, begin, end); });
    });
}

Tensor level_histogram(Tensor images) {
    return measured(images, {images.size(0), images.size(1), 256}, [&](const Levels& p) {
        const KernelTable& table = kernels();
        parallel_units(images.size(0) * images.size(1), 1 + kWorthThread / (1 + p.pixels),
                       [&](int64_t begin, int64_t end) { table.level_histogram(p, begin, end); });
    });
}

}  // namespace
}  // namespace imgopt

STABLE_TORCH_LIBRARY_IMPL(imgopt_fast, CPU, m) {
    m.impl("adjust_hue", TORCH_BOX(&imgopt::adjust_hue));
    m.impl("apply_table", TORCH_BOX(&imgopt::apply_table));
    m.impl("adjust_sharpness", TORCH_BOX(&imgopt::adjust_sharpness));
    m.impl("channel_sums", TORCH_BOX(&imgopt::channel_sums));
    m.impl("level_histogram", TORCH_BOX(&imgopt::level_histogram));
}

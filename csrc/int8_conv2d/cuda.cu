// int8_conv2d for torch on CUDA: checks what memory safety needs, prepares the per-channel numbers on the device (so
// that nothing synchronizes), and chooses the kernel: tensor cores wherever a group fills them, else dot products.
#include <limits>

#include "cuda_bands.h"
#include "cuda_direct.h"
#include "cuda_gather.h"
#include "cuda_gemm.h"
#include "cuda_launch.h"
#include "cuda_steps.h"
#include "cuda_strips.h"
#include "layer.h"

namespace imgopt {

int64_t cuda_weight_bytes(const Int8Weight& weight) { return weight.out_channels * weight_row(weight); }

namespace {

using torch::headeronly::MemoryFormat;

constexpr int kPrepareThreads = 128;

// Per-channel numbers of one call, on the device.
struct ChannelArrays {
    int32_t* offset;
    float* multiplier;
    Int8Shift* shift;
};

__global__ void __launch_bounds__(kStepThreads)
    pack_weight(const Int8Weight w, const int8_t* canonical, uint8_t* packed) {
    const int64_t row = weight_row(w), taps = w.kernel_h * w.kernel_w, k = taps * w.group_channels;
    for (Items i; i.at < w.out_channels * row; i.at += i.step) {
        const int64_t o = i.at / row, at = i.at % row, tap = at / w.group_channels, c = at % w.group_channels;
        packed[i.at] = at < k ? static_cast<uint8_t>(canonical[(o * w.group_channels + c) * taps + tap]) : 0;
    }
}

// p of scale = 2^-p; scales are normal numbers.
__device__ inline int exponent_on_device(double scale) {
    uint64_t bits;
    __builtin_memcpy(&bits, &scale, 8);
    return 1023 - static_cast<int>(bits >> 52 & 0x7ff);
}
__device__ inline int8_t shift_between(int value, int low, int high) {
    return static_cast<int8_t>(value < low ? low : value > high ? high : value);
}

// Block o: offset, multiplier and shift of output channel o, as set_layer() of layer.h.
__global__ void __launch_bounds__(kPrepareThreads)
    prepare_channels(const Int8Conv2d p, const Quantization q, const int32_t* bias, const float* weight_scale,
                     const ChannelArrays to) {
    __shared__ int32_t partial[kPrepareThreads];
    let_successor_start();
    const int64_t o = blockIdx.x, row = weight_row(p.weight);
    int32_t sum = 0;
    if (p.input_zero_point) {
        for (int64_t i = threadIdx.x; i < row; i += kPrepareThreads) sum += static_cast<int8_t>(p.packed[o * row + i]);
        partial[threadIdx.x] = sum;
        __syncthreads();
    }
    if (threadIdx.x > 0) return;
    if (p.input_zero_point)
        for (int i = 1; i < kPrepareThreads; ++i) sum += partial[i];
    to.offset[o] = static_cast<int32_t>(static_cast<uint32_t>(bias[o] - int64_t{p.input_zero_point} * sum));
    const double scale = q.input_scale * static_cast<double>(weight_scale[o]);
    to.multiplier[o] = static_cast<float>(scale / q.output_scale);
    if (!to.shift) return;
    const int fine = exponent_on_device(scale);
    const int residual_fine = p.residual ? exponent_on_device(q.residual_scale) : fine;
    const int finest = fine > residual_fine ? fine : residual_fine;
    to.shift[o] = {shift_between(finest - exponent_on_device(q.output_scale), -31, 62),
                   shift_between(finest - fine, 0, 29), shift_between(finest - residual_fine, 0, 51), 0};
}

template <int kRows, int kColumns>
int64_t gemm_tiles(const Int8Conv2d& p) {
    return ceil_div(p.batch * p.out_h * p.out_w, kRows) * ceil_div(p.weight.out_channels / p.weight.groups, kColumns) *
           p.weight.groups;
}

template <int kRows, int kColumns>
void launch_gemm(const Launcher& launch, const Int8Conv2d& p) {
    const int64_t blocks = gemm_tiles<kRows, kColumns>(p);
    STD_TORCH_CHECK(blocks <= kMostBlocks, "input: too large");
    const bool vector = p.weight.group_channels % kChunk == 0 && aligned_to_16(p.input, p.input_stride);
    launch(vector ? gemm_conv<kRows, kColumns, true> : gemm_conv<kRows, kColumns, false>, static_cast<unsigned>(blocks),
           kGemmThreads, gemm_shared<kRows, kColumns>(), p);
}

void conv_on_hopper(const Launcher& launch, const Int8Conv2d& p) {
    // What a measurement of ResNet-50's layers on an H100 found best; see benchmarks/results/nvidia-h100.md.
    const Int8Weight& w = p.weight;
    const int64_t processors = launch.processors(), outputs = w.out_channels / w.groups;
    const bool narrow = (w.group_channels - 1) % 128 < 64;  // whole spans of 128 would be half empty
    if (wgmma_tiles<WgmmaTile<2, 64, 128, 2>>(p) < processors)
        return narrow ? launch_wgmma<WgmmaTile<1, 64, 64, 3>>(launch, p)
                      : launch_wgmma<WgmmaTile<1, 64, 128, 3>>(launch, p);
    if (outputs % 128 == 0 && !narrow && w.kernel_h * w.kernel_w * w.group_channels >= 1024)
        return launch_wgmma<WgmmaTile<3, 128, 128, 1>>(launch, p);
    if (outputs % 128 == 0)
        return narrow ? launch_wgmma<WgmmaTile<2, 128, 64, 2>>(launch, p)
                      : launch_wgmma<WgmmaTile<2, 128, 128, 2>>(launch, p);
    if (!narrow) return launch_wgmma<WgmmaTile<2, 64, 128, 2>>(launch, p);
    using Band = BandTile<2, 2>;
    if (bands_serve<Band>(p)) return launch_bands<Band>(launch, p);
    using Kept = WgmmaTile<4, 64, 64, 1, 9>;
    if (w.out_channels <= Kept::kColumns && w.groups == 1 && blocks_of(w, Kept::kSpan) <= Kept::kKept)
        return launch_wgmma<Kept>(launch, p);
    launch_wgmma<WgmmaTile<2, 64, 64, 3>>(launch, p);
}

void bordered_on_hopper(const Launcher& launch, const Int8Conv2d& p, const Workspace& workspace) {
    Int8Conv2d q = over_bordered(p, nullptr);
    const int64_t bytes = q.batch * q.in_h * q.in_w * q.input_stride;
    uint8_t* input = workspace(bytes);
    q.input = input;
    launch(gather_bordered, blocks_for(bytes / 16, kGatherThreads), kGatherThreads, 0, p, q, input);
    conv_on_hopper(launch, q);
}

void merged_on_hopper(const Launcher& launch, const Int8Conv2d& p, const Workspace& workspace) {
    Int8Conv2d q = over_merged(p, nullptr);
    const int64_t bytes = cuda_weight_bytes(q.weight);
    uint8_t* packed = workspace(bytes);
    q.packed = packed;
    launch(gather_groups, blocks_for(bytes, kGatherThreads), kGatherThreads, 0, p, q.weight, packed);
    wgmma_serves(q) ? conv_on_hopper(launch, q) : bordered_on_hopper(launch, q, workspace);
}

void cells_on_hopper(const Launcher& launch, const Int8Conv2d& p, const Workspace& workspace) {
    const Cells cells = cells_of(p);
    const int64_t count = p.batch * cells.h * cells.w;
    uint8_t* input = workspace(count * kCell);
    Int8Conv2d q = over_cells(p, cells, input, nullptr);
    const int64_t bytes = cuda_weight_bytes(q.weight);
    uint8_t* packed = workspace(bytes);
    q.packed = packed;
    launch(cells.side == 1 ? gather_cells<1> : gather_cells<2>, blocks_for(count, kGatherThreads), kGatherThreads, 0, p,
           cells, input);
    launch(gather_weights, blocks_for(bytes, kGatherThreads), kGatherThreads, 0, p, q.weight, cells, packed);
    conv_on_hopper(launch, q);
}

}  // namespace

void cuda_pack_weight(const Launcher& launch, const Int8Weight& weight, const int8_t* canonical, uint8_t* packed) {
    launch(pack_weight, blocks_for(cuda_weight_bytes(weight), kStepThreads), kStepThreads, 0, weight, canonical,
           packed);
}

void cuda_conv(const Launcher& launch, const Int8Conv2d& p, const Workspace& workspace) {
    const Int8Weight& w = p.weight;
    const int64_t pixels = p.batch * p.out_h * p.out_w, group_outputs = w.out_channels / w.groups;
    if (pixels == 0) return;
    const bool hopper = has_hopper_kernels();
    if (hopper && w.groups > 1 && merged_serves(p)) return merged_on_hopper(launch, p, workspace);
    if (conv_by_strips(launch, p)) return;
    if (w.group_channels == 1 && group_outputs == 1)
        return launch(depthwise_conv, blocks_for(pixels * ceil_div(w.out_channels, 4), kDirectThreads), kDirectThreads,
                      0, p);
    if (w.groups > 1 && (w.group_channels < 16 || group_outputs < 16))
        return launch(direct_conv, blocks_for(pixels * w.out_channels, kDirectThreads), kDirectThreads, 0, p);
    if (hopper) {
        if (wgmma_serves(p)) return conv_on_hopper(launch, p);
        if (bordered_serves(p)) return bordered_on_hopper(launch, p, workspace);
        if (cells_serve(p)) return cells_on_hopper(launch, p, workspace);
    }
    // The largest tile of which there is one for every processor.
    const int64_t processors = launch.processors();
    if (group_outputs > 64 && gemm_tiles<128, 128>(p) >= processors) return launch_gemm<128, 128>(launch, p);
    if (gemm_tiles<128, 64>(p) >= processors) return launch_gemm<128, 64>(launch, p);
    launch_gemm<64, 64>(launch, p);
}

void cuda_quantize(const Launcher& launch, const Int8Quantize& p) {
    const int64_t area = p.height * p.width, count = p.batch * area * p.channels;
    if (const int channels = quad_channels(p); channels > 0 && count > 0)
        return launch(channels == 1 ? quantize_quads<1> : quantize_quads<3>,
                      blocks_for(count / channels / 4, kStepThreads), kStepThreads, 0, p, channels == 1 ? count : area,
                      count / channels / 4);
    if (count > 0) launch(quantize_values, blocks_for(count, kStepThreads), kStepThreads, 0, p);
}
void cuda_add(const Launcher& launch, const Int8Add& p, int64_t pixels) {
    if (pixels > 0)
        launch(add_values, blocks_for(pixels * ceil_div(p.channels, 4), kStepThreads), kStepThreads, 0, p, pixels);
}
void cuda_pool(const Launcher& launch, const Int8Pool& p) {
    const int64_t pixels = p.batch * p.out_h * p.out_w, count = pixels * ceil_div(p.channels, 4);
    if (pixels > 0 && has_vector_maximum(p))
        return launch(p.kernel_h == 2 ? max_pool<2> : max_pool<3>, blocks_for(pixels * p.channels / 16, kStepThreads),
                      kStepThreads, 0, p);
    if (count > 0) launch(pool_values, blocks_for(count, kStepThreads), kStepThreads, 0, p);
}
void cuda_dequantize(const Launcher& launch, const Int8Dequantize& p, int64_t pixels) {
    if (pixels > 0)
        launch(dequantize_values, blocks_for(pixels * p.channels, kStepThreads), kStepThreads, 0, p, pixels);
}
void cuda_flatten(const Launcher& launch, const uint8_t* input, uint8_t* output, int64_t batch, int64_t area,
                  int64_t channels) {
    const int64_t count = batch * area * channels;
    if (count > 0)
        launch(flatten_values, blocks_for(count, kStepThreads), kStepThreads, 0, input, output, batch, area, channels);
}

namespace {

// --- the operation -------------------------------------------------------------------------------------------------

Tensor channels_last(const Tensor& t) { return torch::stable::contiguous(t, MemoryFormat::ChannelsLast); }

void check_image(const Tensor& t, const char* name) {
    check_device(t, name);
    const DType dtype = dtype_of(t, name);
    STD_TORCH_CHECK(t.dim() == 4 && (dtype == DType::u8 || dtype == DType::i8), name,
                    ": expected uint8 or int8 with 4 axes");
}

void check_channels(const Tensor& t, const char* name, ScalarType dtype, int64_t channels) {
    check_device(t, name);
    STD_TORCH_CHECK(
        t.scalar_type() == dtype && t.dim() == 1 && t.size(0) == channels && (channels == 1 || t.stride(0) == 1), name,
        ": expected a contiguous array with one entry per output channel");
}

int64_t output_length(int64_t in, int64_t before, int64_t after, int64_t kernel, int64_t stride, int64_t dilation) {
    STD_TORCH_CHECK(before >= 0 && after >= 0 && stride > 0 && dilation > 0,
                    "padding, stride, dilation: expected non-negative, positive, positive");
    const int64_t window = dilation * (kernel - 1) + 1;
    STD_TORCH_CHECK(in + before + after >= window, "input: smaller than the dilated kernel");
    return (in + before + after - window) / stride + 1;
}

// The rows that the kernels read: `packed` if it holds them (only these bytes have two axes), else made anew.
Tensor packed_rows(const Launcher& launch, const Int8Weight& geometry, const Tensor& weight, const Tensor& packed) {
    const int64_t row = weight_row(geometry);
    if (packed.dim() == 2 && packed.size(0) == geometry.out_channels && packed.size(1) == row &&
        packed.is_contiguous() && packed.scalar_type() == ScalarType::Byte &&
        aligned_to_16(packed.const_data_ptr(), 0)) {
        check_device(packed, "packed");
        return packed;
    }
    Tensor rows = device_bytes(weight, cuda_weight_bytes(geometry));
    const Tensor canonical = torch::stable::contiguous(weight);
    cuda_pack_weight(launch, geometry, static_cast<const int8_t*>(canonical.const_data_ptr()),
                     static_cast<uint8_t*>(rows.mutable_data_ptr()));
    return rows;
}

void set_range(Int8Conv2d& conv, const Quantization& q) {
    const float least = static_cast<float>(q.output_min / q.output_scale);
    const float most = static_cast<float>(q.output_max / q.output_scale);
    if (q.float_output) {
        conv.low = least;
        conv.high = most;
        return;
    }
    const float bottom = -static_cast<float>(conv.output_zero_point), top = bottom + 255.0f;
    conv.low = least > bottom ? (least < top ? least : top) : bottom;
    conv.high = most < top ? (most > conv.low ? most : conv.low) : top;
}

Tensor int8_conv2d(Tensor input, Tensor weight, Tensor bias, Tensor weight_scale, Tensor packed,
                   std::optional<Tensor> residual, double input_scale, int64_t input_zero_point,
                   std::optional<double> output_scale, int64_t output_zero_point, ScalarType output_dtype,
                   std::vector<int64_t> stride, std::vector<int64_t> padding, std::vector<int64_t> dilation,
                   int64_t groups, std::optional<double> output_min, std::optional<double> output_max,
                   double residual_scale, int64_t residual_zero_point, bool shift) {
    check_image(input, "input");
    check_device(weight, "weight");
    STD_TORCH_CHECK(weight.scalar_type() == ScalarType::Char && weight.dim() == 4 && weight.numel() > 0 && groups > 0 &&
                        weight.size(0) % groups == 0 && input.size(1) == weight.size(1) * groups,
                    "weight, groups: expected int8 (O, C / groups, kH, kW) for the input's channels");
    STD_TORCH_CHECK(stride.size() == 2 && padding.size() == 4 && dilation.size() == 2,
                    "stride, padding, dilation: expected 2, 4 and 2 numbers");
    STD_TORCH_CHECK(output_scale ? output_dtype == ScalarType::Byte || output_dtype == ScalarType::Char
                                 : output_dtype == ScalarType::Float,
                    "output_dtype: expected uint8 or int8 with output_scale, float32 without");
    const Launcher launch(input);
    const int64_t channels = weight.size(0);
    check_channels(bias, "bias", ScalarType::Int, channels);
    check_channels(weight_scale, "weight_scale", ScalarType::Float, channels);

    Int8Conv2d conv{};
    conv.weight = {channels, weight.size(1), groups, weight.size(2), weight.size(3)};
    conv.batch = input.size(0);
    conv.in_h = input.size(2);
    conv.in_w = input.size(3);
    conv.stride_h = stride[0];
    conv.stride_w = stride[1];
    conv.dilation_h = dilation[0];
    conv.dilation_w = dilation[1];
    conv.pad_top = padding[0];
    conv.pad_left = padding[2];
    conv.out_h = output_length(conv.in_h, padding[0], padding[1], conv.weight.kernel_h, stride[0], dilation[0]);
    conv.out_w = output_length(conv.in_w, padding[2], padding[3], conv.weight.kernel_w, stride[1], dilation[1]);
    const Tensor image = channels_last(input);
    conv.input = static_cast<const uint8_t*>(image.const_data_ptr());
    conv.input_stride = input.size(1);
    conv.input_flip = flip_of(dtype_of(input, "input"));
    conv.input_zero_point = static_cast<uint8_t>(input_zero_point + conv.input_flip);
    Tensor added;
    if (residual) {
        check_image(*residual, "residual");
        STD_TORCH_CHECK(residual->size(0) == conv.batch && residual->size(1) == channels &&
                            residual->size(2) == conv.out_h && residual->size(3) == conv.out_w,
                        "residual: expected the output's shape");
        added = channels_last(*residual);
        conv.residual = static_cast<const uint8_t*>(added.const_data_ptr());
        conv.residual_stride = channels;
        conv.residual_flip = flip_of(dtype_of(added, "residual"));
        conv.residual_zero_point = static_cast<uint8_t>(residual_zero_point + conv.residual_flip);
    }
    Tensor output = torch::stable::empty({conv.batch, channels, conv.out_h, conv.out_w}, output_dtype, std::nullopt,
                                         input.device(), std::nullopt, MemoryFormat::ChannelsLast);
    if (output.numel() == 0) return output;
    conv.output = output.mutable_data_ptr();
    conv.output_stride = channels;
    conv.output_flip = output_dtype == ScalarType::Char ? 0x80 : 0;
    conv.output_zero_point = static_cast<uint8_t>(output_zero_point + conv.output_flip);
    constexpr double kInfinity = std::numeric_limits<double>::infinity();
    const Quantization q{input_scale,
                         input_zero_point,
                         !output_scale,
                         output_scale.value_or(1.0),
                         output_zero_point,
                         output_min.value_or(-kInfinity),
                         output_max.value_or(kInfinity),
                         residual_scale,
                         residual_zero_point,
                         shift};
    conv.residual_multiplier = static_cast<float>(q.residual_scale / q.output_scale);
    conv.float_output = q.float_output;
    set_range(conv, q);

    const Tensor rows = packed_rows(launch, conv.weight, weight, packed);
    conv.packed = static_cast<const uint8_t*>(rows.const_data_ptr());
    Tensor numbers = device_bytes(input, 12 * channels);
    auto* memory = static_cast<uint8_t*>(numbers.mutable_data_ptr());
    const bool shifts = shift && !q.float_output;
    const ChannelArrays arrays{reinterpret_cast<int32_t*>(memory), reinterpret_cast<float*>(memory + 4 * channels),
                               shifts ? reinterpret_cast<Int8Shift*>(memory + 8 * channels) : nullptr};
    launch(prepare_channels, blocks_for(channels, 1), kPrepareThreads, 0, conv, q, bias.const_data_ptr<int32_t>(),
           weight_scale.const_data_ptr<float>(), arrays);
    conv.offset = arrays.offset;
    conv.multiplier = arrays.multiplier;
    conv.shift = arrays.shift;
    std::vector<Tensor> kept;
    cuda_conv(launch, conv, [&](int64_t bytes) {
        kept.push_back(device_bytes(input, bytes));
        return static_cast<uint8_t*>(kept.back().mutable_data_ptr());
    });
    return output;
}

}  // namespace
}  // namespace imgopt

STABLE_TORCH_LIBRARY_IMPL(imgopt_fast, IMGOPT_CUDA_KEY, m) { m.impl("int8_conv2d", TORCH_BOX(&imgopt::int8_conv2d)); }

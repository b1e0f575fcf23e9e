// masked_matmul for torch on CUDA: checks and launches. Which of the kernels serves a layer, or whether a dense product
// does, is decided in ops/masked_matmul/cuda.py.
#include <type_traits>

#include "binding.h"
#include "cuda_blocks.h"
#include "cuda_packed.h"
#include "cuda_sparse.h"

namespace imgopt {
namespace {

// Calls body(std::bool_constant<tiled>).
template <class Body>
void by_tiling(const RowQuads& weight, const Body& body) {
    if (weight.block <= kLargestTile)
        body(std::bool_constant<true>{});
    else
        body(std::bool_constant<false>{});
}

Tensor widened(const Launcher& launch, const Tensor& weight, const int32_t* source, int64_t count) {
    const DType dtype = dtype_of(weight, "weight");
    Tensor values = torch::stable::new_empty(weight, {count}, sum_type(dtype));
    if (count == 0) return values;
    const MaskedValues p{dtype, weight.const_data_ptr(), source, values.mutable_data_ptr()};
    by_dtype(dtype, [&]<class Storage, class Sum>(Types<Storage, Sum>) {
        launch(widen_values<Storage, Sum>, blocks_for(count, kSparseThreads), kSparseThreads, 0, p, count);
    });
    return values;
}

void check_all(std::initializer_list<const Tensor*> tensors) {
    for (const Tensor* t : tensors) check_device(*t, "input, weight, structure");
}

// Contiguous and aligned.
std::optional<Tensor> checked_bias(const Tensor& input, const std::optional<Tensor>& bias, int64_t outputs) {
    if (!bias) return std::nullopt;
    check_device(*bias, "bias");
    STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == outputs && bias->scalar_type() == input.scalar_type(),
                    "bias: expected (outputs,) of the input's dtype");
    return aligned_contiguous(*bias);
}

Tensor run(const Launcher& launch, const Tensor& input, const Tensor& values, const std::optional<Tensor>& bias,
           const Tensor& quads, const Tensor& columns, const std::vector<int64_t>& shape,
           const std::vector<int64_t>& window) {
    const RowQuads weight = row_quads(quads, columns, shape);
    Tensor keep;
    const MaskedInput x = masked_input(input, shape, window, keep);
    check_blocks(weight, x);
    const bool wide = values.scalar_type() == sum_type(x.dtype);
    const Tensor all = wide ? aligned_contiguous(values) : widened(launch, values, nullptr, values.numel());
    const std::optional<Tensor> offsets = checked_bias(input, bias, shape[0]);
    Tensor output = torch::stable::new_empty(input, output_size(input, shape[0], window));
    if (output.numel() == 0) return as_image(output, window);
    const MaskedMatmul p{weight, x, all.const_data_ptr(), offsets ? offsets->const_data_ptr() : nullptr,
                         output.mutable_data_ptr()};
    by_dtype(x.dtype, [&]<class Storage, class Sum>(Types<Storage, Sum>) {
        by_tiling(weight, [&]<bool tiled>(std::bool_constant<tiled>) {
            const int64_t blocks = ceil_div(x.samples, kSamples) * ceil_div(weight.rows, kBlockOutputs<Sum>);
            STD_TORCH_CHECK(blocks <= kMostBlocks, "input: too large");
            launch(sparse_matmul<Storage, Sum, tiled>, static_cast<unsigned>(blocks), kSparseThreads,
                   sparse_shared<Sum>(tiled ? weight.block : 0), p);
        });
    });
    return as_image(output, window);
}

// ops/masked_matmul clamps on this device in a pass of its own.
void check_unclamped(const std::optional<double>& output_min, const std::optional<double>& output_max) {
    STD_TORCH_CHECK(!output_min && !output_max, "output_min, output_max: expected None on CUDA");
}

Tensor masked_matmul_packed(const Tensor& input, const Tensor& values, const std::optional<Tensor>& bias,
                            const Tensor& quads, const Tensor& columns, const std::optional<Tensor>&,
                            std::vector<int64_t> shape, std::vector<int64_t> window, std::optional<double> output_min,
                            std::optional<double> output_max) {
    check_all({&input, &values, &quads, &columns});
    check_unclamped(output_min, output_max);
    STD_TORCH_CHECK(values.scalar_type() == input.scalar_type(), "values: expected the input's dtype");
    return run(Launcher(input), input, values, bias, quads, columns, shape, window);
}

Tensor masked_matmul(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& quads,
                     const Tensor& columns, const Tensor& source, const Tensor&, const Tensor&, const Tensor&,
                     std::vector<int64_t> shape, std::vector<int64_t> window, std::optional<double> output_min,
                     std::optional<double> output_max) {
    check_all({&input, &weight, &quads, &columns, &source});
    check_unclamped(output_min, output_max);
    STD_TORCH_CHECK(weight.scalar_type() == input.scalar_type(), "weight: expected the input's dtype");
    check_source(source);
    const Launcher launch(input);
    const Tensor dense = torch::stable::contiguous(weight);
    const Tensor values = widened(launch, dense, static_cast<const int32_t*>(source.const_data_ptr()), source.numel());
    return run(launch, input, values, bias, quads, columns, shape, window);
}

Tensor masked_matmul_weight_grad(const Tensor& input, const Tensor& grad, const Tensor& quads, const Tensor& columns,
                                 const Tensor& source, const Tensor&, const Tensor&, const Tensor&,
                                 std::vector<int64_t> shape, std::vector<int64_t> window,
                                 std::vector<int64_t> weight_shape) {
    check_all({&input, &grad, &quads, &columns, &source});
    const Launcher launch(input);
    const RowQuads weight = row_quads(quads, columns, shape);
    Tensor keep;
    const MaskedInput x = masked_input(input, shape, window, keep);
    check_blocks(weight, x);
    check_source(source);
    STD_TORCH_CHECK(grad.scalar_type() == input.scalar_type() && grad.numel() == x.samples * shape[0],
                    "grad: expected the output's shape and dtype");
    const Tensor rows = window.empty() ? torch::stable::contiguous(grad)
                                       : torch::stable::contiguous(grad, torch::headeronly::MemoryFormat::ChannelsLast);
    const Tensor sums = torch::stable::new_empty(input, {source.numel()}, sum_type(x.dtype));
    Tensor gradient = torch::stable::new_zeros(input, weight_shape);
    const int64_t blocks = weight.blocks * ceil_div(weight.rows, RowQuads::kWindow);
    if (blocks == 0 || x.samples == 0 || source.numel() == 0) return gradient;
    STD_TORCH_CHECK(blocks <= kMostBlocks, "weight: too large");
    const MaskedWeightGrad p{weight,
                             x,
                             rows.const_data_ptr(),
                             static_cast<const int32_t*>(source.const_data_ptr()),
                             sums.mutable_data_ptr(),
                             gradient.mutable_data_ptr(),
                             shape[0],
                             0};
    by_dtype(x.dtype, [&]<class Storage, class Sum>(Types<Storage, Sum>) {
        by_tiling(weight, [&]<bool tiled>(std::bool_constant<tiled>) {
            launch(sparse_weight_grad<Storage, Sum, tiled>, static_cast<unsigned>(blocks), kSparseThreads,
                   weight_grad_shared<Sum>(tiled ? weight.block : 0), p);
        });
    });
    return gradient;
}

Tensor int8_masked_matmul(const Tensor& input, const Tensor& values, const Tensor& bias, const Tensor& weight_scale,
                          const Tensor&, const Tensor& quads, const Tensor& columns, std::vector<int64_t> shape,
                          double input_scale, int64_t input_zero_point, std::optional<double> output_scale,
                          int64_t output_zero_point, ScalarType output_dtype, std::optional<double> output_min,
                          std::optional<double> output_max) {
    check_all({&input, &values, &bias, &weight_scale, &quads, &columns});
    const Launcher launch(input);
    const RowQuads weight = int8_row_quads(input, values, bias, weight_scale, quads, columns, shape);
    STD_TORCH_CHECK(shape[3] == 1, "shape: expected groups of 1 on this device");
    const Tensor rows = torch::stable::contiguous(input);
    Tensor output = torch::stable::new_empty(input, output_size(input, shape[0], {}), output_dtype);
    if (output.numel() == 0) return output;
    const double scale = output_scale.value_or(1.0);
    const DType result = dtype_of(output, "output_dtype");
    const OutputRange range = output_range(result, scale, output_zero_point, output_min, output_max);
    const int64_t samples = output.numel() / shape[0];
    const Int8MaskedMatmul p{weight,
                             dtype_of(input, "input"),
                             result,
                             rows.const_data_ptr(),
                             nullptr,
                             bias.const_data_ptr<int32_t>(),
                             nullptr,
                             output.mutable_data_ptr(),
                             samples,
                             shape[1],
                             static_cast<int32_t>(input_zero_point),
                             static_cast<int32_t>(output_zero_point),
                             range.low,
                             range.high};
    const int64_t blocks = ceil_div(samples, 32) * ceil_div(shape[0], RowQuads::kWindow);
    STD_TORCH_CHECK(blocks <= kMostBlocks, "input: too large");
    const Int8Scales scales{weight_scale.const_data_ptr<float>(), input_scale, scale};
    by_int8(p, [&]<class Input, class Output>(Types<Input, Output>) {
        launch(int8_sparse_matmul<Input, Output>, static_cast<unsigned>(blocks), kSparseThreads, 0, p,
               static_cast<const int8_t*>(values.const_data_ptr()), scales);
    });
    return output;
}

// --- blocks --------------------------------------------------------------------------------------------------------

// input (..., K) times the blocks that `blocks` keeps of weight (O, K), or with `transposed` input (..., O) times those
// of its transpose; blocks: a bit per 16 × 16 block, int32 (rows / 16, ceil(columns / 16 / 32)) of what is multiplied.
Tensor block_matmul(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& blocks,
                    const Tensor&, bool transposed) {
    check_all({&input, &weight, &blocks});
    const DType dtype = dtype_of(input, "input");
    STD_TORCH_CHECK((dtype == DType::f16 || dtype == DType::bf16) && weight.scalar_type() == input.scalar_type() &&
                        weight.dim() == 2 && input.dim() >= 1,
                    "input, weight: expected (..., K) and (O, K) of float16 or bfloat16");
    const int64_t rows = weight.size(transposed ? 1 : 0), depth = weight.size(transposed ? 0 : 1);
    STD_TORCH_CHECK(rows % kBlockSide == 0 && depth % kBlockSide == 0 && input.size(input.dim() - 1) == depth,
                    "input: expected a whole number of blocks of 16 features");
    STD_TORCH_CHECK(blocks.scalar_type() == ScalarType::Int && blocks.is_contiguous() && blocks.dim() == 2 &&
                        blocks.size(0) == rows / kBlockSide && blocks.size(1) == ceil_div(depth / kBlockSide, 32),
                    "blocks: expected a bit per block, int32");
    const Launcher launch(input);
    const Tensor x = aligned_contiguous(input), w = aligned_contiguous(weight);
    const std::optional<Tensor> offsets = checked_bias(input, bias, rows);
    Tensor output = torch::stable::new_empty(input, output_size(input, rows, {}));
    if (output.numel() == 0) return output;
    const BlockMatmul p{static_cast<const uint16_t*>(x.const_data_ptr()),
                        static_cast<const uint16_t*>(w.const_data_ptr()),
                        static_cast<const uint32_t*>(blocks.const_data_ptr()),
                        offsets ? static_cast<const uint16_t*>(offsets->const_data_ptr()) : nullptr,
                        static_cast<uint16_t*>(output.mutable_data_ptr()),
                        output.numel() / rows,
                        rows,
                        depth,
                        blocks.size(1)};
    const int64_t count = ceil_div(p.samples, kBlockSamples) * ceil_div(rows, kBlockRows);
    STD_TORCH_CHECK(count <= kMostBlocks, "input: too large");
    const auto run_ring = [&]<int ring>(std::integral_constant<int, ring>) {
        const auto kernel = dtype == DType::bf16
                                ? transposed ? block_product<true, true, ring> : block_product<true, false, ring>
                            : transposed ? block_product<false, true, ring>
                                         : block_product<false, false, ring>;
        launch(kernel, static_cast<unsigned>(count), kBlockThreads, block_shared(ring), p);
    };
    if (block_shared(3) <= launch.shared_bytes())
        run_ring(std::integral_constant<int, 3>{});
    else
        run_ring(std::integral_constant<int, 2>{});
    return output;
}

// input (..., K) times a weight whose blocks ops/masked_matmul/cuda.py packed for clusters of kPackedCluster blocks of
// threads, of `tile_rows` outputs each. For has_hopper_kernels() alone.
Tensor packed_block_matmul(const Tensor& input, const Tensor& values, const std::optional<Tensor>& bias,
                           const Tensor& stages, const Tensor& tiles, int64_t outputs, int64_t tile_rows) {
    check_all({&input, &values, &stages, &tiles});
    const DType dtype = dtype_of(input, "input");
    const int64_t side = values.dim() == 3 ? values.size(2) : 0;
    STD_TORCH_CHECK((dtype == DType::f16 || dtype == DType::bf16) && values.scalar_type() == input.scalar_type() &&
                        input.dim() >= 1 && (side == 16 || side == 32) && values.size(1) == side,
                    "input, values: expected (..., K) and (blocks, 16 or 32, same) of float16 or bfloat16");
    const int64_t depth = input.size(input.dim() - 1), across = ceil_div(outputs, tile_rows * kPackedCluster);
    STD_TORCH_CHECK(depth > 0 && depth % side == 0 && outputs > 0 && outputs % side == 0 && tile_rows > 0 &&
                        tile_rows % side == 0 && tile_rows <= kPackedOutputs,
                    "input: expected a whole number of blocks of features");
    STD_TORCH_CHECK(stages.scalar_type() == ScalarType::Int && stages.is_contiguous() && stages.dim() == 3 &&
                        stages.size(1) == kPackedCluster && stages.size(2) == 8 &&
                        tiles.scalar_type() == ScalarType::Int && tiles.is_contiguous() && tiles.dim() == 1 &&
                        tiles.size(0) == across + 1,
                    "stages, tiles: expected int32 (stages, cluster, 8) and (tiles + 1,)");
    const Launcher launch(input);
    STD_TORCH_CHECK(has_hopper_kernels(), "packed_block_matmul: expected compute capability 9.0");
    const Tensor x = aligned_contiguous(input), blocks = aligned_contiguous(values);
    const std::optional<Tensor> offsets = checked_bias(input, bias, outputs);
    Tensor output = torch::stable::new_empty(input, output_size(input, outputs, {}));
    if (output.numel() == 0) return output;
    const int64_t samples = output.numel() / outputs;
    STD_TORCH_CHECK(samples < int64_t{1} << 31 && depth < int64_t{1} << 30, "input: too large");
    PackedBlocks p{};
    p.x = box_map({x.const_data_ptr(),
                   2,
                   {static_cast<uint64_t>(depth * 2), static_cast<uint64_t>(samples)},
                   {static_cast<uint64_t>(depth * 2)}},
                  {kPackedDepth * 2, kPackedSamples / kPackedCluster, 1});
    p.values = static_cast<const uint16_t*>(blocks.const_data_ptr());
    p.stages = static_cast<const PackedStage*>(stages.const_data_ptr());
    p.tiles = static_cast<const int32_t*>(tiles.const_data_ptr());
    p.bias = offsets ? static_cast<const uint16_t*>(offsets->const_data_ptr()) : nullptr;
    p.output = static_cast<uint16_t*>(output.mutable_data_ptr());
    p.samples = samples;
    p.rows = outputs;
    p.tile_rows = static_cast<int32_t>(tile_rows);
    p.tiles_across = static_cast<int32_t>(across);
    p.tiles_count = across * ceil_div(samples, kPackedSamples);
    const bool brain = dtype == DType::bf16;
    if (side == 16)
        brain ? launch_packed<true, 16>(launch, p) : launch_packed<false, 16>(launch, p);
    else
        brain ? launch_packed<true, 32>(launch, p) : launch_packed<false, 32>(launch, p);
    return output;
}

}  // namespace
}  // namespace imgopt

STABLE_TORCH_LIBRARY_IMPL(imgopt_fast, IMGOPT_CUDA_KEY, m) {
    m.impl("masked_matmul", TORCH_BOX(&imgopt::masked_matmul));
    m.impl("masked_matmul_packed", TORCH_BOX(&imgopt::masked_matmul_packed));
    m.impl("masked_matmul_weight_grad", TORCH_BOX(&imgopt::masked_matmul_weight_grad));
    m.impl("int8_masked_matmul", TORCH_BOX(&imgopt::int8_masked_matmul));
    m.impl("block_matmul", TORCH_BOX(&imgopt::block_matmul));
    m.impl("packed_block_matmul", TORCH_BOX(&imgopt::packed_block_matmul));
}

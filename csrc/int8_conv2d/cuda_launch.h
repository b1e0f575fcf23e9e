// What int8_conv2d and int8_graph launch on CUDA. The structs are those of the contracts, with pointers to the device;
// Int8Conv2d::packed holds rows of cuda_weight_bytes() / out_channels bytes: (tap, channel), zero at the end.
#pragma once

#include <functional>

#include "../cuda.h"

namespace imgopt {

int64_t cuda_weight_bytes(const Int8Weight& weight);
// From the canonical order.
void cuda_pack_weight(const Launcher& launch, const Int8Weight& weight, const int8_t* canonical, uint8_t* packed);

// Memory on the device that lasts until the call's kernels are done.
using Workspace = std::function<uint8_t*(int64_t bytes)>;

void cuda_conv(const Launcher& launch, const Int8Conv2d& conv, const Workspace& workspace);
void cuda_quantize(const Launcher& launch, const Int8Quantize& step);
void cuda_add(const Launcher& launch, const Int8Add& step, int64_t pixels);
void cuda_pool(const Launcher& launch, const Int8Pool& step);
void cuda_dequantize(const Launcher& launch, const Int8Dequantize& step, int64_t pixels);
void cuda_flatten(const Launcher& launch, const uint8_t* input, uint8_t* output, int64_t batch, int64_t area,
                  int64_t channels);

}  // namespace imgopt

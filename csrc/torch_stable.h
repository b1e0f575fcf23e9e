// The LibTorch stable ABI as this project uses it: aliases, checks that name the Python argument, and the loop that
// spreads a kernel's range over torch's threads. The only file that names the ABI's headers.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <exception>
#include <optional>
#include <string>
#include <vector>

#include "kernels.h"

namespace imgopt {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline DType dtype_of(const Tensor& t, const char* name) {
    switch (t.scalar_type()) {
        case ScalarType::Byte: return DType::u8;
        case ScalarType::Char: return DType::i8;
        case ScalarType::Int: return DType::i32;
        case ScalarType::Half: return DType::f16;
        case ScalarType::BFloat16: return DType::bf16;
        case ScalarType::Float: return DType::f32;
        case ScalarType::Double: return DType::f64;
        default: STD_TORCH_CHECK(false, name, ": dtype is not one that this operation has a kernel for");
    }
}

// Splits [0, units) over torch's threads. `grain` is the least number of units worth a thread. Kernels do not
// throw: an exception that crossed torch's pool would lose its text.
template <class Body>
void parallel_units(int64_t units, int64_t grain, const Body& body) {
    torch::stable::parallel_for(0, units, grain, [&](int64_t begin, int64_t end) { body(begin, end); });
}

}  // namespace imgopt

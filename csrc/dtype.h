// What the contracts of all operations are written in: fixed-size integers, the element types, and the mark of
// arithmetic that processor and device share.
#pragma once

#include <stddef.h>
#include <stdint.h>

// For the arithmetic that CPU and CUDA kernels share.
#if defined(__CUDACC__)
#define IMGOPT_HD __host__ __device__
#else
#define IMGOPT_HD
#endif

namespace imgopt {

enum class DType : int32_t { u8, i8, i32, f16, bf16, f32, f64 };

}  // namespace imgopt

// The contract between the bindings and the kernels: the rules for all of them, and the table of functions that the
// dispatcher fills for the chosen instruction set. Each operation's own contract.h has its struct of parameters, its
// bounds and its rounding. No torch, no Python, no C++ library: every ISA unit includes this file, and an inline
// library function compiled with AVX flags could be the copy that the linker keeps for everyone.
//
// Rules for every kernel
//   * A kernel does the units of work [begin, end); what a unit is stands beside the function pointer. Units are
//     independent, so any split over threads gives the same bits.
//   * A kernel never allocates, throws, or takes a lock; working memory comes from thread_scratch().
//   * Inputs and outputs do not alias unless the struct says so. Strides count elements.
//   * Every file is compiled with -ffp-contract=off: a fused multiply-add happens only where it is written.
#pragma once

#include "affine_warp/contract.h"
#include "int8_conv2d/contract.h"
#include "int8_graph/contract.h"
#include "masked_matmul/contract.h"
#include "masked_sgd/contract.h"
#include "photometric/contract.h"
#include "probe/contract.h"

// What the bindings call, in the spelling of gcc and clang, the compilers that the build knows. Everything else is
// hidden (CMAKE_CXX_VISIBILITY_PRESET in CMakeLists.txt): a function of an ISA unit, or an inline one that was compiled
// with its flags, must not be the one that another library of the process finds under the same name, on a processor
// that lacks the instructions.
#define IMGOPT_API __attribute__((visibility("default")))

namespace imgopt {

struct KernelTable {
    // Units: output rows, batch · output_height of them.
    void (*affine_warp)(const AffineWarp&, int64_t begin, int64_t end);
    AffineWarpGradients affine_warp_backward;
    // The same where images or output are float64, from the scalar unit: others compile float32 arithmetic only.
    void (*affine_warp_f64)(const AffineWarp&, int64_t begin, int64_t end);
    AffineWarpGradients affine_warp_backward_f64;
    // int8_conv2d. The layout names the packed order: bytes of another layout are not readable by this table.
    const char* int8_weight_layout;
    int64_t (*int8_weight_bytes)(const Int8Weight&);
    void (*int8_weight_pack)(const Int8Weight&, const int8_t* weight, uint8_t* packed);
    int64_t (*int8_conv2d_units)(const Int8Conv2d&);
    void (*int8_conv2d)(const Int8Conv2d&, int64_t begin, int64_t end);
    void (*int8_quantize)(const Int8Quantize&, int64_t begin, int64_t end);
    void (*int8_add)(const Int8Add&, int64_t begin, int64_t end);
    void (*int8_pool)(const Int8Pool&, int64_t begin, int64_t end);
    void (*int8_dequantize)(const Int8Dequantize&, int64_t begin, int64_t end);
    Masked masked;
    void (*masked_sgd)(const MaskedSgd&, int64_t begin, int64_t end);  // unit: a block
    // Units: kPixelRun pixels of an image, the last of them fewer; the same; rows, batch · planes · height of them.
    void (*adjust_hue)(const Hue&, int64_t begin, int64_t end);
    void (*lookup)(const Lookup&, int64_t begin, int64_t end);
    void (*adjust_sharpness)(const Sharpness&, int64_t begin, int64_t end);
    // Units: images; channels of images.
    void (*channel_sums)(const Levels&, int64_t begin, int64_t end);
    void (*level_histogram)(const Levels&, int64_t begin, int64_t end);
    Probe probe;
};

// The table of the active instruction set. Throws std::invalid_argument when IMGOPT_ISA names one that does not
// exist or that this processor lacks.
IMGOPT_API const KernelTable& kernels();

// Names in ascending order of preference, nullptr at the end; the last one is the default.
IMGOPT_API const char* const* supported_isas();
IMGOPT_API const char* active_isa();
IMGOPT_API void set_isa(const char* name);  // throws std::invalid_argument like kernels()

// 64-byte aligned memory that belongs to the calling thread and is reused by its next call: at most one live
// block per thread. It grows to the largest request and stays, so that a steady state allocates nothing.
IMGOPT_API void* thread_scratch(int64_t bytes);

// Each ISA unit exports one function, at its foot, which overwrites the entries that it serves better than the
// units before it. dispatch.cpp calls them in ascending order.
namespace scalar {
void affine_warp(KernelTable& table);
void int8_conv2d(KernelTable& table);
void masked_matmul(KernelTable& table);
void masked_sgd(KernelTable& table);
void photometric(KernelTable& table);
void probe(KernelTable& table);
}  // namespace scalar
namespace avx2 {
void affine_warp(KernelTable& table);
void int8_conv2d(KernelTable& table);
void masked_matmul(KernelTable& table);
void masked_sgd(KernelTable& table);
void photometric(KernelTable& table);
void probe(KernelTable& table);
}  // namespace avx2
namespace avxvnni {
void int8_conv2d(KernelTable& table);
void probe(KernelTable& table);
}  // namespace avxvnni
namespace avx512 {
void affine_warp(KernelTable& table);
void int8_conv2d(KernelTable& table);
void masked_matmul(KernelTable& table);
void masked_sgd(KernelTable& table);
void photometric(KernelTable& table);
void probe(KernelTable& table);
}  // namespace avx512
namespace neon {
void affine_warp(KernelTable& table);
void int8_conv2d(KernelTable& table);
void masked_matmul(KernelTable& table);
void masked_sgd(KernelTable& table);
void photometric(KernelTable& table);
void probe(KernelTable& table);
}  // namespace neon

}  // namespace imgopt

// The contract between the bindings and the kernels: one struct of parameters per operation, and the table of
// functions that the dispatcher fills for the chosen instruction set. No torch, no Python, no C++ library: every
// ISA unit includes this file, and an inline library function compiled with AVX flags could be the copy that the
// linker keeps for everyone.
//
// Rules for every kernel
//   * A kernel does the units of work [begin, end); what a unit is stands beside the function pointer. Units are
//     independent, so any split over threads gives the same bits.
//   * A kernel never allocates, throws, or takes a lock; working memory comes from thread_scratch().
//   * Inputs and outputs do not alias unless the struct says so. Strides count elements.
//   * Every file is compiled with -ffp-contract=off: a fused multiply-add happens only where it is written.
#pragma once

#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32)
#define IMGOPT_API __declspec(dllexport)
#else
#define IMGOPT_API __attribute__((visibility("default")))
#endif

namespace imgopt {

enum class DType : int32_t { u8, i8, i32, f16, bf16, f32, f64 };

// --- probe: what one core can do, the denominators of every "% of the floor" -----------------------------------------
// The arithmetic loops return how many multiply-adds they did, as counted by their own accumulators: every product
// is 1. All operands come from memory, so that no compiler knows them.
struct Probe {
    struct Operands {
        alignas(64) float zeros_f32[256] = {};
        alignas(64) float ones_f32[16];
        alignas(64) int16_t ones_s16[256];
        alignas(64) uint8_t ones_u8[64];
        alignas(64) int8_t ones_s8[64];

        Operands() {
            for (float& x : ones_f32) x = 1;
            for (int16_t& x : ones_s16) x = 1;
            for (uint8_t& x : ones_u8) x = 1;
            for (int8_t& x : ones_s8) x = 1;
        }
    };
    int64_t (*fma)(int64_t rounds, const Operands& operands);       // rounds <= 2^24: float32 counts exactly
    int64_t (*int8_dot)(int64_t rounds, const Operands& operands);  // exact sums in int32, the best instruction
    uint64_t (*read)(const void* source, int64_t bytes);            // sum of its 64-bit words; bytes % 512 == 0
    void (*copy)(const void* source, void* target, int64_t bytes);  // bytes % 512 == 0
};

struct KernelTable {
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
void probe(KernelTable& table);
}  // namespace scalar
namespace avx2 {
void affine_warp(KernelTable& table);
void int8_conv2d(KernelTable& table);
void masked_matmul(KernelTable& table);
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
void probe(KernelTable& table);
}  // namespace avx512
namespace neon {
void affine_warp(KernelTable& table);
void int8_conv2d(KernelTable& table);
void masked_matmul(KernelTable& table);
void probe(KernelTable& table);
}  // namespace neon

}  // namespace imgopt

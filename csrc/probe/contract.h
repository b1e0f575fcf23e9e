// The contract of the probe: what one core can do, the denominators of every "% of the floor". The arithmetic loops
// return how many multiply-adds they did, as counted by their own accumulators: every product is 1. All operands come
// from memory, so that no compiler knows them.
#pragma once

#include "../dtype.h"

namespace imgopt {

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

}  // namespace imgopt

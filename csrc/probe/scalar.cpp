// The machine's rates as plain C++ reaches them; the compiler may use the baseline vectors of the platform (SSE2).
#include "../kernels.h"

namespace imgopt::scalar {
namespace {

// Twelve vectors of four floats: the latency of a multiply and an add, at two of each a cycle.
constexpr int kFloats = 48;
constexpr int kInts = 16;

int64_t fma(int64_t rounds, const Probe::Operands& operands) {
    float acc[kFloats];
    for (int i = 0; i < kFloats; ++i) acc[i] = operands.zeros_f32[i];
    const float one = operands.ones_f32[0];
    for (int64_t r = 0; r < rounds; ++r)
        for (int i = 0; i < kFloats; ++i) acc[i] = acc[i] * one + one;
    int64_t count = 0;
    for (float lane : acc) count += static_cast<int64_t>(lane);
    return count;
}

int64_t int8_dot(int64_t rounds, const Probe::Operands& operands) {
    int32_t acc[kInts] = {};
    for (int64_t r = 0; r < rounds; ++r) {
        asm volatile("" ::: "memory");  // the products must not move out of the loop
        for (int i = 0; i < kInts; ++i) acc[i] += int32_t{operands.ones_u8[i]} * operands.ones_s8[i];
    }
    int64_t count = 0;
    for (int32_t lane : acc) count += lane;
    return count;
}

uint64_t read(const void* source, int64_t bytes) {
    const uint64_t* words = static_cast<const uint64_t*>(source);
    uint64_t sum[8] = {};
    for (int64_t w = 0; w < bytes / 8; w += 8)
        for (int i = 0; i < 8; ++i) sum[i] += words[w + i];
    return sum[0] + sum[1] + sum[2] + sum[3] + sum[4] + sum[5] + sum[6] + sum[7];
}

void copy(const void* source, void* target, int64_t bytes) {
    const uint64_t* from = static_cast<const uint64_t*>(source);
    uint64_t* to = static_cast<uint64_t*>(target);
    for (int64_t w = 0; w < bytes / 8; ++w) {
        to[w] = from[w];
        asm volatile("" ::: "memory");  // keeps the loop: it would become a call of memcpy, which has its own ISA
    }
}

}  // namespace

void probe(KernelTable& table) { table.probe = {fma, int8_dot, read, copy}; }

}  // namespace imgopt::scalar

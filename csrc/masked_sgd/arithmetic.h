// One masked SGD step as code. Most bytes of a step are those of the dense weight and gradient (8 + 4 per entry of a
// line that holds a kept one), so the mask comes as a bit per entry and the velocity without gaps: 10.8 bytes per entry
// at 90 % sparsity, where a dense masked step in separate passes moves 44. Full words of bits are a plain loop that the
// compiler turns into vectors of the unit's width; in the others the set bits are visited one by one. Vectors of 16
// lanes that expand and compress the velocity in registers were slower on Zen 5 (4096 x 4096, one core: 14.6 ms
// against 4.3 at 90 % sparsity, 15.4 against 11.3 at 50 %).
// The orders of masked_matmul are written entry by entry as well, with the lines asked for in time: in a pass of their
// own over each block they took 3 to 6 times as long (4096 x 4096: 7.6 and 10.7 ms more than none, now 1.6 and 4.5).
#pragma once

#include <stdint.h>

#include "../kernels.h"

namespace imgopt {
namespace {

constexpr int kWord = 64;
constexpr int64_t kAhead = 64;  // kept entries; 16 are too few (1.15 and 0.44 ns per entry instead of 0.95 and 0.16)

template <bool kVelocity, bool kNesterov>
IMGOPT_HD inline void step(const MaskedSgd& p, float* weight, float* velocity, float grad) {
    const float g = grad + p.decay * *weight;
    float v = g;
    if (kVelocity) {
        v = p.first ? g : p.factor * *velocity + p.gain * g;
        *velocity = v;
    }
    *weight -= p.rate * (kNesterov ? g + p.factor * v : v);
}

// Writes the new weight of kept entry `kept` to its place in both orders. The line of a later one is asked for.
inline void place(const MaskedSgd& p, int64_t kept, int64_t last, float weight) {
    for (int side = 0; side < 2; ++side)
        if (p.values[side]) {
            const int64_t ahead = kept + kAhead < last ? kept + kAhead : last;
            __builtin_prefetch(p.values[side] + p.places[side][ahead], 1);
            p.values[side][p.places[side][kept]] = weight;
        }
}

// The entries of one word of bits, of which `count` are set: the first is entry `kept` of those that are kept.
template <bool kVelocity, bool kNesterov, bool kOrdered>
inline void step_word(const MaskedSgd& p, int64_t at, uint64_t bits, int count, int64_t kept, int64_t last) {
    float* weight = p.weight + at;
    float* velocity = kVelocity ? p.velocity + kept : nullptr;
    const float* grad = p.grad + at;
    if (count == kWord) {
        for (int i = 0; i < kWord; ++i) step<kVelocity, kNesterov>(p, weight + i, velocity + i, grad[i]);
        for (int i = 0; kOrdered && i < kWord; ++i) place(p, kept + i, last, weight[i]);
        return;
    }
    for (int i = 0; bits != 0; bits &= bits - 1, ++i) {
        const int entry = __builtin_ctzll(bits);
        step<kVelocity, kNesterov>(p, weight + entry, velocity + i, grad[entry]);
        if (kOrdered) place(p, kept + i, last, weight[entry]);
    }
}

template <bool kVelocity, bool kNesterov, bool kOrdered>
inline void step_block(const MaskedSgd& p, int64_t block) {
    const int64_t first = block * MaskedSgd::kBlock;
    const int64_t last = p.entries < first + MaskedSgd::kBlock ? p.entries : first + MaskedSgd::kBlock;
    const int64_t all = p.offsets[(p.entries + MaskedSgd::kBlock - 1) / MaskedSgd::kBlock];
    int64_t kept = p.offsets[block];
    for (int64_t at = first; at < last; at += kWord) {
        const uint64_t bits = p.bits[at / kWord];
        const int count = __builtin_popcountll(bits);
        step_word<kVelocity, kNesterov, kOrdered>(p, at, bits, count, kept, all - 1);
        kept += count;
    }
}

template <bool kOrdered>
inline void step_blocks(const MaskedSgd& p, int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
        if (p.velocity == nullptr)
            step_block<false, false, kOrdered>(p, block);
        else if (p.nesterov)
            step_block<true, true, kOrdered>(p, block);
        else
            step_block<true, false, kOrdered>(p, block);
    }
}

inline void masked_sgd(const MaskedSgd& p, int64_t begin, int64_t end) {
    if (p.values[0] || p.values[1])
        step_blocks<true>(p, begin, end);
    else
        step_blocks<false>(p, begin, end);
}

}  // namespace
}  // namespace imgopt

// The contract of masked_sgd.
//
// One step of stochastic gradient descent over the kept entries of a weight, in memory order, float32, every
// operation rounded by itself:
//   g = grad + decay * weight;  v = first ? g : factor * v + gain * g  (v = g without velocity);
//   weight = weight - rate * (nesterov ? g + factor * v : v).
// Entries off the mask are neither read nor written. The velocity holds the kept entries only, one after the other. The
// new weight of kept entry i goes to values[s][places[s][i]] too, which saves the next product of masked_matmul the
// gathering: one for the forward product (s = 0), one for the input gradient (s = 1).
#pragma once

#include "../dtype.h"

namespace imgopt {

struct MaskedSgd {
    static constexpr int64_t kBlock = 4096;  // a unit of work: 16 KiB of weights
    const uint64_t* bits;                    // bit i of word j: entry 64 j + i is kept; zero past the end
    const int64_t* offsets;                  // per block, how many entries are kept before it
    float* weight;
    float* velocity;  // or null
    const float* grad;
    int64_t entries;
    float rate, factor, gain, decay;
    bool first, nesterov;
    float* values[2] = {};  // each or null
    const int32_t* places[2] = {};
};

}  // namespace imgopt

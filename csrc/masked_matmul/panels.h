// Panels of activations for masked_matmul: kRegs * kWidth samples, transposed, so that a column of x is kRegs
// registers.
//
// struct Lanes (lanes.h) names the registers. A panel is made block by block of columns, each just before the rows pass
// over it, so that it is still in the first-level cache then: 5 % of the time at 90 % sparsity.
#pragma once

#include "arithmetic.h"

// Left to itself, the compiler passes a tile of registers to a function through memory.
#define IMGOPT_INLINE __attribute__((always_inline)) inline

namespace imgopt {
namespace {

template <class Lanes>
struct Panels {
    using Reg = typename Lanes::Reg;
    static constexpr int kWidth = Lanes::kWidth;
    static constexpr int kSamples = kWidth * Lanes::kRegs;

    // The samples of a panel: where each stands.
    template <int P>
    struct Samples {
        Position at[kWidth * P];
        int count;

        Samples(const MaskedInput& x, int64_t first) : count(static_cast<int>(min_of(x.samples - first, kWidth * P))) {
            at[0] = position(x, first);
            for (int s = 1; s < count; ++s) advance(x, at[s] = at[s - 1]);
        }
    };

    // panel[(c - begin) * kWidth * P + s] = column c of sample s, for the columns [begin, end).
    template <class Storage, int P>
    static void pack(const MaskedInput& x, const Samples<P>& samples, int64_t begin, int64_t end, float* panel) {
        for (int64_t column = begin; column < end;) {
            const int64_t tap = column / x.channels, channel = column - tap * x.channels;
            const int64_t channels = min_of(x.channels - channel, end - column);
            for (int p = 0; p < P; ++p) {
                const Storage* from[kWidth];
                bool complete = true;
                for (int s = 0; s < kWidth; ++s) {
                    const int n = p * kWidth + s;
                    from[s] = n < samples.count ? pixel<Storage>(x, samples.at[n], tap / x.taps[1], tap % x.taps[1])
                                                : nullptr;
                    complete = complete && from[s];
                }
                for (int64_t c = 0; c < channels; c += kWidth) {
                    const int part = static_cast<int>(min_of(kWidth, channels - c));
                    float* to = panel + (c * P + p) * kWidth;
                    Reg tile[kWidth];
                    if (complete && part == kWidth) {
#pragma GCC unroll 16
                        for (int s = 0; s < kWidth; ++s) {
                            __builtin_prefetch(from[s] + channel + c + 4 * kWidth);
                            tile[s] = Lanes::load_part(from[s] + channel + c, kWidth);
                        }
                        Lanes::transpose(tile);
#pragma GCC unroll 16
                        for (int s = 0; s < kWidth; ++s) Lanes::store(to + s * P * kWidth, tile[s]);
                        continue;
                    }
#pragma GCC unroll 16
                    for (int s = 0; s < kWidth; ++s)
                        tile[s] = from[s] ? Lanes::load_part(from[s] + channel + c, part) : Lanes::zero();
                    Lanes::transpose(tile);
                    for (int s = 0; s < part; ++s) Lanes::store(to + s * P * kWidth, tile[s]);
                }
            }
            panel += channels * kWidth * P;
            column += channels;
        }
    }

    // output[(first + s) * rows + row + o] = sums[o * kWidth * P + s], by way of a few lines per sample: sixteen stores
    // a power of two apart share one set of the cache, and took twice as long. Reads sums up to a multiple of kWidth
    // rows.
    template <class Storage, int P>
    static void unpack(const MaskedMatmul& p, int64_t first, int64_t row, int64_t rows, const float* sums) {
        constexpr int kRun = 64;  // rows
        const bool clamped = is_clamped(p);
        const Reg low = Lanes::splat(static_cast<float>(p.low)), high = Lanes::splat(static_cast<float>(p.high));
        const int64_t count = min_of(p.x.samples - first, kWidth * P);
        alignas(64) Storage lines[kWidth][kRun];
        for (int64_t s = 0; s < count; s += kWidth)
            for (int64_t from = 0; from < rows; from += kRun) {
                const int64_t run = min_of(kRun, rows - from);
                for (int64_t o = 0; o < run; o += kWidth) {
                    Reg tile[kWidth];
#pragma GCC unroll 16
                    for (int i = 0; i < kWidth; ++i) tile[i] = Lanes::load(sums + (from + o + i) * kWidth * P + s);
                    Lanes::transpose(tile);
                    if (clamped)
#pragma GCC unroll 16
                        for (int i = 0; i < kWidth; ++i) tile[i] = Lanes::min(Lanes::max(tile[i], low), high);
#pragma GCC unroll 16
                    for (int i = 0; i < kWidth; ++i) Lanes::store_part(&lines[i][o], tile[i], kWidth);
                }
                Storage* to = static_cast<Storage*>(p.output) + (first + s) * p.weight.rows + row + from;
                for (int64_t i = 0; i < min_of(kWidth, count - s); ++i, to += p.weight.rows)
                    if (run == kRun)  // a copy of constant size is sixteen instructions at most
                        memcpy(to, lines[i], sizeof lines[i]);
                    else
                        memcpy(to, lines[i], static_cast<size_t>(run) * sizeof(Storage));
            }
    }

    template <int P>
    struct Registers {
        static constexpr int kRegs = P;
    };

    // Calls body(Registers<P>, first sample, first window, last window) for the runs of windows that belong to one
    // panel, with the P that holds the samples left.
    template <class Body>
    static void for_each_panel(const RowQuads& w, int64_t samples, int64_t begin, int64_t end, const Body& body) {
        const int64_t windows = windows_of(w);
        while (begin < end) {
            const int64_t panel = begin / windows, stop = min_of(end, (panel + 1) * windows);
            const int64_t from = begin - panel * windows, to = stop - panel * windows;
            const int64_t last = min_of(samples, (panel + 1) * MaskedMatmul::kPanel);
            for (int64_t first = panel * MaskedMatmul::kPanel; first < last; first += kSamples) {
                const int64_t left = last - first;
                if (left <= kWidth) {
                    body(Registers<1>{}, first, from, to);
                } else if (left <= 2 * kWidth || Lanes::kRegs == 2) {
                    body(Registers<2>{}, first, from, to);
                } else if constexpr (Lanes::kRegs == 4) {
                    if (left <= 3 * kWidth)
                        body(Registers<3>{}, first, from, to);
                    else
                        body(Registers<4>{}, first, from, to);
                }
            }
            begin = stop;
        }
    }
};

}  // namespace
}  // namespace imgopt

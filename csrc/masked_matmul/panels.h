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

    // The samples of a panel: where each stands, and for taps that divide nothing what its first one reads: a tap then
    // takes a few vector instructions for kWidth samples, and a 3 x 3 convolution of 64 channels at 90 % 0.87 of the
    // time. Samples that pad the last panel are outside for every tap.
    template <int P>
    struct Samples {
        static constexpr int64_t kOutside = INT64_MIN / 2;

        Position at[kWidth * P];
        int64_t y[kWidth * P], x[kWidth * P], element[kWidth * P];
        int count;

        Samples(const MaskedInput& in, int64_t first)
            : count(static_cast<int>(min_of(in.samples - first, kWidth * P))) {
            Position here = position(in, first);
            for (int s = 0; s < kWidth * P; ++s) {
                at[s] = here;
                y[s] = s < count ? here.out_y * in.step[0] + in.offset[0] : kOutside;
                x[s] = here.out_x * in.step[1] + in.offset[1];
                element[s] = s < count ? ((here.image * in.in[0] + y[s]) * in.in[1] + x[s]) * in.stride : 0;
                advance(in, here);
            }
        }
    };

    // Where a tap reads the samples of one register: all bits of inside[s] are set, or none, and from[s] is any address
    // of the input then.
    template <class Storage>
    struct Seen {
        const Storage* from[kWidth];
        int inside[kWidth];
        bool complete;

        template <int P>
        IMGOPT_INLINE Seen(const MaskedInput& x, const Samples<P>& samples, int p, int64_t tap_y, int64_t tap_x) {
            const Storage* data = static_cast<const Storage*>(x.data);
            int all = -1;
            if (x.divide[0] == 1 && x.divide[1] == 1) {
                const int64_t dy = tap_y * x.per_tap[0], dx = tap_x * x.per_tap[1];
                const int64_t distance = (dy * x.in[1] + dx) * x.stride;
                const uint64_t height = static_cast<uint64_t>(x.in[0]), width = static_cast<uint64_t>(x.in[1]);
                for (int s = 0; s < kWidth; ++s) {
                    const int n = p * kWidth + s;
                    const bool in = (static_cast<uint64_t>(samples.y[n] + dy) < height) &
                                    (static_cast<uint64_t>(samples.x[n] + dx) < width);
                    from[s] = data + (in ? samples.element[n] + distance : 0);
                    all &= inside[s] = -static_cast<int>(in);
                }
            } else {
                for (int s = 0; s < kWidth; ++s) {
                    const int n = p * kWidth + s;
                    const Storage* seen = n < samples.count ? pixel<Storage>(x, samples.at[n], tap_y, tap_x) : nullptr;
                    from[s] = seen ? seen : data;
                    all &= inside[s] = -static_cast<int>(seen != nullptr);
                }
            }
            complete = all == -1;
        }
    };

    // panel[(c - begin) * kWidth * P + s] = column c of sample s, for the columns [begin, end).
    template <class Storage, int P>
    static void pack(const MaskedInput& x, const Samples<P>& samples, int64_t begin, int64_t end, float* panel) {
        for (int64_t column = begin; column < end;) {
            const int64_t tap = column / x.channels, channel = column - tap * x.channels;
            const int64_t channels = min_of(x.channels - channel, end - column);
            for (int p = 0; p < P; ++p) {
                const Seen<Storage> seen(x, samples, p, tap / x.taps[1], tap % x.taps[1]);
                for (int64_t c = 0; c < channels; c += kWidth) {
                    const int part = static_cast<int>(min_of(kWidth, channels - c));
                    float* to = panel + (c * P + p) * kWidth;
                    Reg tile[kWidth];
                    if (seen.complete && part == kWidth) {
#pragma GCC unroll 16
                        for (int s = 0; s < kWidth; ++s) {
                            __builtin_prefetch(seen.from[s] + channel + c + 4 * kWidth);
                            tile[s] = Lanes::load_part(seen.from[s] + channel + c, kWidth);
                        }
                    } else {  // without a branch per sample: which of them a border cuts off changes all the time
#pragma GCC unroll 16
                        for (int s = 0; s < kWidth; ++s)
                            tile[s] = Lanes::load_part(seen.from[s] + channel + c, part & seen.inside[s]);
                    }
                    Lanes::transpose(tile);
#pragma GCC unroll 16
                    for (int s = 0; s < kWidth; ++s)  // constant indices: otherwise the tile goes through memory
                        if (part == kWidth || s < part) Lanes::store(to + s * P * kWidth, tile[s]);
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

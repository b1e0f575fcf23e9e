// The order of packed weights for igemm.h: panels of output channels, within them dwords of a pixel's products, kernel
// row after kernel row.
#pragma once

#include <string.h>

#include "rows.h"

namespace imgopt {
namespace {

// How a group's output channels are cut: `vectors` of kLanes, spread evenly over `panels`.
template <class Isa>
struct Panels {
    int64_t vectors, panels;

    explicit Panels(const Int8Weight& w)
        : vectors(ceil_div(w.out_channels / w.groups, Isa::kLanes)), panels(ceil_div(vectors, Isa::kMaxVectors)) {}
    int64_t begin(int64_t panel) const { return vectors * panel / panels; }
};

// Products in a dword.
template <class Isa>
constexpr int64_t kGroup = 4 / static_cast<int64_t>(sizeof(typename Isa::Product));

template <class Isa>
constexpr int64_t consecutive_rows() {
    if constexpr (requires { Isa::kConsecutiveRows; }) return Isa::kConsecutiveRows;
    return 0;
}

// A kernel row of a first layer, 21 bytes of 7 x 3 or 9 of 3 x 3, leaves one for its last dword. Where tiles read
// consecutive rows, these bytes of all kernel rows come last, together: 37 dwords of 7 x 7 instead of 42. To collect
// them takes half a cycle a pixel, as long as a vector of sums takes to meet a dword.
template <class Isa>
bool row_ends_apart(const Int8Weight& w) {
    const bool rest = consecutive_rows<Isa>() > 0 && w.groups == 1 && w.kernel_w * w.group_channels % 4 == 1;
    return rest && (w.kernel_h - ceil_div(w.kernel_h, 4)) * Panels<Isa>(w).vectors > 1;
}

// Products of one kernel row of an output value, in whole dwords but for an end that stands apart, and of all of them.
template <class Isa>
int64_t row_depth_of(const Int8Weight& w) {
    const int64_t products = w.kernel_w * w.group_channels;
    return row_ends_apart<Isa>(w) ? products - 1 : round_up(products, kGroup<Isa>);
}
template <class Isa>
int64_t depth_of(const Int8Weight& w) {
    const int64_t ends = row_ends_apart<Isa>(w) ? round_up(w.kernel_h, kGroup<Isa>) : 0;
    return w.kernel_h * row_depth_of<Isa>(w) + ends;
}
// Where product `i` of kernel row `ky` stands among all of them.
template <class Isa>
int64_t place_of(const Int8Weight& w, int64_t ky, int64_t i) {
    const int64_t row = row_depth_of<Isa>(w);
    return i < row ? ky * row + i : w.kernel_h * row + ky;
}

template <class Isa>
int64_t igemm_weight_bytes(const Int8Weight& w) {
    return w.groups * Panels<Isa>(w).vectors * Isa::kLanes * depth_of<Isa>(w) * sizeof(typename Isa::Product);
}

// (group, panel, dword, channel of the panel, product of the dword), zero where there is no channel or tap.
template <class Isa>
void igemm_weight_pack(const Int8Weight& w, const int8_t* weight, uint8_t* packed) {
    using Product = typename Isa::Product;
    const Panels<Isa> panels(w);
    const int64_t per_group = w.out_channels / w.groups, depth = depth_of<Isa>(w);
    memset(packed, 0, static_cast<size_t>(igemm_weight_bytes<Isa>(w)));
    for (int64_t o = 0; o < w.out_channels; ++o) {
        const int64_t group = o / per_group, channel = o % per_group, vector = channel / Isa::kLanes;
        int64_t panel = 0;
        while (panels.begin(panel + 1) <= vector) ++panel;
        const int64_t first = panels.begin(panel), width = (panels.begin(panel + 1) - first) * Isa::kLanes;
        Product* out = reinterpret_cast<Product*>(packed) + (group * panels.vectors + first) * Isa::kLanes * depth;
        for (int64_t t = 0; t < taps_of(w); ++t) {
            for (int64_t c = 0; c < w.group_channels; ++c) {
                const int64_t k = place_of<Isa>(w, t / w.kernel_w, t % w.kernel_w * w.group_channels + c);
                out[(k / kGroup<Isa> * width + channel - first * Isa::kLanes) * kGroup<Isa> + k % kGroup<Isa>] =
                    weight[(o * w.group_channels + c) * taps_of(w) + t];
            }
        }
    }
}

}  // namespace
}  // namespace imgopt

// Passes over the image that bring a layer to where cuda_wgmma.h serves it, at the price of one reading and one
// writing.
//
// First layers have pixels of 1 to 16 channels, which no instruction wants. The pass makes "cells" of 16 bytes: one
// pixel, or 2 × 2 pixels where the layer takes every second one, padding included. Neighbouring cells are adjacent in
// memory, so that one row of the kernel is one long run of channels: a tensor map whose pixels overlap makes it a layer
// of kernel_h × 1 taps. 7 × 7 / 2 of RGB becomes 4 × 1 taps of 64 channels.
//
// int8 activations, and borders that are not byte 0, which is all that the copy engine can put there: the pass writes
// uint8 with its border around it.
//
// Groups of 8, 16 or 32 channels: a pass over the weights makes groups of 64 of them, with zeros between. The tensor
// cores multiply those zeros sooner than dp4a the rest.
#pragma once

#include "cuda_wgmma.h"

namespace imgopt {
namespace {

constexpr int kCell = 16, kGatherThreads = 256;

struct Cells {
    int side;      // pixels of a cell, along each axis
    int64_t h, w;  // cells of an image
    int taps_h, taps_w;
};

inline Cells cells_of(const Int8Conv2d& p) {
    const int side = static_cast<int>(p.stride_h);
    const int taps_h = static_cast<int>(ceil_div(p.weight.kernel_h, side));
    const int taps_w = static_cast<int>(ceil_div(p.weight.kernel_w, side));
    return {side, p.out_h + taps_h - 1, p.out_w + taps_w - 1, taps_h, taps_w};
}

// The layer over cells; its taps are rows of cells.
inline Int8Conv2d over_cells(const Int8Conv2d& p, const Cells& cells, const uint8_t* input, const uint8_t* packed) {
    Int8Conv2d q = p;
    q.weight.group_channels = cells.taps_w * kCell;
    q.weight.kernel_h = cells.taps_h;
    q.weight.kernel_w = 1;
    q.packed = packed;
    q.input = input;
    q.input_stride = kCell;
    q.in_h = cells.h;
    q.in_w = cells.w;
    q.stride_h = q.stride_w = 1;
    q.pad_top = q.pad_left = 0;
    q.input_flip = 0;
    return q;
}

// A thread makes one cell: (y, x, channel) of its pixels, zero behind.
template <int side>
__global__ void __launch_bounds__(kGatherThreads) gather_cells(const Int8Conv2d p, const Cells cells, uint8_t* output) {
    const int64_t item = int64_t{blockIdx.x} * kGatherThreads + threadIdx.x;
    if (item >= p.batch * cells.h * cells.w) return;
    const int x = static_cast<int>(item % cells.w) * side - static_cast<int>(p.pad_left);
    const int y = static_cast<int>(item / cells.w % cells.h) * side - static_cast<int>(p.pad_top);
    const uint8_t* image = p.input + item / cells.w / cells.h * p.in_h * p.in_w * p.input_stride;
    const int channels = static_cast<int>(p.weight.group_channels);
    uint32_t words[kCell / 4] = {};
    int c = 0, right = 0, down = 0;
#pragma unroll
    for (int i = 0; i < kCell; ++i) {
        if (down == side) break;
        const int at_y = y + down, at_x = x + right;
        const bool inside = at_y >= 0 && at_y < p.in_h && at_x >= 0 && at_x < p.in_w;
        const uint32_t byte = inside ? load_cached(image + (at_y * p.in_w + at_x) * p.input_stride + c) ^ p.input_flip
                                     : p.input_zero_point;
        words[i / 4] |= byte << (i % 4 * 8);
        if (++c < channels) continue;
        c = 0;
        if (++right < side) continue;
        right = 0;
        ++down;
    }
    reinterpret_cast<uint4*>(output)[item] = make_uint4(words[0], words[1], words[2], words[3]);
}

// The rows of `q` from those of `p`.
__global__ void __launch_bounds__(kGatherThreads)
    gather_weights(const Int8Conv2d p, const Int8Weight q, const Cells cells, uint8_t* output) {
    const int64_t item = int64_t{blockIdx.x} * kGatherThreads + threadIdx.x, row = weight_row(q);
    if (item >= q.out_channels * row) return;
    const int channels = static_cast<int>(p.weight.group_channels), at = static_cast<int>(item % row);
    const int ty = at / static_cast<int>(q.group_channels), tx = at % static_cast<int>(q.group_channels) / kCell;
    const int pixel = at % kCell / channels, c = at % kCell % channels;
    const int y = ty * cells.side + pixel / cells.side, x = tx * cells.side + pixel % cells.side;
    const bool inside =
        ty < cells.taps_h && pixel < cells.side * cells.side && y < p.weight.kernel_h && x < p.weight.kernel_w;
    const int64_t tap = y * p.weight.kernel_w + x;
    output[item] = inside ? p.packed[item / row * weight_row(p.weight) + tap * channels + c] : 0;
}

inline bool cells_serve(const Int8Conv2d& p) {
    const Int8Weight& w = p.weight;
    const bool halves = p.stride_h == 2;
    if (w.groups != 1 || p.stride_h != p.stride_w || p.stride_h > 2 || p.dilation_h != 1 || p.dilation_w != 1)
        return false;
    if (w.group_channels > (halves ? kCell / 4 : kCell) || w.kernel_w > (halves ? 16 : 8)) return false;
    return wgmma_serves(over_cells(p, cells_of(p), nullptr, nullptr));
}

// The layer over an image with its border, as far as the kernel reaches.
inline Int8Conv2d over_bordered(const Int8Conv2d& p, const uint8_t* input) {
    Int8Conv2d q = p;
    q.input = input;
    q.input_stride = p.weight.groups * p.weight.group_channels;
    q.in_h = (p.out_h - 1) * p.stride_h + (p.weight.kernel_h - 1) * p.dilation_h + 1;
    q.in_w = (p.out_w - 1) * p.stride_w + (p.weight.kernel_w - 1) * p.dilation_w + 1;
    q.pad_top = q.pad_left = 0;
    q.input_flip = 0;
    return q;
}

// A thread moves sixteen channels of a pixel of `q`.
__global__ void __launch_bounds__(kGatherThreads)
    gather_bordered(const Int8Conv2d p, const Int8Conv2d q, uint8_t* output) {
    const int64_t item = int64_t{blockIdx.x} * kGatherThreads + threadIdx.x, chunks = q.input_stride / 16;
    if (item >= q.batch * q.in_h * q.in_w * chunks) return;
    const int64_t pixel = item / chunks, line = pixel / q.in_w;
    const int64_t y = line % q.in_h - p.pad_top, x = pixel % q.in_w - p.pad_left;
    const uint32_t flip = four_times(p.input_flip), border = four_times(p.input_zero_point);
    uint4 v = make_uint4(border, border, border, border);
    if (y >= 0 && y < p.in_h && x >= 0 && x < p.in_w) {
        const int64_t at = (line / q.in_h * p.in_h + y) * p.in_w + x;
        v = load_cached(reinterpret_cast<const uint4*>(p.input + at * p.input_stride + item % chunks * 16));
        v = make_uint4(v.x ^ flip, v.y ^ flip, v.z ^ flip, v.w ^ flip);
    }
    reinterpret_cast<uint4*>(output)[item] = v;
}

// A layer of one tap reads its image once, and the pass would cost more than it gains.
inline bool bordered_serves(const Int8Conv2d& p) {
    return p.weight.kernel_h * p.weight.kernel_w > 1 && aligned_to_16(p.input, p.input_stride) &&
           p.weight.group_channels % 16 == 0 && wgmma_serves(over_bordered(p, nullptr));
}

constexpr int kMergedChannels = 64;

// The layer with as many groups in one as have kMergedChannels channels together.
inline Int8Conv2d over_merged(const Int8Conv2d& p, const uint8_t* packed) {
    Int8Conv2d q = p;
    q.weight.groups = p.weight.groups * p.weight.group_channels / kMergedChannels;
    q.weight.group_channels = kMergedChannels;
    q.packed = packed;
    return q;
}

__global__ void __launch_bounds__(kGatherThreads)
    gather_groups(const Int8Conv2d p, const Int8Weight q, uint8_t* output) {
    const int64_t item = int64_t{blockIdx.x} * kGatherThreads + threadIdx.x, row = weight_row(q);
    if (item >= q.out_channels * row) return;
    const Int8Weight& w = p.weight;
    const int64_t o = item / row, tap = item % row / kMergedChannels, c = item % row % kMergedChannels;
    const int64_t own = o / (w.out_channels / w.groups) % (kMergedChannels / w.group_channels);
    const bool inside = c / w.group_channels == own && tap < w.kernel_h * w.kernel_w;
    output[item] = inside ? p.packed[o * weight_row(w) + tap * w.group_channels + c % w.group_channels] : 0;
}

inline bool merged_serves(const Int8Conv2d& p) {
    const Int8Weight& w = p.weight;
    if (w.group_channels < 8 || w.group_channels >= kMergedChannels || kMergedChannels % w.group_channels) return false;
    if (w.groups * w.group_channels % kMergedChannels || w.out_channels / w.groups % w.group_channels) return false;
    const Int8Conv2d q = over_merged(p, nullptr);
    return wgmma_serves(q) || bordered_serves(q);
}

}  // namespace
}  // namespace imgopt

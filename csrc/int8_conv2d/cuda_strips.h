// Depthwise convolution, and groups of 4 or 8 channels, on CUDA: bound by memory once nothing is read twice. A thread
// has four output channels and walks along a row; the columns of input words that it has read stay in registers, ready
// for dp4a, until the window has passed them.
#pragma once

#include <algorithm>
#include <numeric>

#include "cuda_direct.h"

namespace imgopt {
namespace {

constexpr int kStripThreads = 128;
constexpr int kStrip = 7;  // outputs of a thread: 7, 14, 28, 56 and 112 are multiples

// Square kernels of `k` taps. group_words: words of four channels in a group; 0: depthwise.
template <int k, int group_words>
struct Window {
    static constexpr bool kDepthwise = group_words == 0;
    // Words of a column that one output channel multiplies: four taps each, or four channels of a tap each.
    static constexpr int kDepth = kDepthwise ? (k + 3) / 4 : k * group_words;
    static constexpr int kLoaded = kDepthwise ? k : k * group_words;

    uint32_t columns[k][kDepthwise ? 4 * kDepth : kDepth];
    uint32_t weights[k][4][kDepth];

    __device__ static int operand(int channel, int word) { return kDepthwise ? channel * kDepth + word : word; }

    // Of output channels `o` to o + 3: the rows are zero behind the last tap.
    __device__ void load_weights(const Int8Conv2d& p, int64_t o) {
        constexpr int kRowWords = kDepthwise ? (k * k + 4) / 4 : k * k * group_words;
        const int64_t row = weight_row(p.weight);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const auto* from = reinterpret_cast<const uint4*>(p.packed + (o + i) * row);
            uint32_t words[(kRowWords + 3) / 4 * 4];
#pragma unroll
            for (int v = 0; v < (kRowWords + 3) / 4; ++v) {
                const uint4 four = load_cached(from + v);
                words[4 * v] = four.x;
                words[4 * v + 1] = four.y;
                words[4 * v + 2] = four.z;
                words[4 * v + 3] = four.w;
            }
            const auto tap = [&](int ty, int tx) {
                const int at = ty < k ? ty * k + tx : k * k;
                return words[at / 4] >> (at % 4 * 8) & 0xff;
            };
#pragma unroll
            for (int tx = 0; tx < k; ++tx)
#pragma unroll
                for (int w = 0; w < kDepth; ++w)
                    if constexpr (kDepthwise)
                        weights[tx][i][w] = tap(4 * w, tx) | tap(4 * w + 1, tx) << 8 | tap(4 * w + 2, tx) << 16 |
                                            tap(4 * w + 3, tx) << 24;
                    else
                        weights[tx][i][w] = words[(w / group_words * k + tx) * group_words + w % group_words];
        }
    }

    // Column tx from the words of its rows.
    __device__ void set_column(int tx, const uint32_t (&u)[kLoaded]) {
        if constexpr (!kDepthwise) {
#pragma unroll
            for (int w = 0; w < kDepth; ++w) columns[tx][w] = u[w];
        } else {
            // Four channels by up to four taps, turned; bytes behind the last tap meet weights of zero.
#pragma unroll
            for (int w = 0; w < kDepth; ++w) {
                const auto tap = [&](int i) { return u[4 * w + i < k ? 4 * w + i : k - 1]; };
                const uint32_t a = bytes_of(tap(0), tap(1), 0x5140), c = bytes_of(tap(0), tap(1), 0x7362);
                const uint32_t b = bytes_of(tap(2), tap(3), 0x5140), d = bytes_of(tap(2), tap(3), 0x7362);
                columns[tx][operand(0, w)] = bytes_of(a, b, 0x5410);
                columns[tx][operand(1, w)] = bytes_of(a, b, 0x7632);
                columns[tx][operand(2, w)] = bytes_of(c, d, 0x5410);
                columns[tx][operand(3, w)] = bytes_of(c, d, 0x7632);
            }
        }
    }

    __device__ int32_t sum(int channel, int32_t start) const {
#pragma unroll
        for (int tx = 0; tx < k; ++tx)
#pragma unroll
            for (int w = 0; w < kDepth; ++w)
                start = dot4(columns[tx][operand(channel, w)], weights[tx][channel][w], start);
        return start;
    }
};

// The grid's threads are a multiple of the quads of channels, so that a thread keeps its own, and their weights.
template <int k, int stride, int group_words>
__global__ void __launch_bounds__(kStripThreads) strip_conv(const Int8Conv2d p) {
    using W = Window<k, group_words>;
    const int quads = static_cast<int>(p.weight.out_channels / 4), out_h = static_cast<int>(p.out_h);
    const int out_w = static_cast<int>(p.out_w), strips = (out_w + kStrip - 1) / kStrip;
    const int64_t first = int64_t{blockIdx.x} * kStripThreads + threadIdx.x;
    const int64_t items = p.batch * strips * out_h * quads;
    const int o = static_cast<int>(first % quads) * 4;
    const int group_outputs = static_cast<int>(p.weight.out_channels / p.weight.groups);
    const int channel = group_words == 0 ? o : o / group_outputs * group_words * 4;

    W window;
    window.load_weights(p, o);
    int32_t offset[4];
    float multiplier[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        offset[i] = load_cached(p.offset + o + i);
        multiplier[i] = load_cached(p.multiplier + o + i);
    }
    const ByteRounding rounding(p);
    const uint32_t flip = four_times(p.input_flip), padding = four_times(p.input_zero_point);
    const int in_w = static_cast<int>(p.in_w), pixel_bytes = static_cast<int>(p.input_stride);
    for (int64_t item = first; item < items; item += int64_t{gridDim.x} * kStripThreads) {
        // Rows follow each other, so that the first-level cache has what they share.
        const int64_t row = item / quads;
        const int y = static_cast<int>(row % out_h), x0 = static_cast<int>(row / out_h % strips) * kStrip;
        const int64_t n = row / out_h / strips;
        const uint8_t* rows[k];  // null outside of the image
#pragma unroll
        for (int ty = 0; ty < k; ++ty) {
            const int64_t at = int64_t{y} * stride - p.pad_top + ty;
            rows[ty] = at < 0 || at >= p.in_h ? nullptr : p.input + (n * p.in_h + at) * in_w * pixel_bytes + channel;
        }
        const int left = x0 * stride - static_cast<int>(p.pad_left);
        const auto load_column = [&](int tx, int x) {
            constexpr int kPerRow = W::kLoaded / k;
            const bool inside = x >= 0 && x < in_w;
            uint32_t u[W::kLoaded];
#pragma unroll
            for (int i = 0; i < W::kLoaded; ++i) {
                const auto* from = reinterpret_cast<const uint32_t*>(rows[i / kPerRow] + x * pixel_bytes) + i % kPerRow;
                u[i] = inside && rows[i / kPerRow] ? load_cached(from) ^ flip : padding;
            }
            window.set_column(tx, u);
        };
#pragma unroll
        for (int tx = 0; tx < k - stride; ++tx) load_column(tx, left + tx);
        auto* output = static_cast<uint8_t*>(p.output) + ((n * out_h + y) * out_w + x0) * p.output_stride + o;
#pragma unroll
        for (int i = 0; i < kStrip; ++i) {
#pragma unroll
            for (int tx = k - stride; tx < k; ++tx) load_column(tx, left + i * stride + tx);
            if (x0 + i < out_w) {
                float results[4];
#pragma unroll
                for (int c = 0; c < 4; ++c) results[c] = static_cast<float>(window.sum(c, offset[c])) * multiplier[c];
                *reinterpret_cast<uint32_t*>(output + i * p.output_stride) =
                    bytes_of(rounding.two(results[0], results[1]), rounding.two(results[2], results[3]), 0x5410);
            }
#pragma unroll
            for (int tx = 0; tx < k - stride; ++tx)
#pragma unroll
                for (int w = 0; w < static_cast<int>(sizeof(window.columns[0]) / 4); ++w)
                    window.columns[tx][w] = window.columns[tx + stride][w];
        }
    }
}

// --- host ----------------------------------------------------------------------------------------------------------

template <int k, int group_words>
void launch_strips(const Launcher& launch, const Int8Conv2d& p) {
    const auto kernel = p.stride_w == 1 ? strip_conv<k, 1, group_words> : strip_conv<k, 2, group_words>;
    const int64_t quads = p.weight.out_channels / 4;
    const int64_t items = p.batch * ceil_div(p.out_w, kStrip) * p.out_h * quads;
    const int64_t step = quads / std::gcd(quads, int64_t{kStripThreads});  // blocks that end with the last quad
    // No more than run at once, or the few above that start when all the others have ended.
    const int64_t most = std::max(step, launch.resident_blocks(kernel, kStripThreads) / step * step);
    const int64_t blocks = std::min(ceil_div(ceil_div(items, kStripThreads), step) * step, most);
    STD_TORCH_CHECK(blocks <= kMostBlocks, "input: too large");
    launch(kernel, static_cast<unsigned>(blocks), kStripThreads, 0, p);
}

// Launches the kernel if it serves the layer: 3 × 3 and depthwise 5 × 5, one step per pixel or two, bytes out.
inline bool conv_by_strips(const Launcher& launch, const Int8Conv2d& p) {
    const Int8Weight& w = p.weight;
    const bool depthwise = w.group_channels == 1 && w.out_channels == w.groups;
    const bool narrow = w.groups > 1 && (w.group_channels == 4 || w.group_channels == 8) && w.kernel_h == 3 &&
                        w.out_channels / w.groups % 4 == 0;
    if (!(depthwise && (w.kernel_h == 3 || w.kernel_h == 5)) && !narrow) return false;
    if (w.kernel_w != w.kernel_h || p.dilation_h != 1 || p.dilation_w != 1 || p.stride_h != p.stride_w) return false;
    if (p.stride_w > 2 || p.shift || p.float_output || p.residual || w.out_channels % 4) return false;
    if (p.in_w * p.input_stride >= int64_t{1} << 31 || !aligned_to_16(p.packed, 0)) return false;
    if (!aligned_to_4(p.input, p.input_stride) || !aligned_to_4(p.output, p.output_stride)) return false;
    if (depthwise)
        w.kernel_h == 3 ? launch_strips<3, 0>(launch, p) : launch_strips<5, 0>(launch, p);
    else
        w.group_channels == 4 ? launch_strips<3, 1>(launch, p) : launch_strips<3, 2>(launch, p);
    return true;
}

}  // namespace
}  // namespace imgopt

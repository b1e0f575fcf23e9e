// masked_matmul on CUDA over the row quads of the CPU. A block of threads has 64 samples and a few windows of rows, and
// walks the blocks of columns with that part of x in shared memory, samples side by side: a lane has two samples, so a
// step's columns are read without conflicts and its four values are one broadcast. Sums stay in shared memory between
// blocks, whose quads hold other rows. Every sum has one owner and one order: results are deterministic.
//
// The limit is shared memory, not arithmetic: a step of unshared columns reads 4 bytes per multiply-add, 128 of which
// an SM reads in a cycle, a quarter of what its float32 units could take (27 % is Sputnik's figure on a V100).
#pragma once

#include "../cuda.h"
#include "arithmetic.h"

namespace imgopt {
namespace {

constexpr int kSparseThreads = 256, kSparseWarps = kSparseThreads / 32;
constexpr int kSamples = 64;             // of a block of threads: two per lane
constexpr int kLargestTile = 256;        // columns; wider blocks go without a tile
constexpr int kSumPitch = kSamples + 2;  // rows are read across at the end: two ways to a bank instead of 32

__device__ inline int64_t min_of_two(int64_t a, int64_t b) { return a < b ? a : b; }

template <class Sum>
constexpr int kBlockOutputs = sizeof(Sum) == 8 ? 64 : 256;  // of a block of threads: whole windows

template <class Sum>
inline size_t sparse_shared(int64_t block) {
    return static_cast<size_t>(block * kSamples + kBlockOutputs<Sum> * kSumPitch) * sizeof(Sum);
}

template <class Sum>
struct alignas(2 * sizeof(Sum)) Pair {
    Sum first, second;
};

// The values of a step, as one load: they start at multiples of four.
template <class Sum>
struct alignas(16) Values {
    Sum of[4];
};
template <class Sum>
__device__ inline Values<Sum> step_values(const Sum* at) {
    return *reinterpret_cast<const Values<Sum>*>(at);
}

__device__ inline float multiply_add(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
__device__ inline double multiply_add(double a, double b, double c) { return __builtin_fma(a, b, c); }

// Column `column` of sample n of x.
template <class Storage, class Sum>
__device__ inline Sum x_at(const MaskedInput& x, const Position& at, int64_t column) {
    const int64_t tap = column / x.channels;
    const Storage* from = pixel<Storage>(x, at, tap / x.taps[1], tap % x.taps[1]);
    return from ? static_cast<Sum>(widened(from[column % x.channels])) : Sum(0);
}

// tile[column][sample] for the columns [first, first + count). Neighbouring lanes have neighbouring samples, a warp
// neighbouring columns: what a line brings besides one column is used from the first-level cache.
template <class Storage, class Sum>
__device__ inline void load_tile(const MaskedInput& x, int64_t sample0, int64_t first, int count, Sum* tile) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int per_warp = (count + kSparseWarps - 1) / kSparseWarps;
    const int end = (warp + 1) * per_warp < count ? (warp + 1) * per_warp : count;
    for (int half = 0; half < kSamples; half += 32) {
        const int64_t n = sample0 + half + lane;
        const bool there = n < x.samples;
        const Position at = position(x, there ? n : 0);
        if (x.taps[0] == 1 && x.taps[1] == 1) {  // a row of x: no divisions
            const Storage* from = there ? pixel<Storage>(x, at, 0, 0) : nullptr;
            for (int k = warp * per_warp; k < end; ++k)
                tile[k * kSamples + half + lane] = from ? static_cast<Sum>(widened(from[first + k])) : Sum(0);
            continue;
        }
        for (int k = warp * per_warp; k < end; ++k)
            tile[k * kSamples + half + lane] = there ? x_at<Storage, Sum>(x, at, first + k) : Sum(0);
    }
}

// Adds the products of a quad's steps to four rows of sums, for a lane's two samples. column(i) gives x.
template <class Sum, class Column>
__device__ inline void add_quad(const RowQuads& w, const Quad& quad, const Sum* values, Pair<Sum> (&sums)[4],
                                const Column& column) {
    int64_t at = quad.first_column;
    const Sum* value = values + quad.first_step * 4;
    for (int64_t s = 0; s < quad.steps[0]; ++s, ++at, value += 4) {
        const Values<Sum> v = step_values(value);
        const Pair<Sum> x = column(column_at(w, at));
        for (int r = 0; r < 4; ++r) {
            sums[r].first = multiply_add(v.of[r], x.first, sums[r].first);
            sums[r].second = multiply_add(v.of[r], x.second, sums[r].second);
        }
    }
    for (int64_t s = 0; s < quad.steps[1]; ++s, at += 2, value += 4) {
        const Values<Sum> v = step_values(value);
        for (int half = 0; half < 2; ++half) {
            const Pair<Sum> x = column(column_at(w, at + half));
            for (int r = 2 * half; r < 2 * half + 2; ++r) {
                sums[r].first = multiply_add(v.of[r], x.first, sums[r].first);
                sums[r].second = multiply_add(v.of[r], x.second, sums[r].second);
            }
        }
    }
    for (int64_t s = 0; s < quad.steps[2]; ++s, at += 4, value += 4) {
        const Values<Sum> v = step_values(value);
        for (int r = 0; r < 4; ++r) {
            const Pair<Sum> x = column(column_at(w, at + r));
            sums[r].first = multiply_add(v.of[r], x.first, sums[r].first);
            sums[r].second = multiply_add(v.of[r], x.second, sums[r].second);
        }
    }
}

// `tiled`: a block of columns fits into shared memory; otherwise x is read where it lies.
template <class Storage, class Sum, bool tiled>
__global__ void __launch_bounds__(kSparseThreads) sparse_matmul(const MaskedMatmul p) {
    constexpr int kRows = kBlockOutputs<Sum>;
    const RowQuads& w = p.weight;
    Sum* sums = dynamic_shared<Sum>();
    Sum* tile = sums + kRows * kSumPitch;
    const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
    const int64_t groups = (w.rows + kRows - 1) / kRows, columns = columns_of(p.x), quads = (w.rows + 3) / 4;
    const int64_t row0 = blockIdx.x % groups * kRows, sample0 = blockIdx.x / groups * kSamples;
    const int rows = static_cast<int>(w.rows - row0 < kRows ? w.rows - row0 : kRows);
    for (int i = thread; i < kRows * kSamples; i += kSparseThreads) {
        const int row = i / kSamples;
        const bool offset = p.bias && row < rows;
        sums[row * kSumPitch + i % kSamples] =
            offset ? static_cast<Sum>(widened(static_cast<const Storage*>(p.bias)[row0 + row])) : Sum(0);
    }
    const Position places[2] = {position(p.x, min_of_two(sample0 + 2 * lane, p.x.samples - 1)),
                                position(p.x, min_of_two(sample0 + 2 * lane + 1, p.x.samples - 1))};
    for (int64_t b = 0; b < w.blocks; ++b) {
        __syncthreads();  // the last block's tile is done with, and its sums are written
        const int64_t first = b * w.block;
        if (tiled) {
            const int64_t left = columns - first;
            load_tile<Storage, Sum>(p.x, sample0, first, static_cast<int>(left < w.block ? left : w.block), tile);
            __syncthreads();
        }
        const auto column = [&](int64_t k) {
            if (tiled) return *reinterpret_cast<const Pair<Sum>*>(tile + k * kSamples + 2 * lane);
            return Pair<Sum>{x_at<Storage, Sum>(p.x, places[0], first + k),
                             x_at<Storage, Sum>(p.x, places[1], first + k)};
        };
        const int64_t last = min_of_two((row0 + kRows) / 4, quads);
        for (int64_t q = row0 / 4 + warp; q < last; q += kSparseWarps) {
            const Quad quad(w, b, q);
            Pair<Sum>* mine[4];
            Pair<Sum> own[4];
            for (int r = 0; r < 4; ++r) {
                mine[r] = reinterpret_cast<Pair<Sum>*>(sums + (quad.rows[r] - row0) * kSumPitch + 2 * lane);
                own[r] = *mine[r];
            }
            add_quad(w, quad, static_cast<const Sum*>(p.values), own, column);
            for (int r = 0; r < 4; ++r) *mine[r] = own[r];
        }
    }
    __syncthreads();
    for (int i = thread; i < kRows * kSamples; i += kSparseThreads) {
        const int row = i % kRows, n = i / kRows;
        if (row < rows && sample0 + n < p.x.samples)
            narrow(sums[row * kSumPitch + n], &static_cast<Storage*>(p.output)[(sample0 + n) * w.rows + row0 + row]);
    }
}

// --- gradient of the weight ----------------------------------------------------------------------------------------

constexpr int kGradPitch = kSamples + 1;  // lanes read other rows and columns of one sample

// Column of value v of a quad, counted from the block's.
__device__ inline int64_t column_of_value(const RowQuads& w, const Quad& quad, int64_t v) {
    const int64_t s = v / 4, r = v % 4, one = quad.steps[0], two = quad.steps[1];
    const int64_t at = s < one         ? s
                       : s < one + two ? one + 2 * (s - one) + r / 2
                                       : one + 2 * two + 4 * (s - one - two) + r;
    return column_at(w, quad.first_column + at);
}
__device__ inline int64_t values_of(const Quad& quad) { return 4 * (quad.steps[0] + quad.steps[1] + quad.steps[2]); }

// Calls body(row, column, i) for the values of a quad, spread over a warp's lanes.
template <class Body>
__device__ inline void for_own_values(const RowQuads& w, const Quad& quad, int lane, const Body& body) {
    for (int64_t v = lane; v < values_of(quad); v += 32)
        body(quad.rows[v % 4], column_of_value(w, quad, v), quad.first_step * 4 + v);
}

template <class Sum>
inline size_t weight_grad_shared(int64_t block) {
    return static_cast<size_t>(block + RowQuads::kWindow) * kGradPitch * sizeof(Sum);
}

// A block of threads has a window of rows and a block of columns, and all samples: sums[i] has one owner.
template <class Storage, class Sum, bool tiled>
__global__ void __launch_bounds__(kSparseThreads) sparse_weight_grad(const MaskedWeightGrad p) {
    const RowQuads& w = p.weight;
    Sum* grads = dynamic_shared<Sum>();  // [row][sample]
    Sum* tile = grads + RowQuads::kWindow * kGradPitch;
    const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
    const int64_t windows = (w.rows + RowQuads::kWindow - 1) / RowQuads::kWindow, quads = (w.rows + 3) / 4;
    const int64_t b = blockIdx.x / windows, row0 = blockIdx.x % windows * RowQuads::kWindow, first = b * w.block;
    const int64_t left = columns_of(p.x) - first;
    const int columns = static_cast<int>(left < w.block ? left : w.block);
    const int64_t last = min_of_two((row0 + RowQuads::kWindow) / 4, quads);
    Sum* sums = static_cast<Sum*>(p.sums);
    for (int64_t sample0 = 0; sample0 < p.x.samples; sample0 += kSamples) {
        __syncthreads();
        for (int i = thread; i < RowQuads::kWindow * kSamples; i += kSparseThreads) {
            const int row = i % RowQuads::kWindow, n = i / RowQuads::kWindow;
            const bool there = sample0 + n < p.x.samples && row0 + row < w.rows;
            grads[row * kGradPitch + n] =
                there ? static_cast<Sum>(
                            widened(static_cast<const Storage*>(p.grad)[(sample0 + n) * p.grad_stride + row0 + row]))
                      : Sum(0);
        }
        if (tiled)
            for (int i = thread; i < columns * kSamples; i += kSparseThreads) {
                const int k = i % columns, n = i / columns;
                tile[k * kGradPitch + n] =
                    sample0 + n < p.x.samples ? x_at<Storage, Sum>(p.x, position(p.x, sample0 + n), first + k) : Sum(0);
            }
        __syncthreads();
        const int count = static_cast<int>(min_of_two(kSamples, p.x.samples - sample0));
        for (int64_t q = row0 / 4 + warp; q < last; q += kSparseWarps)
            for_own_values(w, Quad(w, b, q), lane, [&](int64_t row, int64_t column, int64_t i) {
                const Sum* g = grads + (row - row0) * kGradPitch;
                Sum sum = sample0 ? sums[i] : Sum(0);
                for (int n = 0; n < count; ++n) {
                    const Sum x = tiled ? tile[column * kGradPitch + n]
                                        : x_at<Storage, Sum>(p.x, position(p.x, sample0 + n), first + column);
                    sum = multiply_add(g[n], x, sum);
                }
                sums[i] = sum;
                const bool done = sample0 + kSamples >= p.x.samples;
                if (done && p.source[i] >= 0) narrow(sum, &static_cast<Storage*>(p.gradient)[p.source[i]]);
            });
    }
}

// --- values and int8 -----------------------------------------------------------------------------------------------

template <class Storage, class Sum>
__global__ void __launch_bounds__(kSparseThreads) widen_values(const MaskedValues p, int64_t count) {
    const int64_t step = int64_t{gridDim.x} * kSparseThreads;
    for (int64_t i = int64_t{blockIdx.x} * kSparseThreads + threadIdx.x; i < count; i += step) {
        const int64_t at = p.source ? p.source[i] : i;
        static_cast<Sum*>(p.values)[i] =
            at < 0 ? Sum(0) : static_cast<Sum>(widened(static_cast<const Storage*>(p.weight)[at]));
    }
}

// Scales of an int8 product, in float64, as the binding of the CPU multiplies them.
struct Int8Scales {
    const float* weight;  // per row
    double input, output;
};

// A block of threads has a window of rows and 32 samples: a warp a quad, a lane a sample. Sums are exact integers.
template <class Input, class Output>
__global__ void __launch_bounds__(kSparseThreads)
    int8_sparse_matmul(const Int8MaskedMatmul p, const int8_t* values, const Int8Scales scales) {
    __shared__ int32_t sums[RowQuads::kWindow][33];
    const RowQuads& w = p.weight;
    const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
    const int64_t windows = (w.rows + RowQuads::kWindow - 1) / RowQuads::kWindow, quads = (w.rows + 3) / 4;
    const int64_t row0 = blockIdx.x % windows * RowQuads::kWindow, sample0 = blockIdx.x / windows * 32;
    const int64_t n = min_of_two(sample0 + lane, p.samples - 1);
    const Input* x = static_cast<const Input*>(p.input) + n * p.channels;
    for (int i = thread; i < RowQuads::kWindow * 32; i += kSparseThreads) sums[i / 32][i % 32] = 0;
    const int64_t last = min_of_two((row0 + RowQuads::kWindow) / 4, quads);
    for (int64_t b = 0; b < w.blocks; ++b) {
        __syncthreads();
        for (int64_t q = row0 / 4 + warp; q < last; q += kSparseWarps) {
            const Quad quad(w, b, q);
            for (int64_t v = 0; v < values_of(quad); ++v) {
                const int64_t column = b * w.block + column_of_value(w, quad, v);
                sums[quad.rows[v % 4] - row0][lane] += values[quad.first_step * 4 + v] * (x[column] - p.zero_point);
            }
        }
    }
    __syncthreads();
    for (int i = thread; i < RowQuads::kWindow * 32; i += kSparseThreads) {
        const int64_t row = row0 + i % RowQuads::kWindow, sample = sample0 + i / RowQuads::kWindow;
        if (row >= w.rows || sample >= p.samples) continue;
        const float multiplier =
            static_cast<float>(scales.input * static_cast<double>(scales.weight[row]) / scales.output);
        float y = static_cast<float>(sums[row - row0][sample - sample0] + p.bias[row]) * multiplier;
        y = y < p.low ? p.low : y;
        y = y > p.high ? p.high : y;
        requantized(y, p.output_zero_point, static_cast<Output*>(p.result)[sample * w.rows + row]);
    }
}

}  // namespace
}  // namespace imgopt

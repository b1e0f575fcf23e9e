// Hue, sharpness and table lookups over the units of a batch. What is done to a run of pixels comes from the ISA unit's
// `Runs`; `PlainRuns` are loops that the compiler makes vectors of.
#pragma once

#include "arithmetic.h"

namespace imgopt {
namespace {

struct PlainRuns {
    template <class T, int kStride>
    static void hue_block(const T* from, T* to, int64_t channel, int count, const Places& at) {
        constexpr int kMost = 256;  // three planes of floats, 3 KiB, stay in the first-level cache
        float planes[3][kMost] = {};
        for (int c = 0; c < 3; ++c)
            for (int i = 0; i < count; ++i) planes[c][i] = static_cast<float>(from[c * channel + i * kStride]);
        for (int i = 0; i < kMost; ++i) turn_pixel(planes[0][i], planes[1][i], planes[2][i], at);
        for (int c = 0; c < 3; ++c)
            for (int i = 0; i < count; ++i) store(planes[c][i], to + c * channel + i * kStride);
    }

    // `count` pixels, `kStride` elements from one to the next and `channel` from one channel to the next.
    template <int kStride, class T>
    static void hue(const T* from, T* to, int64_t channel, int64_t count, const Places& at) {
        for (int64_t i = 0; i < count; i += 256)
            hue_block<T, kStride>(from + i * kStride, to + i * kStride, channel,
                                  static_cast<int>(count - i < 256 ? count - i : 256), at);
    }

    static void lookup(const uint8_t* from, uint8_t* to, int64_t count, const uint8_t* table) {
        for (int64_t i = 0; i < count; ++i) to[i] = table[from[i]];
    }
    static void lookup_interleaved(const uint8_t* from, uint8_t* to, int64_t count, int64_t channels,
                                   const uint8_t* tables) {
        if (channels == 3)
            for (int64_t i = 0; i < 3 * count; i += 3)
                for (int c = 0; c < 3; ++c) to[i + c] = tables[256 * c + from[i + c]];
        else
            for (int64_t i = 0; i < channels * count; i += channels)
                for (int64_t c = 0; c < channels; ++c) to[i + c] = tables[256 * c + from[i + c]];
    }

    // The elements [0, count) of a row from `at` on. The sums over three rows are needed three times, by the pixels on
    // both sides too: kept as 16 bits. Integers, so that the order of adding does not matter.
    static void sharpen_stretch(const uint8_t* __restrict at, uint8_t* __restrict to, int64_t row, int64_t step,
                                int64_t count, float weight, uint16_t* __restrict sums) {
        const uint8_t *up = at - row - step, *middle = at - step, *down = at + row - step;
        for (int64_t i = 0; i < count + 2 * step; ++i) sums[i] = static_cast<uint16_t>(up[i] + middle[i] + down[i]);
        const uint16_t *left = sums, *inner = sums + step, *right = sums + 2 * step;
        for (int64_t i = 0; i < count; ++i) {
            const int16_t excess = static_cast<int16_t>(left[i] + inner[i] + right[i] - 9 * at[i]);
            sharpen(at[i], static_cast<float>(excess), weight, 255.0f, to + i);
        }
    }
};

// Calls body(image, first pixel, count) for the units [begin, end) of images of `pixels`.
template <class Body>
inline void each_run(int64_t pixels, int64_t begin, int64_t end, const Body& body) {
    const int64_t runs = (pixels + kPixelRun - 1) / kPixelRun;
    for (int64_t unit = begin; unit < end; ++unit) {
        const int64_t first = unit % runs * kPixelRun;
        body(unit / runs, first, pixels - first < kPixelRun ? pixels - first : kPixelRun);
    }
}

template <class Runs, class T>
inline void hue_runs(const Hue& p, int64_t begin, int64_t end) {
    each_run(p.pixels, begin, end, [&](int64_t image, int64_t first, int64_t count) {
        const int64_t at = 3 * image * p.pixels + (p.interleaved ? 3 : 1) * first;
        const T* from = static_cast<const T*>(p.images) + at;
        T* to = static_cast<T*>(p.output) + at;
        const Places turned = places(p.turn[image]);
        if (p.interleaved)
            Runs::template hue<3>(from, to, 1, count, turned);
        else
            Runs::template hue<1>(from, to, p.pixels, count, turned);
    });
}

template <class Runs>
inline void adjust_hue(const Hue& p, int64_t begin, int64_t end) {
    p.dtype == DType::u8 ? hue_runs<Runs, uint8_t>(p, begin, end) : hue_runs<Runs, float>(p, begin, end);
}

template <class Runs>
inline void lookup(const Lookup& p, int64_t begin, int64_t end) {
    each_run(p.pixels, begin, end, [&](int64_t image, int64_t first, int64_t count) {
        const uint8_t* table = p.table + image * p.table_stride;
        const int64_t at = image * p.channels * p.pixels;
        if (p.interleaved && p.channels > 1) {
            const int64_t i = at + first * p.channels;
            Runs::lookup_interleaved(p.images + i, p.output + i, count, p.channels, table);
        } else {
            for (int64_t c = 0; c < p.channels; ++c) {
                const int64_t i = at + c * p.pixels + first;
                Runs::lookup(p.images + i, p.output + i, count, table + 256 * c);
            }
        }
    });
}

// --- sharpness -----------------------------------------------------------------------------------------------------

constexpr int64_t kStretch = 2048;  // elements at a time: with their sums a quarter of the first-level cache

template <class Runs>
inline void sharpen_row(const uint8_t* at, uint8_t* to, int64_t row, int64_t step, float weight) {
    const int64_t width = row - 2 * step;
    if (step > kStretch / 4) {  // hundreds of interleaved channels
        for (int64_t i = 0; i < width; ++i) {
            const float change = static_cast<float>(excess(at + i - row, at + i, at + i + row, step));
            sharpen(at[i], change, weight, 255.0f, to + i);
        }
        return;
    }
    uint16_t sums[2 * kStretch];
    for (int64_t i = 0; i < width; i += kStretch)
        Runs::sharpen_stretch(at + i, to + i, row, step, width - i < kStretch ? width - i : kStretch, weight, sums);
}

template <class Runs>
inline void sharpen_row(const float* __restrict at, float* __restrict to, int64_t row, int64_t step, float weight) {
    for (int64_t i = 0; i < row - 2 * step; ++i)
        sharpen(at[i], excess(at + i - row, at + i, at + i + row, step), weight, 1.0f, to + i);
}

template <class Runs, class T>
inline void sharpness_rows(const Sharpness& p, int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) {
        const int64_t y = unit % p.height;
        const T* at = static_cast<const T*>(p.images) + unit * p.row;
        T* to = static_cast<T*>(p.output) + unit * p.row;
        const bool inside = y > 0 && y < p.height - 1 && p.row >= 3 * p.step;
        const int64_t kept = inside ? p.step : p.row;
        memcpy(to, at, static_cast<size_t>(kept) * sizeof(T));
        if (!inside) continue;
        sharpen_row<Runs>(at + p.step, to + p.step, p.row, p.step, p.weight[unit / p.height / p.planes]);
        memcpy(to + p.row - kept, at + p.row - kept, static_cast<size_t>(kept) * sizeof(T));
    }
}

template <class Runs>
inline void adjust_sharpness(const Sharpness& p, int64_t begin, int64_t end) {
    p.dtype == DType::u8 ? sharpness_rows<Runs, uint8_t>(p, begin, end) : sharpness_rows<Runs, float>(p, begin, end);
}

}  // namespace
}  // namespace imgopt

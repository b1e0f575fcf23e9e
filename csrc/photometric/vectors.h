// Runs of pixels in the vectors of `Lanes`: arithmetic.h, operation by operation.
#pragma once

#include "arithmetic.h"

namespace imgopt {
namespace {

template <class Lanes>
inline void turn_lanes(typename Lanes::Floats (&rgb)[3], const Places& at) {
    using L = Lanes;
    using Floats = typename L::Floats;
    const Floats r = rgb[0], g = rgb[1], b = rgb[2];
    const Floats value = L::larger(L::larger(r, g), b), low = L::smaller(L::smaller(r, g), b);
    const Floats chroma = L::subtract(value, low), lowest = L::subtract(low, chroma);
    const auto is_red = L::same(value, r), is_green = L::same(value, g);
    const auto by_largest = [&](Floats red, Floats green, Floats blue) {
        return L::choose(is_red, red, L::choose(is_green, green, blue));
    };
    const Floats difference = by_largest(L::subtract(g, b), L::subtract(b, r), L::subtract(r, g));
    const Floats largest = L::all(at.largest), next = L::all(at.next), last = L::all(at.last);
    const Floats place[3] = {by_largest(largest, last, next), by_largest(next, largest, last),
                             by_largest(last, next, largest)};
    for (int c = 0; c < 3; ++c) {
        const Floats far = L::magnitude(L::add(difference, L::multiply(chroma, place[c])));
        rgb[c] = L::smaller(value, L::larger(low, L::add(lowest, far)));
    }
}

template <class Lanes, int kStride, class T>
inline void turn_vector(const T* from, T* to, int64_t channel, const Places& at) {
    typename Lanes::Floats rgb[3];
    if constexpr (kStride == 3)
        Lanes::load_pixels(from, rgb);
    else
        Lanes::load_planes(from, channel, rgb);
    turn_lanes<Lanes>(rgb, at);
    if constexpr (kStride == 3)
        Lanes::store_pixels(rgb, to);
    else
        Lanes::store_planes(rgb, to, channel);
}

// As PlainRuns::hue. The pixels after the last whole vector go through a copy.
template <class Lanes, int kStride, class T>
inline void turn_run(const T* from, T* to, int64_t channel, int64_t count, const Places& at) {
    constexpr int kCount = Lanes::kCount;
    int64_t i = 0;
    for (; i + kCount <= count; i += kCount)
        turn_vector<Lanes, kStride>(from + i * kStride, to + i * kStride, channel, at);
    if (i == count) return;
    const int64_t channel_of_copy = kStride == 3 ? 1 : kCount;
    T pixels[3 * kCount] = {};
    for (int64_t k = i; k < count; ++k)
        for (int c = 0; c < 3; ++c) pixels[c * channel_of_copy + (k - i) * kStride] = from[c * channel + k * kStride];
    turn_vector<Lanes, kStride>(pixels, pixels, channel_of_copy, at);
    for (int64_t k = i; k < count; ++k)
        for (int c = 0; c < 3; ++c) to[c * channel + k * kStride] = pixels[c * channel_of_copy + (k - i) * kStride];
}

constexpr int32_t kExcess = 1 - 9 * 65536;  // a pair of words: 1 for the lower one, -9 for the upper one

// The place after `i` for steps of `step` up to `end` >= step, the last of which ends there.
inline int64_t next_place(int64_t i, int64_t step, int64_t end) {
    const int64_t next = i + step;
    return next + step <= end || next >= end ? next : end - step;
}

// As PlainRuns::sharpen_stretch, a vector of elements at a time; the last one overlaps the one before it.
template <class Lanes>
inline void sharpen_vectors(const uint8_t* at, uint8_t* to, int64_t row, int64_t step, int64_t count, float weight,
                            uint16_t* sums) {
    constexpr int64_t kWords = Lanes::kWords;
    const uint8_t *up = at - row - step, *middle = at - step, *down = at + row - step;
    const int64_t summed = count + 2 * step;
    for (int64_t i = 0; i < summed; i = next_place(i, kWords, summed))
        Lanes::add_rows(up + i, middle + i, down + i, sums + i);
    for (int64_t i = 0; i < count; i = next_place(i, kWords, count))
        Lanes::sharpen(sums + i, step, at + i, weight, to + i);
}

}  // namespace
}  // namespace imgopt

// affine_warp of float16, bfloat16 and float32 images in vectors, the loop that the units share: the touched part of
// the source is copied as float32, plane by plane, with its border written out as pixels (window.h), so that layout,
// type and padding are dealt with once per source pixel and the loop over the output has neither inside nor outside. A
// unit brings the columns of one row of taps at as many positions as it has lanes.
#pragma once

#include "groups.h"

namespace imgopt {
namespace {

constexpr int kPlanes = 4;  // channels that are located, and in the window, together

// --- the window ----------------------------------------------------------------------------------------------------

template <class T>
void widen_row(const T* from, int64_t count, float* to) {
    for (int64_t i = 0; i < count; ++i) to[i] = widened(from[i]);
}
#if defined(__F16C__)
inline void widen_row(const Half* from, int64_t count, float* to) {
    int64_t i = 0;
    for (; i + 8 <= count; i += 8)
        _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
    for (; i < count; ++i) to[i] = widened(from[i]);
}
#endif

template <int channels>
void deinterleave(const float* from, int64_t count, float* to, int64_t plane) {
    for (int64_t i = 0; i < count; ++i)
        for (int c = 0; c < channels; ++c) to[c * plane + i] = from[i * channels + c];
}

// `count` pixels of `channels` planes, `plane` floats apart. `room`: for a row of the source, all its channels.
template <class T>
void copy_row(const Source<T>& source, const T* from, int channels, int64_t count, float* room, float* to,
              int64_t plane) {
    if (source.channel == 1 && source.column == channels && (channels == 3 || channels == 4)) {
        widen_row(from, count * channels, room);
        return channels == 3 ? deinterleave<3>(room, count, to, plane) : deinterleave<4>(room, count, to, plane);
    }
    for (int c = 0; c < channels; ++c, from += source.channel, to += plane) {
        if (source.column == 1)
            widen_row(from, count, to);
        else
            for (int64_t i = 0; i < count; ++i) to[i] = widened(from[i * source.column]);
    }
}

// `source` begins at the first of the channels, `fill` too.
template <class T>
void fill_planes(const Source<T>& source, const float* fill, const Window& w, Padding padding, int channels,
                 float* room) {
    const int64_t pitch = w.pitch / int64_t{sizeof(float)}, plane = pitch * w.height;
    const int32_t left = w.x0 < 0 ? -w.x0 : 0, end = source.width - w.x0, right = end < w.width ? end : w.width;
    const bool touches = left < right;
    float* to = reinterpret_cast<float*>(w.data);
    for (int32_t row = 0; row < w.height; ++row, to += pitch) {
        const int32_t y = tap_index(w.y0 + row, source.height, padding);
        const T* from = source.data + (y < 0 ? 0 : y) * source.row;
        if (y >= 0 && touches)
            copy_row(source, from + (w.x0 + left) * source.column, channels, right - left, room, to + left, plane);
        for (int32_t i = 0; i < w.width; ++i) {
            if (y >= 0 && touches && i == left) i = right;
            if (i >= w.width) break;
            const int32_t x = y < 0 ? -1 : tap_index(w.x0 + i, source.width, padding);
            for (int c = 0; c < channels; ++c)
                to[c * plane + i] = x < 0 ? fill[c] : widened(from[x * source.column + c * source.channel]);
        }
    }
}

// --- samples -------------------------------------------------------------------------------------------------------

// What a vector of samples of one plane has in common with those of the other planes.
template <class Isa, int taps>
struct AxisVectors {
    typename Isa::Vector x[taps], y[taps];

    IMGOPT_INLINE AxisVectors(const typename Isa::Group& at, int half) {
        if constexpr (taps == 2) {
            x[0] = at.fx[half];
            y[0] = at.fy[half];
        } else if constexpr (taps == 4) {
            Isa::bicubic(at.fx[half], x);
            Isa::bicubic(at.fy[half], y);
        }
    }
};

// One vector of samples of a plane, in the order of sums of arithmetic.h.
template <class Isa, int taps>
IMGOPT_INLINE typename Isa::Vector sample(const uint8_t* plane, int64_t pitch, const int32_t* offset,
                                          const AxisVectors<Isa, taps>& weight) {
    using Vector = typename Isa::Vector;
    Vector columns[taps], sum;
    const auto row = [&](int i) __attribute__((always_inline)) {
        Isa::template columns<taps>(plane + i * pitch, offset, columns);
        if constexpr (taps == 1) return columns[0];
        if constexpr (taps == 2) return Isa::fused(weight.x[0], columns[1] - columns[0], columns[0]);
        Vector across = weight.x[0] * columns[0];
        for (int k = 1; k < taps; ++k) across = Isa::fused(weight.x[k], columns[k], across);
        return across;
    };
    sum = row(0);
    if constexpr (taps == 1) return sum;
    if constexpr (taps == 2) return Isa::fused(weight.y[0], row(1) - sum, sum);
    sum = weight.y[0] * sum;
    for (int k = 1; k < taps; ++k) sum = Isa::fused(weight.y[k], row(k), sum);
    return sum;
}

// The samples of `count` pixels of a block, each plane at its own kBlock values.
template <class Isa, int taps, class T>
void sample_planes(const AffineWarp& p, const Map& map, const Source<T>& source, const Window& w, const float* fill,
                   int channels, int64_t x, int64_t y, int count, float* values) {
    constexpr int lanes = Isa::kLanes;
    const Base<float> base = map.affine ? affine_base<float>(map.m, x, y) : Base<float>{};
    const int64_t plane = w.pitch * w.height;
    if (map.affine && !base.finite) {
        for (int c = 0; c < channels; ++c)
            for (int i = 0; i < kBlock; ++i) values[c * kBlock + i] = fill[c];
        return;
    }
    // Loops of their own: the processor then has the offsets before the loads of the second one ask for them.
    typename Isa::Group groups[kBlock / (2 * lanes)], *group = groups;
    for (int lane = 0; lane < count; lane += 2 * lanes)
        locate_group<Isa, taps>(p, map, source, w, sizeof(float), Place{base, x, y}, lane, *group++);
    group = groups;
    for (int lane = 0; lane < count; lane += 2 * lanes, ++group)
        for (int half = 0; half < 2; ++half) {
            const AxisVectors<Isa, taps> weight(*group, half);
            float* to = values + lane + half * lanes;
            for (int c = 0; c < channels; ++c) {
                const int32_t* offset = group->offset + half * lanes;
                __asm__ volatile("" : "+r"(offset));  // or all offsets wait in registers that there are too few of
                auto v = sample<Isa>(group->origin + c * plane, w.pitch, offset, weight);
                if (!group->plain) Isa::template blend<1>(fill + c, *group, half, &v);
                __builtin_memcpy(to + c * kBlock, &v, sizeof v);
            }
        }
}

// --- tiles and images ----------------------------------------------------------------------------------------------

// Rows [y0, y1) and columns [x0, x1) of an image, x0 a multiple of kBlock, from windows at `scratch`; false: they do
// not fit, or do not pay.
template <class Isa, int taps, class T>
bool warp_planes(const AffineWarp& p, const Map& map, const Source<T>& source, uint8_t* scratch, int64_t image,
                 int64_t y0, int64_t y1, int64_t x0, int64_t x1, Ahead& ahead) {
    constexpr int kRoomBytes = static_cast<int>(kWindowBytes / kPlanes);
    const int together = p.channels < kPlanes ? static_cast<int>(p.channels) : kPlanes;
    Window w = window_of(map, source, p.padding, taps, sizeof(float), false, y0, y1, x0, x1);
    if (!pays(w, together, (y1 - y0) * (x1 - x0)) || w.pitch * together > kRoomBytes) return false;
    float* room = reinterpret_cast<float*>(scratch);
    w.data = scratch + kRoomBytes;
    float values[kPlanes * kBlock] = {};
    const ColorMap<float> color = p.color_matrix ? ColorMap<float>(p, image, 1) : ColorMap<float>();
    for (int64_t c0 = 0; c0 < p.channels; c0 += together) {
        const int channels = p.channels - c0 < together ? static_cast<int>(p.channels - c0) : together;
        Source<T> planes = source;
        planes.data += c0 * source.channel;
        float fill[kPlanes];
        for (int c = 0; c < channels; ++c) fill[c] = static_cast<float>(p.fill[c0 + c]);
        fill_planes(planes, fill, w, p.padding, channels, room);
        for (int64_t y = y0; y < y1; ++y) {
            if (c0 == 0) ahead.row();
            for (int64_t x = x0; x < x1; x += kBlock) {
                const int count = static_cast<int>(x1 - x < kBlock ? x1 - x : kBlock);
                sample_planes<Isa, taps>(p, map, planes, w, fill, channels, x, y, count, values);
                if (p.color_matrix) color_block(color, count, values);
                const int64_t* step = p.output_stride;
                store_block(p, 1, image * step[0] + c0 * step[1] + y * step[2] + x * step[3], count, c0, channels,
                            values);
            }
        }
    }
    return true;
}

template <class Isa, int taps, class T>
void warp_floating_images(const AffineWarp& p, int64_t begin, int64_t end) {
    for_each_image(p, begin, end, [&](int64_t image, int64_t y_begin, int64_t y_end) {
        const Map map = map_of(p, image);
        const int64_t before = (prepared_bytes<T>(p, map) + 63) / 64 * 64;
        uint8_t* scratch =
            static_cast<uint8_t*>(thread_scratch(before + kWindowBytes + kWindowBytes / kPlanes + kSlack));
        const Source<T> source = prepared<T>(p, map, image, scratch);
        Ahead ahead = ahead_of<T>(p, image, y_end - y_begin, end);
        const auto warp = [&](int64_t y0, int64_t y1, int64_t x0, int64_t x1) {
            return warp_planes<Isa, taps>(p, map, source, scratch + before, image, y0, y1, x0, x1, ahead);
        };
        if (warp(y_begin, y_end, 0, p.output_width)) return;
        ahead = Ahead{};
        for (int64_t y0 = y_begin; y0 < y_end; y0 += kTile)
            for (int64_t x0 = 0; x0 < p.output_width; x0 += kTile) {
                const int64_t y1 = y0 + kTile < y_end ? y0 + kTile : y_end;
                const int64_t x1 = x0 + kTile < p.output_width ? x0 + kTile : p.output_width;
                if (!warp(y0, y1, x0, x1)) warp_tile<T, float>(p, map, source, image, y0, y1, x0, x1, ahead);
            }
    });
}

template <class Isa, class T>
void warp_floating_of(const AffineWarp& p, int64_t begin, int64_t end) {
    switch (p.interpolation) {
        case Interpolation::nearest: return warp_floating_images<Isa, 1, T>(p, begin, end);
        case Interpolation::bilinear: return warp_floating_images<Isa, 2, T>(p, begin, end);
        default: return warp_floating_images<Isa, 4, T>(p, begin, end);
    }
}

// Whatever has no window of bytes.
template <class Isa>
void warp_floating(const AffineWarp& p, int64_t begin, int64_t end) {
    const bool near = p.width < (1 << 22) && p.height < (1 << 22);
    if (!near) return warp_rows<float>(p, begin, end);
    switch (p.images_dtype) {
        case DType::f16: return warp_floating_of<Isa, Half>(p, begin, end);
        case DType::bf16: return warp_floating_of<Isa, BFloat16>(p, begin, end);
        case DType::f32: return warp_floating_of<Isa, float>(p, begin, end);
        default: return warp_rows<float>(p, begin, end);
    }
}

}  // namespace
}  // namespace imgopt

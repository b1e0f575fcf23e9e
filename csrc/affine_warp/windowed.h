// affine_warp of uint8 images from a window (window.h), the loop that the vector units share. A unit brings the steps
// on a group of pixels, two of its vectors; groups.h says of each whether all of it lies inside the window, where
// nothing has to be clamped or mirrored, all of it is fill, or neither.
#pragma once

#include "floating.h"
#include "groups.h"

namespace imgopt {
namespace {

constexpr float kModerate = 0x1p60f;  // products of two such numbers are finite, which the stores rely on

// --- per image -----------------------------------------------------------------------------------------------------

// What put() is given: samples, within the range of levels or (bicubic) beyond it, or what the colours have made of
// them.
enum class Values { samples, overshooting, colored };

template <int taps, bool colored>
constexpr Values kValues = colored     ? Values::colored
                           : taps == 4 ? Values::overshooting
                                       : Values::samples;

template <int C>
struct Epilogue {
    float fill[C];  // a sample that is fill
    bool colored;
    ColorMap<float> color;    // where there is a colour matrix
    float factor[C], add[C];  // floating output without one
    float levels;             // uint8 output without one
    bool moderate = true;     // no NaN can arise

    Epilogue(const AffineWarp& p, int64_t image, double whole) : colored(p.color_matrix != nullptr) {
        const auto checked = [&](double v) {
            moderate = moderate && v <= kModerate && v >= -kModerate;
            return static_cast<float>(v);
        };
        levels = static_cast<float>(1 / whole);
        for (int c = 0; c < C; ++c) {
            fill[c] = static_cast<float>(p.fill[c]) * static_cast<float>(whole);
            factor[c] = checked(p.scale[c] * to_unit(p, whole));
            add[c] = checked(p.offset[c]);
        }
        if (colored) color = ColorMap<float>(p, image, whole);
        for (float v : color.matrix) checked(v);
        for (int i = 0; i < 3; ++i) checked(color.low[i]), checked(color.high[i]);
    }
};

// Where a vector of pixels goes. `planar`: channel by channel, `channel` elements apart; otherwise pixel by pixel.
struct Target {
    int64_t channel;
    bool planar;
    int count;     // pixels to write, at most a vector
    int64_t room;  // pixels that may be written, as later ones will be written over
};

// --- one tile ------------------------------------------------------------------------------------------------------

// The groups of one block of one row. A loop of its own: the processor then has their offsets before the loads of the
// next loop ask for them.
template <class Isa, int C, int taps>
IMGOPT_INLINE void locate_block(const AffineWarp& p, const Map& map, const Source<uint8_t>& source, const Window& w,
                                const typename Isa::Steps& steps, const BlockColumn<Isa>& column, int row, int64_t x,
                                int64_t y, int count, typename Isa::Group* groups) {
    constexpr int lanes = Isa::kLanes, bytes = position_bytes(C, taps), lead = taps == 4;
    const Base<float> base = column.base(row);
    const uint8_t* origin =
        w.data + (int64_t{base.y} - w.y0 - lead) * w.pitch + (int64_t{base.x} - w.x0 - lead) * bytes;
    const auto fx = Isa::all(base.fx), fy = Isa::all(base.fy);
    for (int lane = 0; lane < count; lane += 2 * lanes, ++groups) {
        const int32_t reach = map.affine ? column.reach[lane / (2 * lanes)][row] : kReachEither;
        groups->touched = reach != kReachFill;
        groups->plain = reach == kReachInside;
        if (reach == kReachFill) continue;
        // Beyond the end of the row the window may end, though the image does not: those offsets are clamped.
        if (reach == kReachInside && lane + 2 * lanes <= count) {
            groups->origin = origin;
            for (int h = 0; h < 2; ++h)
                Isa::template locate_inside<C, taps>(steps, fx, fy, lane + h * lanes, *groups, h);
        } else {
            locate_group<Isa, taps>(p, map, source, w, bytes, Place{base, x, y}, lane, *groups);
        }
        Isa::template weigh<taps>(*groups);
    }
}

// Samples of half a group through the epilogue to where they belong.
template <class Isa, int C, int taps, bool colored, class T>
IMGOPT_INLINE void sample_half(const Window& w, const Epilogue<C>& epilogue, const Target& target,
                               const typename Isa::Group& group, int half, T* to) {
    if constexpr (taps == 1 && C > 1 && sizeof(T) == 1 && !colored)
        if (!target.planar) return Isa::template copy<C>(to, target, group, half);
    typename Isa::Vector samples[C];
    Isa::template samples<C, taps>(w, group, half, samples);
    if constexpr (colored) Isa::color(epilogue.color, samples);
    Isa::template put<C, kValues<taps, colored>>(to, target, epilogue, samples);
}

// A group that is fill, has pixels that are, or is cut off by the end of the row.
template <class Isa, int C, int taps, bool colored, class T>
[[gnu::noinline]] void finish_group(const Window& w, const Epilogue<C>& epilogue, const Target& whole,
                                    const typename Isa::Group& group, int64_t step, T* to) {
    Target target = whole;
    for (int half = 0; half < 2 && target.room > 0; ++half, to += Isa::kLanes * step, target.room -= Isa::kLanes) {
        target.count = target.room < Isa::kLanes ? static_cast<int>(target.room) : Isa::kLanes;
        if (group.plain) {
            sample_half<Isa, C, taps, colored>(w, epilogue, target, group, half, to);
            continue;
        }
        typename Isa::Vector samples[C];
        if (group.touched) {
            Isa::template samples<C, taps>(w, group, half, samples);
            Isa::template blend<C>(epilogue.fill, group, half, samples);
        } else {
            Isa::template spread<C>(epilogue.fill, samples);
        }
        if constexpr (colored) Isa::color(epilogue.color, samples);
        Isa::template put<C, kValues<taps, colored>>(to, target, epilogue, samples);
    }
}

template <class Isa, int C, int taps, bool colored, class T>
void warp_strip(const AffineWarp& p, const Map& map, const Source<uint8_t>& source, const Window& w,
                const Epilogue<C>& epilogue_of_image, int64_t image, int64_t y0, int64_t y1, int64_t x0, int64_t x1,
                Ahead& ahead) {
    constexpr int lanes = Isa::kLanes;
    const Limits limits(p, source, w, taps);
    const Epilogue<C> epilogue = epilogue_of_image;  // a copy that no store can change
    const int64_t step = p.output_stride[3], row_step = p.output_stride[2];
    Target target{p.output_stride[1], step == 1 && C > 1, lanes, 0};
    BlockColumn<Isa> columns[kStripBlocks];
    typename Isa::Group groups[2][kBlock / (2 * lanes)];
    T* output = static_cast<T*>(p.output) + image * p.output_stride[0];
    const int64_t blocks = (x1 - x0 + kBlock - 1) / kBlock;
    for (int64_t i = 0; map.affine && i < blocks; ++i) columns[i].plan(map, limits, x0 + i * kBlock, y0);
    const typename Isa::Steps steps(columns[0].step, w.pitch);
    int64_t located_row = y0, located = 0, row = y0, block = 0;
    T* to = output + y0 * row_step + x0 * step;
    for (int64_t turn = 0; turn <= (y1 - y0) * blocks; ++turn) {
        if (located_row < y1) {
            const int64_t x = x0 + located * kBlock;
            const int count = static_cast<int>(x1 - x < kBlock ? x1 - x : kBlock);
            ahead.row();
            locate_block<Isa, C, taps>(p, map, source, w, steps, columns[located], static_cast<int>(located_row - y0),
                                       x, located_row, count, groups[turn % 2]);
            if (++located == blocks) {
                located = 0;
                ++located_row;
            }
        }
        if (turn == 0) continue;
        const typename Isa::Group *group = groups[(turn + 1) % 2], *last = group + kBlock / (2 * lanes);
        target.room = x1 - x0 - block * kBlock;
        for (; target.room > 0 && group < last; ++group, target.room -= 2 * lanes, to += 2 * lanes * step) {
            if (!group->plain || target.room < 2 * lanes) {
                finish_group<Isa, C, taps, colored>(w, epilogue, target, *group, step, to);
                continue;
            }
            sample_half<Isa, C, taps, colored>(w, epilogue, target, *group, 0, to);
            const Target rest{target.channel, target.planar, lanes, target.room - lanes};
            sample_half<Isa, C, taps, colored>(w, epilogue, rest, *group, 1, to + lanes * step);
        }
        if (++block == blocks) {
            block = 0;
            to = output + ++row * row_step + x0 * step;
        }
    }
}

// The strips of a tile.
template <class Isa, int C, int taps, bool colored, class T>
void warp_strips(const AffineWarp& p, const Map& map, const Source<uint8_t>& source, const Window& w,
                 const Epilogue<C>& epilogue, int64_t image, int64_t y0, int64_t y1, int64_t x0, int64_t x1,
                 Ahead& ahead) {
    constexpr int64_t wide = kStripBlocks * kBlock;
    for (int64_t y = y0; y < y1; y += Isa::kLanes) {
        const int64_t y_end = y + Isa::kLanes < y1 ? y + Isa::kLanes : y1;
        for (int64_t x = x0; x < x1; x += wide) {
            const int64_t x_end = x + wide < x1 ? x + wide : x1;
            warp_strip<Isa, C, taps, colored, T>(p, map, source, w, epilogue, image, y, y_end, x, x_end, ahead);
        }
    }
}

// --- images and tiles ----------------------------------------------------------------------------------------------

// Whether the vector units serve this call.
inline bool has_window(const AffineWarp& p) {
    const int64_t* in = p.images_stride;
    const int64_t* out = p.output_stride;
    const int64_t c = p.channels;
    const bool in_dense = in[3] == 1 || (in[1] == 1 && in[3] == c);
    const bool out_dense = out[3] == 1 || (out[1] == 1 && out[3] == c);
    return p.images_dtype == DType::u8 && (c == 1 || c == 3 || c == 4) && in_dense && out_dense &&
           p.width < (1 << 22) && p.height < (1 << 22);
}

template <class Isa, int C, int taps, class T>
void warp_windowed(const AffineWarp& p, int64_t begin, int64_t end) {
    uint8_t fill[C];
    for (int c = 0; c < C; ++c) fill[c] = static_cast<uint8_t>(p.fill[c]);
    for_each_image(p, begin, end, [&](int64_t image, int64_t y_begin, int64_t y_end) {
        const Map map = map_of(p, image);
        const Epilogue<C> epilogue(p, image, taps > 1 ? kWeightSum : 1);
        const int64_t before = (prepared_bytes<uint8_t>(p, map) + 63) / 64 * 64;
        uint8_t* scratch = static_cast<uint8_t*>(thread_scratch(before + kWindowBytes + kSlack));
        const Source<uint8_t> source = prepared<uint8_t>(p, map, image, scratch);
        const int64_t block_rows = (y_end - y_begin) * ((p.output_width + kBlock - 1) / kBlock);
        Ahead ahead = ahead_of<uint8_t>(p, image, block_rows, end);
        const auto warp_from_patches = [&](int64_t y0, int64_t y1, int64_t x0, int64_t x1) {
            if constexpr (taps < 4 && Isa::kPatches)
                return epilogue.moderate && Isa::template warp_blocks<C, taps, T>(p, map, source, epilogue, fill, image,
                                                                                  y0, y1, x0, x1, ahead);
            return false;
        };
        const auto warp = [&](int64_t y0, int64_t y1, int64_t x0, int64_t x1) {
            constexpr int bytes = position_bytes(C, taps);
            Window w = window_of(map, source, p.padding, taps, bytes, taps == 2, y0, y1, x0, x1);
            if (!epilogue.moderate || !pays(w, 1, (y1 - y0) * (x1 - x0))) return false;
            w.data = scratch + before;
            fill_window<C, taps, Isa>(source, fill, w, p.padding);
            if constexpr (C == 3)
                if (epilogue.colored)
                    return warp_strips<Isa, C, taps, true, T>(p, map, source, w, epilogue, image, y0, y1, x0, x1,
                                                              ahead),
                           true;
            warp_strips<Isa, C, taps, false, T>(p, map, source, w, epilogue, image, y0, y1, x0, x1, ahead);
            return true;
        };
        if (warp_from_patches(y_begin, y_end, 0, p.output_width)) return;
        // Where a homography shrinks the image little, patches serve; where it shrinks it more, they do not.
        const bool mixed = Isa::kPatches && taps < 4 && !map.affine;
        if (!mixed && warp(y_begin, y_end, 0, p.output_width)) return;
        const int64_t side = mixed ? kBlock : kTile;
        Ahead nothing{};
        for (int64_t y0 = y_begin; y0 < y_end; y0 += side)
            for (int64_t x0 = 0; x0 < p.output_width; x0 += side) {
                const int64_t y1 = y0 + side < y_end ? y0 + side : y_end;
                const int64_t x1 = x0 + side < p.output_width ? x0 + side : p.output_width;
                if ((mixed && warp_from_patches(y0, y1, x0, x1)) || warp(y0, y1, x0, x1)) continue;
                warp_tile<uint8_t, float>(p, map, source, image, y0, y1, x0, x1, nothing);
            }
    });
}

template <class Isa, int C, int taps>
void warp_to(const AffineWarp& p, int64_t begin, int64_t end) {
    switch (p.output_dtype) {
        case DType::u8: return warp_windowed<Isa, C, taps, uint8_t>(p, begin, end);
        case DType::f16: return warp_windowed<Isa, C, taps, Half>(p, begin, end);
        case DType::bf16: return warp_windowed<Isa, C, taps, BFloat16>(p, begin, end);
        default: return warp_windowed<Isa, C, taps, float>(p, begin, end);
    }
}

template <class Isa, int C>
void warp_channels(const AffineWarp& p, int64_t begin, int64_t end) {
    switch (p.interpolation) {
        case Interpolation::nearest: return warp_to<Isa, C, 1>(p, begin, end);
        case Interpolation::bilinear: return warp_to<Isa, C, 2>(p, begin, end);
        default: return warp_to<Isa, C, 4>(p, begin, end);
    }
}

// Channels [first, first + count) of images and output in planes.
inline AffineWarp planes_of(const AffineWarp& p, int64_t first, int64_t count) {
    const int64_t bytes = p.output_dtype == DType::u8 ? 1 : p.output_dtype == DType::f32 ? 4 : 2;
    AffineWarp part = p;
    part.channels = count;
    part.images = static_cast<const uint8_t*>(p.images) + first * p.images_stride[1];
    part.output = static_cast<char*>(p.output) + first * p.output_stride[1] * bytes;
    part.fill = p.fill + first;
    part.scale = p.scale + first;
    part.offset = p.offset + first;
    if (p.table) part.table = p.table + 256 * first;
    return part;
}

// Whether the vector units serve it a few planes at a time.
inline bool in_planes(const AffineWarp& p) {
    return p.images_dtype == DType::u8 && p.images_stride[3] == 1 && p.output_stride[3] == 1 &&
           (p.channels == 2 || p.channels > 4);
}

template <class Isa>
void warp_vectorized(const AffineWarp& p, int64_t begin, int64_t end) {
    if (in_planes(p)) {
        for (int64_t first = 0, count; first < p.channels; first += count) {
            const int64_t rest = p.channels - first;
            count = rest == 2 ? 1 : rest == 3 || rest == 6 ? 3 : rest < 4 ? 1 : 4;
            warp_vectorized<Isa>(planes_of(p, first, count), begin, end);
        }
        return;
    }
    if (!has_window(p)) return warp_floating<Isa>(p, begin, end);
    switch (p.channels) {
        case 1: return warp_channels<Isa, 1>(p, begin, end);
        case 3: return warp_channels<Isa, 3>(p, begin, end);
        default: return warp_channels<Isa, 4>(p, begin, end);
    }
}

}  // namespace
}  // namespace imgopt

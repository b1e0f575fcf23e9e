// The end of the NEON warp: samples of four pixels, one register per channel, as levels or normalised values in either
// layout; the structured stores interleave what is wider than a byte. No value is NaN (windowed.h sends what could
// become one to the portable kernel).
#pragma once

#include <arm_neon.h>

#include "lanes_neon.h"
#include "windowed.h"

namespace imgopt::neon {
namespace {

// Four elements of a plane to consecutive places, or the first of them.
template <class T, class Store>
IMGOPT_INLINE void put_lanes(T* to, int count, int each, const Store& store) {
    if (count == kLanes) return store(to);
    T lanes[4 * kLanes];
    store(lanes);
    __builtin_memcpy(to, lanes, static_cast<size_t>(count) * each * sizeof(T));
}

IMGOPT_INLINE float32x4_t narrowed(float32x4_t v, const float*) { return v; }
IMGOPT_INLINE uint16x4_t narrowed(float32x4_t v, const Half*) { return vreinterpret_u16_f16(vcvt_f16_f32(v)); }
IMGOPT_INLINE uint16x4_t narrowed(float32x4_t v, const BFloat16*) {
    const uint32x4_t bits = vreinterpretq_u32_f32(v);
    const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    return vshrn_n_u32(vaddq_u32(vaddq_u32(bits, vdupq_n_u32(0x7fff)), odd), 16);
}

IMGOPT_INLINE void put_plane(float* to, float32x4_t v) { vst1q_f32(to, v); }
template <class T>
IMGOPT_INLINE void put_plane(T* to, uint16x4_t v) {
    vst1_u16(&to->bits, v);
}
IMGOPT_INLINE void put_pixels(float* to, const float32x4_t (&v)[3]) { vst3q_f32(to, {{v[0], v[1], v[2]}}); }
IMGOPT_INLINE void put_pixels(float* to, const float32x4_t (&v)[4]) { vst4q_f32(to, {{v[0], v[1], v[2], v[3]}}); }
template <class T>
IMGOPT_INLINE void put_pixels(T* to, const uint16x4_t (&v)[3]) {
    vst3_u16(&to->bits, {{v[0], v[1], v[2]}});
}
template <class T>
IMGOPT_INLINE void put_pixels(T* to, const uint16x4_t (&v)[4]) {
    vst4_u16(&to->bits, {{v[0], v[1], v[2], v[3]}});
}

template <int C, Values values, class T>
IMGOPT_INLINE void store(T* to, const Target& at, const Epilogue<C>& e, const float32x4_t* v) {
    decltype(narrowed(v[0], to)) value[C];
    for (int c = 0; c < C; ++c)
        value[c] = narrowed(
            values == Values::colored ? v[c] : vfmaq_f32(vdupq_n_f32(e.add[c]), v[c], vdupq_n_f32(e.factor[c])), to);
    if (C == 1 || at.planar) {
        for (int c = 0; c < C; ++c)
            put_lanes(to + c * at.channel, at.count, 1, [&](T* place) { put_plane(place, value[c]); });
        return;
    }
    if constexpr (C > 1) put_lanes(to, at.count, C, [&](T* place) { put_pixels(place, value); });
}

// --- bytes ---------------------------------------------------------------------------------------------------------

// A byte shuffle; places from 255 on are zero.
template <class Order>
IMGOPT_INLINE uint8x16_t byte_order(const Order& order) {
    uint8_t from[16];
    for (int i = 0; i < 16; ++i) from[i] = static_cast<uint8_t>(order(i));
    return vld1q_u8(from);
}

// Four pixels of C bytes side by side at the beginning of `pixels`.
template <int C>
IMGOPT_INLINE void put_bytes(uint8_t* to, const Target& at, uint8x16_t pixels) {
    if (at.room * C >= 16) return vst1q_u8(to, pixels);
    uint8_t room[16];
    vst1q_u8(room, pixels);
    __builtin_memcpy(to, room, static_cast<size_t>(at.count) * C);
}

template <int C, Values values>
IMGOPT_INLINE void store(uint8_t* to, const Target& at, const Epilogue<C>& e, const float32x4_t* v) {
    const auto words = [&](int c) {
        const float32x4_t sample = v[c < C ? c : 0];
        return vqmovun_s32(
            vcvtnq_s32_f32(values == Values::colored ? sample : vmulq_f32(sample, vdupq_n_f32(e.levels))));
    };
    // Byte 4 c + i: channel c of pixel i.
    const uint8x8_t low = vqmovn_u16(vcombine_u16(words(0), words(1)));
    const uint8x16_t planes = C > 1 ? vqmovn_high_u16(low, vcombine_u16(words(2), words(3))) : vcombine_u8(low, low);
    if (C > 1 && !at.planar)
        return put_bytes<C>(to, at,
                            vqtbl1q_u8(planes, byte_order([](int i) { return i < 4 * C ? i % C * 4 + i / C : 255; })));
    uint8_t bytes[16];
    vst1q_u8(bytes, planes);
    for (int c = 0; c < C; ++c)
        put_lanes(to + c * at.channel, at.count, 1, [&](uint8_t* place) { __builtin_memcpy(place, bytes + 4 * c, 4); });
}

// Pixels as they are, one per dword.
template <int C>
IMGOPT_INLINE void store_dwords(uint8_t* to, const Target& at, uint32x4_t dwords) {
    const uint8x16_t pixels = vreinterpretq_u8_u32(dwords);
    put_bytes<C>(
        to, at,
        C == 4 ? pixels : vqtbl1q_u8(pixels, byte_order([](int i) { return i < 12 ? i / 3 * 4 + i % 3 : 255; })));
}

}  // namespace
}  // namespace imgopt::neon

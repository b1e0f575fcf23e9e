// affine_warp for AVX-512 with VBMI and VNNI. Thirty-two pixels at a time: coordinates in float32, weights in 16-bit
// words, one 16-byte load per pixel from the window (window.h), byte permutations that bring each channel's four taps
// together, and two vpdpbusd per channel and 16 pixels, one for the high and one for the low byte of the 15-bit
// weights. Sixteen bilinear RGB pixels take about 60 vector instructions besides their loads.
#include <immintrin.h>

#include "backward.h"
#include "windowed.h"

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC PR 105593: its own unmasked intrinsics
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#include "patch_avx512.h"

namespace imgopt::avx512 {
namespace {

// --- packing --------------------------------------------------------------------------------------------------------

// vpermi2b indices that interleave 16 pixels of two rows into positions. A register holds 16 C bytes of one row: pixel
// by pixel, or plane by plane (16 bytes each).
template <int C, int taps, bool planar>
struct PackIndices {
    alignas(64) uint8_t index[2][64];

    constexpr PackIndices() : index{} {
        constexpr int bytes = position_bytes(C, taps);
        for (int i = 0; i < 128; ++i) {
            const int pixel = i / bytes % kLanes, byte = i % bytes, row = byte / C, c = byte % C;
            index[i / 64][i % 64] = static_cast<uint8_t>((row & 1) * 64 + (planar ? c * 16 + pixel : pixel * C + c));
        }
    }
};

// 16 pixels, of which `count` may be read; what lies behind the last one is not used.
template <int C>
IMGOPT_INLINE __m512i load_pixels(const Source<uint8_t>& source, const uint8_t* from, bool planar, int32_t count) {
    if (!planar) {
        if (count * C >= 64) return _mm512_loadu_si512(from);
        return _mm512_maskz_loadu_epi8((1ull << count * C) - 1, from);
    }
    const auto plane = [&](int c) {
        const uint8_t* at = from + c * source.channel;
        return count >= kLanes ? _mm_loadu_si128(reinterpret_cast<const __m128i*>(at))
                               : _mm_maskz_loadu_epi8(static_cast<__mmask16>((1u << count) - 1), at);
    };
    __m512i pixels = _mm512_castsi128_si512(plane(0));
    if constexpr (C > 1) {
        pixels = _mm512_inserti32x4(pixels, plane(1), 1);
        pixels = _mm512_inserti32x4(pixels, plane(2), 2);
        if constexpr (C > 3) pixels = _mm512_inserti32x4(pixels, plane(3), 3);
    }
    return pixels;
}

template <int C, int taps, bool planar>
void pack_pixels(const Source<uint8_t>& source, const uint8_t* first, const uint8_t* second, int32_t count,
                 uint8_t* to) {
    static constexpr PackIndices<C, taps, planar> kIndices;
    constexpr int bytes = position_bytes(C, taps) * kLanes;
    const __m512i low = _mm512_load_si512(kIndices.index[0]), high = _mm512_load_si512(kIndices.index[1]);
    for (int32_t i = 0; i < count; i += kLanes, to += bytes) {
        const int32_t n = count - i;
        const int64_t at = int64_t{i} * (planar ? 1 : C);
        const __m512i a = load_pixels<C>(source, first + at, planar, n);
        __m512i b = a;
        if constexpr (taps == 2) b = load_pixels<C>(source, second + at, planar, n);
        if constexpr (bytes == 16) {
            _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_castsi512_si128(a));
        } else if constexpr (bytes == 32) {
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                                _mm512_castsi512_si256(_mm512_permutex2var_epi8(a, low, b)));
        } else {
            _mm512_storeu_si512(to, _mm512_permutex2var_epi8(a, low, b));
            if constexpr (bytes == 96)
                _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 64),
                                    _mm512_castsi512_si256(_mm512_permutex2var_epi8(a, high, b)));
            if constexpr (bytes == 128) _mm512_storeu_si512(to + 64, _mm512_permutex2var_epi8(a, high, b));
        }
    }
}

// --- offsets --------------------------------------------------------------------------------------------------------

// Two vectors of pixels.
struct Group {
    alignas(64) int32_t offset[2 * kLanes];  // of the position in the window, bytes, from `origin`
    const uint8_t* origin;
    __m512 fx[2], fy[2];
    __mmask16 finite[2];
    PairedWeights bilinear[2];
    SplitWeights bicubic[2];  // of a row
    bool touched;             // or all of it is fill
    bool plain;               // no pixel is fill as a whole
};

// Written so that the compiler does not see the other end of it: it would move each offset through vpextrd, four times
// the cost of a load.
IMGOPT_INLINE void keep(int32_t* to, __m512i v) {
    __asm__("vmovdqa32 %1, %0" : "=m"(*reinterpret_cast<__m512i*>(to)) : "v"(v));
}

// What the offsets of an image have in common.
struct Steps {
    __m512 x, y, pitch;

    Steps(const float* step, int64_t bytes)
        : x(_mm512_set1_ps(step[0])), y(_mm512_set1_ps(step[1])), pitch(_mm512_set1_ps(static_cast<float>(bytes))) {}
};

// Offsets where every coordinate of the group lies inside the window. They are exact in float32: below 2^20.
template <int bytes, bool rounds>
IMGOPT_INLINE void locate_inside(const Steps& steps, __m512 fx, __m512 fy, int lane, Group& to, int half) {
    const __m512 index = _mm512_load_ps(kLane.index + lane);
    const __m512 x = _mm512_fmadd_ps(steps.x, index, fx), y = _mm512_fmadd_ps(steps.y, index, fy);
    __m512 wx = floored(x), wy = floored(y);
    to.fx[half] = _mm512_sub_ps(x, wx);
    to.fy[half] = _mm512_sub_ps(y, wy);
    if constexpr (rounds) {
        const __m512 middle = _mm512_set1_ps(0.5f), one = _mm512_set1_ps(1);
        wx = _mm512_mask_add_ps(wx, _mm512_cmp_ps_mask(to.fx[half], middle, _CMP_GE_OQ), wx, one);
        wy = _mm512_mask_add_ps(wy, _mm512_cmp_ps_mask(to.fy[half], middle, _CMP_GE_OQ), wy, one);
    }
    const __m512 along_x = bytes == 1 ? wx : _mm512_mul_ps(wx, _mm512_set1_ps(bytes));
    keep(to.offset + half * kLanes, _mm512_cvttps_epi32(_mm512_fmadd_ps(wy, steps.pitch, along_x)));
}

// Offsets of any coordinates. The clamp does the border's work and keeps every load inside.
IMGOPT_INLINE void locate_clamped(const Window& w, int bytes, int lead, const Points& at, Group& to, int half) {
    const auto cut = [](__m512i v, int32_t first, int32_t last) {
        v = _mm512_sub_epi32(v, _mm512_set1_epi32(first));
        return _mm512_min_epi32(_mm512_max_epi32(v, _mm512_setzero_si512()), _mm512_set1_epi32(last));
    };
    const __m512i x = cut(at.x, w.x0 + lead, w.x_last), y = cut(at.y, w.y0 + lead, w.y_last);
    to.origin = w.data;
    to.fx[half] = at.fx;
    to.fy[half] = at.fy;
    to.finite[half] = at.finite;
    keep(to.offset + half * kLanes,
         _mm512_add_epi32(_mm512_mullo_epi32(y, _mm512_set1_epi32(static_cast<int32_t>(w.pitch))),
                          _mm512_mullo_epi32(x, _mm512_set1_epi32(bytes))));
}

// --- sampling -------------------------------------------------------------------------------------------------------

// A constant that the compiler does not know: it would make it anew, through a general register, at every use.
IMGOPT_INLINE __mmask16 kept_mask(__mmask16 mask) {
    __asm__("" : "+Yk"(mask));
    return mask;
}

// The 16 bytes at four positions, one per 128-bit lane.
IMGOPT_INLINE __m512i load_positions(const uint8_t* data, const int32_t* offset) {
    const auto at = [&](int i) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(data + offset[i])); };
    __m512i v = _mm512_castsi128_si512(at(0));
    v = _mm512_mask_broadcast_i32x4(v, kept_mask(0x00f0), at(1));
    v = _mm512_mask_broadcast_i32x4(v, kept_mask(0x0f00), at(2));
    return _mm512_mask_broadcast_i32x4(v, kept_mask(0xf000), at(3));
}

// The 4 bytes at each of 16 positions.
IMGOPT_INLINE __m512i load_dwords(const uint8_t* data, const int32_t* offset) {
    const auto quarter = [&](int i) {
        const auto at = [&](int k) {
            int32_t v;
            __builtin_memcpy(&v, data + offset[4 * i + k], 4);
            return v;
        };
        return _mm_insert_epi32(_mm_insert_epi32(_mm_insert_epi32(_mm_cvtsi32_si128(at(0)), at(1), 1), at(2), 2), at(3),
                                3);
    };
    const __m256i low = _mm256_inserti128_si256(_mm256_castsi128_si256(quarter(0)), quarter(1), 1);
    const __m256i high = _mm256_inserti128_si256(_mm256_castsi128_si256(quarter(2)), quarter(3), 1);
    return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
}

// One, two or four floats side by side at each of 16 positions, column by column. Each 128 bits hold what becomes four
// pixels side by side there.
template <int taps>
IMGOPT_INLINE void load_columns(const uint8_t* data, const int32_t* offset, __m512* to) {
    const auto join = [](__m128 a, __m128 b, __m128 c, __m128 d) {
        const __m256 low = _mm256_set_m128(b, a), high = _mm256_set_m128(d, c);
        return _mm512_insertf32x8(_mm512_castps256_ps512(low), high, 1);
    };
    if constexpr (taps == 1) {
        to[0] = _mm512_castsi512_ps(load_dwords(data, offset));
    } else if constexpr (taps == 2) {
        const auto two = [&](int i) {
            const auto at = [&](int k) { return reinterpret_cast<const __m64*>(data + offset[k]); };
            return _mm_loadh_pi(_mm_loadl_pi(_mm_setzero_ps(), at(i)), at(i + 1));
        };
        const __m512 a = join(two(0), two(4), two(8), two(12)), b = join(two(2), two(6), two(10), two(14));
        to[0] = _mm512_shuffle_ps(a, b, 0x88);
        to[1] = _mm512_shuffle_ps(a, b, 0xdd);
    } else {
        const auto four = [&](int i) { return _mm_loadu_ps(reinterpret_cast<const float*>(data + offset[i])); };
        __m512 pixel[4];
        for (int i = 0; i < 4; ++i) pixel[i] = join(four(i), four(i + 4), four(i + 8), four(i + 12));
        const auto pairs = [](__m512 a, __m512 b) { return _mm512_castps_pd(_mm512_unpacklo_ps(a, b)); };
        const auto others = [](__m512 a, __m512 b) { return _mm512_castps_pd(_mm512_unpackhi_ps(a, b)); };
        const __m512d a = pairs(pixel[0], pixel[1]), b = pairs(pixel[2], pixel[3]);
        const __m512d c = others(pixel[0], pixel[1]), d = others(pixel[2], pixel[3]);
        to[0] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
        to[1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
        to[2] = _mm512_castpd_ps(_mm512_unpacklo_pd(c, d));
        to[3] = _mm512_castpd_ps(_mm512_unpackhi_pd(c, d));
    }
}

// vpermi2b indices that bring the four taps of a channel, C bytes apart, together: channels `first` and `second` of the
// eight pixels of two registers, 32 bytes each.
template <int C>
struct PlaneIndices {
    alignas(64) uint8_t index[2][64];

    constexpr PlaneIndices() : index{} {
        for (int pair = 0; pair < 2; ++pair)
            for (int i = 0; i < 64; ++i) {
                const int channel = 2 * pair + i / 32, pixel = i % 32 / 4, tap = i % 4;
                index[pair][i] = static_cast<uint8_t>(pixel * 16 + (channel < C ? tap * C + channel : 0));
            }
    }
};

// The 16 bytes at each of 16 positions as planes: dword i of plane c holds four taps of channel c of pixel i. In a
// bilinear window these are 00, 10, 01, 11, in a bicubic one the columns of a row.
template <int C>
IMGOPT_INLINE void load_planes(const uint8_t* data, const int32_t* offset, __m512i* planes) {
    if constexpr (C == 1) {
        planes[0] = load_dwords(data, offset);
        return;
    }
    static constexpr PlaneIndices<C> kIndices;
    __m512i pixels[4];
    for (int i = 0; i < 4; ++i) pixels[i] = load_positions(data, offset + 4 * i);
    for (int pair = 0; pair < (C + 1) / 2; ++pair) {
        const __m512i index = _mm512_load_si512(kIndices.index[pair]);
        const __m512i a = _mm512_permutex2var_epi8(pixels[0], index, pixels[1]);
        const __m512i b = _mm512_permutex2var_epi8(pixels[2], index, pixels[3]);
        planes[2 * pair] = _mm512_inserti64x4(a, _mm512_castsi512_si256(b), 1);
        planes[2 * pair + 1] = _mm512_shuffle_i64x2(a, b, 0xee);
    }
}

// Samples of 16 pixels: levels times kWeightSum, one register per channel.
template <int C>
IMGOPT_INLINE void bilinear_samples(const Group& at, int half, __m512* to) {
    const PairedWeights& w = at.bilinear[half];
    __m512i planes[4];
    load_planes<C>(at.origin, at.offset + half * kLanes, planes);
    for (int c = 0; c < C; ++c) {
        to[c] = _mm512_cvtepi32_ps(weighted(planes[c], w));
    }
}

// Four rows of four columns: each row in exact integers like the bilinear taps, then the rows in float32.
template <int C>
IMGOPT_INLINE void bicubic_samples(const Window& w, const Group& at, int half, __m512* to) {
    const SplitWeights& columns = at.bicubic[half];
    __m512 rows[4];
    bicubic_weights(at.fy[half], rows);
    for (int row = 0; row < 4; ++row) {
        __m512i planes[4];
        load_planes<C>(at.origin + row * w.pitch, at.offset + half * kLanes, planes);
        for (int c = 0; c < C; ++c) {
            const __m512 real = _mm512_cvtepi32_ps(weighted(planes[c], columns));
            to[c] = row ? _mm512_fmadd_ps(rows[row], real, to[c]) : _mm512_mul_ps(rows[row], real);
        }
    }
}

template <int C>
IMGOPT_INLINE void nearest_samples(const Group& at, int half, __m512* to) {
    const __m512i pixels = load_dwords(at.origin, at.offset + half * kLanes), byte = _mm512_set1_epi32(255);
    for (int c = 0; c < C; ++c) to[c] = _mm512_cvtepi32_ps(_mm512_and_si512(_mm512_srli_epi32(pixels, 8 * c), byte));
}

// --- the steps of windowed.h ----------------------------------------------------------------------------------------

// A number per row of a strip, in the compiler's vectors; the halves as wide as the float64 they come from.
struct StripRows {
    typedef int32_t Ints __attribute__((vector_size(64)));
    typedef float Floats __attribute__((vector_size(64)));
    typedef int32_t HalfInts __attribute__((vector_size(32)));
    typedef float HalfFloats __attribute__((vector_size(32)));
    typedef int64_t Longs __attribute__((vector_size(64)));
    typedef double Doubles __attribute__((vector_size(64)));
};

template <class T>
IMGOPT_INLINE Places<T> places_of(T* to, const Target& at, int step) {
    const int first = at.count < 8 ? at.count : 8;
    return {{to, to + 8 * step}, {first, at.count - first}, at.room - 8};
}

struct Isa {
    using Vector = __m512;
    using Rows = StripRows;
    using Group = avx512::Group;
    using Steps = avx512::Steps;
    static constexpr int kLanes = avx512::kLanes;
    static constexpr bool kPatches = true;

    IMGOPT_INLINE static __m512 all(float v) { return _mm512_set1_ps(v); }
    IMGOPT_INLINE static bool all_finite(const Group& group) { return (group.finite[0] & group.finite[1]) == 0xffff; }
    template <int C, int taps>
    IMGOPT_INLINE static void locate_inside(const Steps& steps, __m512 fx, __m512 fy, int lane, Group& to, int half) {
        avx512::locate_inside<position_bytes(C, taps), taps == 1>(steps, fx, fy, lane, to, half);
    }
    IMGOPT_INLINE static void locate(const Window& w, int bytes, int lead, const Points& at, Group& to, int half) {
        locate_clamped(w, bytes, lead, at, to, half);
    }
    template <int taps>
    IMGOPT_INLINE static void weigh(Group& to) {
        if constexpr (taps == 2) weigh_bilinear(to.fx, to.fy, to.bilinear);
        if constexpr (taps == 4) weigh_bicubic(to.fx, to.bicubic);
    }
    template <int C, int taps>
    IMGOPT_INLINE static void samples(const Window& w, const Group& at, int half, __m512* to) {
        if constexpr (taps == 1) nearest_samples<C>(at, half, to);
        if constexpr (taps == 2) bilinear_samples<C>(at, half, to);
        if constexpr (taps == 4) bicubic_samples<C>(w, at, half, to);
    }
    IMGOPT_INLINE static __m512 fused(__m512 a, __m512 b, __m512 c) { return _mm512_fmadd_ps(a, b, c); }
    IMGOPT_INLINE static void bicubic(__m512 f, __m512* to) { bicubic_weights(f, to); }
    template <int taps>
    IMGOPT_INLINE static void columns(const uint8_t* data, const int32_t* offset, __m512* to) {
        load_columns<taps>(data, offset, to);
    }
    template <int C, int taps>
    static void pack(const Source<uint8_t>& source, const uint8_t* first, const uint8_t* second, int32_t count,
                     uint8_t* to) {
        if (source.column == C && source.channel == 1)
            pack_pixels<C, taps, false>(source, first, second, count, to);
        else
            pack_pixels<C, taps, true>(source, first, second, count, to);
    }
    IMGOPT_INLINE static Points affine(const Base<float>& base, int lane) { return affine_points(base, lane); }
    IMGOPT_INLINE static Points perspective(const double* m, int64_t x, int64_t y) {
        const double down[3] = {m[1] * y + m[2], m[4] * y + m[5], m[7] * y + m[8]};
        return points_of(perspective_half<false>(m, down, x), perspective_half<false>(m, down, x + 8));
    }
    IMGOPT_INLINE static void round(Points& at) { round_to_nearest(at); }
    IMGOPT_INLINE static void fold(Points& at, int32_t width, int32_t height, Padding padding) {
        fold_axis(at.x, at.fx, width, padding);
        fold_axis(at.y, at.fy, height, padding);
    }
    template <int C>
    IMGOPT_INLINE static void blend(const float* fill, const Group& at, int half, __m512* v) {
        for (int c = 0; c < C; ++c) v[c] = _mm512_mask_mov_ps(_mm512_set1_ps(fill[c]), at.finite[half], v[c]);
    }
    template <int C>
    IMGOPT_INLINE static void spread(const float* fill, __m512* v) {
        for (int c = 0; c < C; ++c) v[c] = _mm512_set1_ps(fill[c]);
    }
    IMGOPT_INLINE static void color(const ColorMap<float>& map, __m512* v) { apply_color(map, v); }
    template <int C>
    IMGOPT_INLINE static void copy(uint8_t* to, const Target& at, const Group& from, int half) {
        store_dwords<C>(places_of(to, at, C), load_dwords(from.origin, from.offset + half * kLanes));
    }
    template <int C, int taps, class T>
    static bool warp_blocks(const AffineWarp& p, const Map& map, const Source<uint8_t>& source,
                            const Epilogue<C>& epilogue, const uint8_t* fill, int64_t image, int64_t y0, int64_t y1,
                            int64_t x0, int64_t x1, Ahead& ahead) {
        if constexpr (C == 3)
            if (epilogue.colored)
                return warp_patches<C, taps, true, T>(p, map, source, epilogue, fill, image, y0, y1, x0, x1, ahead);
        return warp_patches<C, taps, false, T>(p, map, source, epilogue, fill, image, y0, y1, x0, x1, ahead);
    }
    template <int C, Values values, class T>
    IMGOPT_INLINE static void put(T* to, const Target& at, const Epilogue<C>& epilogue, const __m512* v) {
        store<C, values>(places_of(to, at, at.planar ? 1 : C), at, epilogue, v);
    }
};

}  // namespace

void affine_warp(KernelTable& table) {
    table.affine_warp = warp_vectorized<Isa>;
    table.affine_warp_backward = kWarpBackward<float>;
}

}  // namespace imgopt::avx512

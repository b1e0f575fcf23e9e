// affine_warp for AVX2 with FMA. Sixteen pixels at a time, as in the AVX-512 unit, with what AVX2 has instead of VNNI:
// the 16-bit weights go whole into vpmaddwd, two taps per multiplication, which is exact; byte shuffles widen the taps
// on the way.
#include <immintrin.h>

#include "backward.h"
#include "stores_avx2.h"
#include "windowed.h"

namespace imgopt::avx2 {
namespace {

// --- packing --------------------------------------------------------------------------------------------------------

IMGOPT_INLINE int32_t dword_at(const uint8_t* from) {
    int32_t v;
    __builtin_memcpy(&v, from, 4);
    return v;
}

// Four pixels side by side, C bytes each. Reads 16 bytes where they are interleaved.
template <int C>
IMGOPT_INLINE __m128i four_pixels(const Source<uint8_t>& source, const uint8_t* from, bool planar) {
    if (!planar) return bytes_at(from);
    const auto plane = [&](int c) { return dword_at(from + c * source.channel); };
    const __m128i planes = _mm_set_epi32(C == 4 ? plane(C == 4 ? 3 : 0) : 0, plane(2), plane(1), plane(0));
    return C == 4 ? _mm_shuffle_epi8(planes, _mm_set_epi8(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0))
                  : _mm_shuffle_epi8(planes, _mm_set_epi8(-1, -1, -1, -1, 11, 7, 3, 10, 6, 2, 9, 5, 1, 8, 4, 0));
}

// Positions of four pixels from two rows of them.
template <int C, int taps>
IMGOPT_INLINE void put_positions(uint8_t* to, __m128i a, __m128i b) {
    if constexpr (C == 4 && taps == 2) {
        put_bytes(to, _mm_unpacklo_epi32(a, b));
        put_bytes(to + 16, _mm_unpackhi_epi32(a, b));
    } else if constexpr (C == 4 || taps == 4) {
        put_bytes(to, a);
    } else if constexpr (taps == 2) {
        const __m128i low =
            _mm_or_si128(_mm_shuffle_epi8(a, _mm_set_epi8(-1, 8, 7, 6, -1, -1, -1, 5, 4, 3, -1, -1, -1, 2, 1, 0)),
                         _mm_shuffle_epi8(b, _mm_set_epi8(6, -1, -1, -1, 5, 4, 3, -1, -1, -1, 2, 1, 0, -1, -1, -1)));
        const __m128i high = _mm_or_si128(
            _mm_shuffle_epi8(a, _mm_set_epi8(-1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, 11, 10, 9, -1, -1)),
            _mm_shuffle_epi8(b, _mm_set_epi8(-1, -1, -1, -1, -1, -1, -1, -1, 11, 10, 9, -1, -1, -1, 8, 7)));
        put_bytes(to, low);
        _mm_storel_epi64(reinterpret_cast<__m128i*>(to + 16), high);
    } else {
        put_bytes(to, _mm_shuffle_epi8(a, _mm_set_epi8(-1, 11, 10, 9, -1, 8, 7, 6, -1, 5, 4, 3, -1, 2, 1, 0)));
    }
}

struct Packing {
    template <int taps>
    IMGOPT_INLINE static void put_sixteen(uint8_t* to, const uint8_t* first, const uint8_t* second) {
        const __m128i a = bytes_at(first);
        if constexpr (taps == 2) {
            const __m128i b = bytes_at(second);
            put_bytes(to, _mm_unpacklo_epi8(a, b));
            put_bytes(to + 16, _mm_unpackhi_epi8(a, b));
        } else {
            put_bytes(to, a);
        }
    }
    template <int C, int taps>
    IMGOPT_INLINE static void put_four(uint8_t* to, const Source<uint8_t>& source, const uint8_t* first,
                                       const uint8_t* second, bool planar) {
        put_positions<C, taps>(to, four_pixels<C>(source, first, planar), four_pixels<C>(source, second, planar));
    }
};

// --- offsets --------------------------------------------------------------------------------------------------------

// Two vectors of pixels.
struct Group {
    alignas(32) int32_t offset[2 * kLanes];  // of the position in the window, bytes, from `origin`
    const uint8_t* origin;
    __m256 fx[2], fy[2];
    int finite[2];
    PairedWeights weights[2];
    bool touched;  // or all of it is fill
    bool plain;    // no pixel is fill as a whole
};

// Written so that the compiler does not see the other end of it: it would move each offset through vpextrd.
IMGOPT_INLINE void keep(int32_t* to, __m256i v) {
    __asm__("vmovdqa %1, %0" : "=m"(*reinterpret_cast<__m256i*>(to)) : "x"(v));
}

// What the offsets of an image have in common.
struct Steps {
    __m256 x, y, pitch;

    Steps(const float* step, int64_t bytes)
        : x(_mm256_set1_ps(step[0])), y(_mm256_set1_ps(step[1])), pitch(_mm256_set1_ps(static_cast<float>(bytes))) {}
};

// Offsets where every coordinate of the group lies inside the window. They are exact in float32: below 2^20.
template <int bytes, bool rounds>
IMGOPT_INLINE void locate_inside(const Steps& steps, __m256 fx, __m256 fy, int lane, Group& to, int half) {
    const __m256 index = lanes_from(lane);
    const __m256 x = _mm256_fmadd_ps(steps.x, index, fx), y = _mm256_fmadd_ps(steps.y, index, fy);
    __m256 wx = _mm256_floor_ps(x), wy = _mm256_floor_ps(y);
    to.fx[half] = _mm256_sub_ps(x, wx);
    to.fy[half] = _mm256_sub_ps(y, wy);
    if constexpr (rounds) {
        const __m256 middle = _mm256_set1_ps(0.5f), one = _mm256_set1_ps(1);
        wx = _mm256_add_ps(wx, _mm256_and_ps(_mm256_cmp_ps(to.fx[half], middle, _CMP_GE_OQ), one));
        wy = _mm256_add_ps(wy, _mm256_and_ps(_mm256_cmp_ps(to.fy[half], middle, _CMP_GE_OQ), one));
    }
    const __m256 along_x = _mm256_mul_ps(wx, _mm256_set1_ps(bytes));
    keep(to.offset + half * kLanes, _mm256_cvttps_epi32(_mm256_fmadd_ps(wy, steps.pitch, along_x)));
}

// Offsets of any coordinates. The clamp does the border's work and keeps every load inside.
IMGOPT_INLINE void locate_clamped(const Window& w, int bytes, int lead, const Points& at, Group& to, int half) {
    const auto cut = [](__m256i v, int32_t first, int32_t last) {
        v = _mm256_sub_epi32(v, _mm256_set1_epi32(first));
        return _mm256_min_epi32(_mm256_max_epi32(v, _mm256_setzero_si256()), _mm256_set1_epi32(last));
    };
    const __m256i x = cut(at.x, w.x0 + lead, w.x_last), y = cut(at.y, w.y0 + lead, w.y_last);
    const __m256i rows = _mm256_mullo_epi32(y, _mm256_set1_epi32(static_cast<int32_t>(w.pitch)));
    to.origin = w.data;
    to.fx[half] = at.fx;
    to.fy[half] = at.fy;
    to.finite[half] = at.finite;
    keep(to.offset + half * kLanes, _mm256_add_epi32(rows, _mm256_mullo_epi32(x, _mm256_set1_epi32(bytes))));
}

// --- sampling -------------------------------------------------------------------------------------------------------

// The 4 bytes at each of eight positions.
IMGOPT_INLINE __m256i load_dwords(const uint8_t* data, const int32_t* offset) {
    const auto quarter = [&](int i) {
        const auto at = [&](int k) { return dword_at(data + offset[4 * i + k]); };
        const __m128i two = _mm_insert_epi32(_mm_cvtsi32_si128(at(0)), at(1), 1);
        return _mm_insert_epi32(_mm_insert_epi32(two, at(2), 2), at(3), 3);
    };
    return _mm256_set_m128i(quarter(1), quarter(0));
}

// Dword c of four registers, each with pixel i in its lower and pixel i + 4 in its upper lane, for c = 0 .. 3.
IMGOPT_INLINE void transpose(const __m256i* pixels, __m256i* planes) {
    const __m256i a = _mm256_unpacklo_epi32(pixels[0], pixels[1]), b = _mm256_unpacklo_epi32(pixels[2], pixels[3]);
    const __m256i c = _mm256_unpackhi_epi32(pixels[0], pixels[1]), d = _mm256_unpackhi_epi32(pixels[2], pixels[3]);
    planes[0] = _mm256_unpacklo_epi64(a, b);
    planes[1] = _mm256_unpackhi_epi64(a, b);
    planes[2] = _mm256_unpacklo_epi64(c, d);
    planes[3] = _mm256_unpackhi_epi64(c, d);
}

// One, two or four floats side by side at each of eight positions, column by column. Each 128 bits hold what becomes
// four pixels side by side there.
template <int taps>
IMGOPT_INLINE void load_columns(const uint8_t* data, const int32_t* offset, __m256* to) {
    if constexpr (taps == 1) {
        to[0] = _mm256_castsi256_ps(load_dwords(data, offset));
    } else if constexpr (taps == 2) {
        const auto two = [&](int i) {
            const auto at = [&](int k) { return reinterpret_cast<const __m64*>(data + offset[k]); };
            return _mm_loadh_pi(_mm_loadl_pi(_mm_setzero_ps(), at(i)), at(i + 1));
        };
        const __m256 a = _mm256_set_m128(two(4), two(0)), b = _mm256_set_m128(two(6), two(2));
        to[0] = _mm256_shuffle_ps(a, b, 0x88);
        to[1] = _mm256_shuffle_ps(a, b, 0xdd);
    } else {
        const auto four = [&](int i) { return _mm_loadu_ps(reinterpret_cast<const float*>(data + offset[i])); };
        __m256i pixel[4], column[4];
        for (int i = 0; i < 4; ++i) pixel[i] = _mm256_castps_si256(_mm256_set_m128(four(i + 4), four(i)));
        transpose(pixel, column);
        for (int k = 0; k < 4; ++k) to[k] = _mm256_castsi256_ps(column[k]);
    }
}

IMGOPT_INLINE __m256 weighted(__m256i first, __m256i second, const PairedWeights& w) {
    return _mm256_cvtepi32_ps(_mm256_add_epi32(_mm256_madd_epi16(first, w.first), _mm256_madd_epi16(second, w.second)));
}

// Byte shuffle that widens two taps of every channel, C bytes apart, to a dword each: taps 0 and 1, or 2 and 3.
template <int C>
IMGOPT_INLINE __m256i pair_order(int pair) {
    alignas(16) int8_t order[16];
    for (int i = 0; i < 16; ++i)
        order[i] = static_cast<int8_t>(i % 2 || i / 4 >= C ? -1 : (2 * pair + i % 4 / 2) * C + i / 4);
    return _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(order)));
}

// The 16 bytes at each of eight positions as planes of 16-bit taps: of channel c, taps 0 and 1 and taps 2 and 3.
template <int C>
IMGOPT_INLINE void load_planes(const uint8_t* data, const int32_t* offset, __m256i* first, __m256i* second) {
    __m256i left[4], right[4];
    for (int i = 0; i < 4; ++i) {
        const __m256i taps = _mm256_set_m128i(bytes_at(data + offset[i + 4]), bytes_at(data + offset[i]));
        left[i] = _mm256_shuffle_epi8(taps, pair_order<C>(0));
        right[i] = _mm256_shuffle_epi8(taps, pair_order<C>(1));
    }
    transpose(left, first);
    transpose(right, second);
}
template <>
IMGOPT_INLINE void load_planes<1>(const uint8_t* data, const int32_t* offset, __m256i* first, __m256i* second) {
    const __m256i taps = load_dwords(data, offset);
    const __m256i even = _mm256_and_si256(taps, _mm256_set1_epi16(255)), odd = _mm256_srli_epi16(taps, 8);
    first[0] = _mm256_blend_epi16(even, _mm256_slli_epi32(odd, 16), 0xaa);
    second[0] = _mm256_blend_epi16(_mm256_srli_epi32(even, 16), odd, 0xaa);
}

// Samples of eight pixels: levels times kWeightSum, one register per channel.
template <int C>
IMGOPT_INLINE void bilinear_samples(const Group& at, int half, __m256* to) {
    __m256i first[4], second[4];
    load_planes<C>(at.origin, at.offset + half * kLanes, first, second);
    for (int c = 0; c < C; ++c) to[c] = weighted(first[c], second[c], at.weights[half]);
}

// Four rows of four columns: each row in exact integers like the bilinear taps, then the rows in float32.
template <int C>
IMGOPT_INLINE void bicubic_samples(const Window& w, const Group& at, int half, __m256* to) {
    __m256 rows[4];
    bicubic_weights(at.fy[half], rows);
    const auto sums = [&](int row, __m256* sum) __attribute__((always_inline)) {
        __m256i first[4], second[4];
        load_planes<C>(at.origin + row * w.pitch, at.offset + half * kLanes, first, second);
        for (int c = 0; c < C; ++c) sum[c] = weighted(first[c], second[c], at.weights[half]);
    };
    __m256 sum[C];
    sums(0, sum);
    for (int c = 0; c < C; ++c) to[c] = _mm256_mul_ps(rows[0], sum[c]);
    for (int row = 1; row < 4; ++row) {
        sums(row, sum);
        for (int c = 0; c < C; ++c) to[c] = _mm256_fmadd_ps(rows[row], sum[c], to[c]);
    }
}

template <int C>
IMGOPT_INLINE void nearest_samples(const Group& at, int half, __m256* to) {
    const __m256i pixels = load_dwords(at.origin, at.offset + half * kLanes), byte = _mm256_set1_epi32(255);
    for (int c = 0; c < C; ++c) to[c] = _mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srli_epi32(pixels, 8 * c), byte));
}

// --- the steps of windowed.h ----------------------------------------------------------------------------------------

// A number per row of a strip, in the compiler's vectors; the halves as wide as the float64 they come from.
struct StripRows {
    typedef int32_t Ints __attribute__((vector_size(32)));
    typedef float Floats __attribute__((vector_size(32)));
    typedef int32_t HalfInts __attribute__((vector_size(16)));
    typedef float HalfFloats __attribute__((vector_size(16)));
    typedef int64_t Longs __attribute__((vector_size(32)));
    typedef double Doubles __attribute__((vector_size(32)));
};

struct Isa {
    using Vector = __m256;
    using Group = avx2::Group;
    using Steps = avx2::Steps;
    using Rows = StripRows;
    static constexpr int kLanes = avx2::kLanes;
    static constexpr bool kPatches = false;  // without vpermi2b nothing is looked up in registers

    IMGOPT_INLINE static __m256 all(float v) { return _mm256_set1_ps(v); }
    IMGOPT_INLINE static bool all_finite(const Group& group) { return (group.finite[0] & group.finite[1]) == 0xff; }
    template <int C, int taps>
    IMGOPT_INLINE static void locate_inside(const Steps& steps, __m256 fx, __m256 fy, int lane, Group& to, int half) {
        avx2::locate_inside<position_bytes(C, taps), taps == 1>(steps, fx, fy, lane, to, half);
    }
    IMGOPT_INLINE static void locate(const Window& w, int bytes, int lead, const Points& at, Group& to, int half) {
        locate_clamped(w, bytes, lead, at, to, half);
    }
    template <int taps>
    IMGOPT_INLINE static void weigh(Group& to) {
        if constexpr (taps == 2) weigh_bilinear(to.fx, to.fy, to.weights);
        if constexpr (taps == 4) weigh_bicubic(to.fx, to.weights);
    }
    template <int C, int taps>
    IMGOPT_INLINE static void samples(const Window& w, const Group& at, int half, __m256* to) {
        if constexpr (taps == 1) nearest_samples<C>(at, half, to);
        if constexpr (taps == 2) bilinear_samples<C>(at, half, to);
        if constexpr (taps == 4) bicubic_samples<C>(w, at, half, to);
    }
    IMGOPT_INLINE static __m256 fused(__m256 a, __m256 b, __m256 c) { return _mm256_fmadd_ps(a, b, c); }
    IMGOPT_INLINE static void bicubic(__m256 f, __m256* to) { bicubic_weights(f, to); }
    template <int taps>
    IMGOPT_INLINE static void columns(const uint8_t* data, const int32_t* offset, __m256* to) {
        load_columns<taps>(data, offset, to);
    }
    template <int C, int taps>
    static void pack(const Source<uint8_t>& source, const uint8_t* first, const uint8_t* second, int32_t count,
                     uint8_t* to) {
        pack_pixels<Packing, C, taps>(source, first, second, count, to);
    }
    IMGOPT_INLINE static Points affine(const Base<float>& base, int lane) { return affine_points(base, lane); }
    IMGOPT_INLINE static Points perspective(const double* m, int64_t x, int64_t y) {
        return joined(perspective_half(m, x, y), perspective_half(m, x + 4, y));
    }
    IMGOPT_INLINE static void round(Points& at) { round_to_nearest(at); }
    IMGOPT_INLINE static void fold(Points& at, int32_t width, int32_t height, Padding padding) {
        fold_axis(at.x, at.fx, width, padding);
        fold_axis(at.y, at.fy, height, padding);
    }
    template <int C>
    IMGOPT_INLINE static void blend(const float* fill, const Group& at, int half, __m256* v) {
        const __m256i bit = _mm256_set_epi32(128, 64, 32, 16, 8, 4, 2, 1);
        const __m256i set = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(at.finite[half]), bit), bit);
        for (int c = 0; c < C; ++c) v[c] = _mm256_blendv_ps(_mm256_set1_ps(fill[c]), v[c], _mm256_castsi256_ps(set));
    }
    template <int C>
    IMGOPT_INLINE static void spread(const float* fill, __m256* v) {
        for (int c = 0; c < C; ++c) v[c] = _mm256_set1_ps(fill[c]);
    }
    IMGOPT_INLINE static void color(const ColorMap<float>& map, __m256* v) { apply_color(map, v); }
    template <int C>
    IMGOPT_INLINE static void copy(uint8_t* to, const Target& at, const Group& from, int half) {
        store_dwords<C>(to, at, load_dwords(from.origin, from.offset + half * kLanes));
    }
    template <int C, Values values, class T>
    IMGOPT_INLINE static void put(T* to, const Target& at, const Epilogue<C>& epilogue, const __m256* v) {
        store<C, values>(to, at, epilogue, v);
    }
};

}  // namespace

void affine_warp(KernelTable& table) {
    table.affine_warp = warp_vectorized<Isa>;
    table.affine_warp_backward = kWarpBackward<float>;
}

}  // namespace imgopt::avx2

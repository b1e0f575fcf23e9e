// affine_warp for AVX-512 with VBMI and VNNI. Sixteen pixels at a time: coordinates, integer weights, one 16-byte load
// per pixel from the window (window.h), a byte shuffle that brings each channel's four taps together, and two
// vpdpbusd per channel and 16 pixels, one for the high and one for the low byte of the 15-bit weights.
#include <immintrin.h>

#include "window.h"

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC PR 105593: its own unmasked intrinsics
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

namespace imgopt::avx512 {
namespace {

constexpr int kLanes = 16;

// --- packing -------------------------------------------------------------------------------------------------------

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
        const __m512i b = taps == 2 ? load_pixels<C>(source, second + at, planar, n) : a;
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

// --- coordinates ---------------------------------------------------------------------------------------------------

struct Points {
    __m512i x, y;  // floors
    __m512 fx, fy;
    __mmask16 finite;
};

IMGOPT_INLINE Points affine_points(const Base<float>& base, int lane) {
    const __m512 lanes = _mm512_cvtepi32_ps(_mm512_add_epi32(
        _mm512_set1_epi32(lane), _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0)));
    const __m512 far = _mm512_set1_ps(static_cast<float>(kFarInBlock)), near = _mm512_sub_ps(_mm512_setzero_ps(), far);
    __m512 x = _mm512_fmadd_ps(_mm512_set1_ps(base.step_x), lanes, _mm512_set1_ps(base.fx));
    __m512 y = _mm512_fmadd_ps(_mm512_set1_ps(base.step_y), lanes, _mm512_set1_ps(base.fy));
    x = _mm512_min_ps(_mm512_max_ps(x, near), far);
    y = _mm512_min_ps(_mm512_max_ps(y, near), far);
    const __m512 wx = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    const __m512 wy = _mm512_roundscale_ps(y, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    return {_mm512_add_epi32(_mm512_set1_epi32(base.x), _mm512_cvttps_epi32(wx)),
            _mm512_add_epi32(_mm512_set1_epi32(base.y), _mm512_cvttps_epi32(wy)), _mm512_sub_ps(x, wx),
            _mm512_sub_ps(y, wy), static_cast<__mmask16>(base.finite ? 0xffff : 0)};
}

struct HalfPoints {
    __m256i x, y;
    __m256 fx, fy;
    __mmask8 finite;
};

IMGOPT_INLINE HalfPoints perspective_half(const double* m, int64_t x, int64_t y) {
    const __m512d column = _mm512_add_pd(_mm512_set1_pd(static_cast<double>(x)), _mm512_set_pd(7, 6, 5, 4, 3, 2, 1, 0));
    const auto row = [&](int i) {
        return _mm512_add_pd(_mm512_mul_pd(_mm512_set1_pd(m[i]), column), _mm512_set1_pd(m[i + 1] * y + m[i + 2]));
    };
    const __m512d r = _mm512_div_pd(_mm512_set1_pd(1), row(6));
    const __m512d sx = _mm512_mul_pd(row(0), r), sy = _mm512_mul_pd(row(3), r);
    const __m512d zero = _mm512_setzero_pd();
    const __mmask8 finite = _mm512_cmp_pd_mask(_mm512_sub_pd(sx, sx), zero, _CMP_EQ_OQ) &
                            _mm512_cmp_pd_mask(_mm512_sub_pd(sy, sy), zero, _CMP_EQ_OQ);
    const __m512d far = _mm512_set1_pd(kFar), near = _mm512_set1_pd(-kFar);
    const __m512d cx = _mm512_min_pd(_mm512_max_pd(sx, near), far), cy = _mm512_min_pd(_mm512_max_pd(sy, near), far);
    const __m512d wx = _mm512_roundscale_pd(cx, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    const __m512d wy = _mm512_roundscale_pd(cy, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    return {_mm512_cvttpd_epi32(wx), _mm512_cvttpd_epi32(wy), _mm512_cvtpd_ps(_mm512_sub_pd(cx, wx)),
            _mm512_cvtpd_ps(_mm512_sub_pd(cy, wy)), finite};
}

IMGOPT_INLINE Points perspective_points(const double* m, int64_t x, int64_t y) {
    const HalfPoints a = perspective_half(m, x, y), b = perspective_half(m, x + 8, y);
    const auto joined = [](__m256i low, __m256i high) {
        return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
    };
    const auto joined_ps = [](__m256 low, __m256 high) {
        return _mm512_insertf32x8(_mm512_castps256_ps512(low), high, 1);
    };
    return {joined(a.x, b.x), joined(a.y, b.y), joined_ps(a.fx, b.fx), joined_ps(a.fy, b.fy),
            static_cast<__mmask16>(a.finite | b.finite << 8)};
}

// fold() of arithmetic.h. Coordinates within one period of the image need no division; others are rare and go one by
// one.
IMGOPT_INLINE void fold_axis(__m512i& i, __m512& f, int32_t n, Padding padding) {
    const __mmask16 outside = _mm512_cmpge_epu32_mask(i, _mm512_set1_epi32(n));
    if (!outside || n == 1) return;
    alignas(64) int32_t index[kLanes];
    alignas(64) float fraction[kLanes];
    _mm512_store_si512(index, i);
    _mm512_store_ps(fraction, f);
    for (int lane = 0; lane < kLanes; ++lane) fold(index[lane], fraction[lane], n, padding);
    i = _mm512_load_si512(index);
    f = _mm512_load_ps(fraction);
}

// --- sampling ------------------------------------------------------------------------------------------------------

// Byte offsets of the positions in the window. The clamp does the border's work and keeps every load inside.
IMGOPT_INLINE __m512i offsets_in(const Window& w, int bytes, int lead, const Points& at) {
    const auto cut = [](__m512i v, int32_t first, int32_t last) {
        v = _mm512_sub_epi32(v, _mm512_set1_epi32(first));
        return _mm512_min_epi32(_mm512_max_epi32(v, _mm512_setzero_si512()), _mm512_set1_epi32(last));
    };
    const __m512i x = cut(at.x, w.x0 + lead, w.x_last), y = cut(at.y, w.y0 + lead, w.y_last);
    return _mm512_add_epi32(_mm512_mullo_epi32(y, _mm512_set1_epi32(static_cast<int32_t>(w.pitch))),
                            _mm512_mullo_epi32(x, _mm512_set1_epi32(bytes)));
}

// Weights of 16 pixels as signed bytes, four to a dword: high · 256 + low.
struct SplitWeights {
    __m512i high, low;
};

IMGOPT_INLINE SplitWeights split_bytes(__m512i w0, __m512i w1, __m512i w2, __m512i w3) {
    const auto pair = [](__m512i even, __m512i odd) {
        return _mm512_mask_mov_epi16(even, 0xaaaaaaaa, _mm512_slli_epi32(odd, 16));
    };
    const __m512i left = pair(w0, w1), right = pair(w2, w3), half = _mm512_set1_epi16(128);
    // Byte 4k + j of the result: byte 4k + {0, 2} of `left`, then of `right`; one further for the high bytes.
    const __m512i even = _mm512_add_epi8(
        _mm512_set1_epi32(0x42400200),
        _mm512_set_epi32(0x3c3c3c3c, 0x38383838, 0x34343434, 0x30303030, 0x2c2c2c2c, 0x28282828, 0x24242424, 0x20202020,
                         0x1c1c1c1c, 0x18181818, 0x14141414, 0x10101010, 0x0c0c0c0c, 0x08080808, 0x04040404, 0));
    const __m512i odd = _mm512_or_si512(even, _mm512_set1_epi8(1));
    return {_mm512_permutex2var_epi8(_mm512_add_epi16(left, half), odd, _mm512_add_epi16(right, half)),
            _mm512_permutex2var_epi8(left, even, right)};
}

IMGOPT_INLINE SplitWeights split_weights(__m512 fx, __m512 fy) {
    const __m512 sum = _mm512_set1_ps(kWeightSum), both = _mm512_mul_ps(fx, fy);
    const __m512i w11 = _mm512_cvtps_epi32(_mm512_mul_ps(both, sum));
    const __m512i w01 = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_sub_ps(fx, both), sum));
    const __m512i w10 = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_sub_ps(fy, both), sum));
    const __m512i w00 =
        _mm512_sub_epi32(_mm512_sub_epi32(_mm512_set1_epi32(kWeightSum), w11), _mm512_add_epi32(w01, w10));
    return split_bytes(w00, w10, w01, w11);
}

// bicubic_weights() of arithmetic.h.
IMGOPT_INLINE void bicubic_weights(__m512 f, __m512* to) {
    const __m512 one = _mm512_set1_ps(1), a = _mm512_set1_ps(static_cast<float>(kKeys)), g = _mm512_sub_ps(one, f);
    const auto near = [&](__m512 d) {
        const __m512 line = _mm512_fmadd_ps(_mm512_set1_ps(static_cast<float>(kKeys + 2)), d,
                                            _mm512_set1_ps(static_cast<float>(-kKeys - 3)));
        return _mm512_fmadd_ps(line, _mm512_mul_ps(d, d), one);
    };
    to[0] = _mm512_mul_ps(_mm512_mul_ps(a, f), _mm512_mul_ps(g, g));
    to[1] = near(f);
    to[2] = near(g);
    to[3] = _mm512_mul_ps(_mm512_mul_ps(a, g), _mm512_mul_ps(f, f));
}

IMGOPT_INLINE SplitWeights split_bicubic_weights(__m512 f) {
    const __m512 sum = _mm512_set1_ps(kWeightSum);
    __m512 w[4];
    bicubic_weights(f, w);
    const __m512i w0 = _mm512_cvtps_epi32(_mm512_mul_ps(w[0], sum)), w2 = _mm512_cvtps_epi32(_mm512_mul_ps(w[2], sum));
    const __m512i w3 = _mm512_cvtps_epi32(_mm512_mul_ps(w[3], sum));
    const __m512i w1 = _mm512_sub_epi32(_mm512_sub_epi32(_mm512_set1_epi32(kWeightSum), w0), _mm512_add_epi32(w2, w3));
    return split_bytes(w0, w1, w2, w3);
}

IMGOPT_INLINE __m512i weighted(__m512i taps, const SplitWeights& w) {
    const __m512i high = _mm512_dpbusd_epi32(_mm512_setzero_si512(), taps, w.high);
    return _mm512_dpbusd_epi32(_mm512_slli_epi32(high, 8), taps, w.low);
}

// The 16 bytes at four positions, one per 128-bit lane.
IMGOPT_INLINE __m512i load_positions(const uint8_t* data, const int32_t* offset) {
    const auto at = [&](int i) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(data + offset[i])); };
    return _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_inserti128_si256(_mm256_castsi128_si256(at(0)), at(1), 1)),
                              _mm256_inserti128_si256(_mm256_castsi128_si256(at(2)), at(3), 1), 1);
}

// The 16 bytes at each of 16 positions as planes: dword i of plane c holds four taps of channel c of pixel i, C bytes
// apart. In a bilinear window these are 00, 10, 01, 11, in a bicubic one the columns of a row.
template <int C>
IMGOPT_INLINE void load_planes(const uint8_t* data, const int32_t* offset, __m512i* planes) {
    const __m512i order =
        C == 3 ? _mm512_broadcast_i32x4(_mm_set_epi8(-1, -1, -1, -1, 11, 8, 5, 2, 10, 7, 4, 1, 9, 6, 3, 0))
               : _mm512_broadcast_i32x4(_mm_set_epi8(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0));
    __m512i pixels[4];
    for (int i = 0; i < 4; ++i) pixels[i] = _mm512_shuffle_epi8(load_positions(data, offset + 4 * i), order);
    // Two channels of eight pixels each: dword c of every lane, then dword c + 1.
    const __m512i first = _mm512_set_epi32(29, 25, 21, 17, 13, 9, 5, 1, 28, 24, 20, 16, 12, 8, 4, 0);
    const __m512i second = _mm512_set_epi32(31, 27, 23, 19, 15, 11, 7, 3, 30, 26, 22, 18, 14, 10, 6, 2);
    const __m512i rg0 = _mm512_permutex2var_epi32(pixels[0], first, pixels[1]);
    const __m512i rg1 = _mm512_permutex2var_epi32(pixels[2], first, pixels[3]);
    const __m512i ba0 = _mm512_permutex2var_epi32(pixels[0], second, pixels[1]);
    const __m512i ba1 = _mm512_permutex2var_epi32(pixels[2], second, pixels[3]);
    planes[0] = _mm512_shuffle_i64x2(rg0, rg1, 0x44);
    planes[1] = _mm512_shuffle_i64x2(rg0, rg1, 0xee);
    planes[2] = _mm512_shuffle_i64x2(ba0, ba1, 0x44);
    planes[3] = _mm512_shuffle_i64x2(ba0, ba1, 0xee);
}

// Samples of 16 pixels: levels times kWeightSum, one register per channel.
template <int C>
IMGOPT_INLINE void bilinear_samples(const Window& w, const BlockTaps& block, int first_lane, __m512* to) {
    const int32_t* offset = block.offset + first_lane;
    const SplitWeights weights = {_mm512_load_si512(block.weight[0] + first_lane),
                                  _mm512_load_si512(block.weight[1] + first_lane)};
    if constexpr (C == 1) {
        to[0] = _mm512_cvtepi32_ps(weighted(_mm512_i32gather_epi32(_mm512_load_si512(offset), w.data, 1), weights));
    } else {
        __m512i planes[4];
        load_planes<C>(w.data, offset, planes);
        for (int c = 0; c < C; ++c) to[c] = _mm512_cvtepi32_ps(weighted(planes[c], weights));
    }
}

// Four rows of four columns: each row in exact integers like the bilinear taps, then the rows in float32.
template <int C>
IMGOPT_INLINE void bicubic_samples(const Window& w, const BlockTaps& block, int first_lane, __m512* to) {
    const int32_t* offset = block.offset + first_lane;
    const SplitWeights weights = {_mm512_load_si512(block.weight[0] + first_lane),
                                  _mm512_load_si512(block.weight[1] + first_lane)};
    for (int row = 0; row < 4; ++row) {
        const uint8_t* data = w.data + row * w.pitch;
        const __m512 weight = _mm512_load_ps(block.row_weight[row] + first_lane);
        __m512i planes[4];
        if constexpr (C == 1)
            planes[0] = _mm512_i32gather_epi32(_mm512_load_si512(offset), data, 1);
        else
            load_planes<C>(data, offset, planes);
        for (int c = 0; c < C; ++c) {
            const __m512 sum = _mm512_cvtepi32_ps(weighted(planes[c], weights));
            to[c] = row ? _mm512_fmadd_ps(weight, sum, to[c]) : _mm512_mul_ps(weight, sum);
        }
    }
}

IMGOPT_INLINE void round_to_nearest(Points& at) {
    const __m512 half = _mm512_set1_ps(0.5f);
    const __m512i one = _mm512_set1_epi32(1);
    at.x = _mm512_mask_add_epi32(at.x, _mm512_cmp_ps_mask(at.fx, half, _CMP_GE_OQ), at.x, one);
    at.y = _mm512_mask_add_epi32(at.y, _mm512_cmp_ps_mask(at.fy, half, _CMP_GE_OQ), at.y, one);
    at.fx = at.fy = _mm512_setzero_ps();
}

template <int C>
IMGOPT_INLINE void nearest_samples(const Window& w, const BlockTaps& block, int first_lane, __m512* to) {
    const __m512i pixels = _mm512_i32gather_epi32(_mm512_load_si512(block.offset + first_lane), w.data, 1);
    const __m512i byte = _mm512_set1_epi32(255);
    for (int c = 0; c < C; ++c) to[c] = _mm512_cvtepi32_ps(_mm512_and_si512(_mm512_srli_epi32(pixels, 8 * c), byte));
}

// --- epilogue and stores -------------------------------------------------------------------------------------------

IMGOPT_INLINE void apply_color(const float* m, float unit, __m512* v) {
    const __m512 factor = _mm512_set1_ps(unit);
    const __m512 r = _mm512_mul_ps(v[0], factor), g = _mm512_mul_ps(v[1], factor), b = _mm512_mul_ps(v[2], factor);
    for (int i = 0; i < 3; ++i, m += 4) {
        __m512 t = _mm512_fmadd_ps(_mm512_set1_ps(m[0]), r, _mm512_set1_ps(m[3]));
        t = _mm512_fmadd_ps(_mm512_set1_ps(m[1]), g, t);
        t = _mm512_fmadd_ps(_mm512_set1_ps(m[2]), b, t);
        v[i] = _mm512_min_ps(_mm512_set1_ps(1), _mm512_max_ps(_mm512_setzero_ps(), t));  // this order keeps a NaN
    }
}

// vpermi2 indices that interleave planes: element e of the output is channel e % C of pixel e / C. Channels 0 and 1
// come by `pair`, the others one by one where their mask is set.
template <int C>
struct InterleaveIndices {
    alignas(64) int32_t pair[C][kLanes];
    uint16_t third[C], fourth[C];
    alignas(64) int16_t words[2][32];  // of 16-bit elements: channels 0, 1 in the first source, 2, 3 in the second
    alignas(64) uint8_t bytes[64];     // of the bytes that two packs leave behind

    constexpr InterleaveIndices() : pair{}, third{}, fourth{}, words{}, bytes{} {
        for (int e = 0; e < C * kLanes; ++e) {
            const int pixel = e / C, c = e % C, out = e / kLanes, lane = e % kLanes;
            pair[out][lane] = pixel + (c == 1 ? kLanes : 0);
            if (c == 2) third[out] = static_cast<uint16_t>(third[out] | 1 << lane);
            if (c == 3) fourth[out] = static_cast<uint16_t>(fourth[out] | 1 << lane);
            words[e / 32][e % 32] = static_cast<int16_t>(pixel + 16 * c);
            bytes[e] = static_cast<uint8_t>(pixel / 4 * 16 + 4 * c + pixel % 4);
        }
    }
};

template <int C>
IMGOPT_INLINE void store(uint8_t* to, const Target& at, const Epilogue<C>& e, const __m512* v) {
    static constexpr InterleaveIndices<C> kIndices;
    const __m512 factor = _mm512_set1_ps(e.levels);
    __m512i level[4];
    for (int c = 0; c < 4; ++c) level[c] = _mm512_cvtps_epi32(_mm512_mul_ps(v[c < C ? c : 0], factor));
    if (at.planar) {
        const __mmask16 mask = static_cast<__mmask16>((1u << at.count) - 1);
        for (int c = 0; c < C; ++c) {
            const __m512i positive = _mm512_max_epi32(level[c], _mm512_setzero_si512());
            const __m128i bytes = _mm512_cvtusepi32_epi8(positive);
            if (at.count == kLanes)
                _mm_storeu_si128(reinterpret_cast<__m128i*>(to + c * at.channel), bytes);
            else
                _mm_mask_storeu_epi8(to + c * at.channel, mask, bytes);
        }
        return;
    }
    const __m512i packed =
        _mm512_packus_epi16(_mm512_packus_epi32(level[0], level[1]), _mm512_packus_epi32(level[2], level[3]));
    const __m512i pixels = _mm512_permutexvar_epi8(_mm512_load_si512(kIndices.bytes), packed);
    if (at.count < kLanes) {
        _mm512_mask_storeu_epi8(to, (1ull << at.count * C) - 1, pixels);
    } else if constexpr (C == 4) {
        _mm512_storeu_si512(to, pixels);
    } else {
        // Whole vectors avoid the mask: a masked byte store costs as much as the sampling.
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_castsi512_si256(pixels));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 32), _mm512_extracti32x4_epi32(pixels, 2));
    }
}

template <int C>
IMGOPT_INLINE void normalize(const Epilogue<C>& e, const __m512* v, __m512* to) {
    for (int c = 0; c < C; ++c) to[c] = _mm512_fmadd_ps(v[c], _mm512_set1_ps(e.factor[c]), _mm512_set1_ps(e.add[c]));
}

IMGOPT_INLINE __mmask16 lanes_below(int count) {
    return static_cast<__mmask16>(count >= kLanes ? 0xffff : count <= 0 ? 0 : (1u << count) - 1);
}

template <int C>
IMGOPT_INLINE void store(float* to, const Target& at, const Epilogue<C>& e, const __m512* v) {
    static constexpr InterleaveIndices<C> kIndices;
    __m512 out[C];
    normalize(e, v, out);
    if (at.planar) {
        for (int c = 0; c < C; ++c)
            if (at.count == kLanes)
                _mm512_storeu_ps(to + c * at.channel, out[c]);
            else
                _mm512_mask_storeu_ps(to + c * at.channel, lanes_below(at.count), out[c]);
        return;
    }
    for (int i = 0; i < C; ++i) {
        const __m512i index = _mm512_load_si512(kIndices.pair[i]);
        __m512 pixels = _mm512_permutex2var_ps(out[0], index, out[C > 1 ? 1 : 0]);
        if constexpr (C > 2) pixels = _mm512_mask_permutexvar_ps(pixels, kIndices.third[i], index, out[2]);
        if constexpr (C > 3) pixels = _mm512_mask_permutexvar_ps(pixels, kIndices.fourth[i], index, out[3]);
        _mm512_mask_storeu_ps(to + i * kLanes, lanes_below(at.count * C - i * kLanes), pixels);
    }
}

IMGOPT_INLINE __m256i narrowed(__m512 v, const Half*) {
    return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
IMGOPT_INLINE __m256i narrowed(__m512 v, const BFloat16*) {
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    const __m512i kept =
        _mm512_mask_or_epi32(rounded, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), bits, _mm512_set1_epi32(0x400000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(kept, 16));
}

template <int C, class T>
IMGOPT_INLINE void store(T* to, const Target& at, const Epilogue<C>& e, const __m512* v) {
    static_assert(sizeof(T) == 2);
    static constexpr InterleaveIndices<C> kIndices;
    __m512 wide[C];
    normalize(e, v, wide);
    __m256i out[4];
    for (int c = 0; c < 4; ++c) out[c] = narrowed(wide[c < C ? c : 0], to);
    if (at.planar) {
        for (int c = 0; c < C; ++c)
            if (at.count == kLanes)
                _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + c * at.channel), out[c]);
            else
                _mm256_mask_storeu_epi16(to + c * at.channel, lanes_below(at.count), out[c]);
        return;
    }
    const __m512i low = _mm512_inserti64x4(_mm512_castsi256_si512(out[0]), out[1], 1);
    const __m512i high = _mm512_inserti64x4(_mm512_castsi256_si512(out[2]), out[3], 1);
    const int count = at.count * C;
    const auto below = [](int n) { return n >= 32 ? ~0u : n <= 0 ? 0u : (1u << n) - 1; };
    for (int i = 0; i < (C + 1) / 2; ++i)
        _mm512_mask_storeu_epi16(to + 32 * i, below(count - 32 * i),
                                 _mm512_permutex2var_epi16(low, _mm512_load_si512(kIndices.words[i]), high));
}

struct Isa {
    using Vector = __m512;
    static constexpr int kLanes = avx512::kLanes;
    static constexpr uint32_t kAllFinite = 0xffff;

    IMGOPT_INLINE static Points affine(const Base<float>& base, int lane) { return affine_points(base, lane); }
    IMGOPT_INLINE static Points perspective(const double* m, int64_t x, int64_t y) {
        return perspective_points(m, x, y);
    }

    template <int C, int taps>
    IMGOPT_INLINE static void locate(const Window& w, const Points& at, BlockTaps& to, int first_lane) {
        _mm512_store_si512(to.offset + first_lane, offsets_in(w, position_bytes(C, taps), taps == 4, at));
        to.finite[first_lane / kLanes] = at.finite;
        if constexpr (taps > 1) {
            const SplitWeights weights = taps == 2 ? split_weights(at.fx, at.fy) : split_bicubic_weights(at.fx);
            _mm512_store_si512(to.weight[0] + first_lane, weights.high);
            _mm512_store_si512(to.weight[1] + first_lane, weights.low);
        }
        if constexpr (taps == 4) {
            __m512 rows[4];
            bicubic_weights(at.fy, rows);
            for (int i = 0; i < 4; ++i) _mm512_store_ps(to.row_weight[i] + first_lane, rows[i]);
        }
    }

    template <int C, int taps>
    IMGOPT_INLINE static void samples(const Window& w, const BlockTaps& block, int first_lane, __m512* to) {
        if constexpr (taps == 1) nearest_samples<C>(w, block, first_lane, to);
        if constexpr (taps == 2) bilinear_samples<C>(w, block, first_lane, to);
        if constexpr (taps == 4) bicubic_samples<C>(w, block, first_lane, to);
    }

    template <int C, int taps>
    static void pack(const Source<uint8_t>& source, const uint8_t* first, const uint8_t* second, int32_t count,
                     uint8_t* to) {
        if (source.column == C && source.channel == 1)
            pack_pixels<C, taps, false>(source, first, second, count, to);
        else
            pack_pixels<C, taps, true>(source, first, second, count, to);
    }
    IMGOPT_INLINE static void round(Points& at) { round_to_nearest(at); }
    IMGOPT_INLINE static void fold(Points& at, const Source<uint8_t>& source, Padding padding) {
        fold_axis(at.x, at.fx, source.width, padding);
        fold_axis(at.y, at.fy, source.height, padding);
    }
    IMGOPT_INLINE static void blend(float fill, uint32_t finite, __m512& v) {
        v = _mm512_mask_mov_ps(_mm512_set1_ps(fill), static_cast<__mmask16>(finite), v);
    }
    IMGOPT_INLINE static void color(const float* m, float unit, __m512* v) { apply_color(m, unit, v); }

    template <int C, class T>
    IMGOPT_INLINE static void put(T* to, const Target& at, const Epilogue<C>& epilogue, const __m512* v) {
        store<C>(to, at, epilogue, v);
    }
};

}  // namespace

void affine_warp(KernelTable& table) { table.affine_warp = warp_vectorized<Isa>; }

}  // namespace imgopt::avx512

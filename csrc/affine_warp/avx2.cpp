// affine_warp for AVX2 with FMA. Eight pixels at a time, as in the AVX-512 unit, with what AVX2 has instead of VNNI:
// the 16-bit weights go whole into vpmaddwd, two taps per multiplication, which is exact; byte shuffles widen the taps
// on the way.
#include <immintrin.h>

#include "window.h"

namespace imgopt::avx2 {
namespace {

constexpr int kLanes = 8;

// --- packing -------------------------------------------------------------------------------------------------------

IMGOPT_INLINE __m128i bytes_at(const uint8_t* from) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from)); }
IMGOPT_INLINE void put_bytes(uint8_t* to, __m128i v) { _mm_storeu_si128(reinterpret_cast<__m128i*>(to), v); }

IMGOPT_INLINE int32_t dword_at(const uint8_t* from) {
    int32_t v;
    __builtin_memcpy(&v, from, 4);
    return v;
}

IMGOPT_INLINE __m256i dwords_at(const int32_t* from) {
    return _mm256_load_si256(reinterpret_cast<const __m256i*>(from));
}
IMGOPT_INLINE void put_dwords(int32_t* to, __m256i v) { _mm256_store_si256(reinterpret_cast<__m256i*>(to), v); }

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

template <int C, int taps>
void pack_pixels(const Source<uint8_t>& source, const uint8_t* first, const uint8_t* second, int32_t count,
                 uint8_t* to) {
    constexpr int bytes = position_bytes(C, taps);
    const bool planar = !(source.column == C && source.channel == 1);
    const int64_t column = planar ? 1 : C, channel = planar ? source.channel : 1;
    int32_t i = 0;
    if constexpr (C == 1) {
        for (; i + 16 <= count; i += 16) {
            const __m128i a = bytes_at(first + i);
            if constexpr (taps == 2) {
                const __m128i b = bytes_at(second + i);
                put_bytes(to + 2 * i, _mm_unpacklo_epi8(a, b));
                put_bytes(to + 2 * i + 16, _mm_unpackhi_epi8(a, b));
            } else {
                put_bytes(to + i, a);
            }
        }
    } else {
        const int ahead = planar || C == 4 ? 4 : 6;  // pixels that a 16-byte load of interleaved RGB touches
        for (; i + ahead <= count; i += 4)
            put_positions<C, taps>(to + i * bytes, four_pixels<C>(source, first + i * column, planar),
                                   four_pixels<C>(source, second + i * column, planar));
    }
    for (; i < count; ++i)
        for (int c = 0; c < C; ++c) {
            to[i * bytes + c] = first[i * column + c * channel];
            if (taps == 2) to[i * bytes + C + c] = second[i * column + c * channel];
        }
}

// --- coordinates ---------------------------------------------------------------------------------------------------

struct Points {
    __m256i x, y;  // floors
    __m256 fx, fy;
    int finite;  // bit per lane
};

IMGOPT_INLINE Points affine_points(const Base<float>& base, int lane) {
    const __m256 lanes =
        _mm256_cvtepi32_ps(_mm256_add_epi32(_mm256_set1_epi32(lane), _mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0)));
    const __m256 far = _mm256_set1_ps(static_cast<float>(kFarInBlock)), near = _mm256_sub_ps(_mm256_setzero_ps(), far);
    const auto along = [&](float step, float start) {
        const __m256 v = _mm256_fmadd_ps(_mm256_set1_ps(step), lanes, _mm256_set1_ps(start));
        return _mm256_min_ps(_mm256_max_ps(v, near), far);
    };
    const __m256 x = along(base.step_x, base.fx), y = along(base.step_y, base.fy);
    const __m256 wx = _mm256_floor_ps(x), wy = _mm256_floor_ps(y);
    return {_mm256_add_epi32(_mm256_set1_epi32(base.x), _mm256_cvttps_epi32(wx)),
            _mm256_add_epi32(_mm256_set1_epi32(base.y), _mm256_cvttps_epi32(wy)), _mm256_sub_ps(x, wx),
            _mm256_sub_ps(y, wy), base.finite ? 0xff : 0};
}

struct HalfPoints {
    __m128i x, y;
    __m128 fx, fy;
    int finite;
};

IMGOPT_INLINE HalfPoints perspective_half(const double* m, int64_t x, int64_t y) {
    const __m256d column = _mm256_add_pd(_mm256_set1_pd(static_cast<double>(x)), _mm256_set_pd(3, 2, 1, 0));
    const auto row = [&](int i) {
        return _mm256_add_pd(_mm256_mul_pd(_mm256_set1_pd(m[i]), column), _mm256_set1_pd(m[i + 1] * y + m[i + 2]));
    };
    const __m256d r = _mm256_div_pd(_mm256_set1_pd(1), row(6));
    const __m256d sx = _mm256_mul_pd(row(0), r), sy = _mm256_mul_pd(row(3), r);
    const __m256d zero = _mm256_setzero_pd();
    const int finite = _mm256_movemask_pd(_mm256_and_pd(_mm256_cmp_pd(_mm256_sub_pd(sx, sx), zero, _CMP_EQ_OQ),
                                                        _mm256_cmp_pd(_mm256_sub_pd(sy, sy), zero, _CMP_EQ_OQ)));
    const __m256d far = _mm256_set1_pd(kFar), near = _mm256_set1_pd(-kFar);
    const __m256d cx = _mm256_min_pd(_mm256_max_pd(sx, near), far), cy = _mm256_min_pd(_mm256_max_pd(sy, near), far);
    const __m256d wx = _mm256_floor_pd(cx), wy = _mm256_floor_pd(cy);
    return {_mm256_cvttpd_epi32(wx), _mm256_cvttpd_epi32(wy), _mm256_cvtpd_ps(_mm256_sub_pd(cx, wx)),
            _mm256_cvtpd_ps(_mm256_sub_pd(cy, wy)), finite};
}

IMGOPT_INLINE Points perspective_points(const double* m, int64_t x, int64_t y) {
    const HalfPoints a = perspective_half(m, x, y), b = perspective_half(m, x + 4, y);
    return {_mm256_set_m128i(b.x, a.x), _mm256_set_m128i(b.y, a.y), _mm256_set_m128(b.fx, a.fx),
            _mm256_set_m128(b.fy, a.fy), a.finite | b.finite << 4};
}

IMGOPT_INLINE void round_to_nearest(Points& at) {
    const __m256 half = _mm256_set1_ps(0.5f);
    at.x = _mm256_sub_epi32(at.x, _mm256_castps_si256(_mm256_cmp_ps(at.fx, half, _CMP_GE_OQ)));
    at.y = _mm256_sub_epi32(at.y, _mm256_castps_si256(_mm256_cmp_ps(at.fy, half, _CMP_GE_OQ)));
    at.fx = at.fy = _mm256_setzero_ps();
}

// fold() of arithmetic.h, lane by lane, for the vectors that leave the image.
IMGOPT_INLINE void fold_axis(__m256i& i, __m256& f, int32_t n, Padding padding) {
    const __m256i inside =
        _mm256_andnot_si256(_mm256_cmpgt_epi32(_mm256_setzero_si256(), i), _mm256_cmpgt_epi32(_mm256_set1_epi32(n), i));
    if (_mm256_movemask_epi8(inside) == -1 || n == 1) return;
    alignas(32) int32_t index[kLanes];
    alignas(32) float fraction[kLanes];
    _mm256_store_si256(reinterpret_cast<__m256i*>(index), i);
    _mm256_store_ps(fraction, f);
    for (int lane = 0; lane < kLanes; ++lane) fold(index[lane], fraction[lane], n, padding);
    i = _mm256_load_si256(reinterpret_cast<const __m256i*>(index));
    f = _mm256_load_ps(fraction);
}

// --- sampling ------------------------------------------------------------------------------------------------------

IMGOPT_INLINE __m256i offsets_in(const Window& w, int bytes, int lead, const Points& at) {
    const auto cut = [](__m256i v, int32_t first, int32_t last) {
        v = _mm256_sub_epi32(v, _mm256_set1_epi32(first));
        return _mm256_min_epi32(_mm256_max_epi32(v, _mm256_setzero_si256()), _mm256_set1_epi32(last));
    };
    const __m256i x = cut(at.x, w.x0 + lead, w.x_last), y = cut(at.y, w.y0 + lead, w.y_last);
    return _mm256_add_epi32(_mm256_mullo_epi32(y, _mm256_set1_epi32(static_cast<int32_t>(w.pitch))),
                            _mm256_mullo_epi32(x, _mm256_set1_epi32(bytes)));
}

// Weights of eight pixels, two 16-bit ones per dword: taps 0 and 1, taps 2 and 3.
struct PairedWeights {
    __m256i first, second;
};

IMGOPT_INLINE PairedWeights paired(__m256i w0, __m256i w1, __m256i w2, __m256i w3) {
    return {_mm256_blend_epi16(w0, _mm256_slli_epi32(w1, 16), 0xaa),
            _mm256_blend_epi16(w2, _mm256_slli_epi32(w3, 16), 0xaa)};
}

IMGOPT_INLINE PairedWeights paired_weights(__m256 fx, __m256 fy) {
    const __m256 sum = _mm256_set1_ps(kWeightSum), both = _mm256_mul_ps(fx, fy);
    const __m256i w11 = _mm256_cvtps_epi32(_mm256_mul_ps(both, sum));
    const __m256i w01 = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_sub_ps(fx, both), sum));
    const __m256i w10 = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_sub_ps(fy, both), sum));
    const __m256i w00 =
        _mm256_sub_epi32(_mm256_sub_epi32(_mm256_set1_epi32(kWeightSum), w11), _mm256_add_epi32(w01, w10));
    return paired(w00, w10, w01, w11);
}

// bicubic_weights() of arithmetic.h.
IMGOPT_INLINE void bicubic_weights(__m256 f, __m256* to) {
    const __m256 one = _mm256_set1_ps(1), a = _mm256_set1_ps(static_cast<float>(kKeys)), g = _mm256_sub_ps(one, f);
    const auto near = [&](__m256 d) {
        const __m256 line = _mm256_fmadd_ps(_mm256_set1_ps(static_cast<float>(kKeys + 2)), d,
                                            _mm256_set1_ps(static_cast<float>(-kKeys - 3)));
        return _mm256_fmadd_ps(line, _mm256_mul_ps(d, d), one);
    };
    to[0] = _mm256_mul_ps(_mm256_mul_ps(a, f), _mm256_mul_ps(g, g));
    to[1] = near(f);
    to[2] = near(g);
    to[3] = _mm256_mul_ps(_mm256_mul_ps(a, g), _mm256_mul_ps(f, f));
}

IMGOPT_INLINE PairedWeights paired_bicubic_weights(__m256 f) {
    const __m256 sum = _mm256_set1_ps(kWeightSum);
    __m256 w[4];
    bicubic_weights(f, w);
    const __m256i w0 = _mm256_cvtps_epi32(_mm256_mul_ps(w[0], sum)), w2 = _mm256_cvtps_epi32(_mm256_mul_ps(w[2], sum));
    const __m256i w3 = _mm256_cvtps_epi32(_mm256_mul_ps(w[3], sum));
    const __m256i w1 = _mm256_sub_epi32(_mm256_sub_epi32(_mm256_set1_epi32(kWeightSum), w0), _mm256_add_epi32(w2, w3));
    return paired(w0, w1, w2, w3);
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

// Dword c of four registers, each with pixel i in its lower and pixel i + 4 in its upper lane, for c = 0 .. 3.
IMGOPT_INLINE void transpose(const __m256i* pixels, __m256i* planes) {
    const __m256i a = _mm256_unpacklo_epi32(pixels[0], pixels[1]), b = _mm256_unpacklo_epi32(pixels[2], pixels[3]);
    const __m256i c = _mm256_unpackhi_epi32(pixels[0], pixels[1]), d = _mm256_unpackhi_epi32(pixels[2], pixels[3]);
    planes[0] = _mm256_unpacklo_epi64(a, b);
    planes[1] = _mm256_unpackhi_epi64(a, b);
    planes[2] = _mm256_unpacklo_epi64(c, d);
    planes[3] = _mm256_unpackhi_epi64(c, d);
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
    const __m256i taps = _mm256_i32gather_epi32(reinterpret_cast<const int*>(data), dwords_at(offset), 1);
    const __m256i even = _mm256_and_si256(taps, _mm256_set1_epi16(255)), odd = _mm256_srli_epi16(taps, 8);
    first[0] = _mm256_blend_epi16(even, _mm256_slli_epi32(odd, 16), 0xaa);
    second[0] = _mm256_blend_epi16(_mm256_srli_epi32(even, 16), odd, 0xaa);
}

// Samples of eight pixels: levels times kWeightSum, one register per channel.
template <int C>
IMGOPT_INLINE void bilinear_samples(const Window& w, const BlockTaps& block, int first_lane, __m256* to) {
    const PairedWeights weights = {dwords_at(block.weight[0] + first_lane), dwords_at(block.weight[1] + first_lane)};
    __m256i first[4], second[4];
    load_planes<C>(w.data, block.offset + first_lane, first, second);
    for (int c = 0; c < C; ++c) to[c] = weighted(first[c], second[c], weights);
}

// Four rows of four columns: each row in exact integers like the bilinear taps, then the rows in float32.
template <int C>
IMGOPT_INLINE void bicubic_samples(const Window& w, const BlockTaps& block, int first_lane, __m256* to) {
    const PairedWeights weights = {dwords_at(block.weight[0] + first_lane), dwords_at(block.weight[1] + first_lane)};
    for (int row = 0; row < 4; ++row) {
        const __m256 weight = _mm256_load_ps(block.row_weight[row] + first_lane);
        __m256i first[4], second[4];
        load_planes<C>(w.data + row * w.pitch, block.offset + first_lane, first, second);
        for (int c = 0; c < C; ++c) {
            const __m256 sum = weighted(first[c], second[c], weights);
            to[c] = row ? _mm256_fmadd_ps(weight, sum, to[c]) : _mm256_mul_ps(weight, sum);
        }
    }
}

template <int C>
IMGOPT_INLINE void nearest_samples(const Window& w, const BlockTaps& block, int first_lane, __m256* to) {
    const __m256i offset = dwords_at(block.offset + first_lane);
    const __m256i pixels = _mm256_i32gather_epi32(reinterpret_cast<const int*>(w.data), offset, 1);
    const __m256i byte = _mm256_set1_epi32(255);
    for (int c = 0; c < C; ++c) to[c] = _mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srli_epi32(pixels, 8 * c), byte));
}

// --- epilogue and stores -------------------------------------------------------------------------------------------

IMGOPT_INLINE void apply_color(const float* m, float unit, __m256* v) {
    const __m256 factor = _mm256_set1_ps(unit);
    const __m256 r = _mm256_mul_ps(v[0], factor), g = _mm256_mul_ps(v[1], factor), b = _mm256_mul_ps(v[2], factor);
    for (int i = 0; i < 3; ++i, m += 4) {
        __m256 t = _mm256_fmadd_ps(_mm256_set1_ps(m[0]), r, _mm256_set1_ps(m[3]));
        t = _mm256_fmadd_ps(_mm256_set1_ps(m[1]), g, t);
        t = _mm256_fmadd_ps(_mm256_set1_ps(m[2]), b, t);
        v[i] = _mm256_min_ps(_mm256_set1_ps(1), _mm256_max_ps(_mm256_setzero_ps(), t));  // this order keeps a NaN
    }
}

// Eight elements of a plane, or fewer, to consecutive places.
template <class T>
IMGOPT_INLINE void put_some(T* to, const T* from, int count) {
    __builtin_memcpy(to, from, static_cast<size_t>(count) * sizeof(T));
}

// Planes of eight elements, as they are or pixel by pixel.
template <int C, class T>
IMGOPT_INLINE void put_planes(T* to, const Target& at, const T* planes) {
    if (at.planar) {
        for (int c = 0; c < C; ++c)
            if (at.count == kLanes)
                __builtin_memcpy(to + c * at.channel, planes + c * kLanes, kLanes * sizeof(T));
            else
                put_some(to + c * at.channel, planes + c * kLanes, at.count);
        return;
    }
    for (int i = 0; i < at.count; ++i)
        for (int c = 0; c < C; ++c) to[i * C + c] = planes[c * kLanes + i];
}

template <int C>
IMGOPT_INLINE void store(uint8_t* to, const Target& at, const Epilogue<C>& e, const __m256* v) {
    const __m256 factor = _mm256_set1_ps(e.levels);
    __m256i level[4];
    for (int c = 0; c < 4; ++c) level[c] = _mm256_cvtps_epi32(_mm256_mul_ps(v[c < C ? c : 0], factor));
    // Bytes c of pixels 0 .. 3 in dword c of the lower lane, those of pixels 4 .. 7 in the upper one.
    const __m256i packed =
        _mm256_packus_epi16(_mm256_packus_epi32(level[0], level[1]), _mm256_packus_epi32(level[2], level[3]));
    if (at.planar || C == 1) {
        alignas(32) uint8_t planes[4 * kLanes];
        const __m256i order = _mm256_set_epi32(7, 3, 6, 2, 5, 1, 4, 0);
        _mm256_store_si256(reinterpret_cast<__m256i*>(planes), _mm256_permutevar8x32_epi32(packed, order));
        put_planes<C>(to, at, planes);
        return;
    }
    const __m128i order = C == 4 ? _mm_set_epi8(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0)
                                 : _mm_set_epi8(-1, -1, -1, -1, 11, 7, 3, 10, 6, 2, 9, 5, 1, 8, 4, 0);
    const __m128i low = _mm_shuffle_epi8(_mm256_castsi256_si128(packed), order);
    const __m128i high = _mm_shuffle_epi8(_mm256_extracti128_si256(packed, 1), order);
    alignas(16) uint8_t pixels[48];
    put_bytes(pixels, low);
    put_bytes(pixels + 4 * C, high);
    if (at.count == kLanes)
        __builtin_memcpy(to, pixels, kLanes * C);
    else
        put_some(to, pixels, at.count * C);
}

IMGOPT_INLINE __m128i narrowed(__m256 v, const Half*) {
    return _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
IMGOPT_INLINE __m128i narrowed(__m256 v, const BFloat16*) {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const __m256i kept = _mm256_blendv_epi8(rounded, quiet, _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q)));
    const __m256i words = _mm256_srli_epi32(kept, 16);
    return _mm256_castsi256_si128(_mm256_permute4x64_epi64(_mm256_packus_epi32(words, words), 0x08));
}

template <int C, class T>
IMGOPT_INLINE void store(T* to, const Target& at, const Epilogue<C>& e, const __m256* v) {
    alignas(32) T planes[C * kLanes];
    for (int c = 0; c < C; ++c) {
        const __m256 value = _mm256_fmadd_ps(v[c], _mm256_set1_ps(e.factor[c]), _mm256_set1_ps(e.add[c]));
        if constexpr (sizeof(T) == 4)
            _mm256_store_ps(reinterpret_cast<float*>(planes + c * kLanes), value);
        else
            _mm_store_si128(reinterpret_cast<__m128i*>(planes + c * kLanes), narrowed(value, to));
    }
    put_planes<C>(to, at, planes);
}

struct Isa {
    using Vector = __m256;
    static constexpr int kLanes = avx2::kLanes;
    static constexpr uint32_t kAllFinite = 0xff;

    IMGOPT_INLINE static Points affine(const Base<float>& base, int lane) { return affine_points(base, lane); }
    IMGOPT_INLINE static Points perspective(const double* m, int64_t x, int64_t y) {
        return perspective_points(m, x, y);
    }

    template <int C, int taps>
    IMGOPT_INLINE static void locate(const Window& w, const Points& at, BlockTaps& to, int first_lane) {
        put_dwords(to.offset + first_lane, offsets_in(w, position_bytes(C, taps), taps == 4, at));
        to.finite[first_lane / kLanes] = static_cast<uint32_t>(at.finite);
        if constexpr (taps > 1) {
            const PairedWeights weights = taps == 2 ? paired_weights(at.fx, at.fy) : paired_bicubic_weights(at.fx);
            put_dwords(to.weight[0] + first_lane, weights.first);
            put_dwords(to.weight[1] + first_lane, weights.second);
        }
        if constexpr (taps == 4) {
            __m256 rows[4];
            bicubic_weights(at.fy, rows);
            for (int i = 0; i < 4; ++i) _mm256_store_ps(to.row_weight[i] + first_lane, rows[i]);
        }
    }

    template <int C, int taps>
    IMGOPT_INLINE static void samples(const Window& w, const BlockTaps& block, int first_lane, __m256* to) {
        if constexpr (taps == 1) nearest_samples<C>(w, block, first_lane, to);
        if constexpr (taps == 2) bilinear_samples<C>(w, block, first_lane, to);
        if constexpr (taps == 4) bicubic_samples<C>(w, block, first_lane, to);
    }

    template <int C, int taps>
    static void pack(const Source<uint8_t>& source, const uint8_t* first, const uint8_t* second, int32_t count,
                     uint8_t* to) {
        pack_pixels<C, taps>(source, first, second, count, to);
    }
    IMGOPT_INLINE static void round(Points& at) { round_to_nearest(at); }
    IMGOPT_INLINE static void fold(Points& at, const Source<uint8_t>& source, Padding padding) {
        fold_axis(at.x, at.fx, source.width, padding);
        fold_axis(at.y, at.fy, source.height, padding);
    }
    IMGOPT_INLINE static void blend(float fill, uint32_t finite, __m256& v) {
        const __m256i bit = _mm256_set_epi32(128, 64, 32, 16, 8, 4, 2, 1);
        const __m256i set = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(static_cast<int>(finite)), bit), bit);
        v = _mm256_blendv_ps(_mm256_set1_ps(fill), v, _mm256_castsi256_ps(set));
    }
    IMGOPT_INLINE static void color(const float* m, float unit, __m256* v) { apply_color(m, unit, v); }

    template <int C, class T>
    IMGOPT_INLINE static void put(T* to, const Target& at, const Epilogue<C>& epilogue, const __m256* v) {
        store<C>(to, at, epilogue, v);
    }
};

}  // namespace

void affine_warp(KernelTable& table) { table.affine_warp = warp_vectorized<Isa>; }

}  // namespace imgopt::avx2

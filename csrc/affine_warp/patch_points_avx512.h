// Where the pixels of a block look up their taps in its patch (patch_avx512.h). Inside the image coordinates never
// become integers of their own: a sum with a large power of two leaves the place of a pixel's first tap in the last
// byte of a float, modulo 256, and the patch's own place is subtracted from that byte.
#pragma once

#include "lanes_avx512.h"
#include "patch_plan_avx512.h"

namespace imgopt::avx512 {
namespace {

constexpr uint8_t kOutside = 0xff;  // index of a patch's last byte, which taps outside the image look up

// --- coordinates ----------------------------------------------------------------------------------------------------

struct PairLanes {
    alignas(64) float index[kSide][16];

    constexpr PairLanes() : index{} {
        for (int i = 0; i < 16 * kSide; ++i) index[i / 16][i % 16] = static_cast<float>(i / 16 * kSide + i % kSide);
    }
};
constexpr PairLanes kPairLane;

// Two rows of a block inside the image. `index`: where the pixels' first taps lie in rows of 16 source pixels from the
// image's first one, modulo 256; for bilinear in all bytes of a dword, for nearest in the lowest one. The fractions are
// those of bilinear taps.
struct InsidePoints {
    __m512i index;
    __m512 fx, fy;
};

// Byte 0 of each dword in all of its bytes.
IMGOPT_INLINE __m512i spread_bytes(__m512i v) {
    return _mm512_shuffle_epi8(
        v, _mm512_broadcast_i32x4(_mm_set_epi8(12, 12, 12, 12, 8, 8, 8, 8, 4, 4, 4, 4, 0, 0, 0, 0)));
}

// What the rows of kBlock columns of eight rows share.
template <bool affine>
struct BlockRows;

// affine_base() of eight rows, two to a register: lane i is of row i / 8.
template <>
struct BlockRows<true> {
    __m512i x[4], y[4];
    __m512 fx[4], fy[4], place[4];  // of the base's pixel, as `index` above, plus 1.5 · 2^23
    __m512 step_x, step_y;

    IMGOPT_INLINE BlockRows(const Map& map, int64_t x0, int64_t y0)
        : step_x(_mm512_set1_ps(static_cast<float>(map.m[0]))), step_y(_mm512_set1_ps(static_cast<float>(map.m[3]))) {
        const Doubles row = Doubles{0, 1, 2, 3, 4, 5, 6, 7} + static_cast<double>(y0);
        const auto along = [&](const double* m, __m512i* whole, __m512* fraction) {
            const Doubles v = m[0] * static_cast<double>(x0) + (m[1] * row + m[2]), below = floor_of(v);
            const __m512i floors = _mm512_castsi256_si512(_mm512_cvttpd_epi32((__m512d)below));
            const __m512 rest = _mm512_castps256_ps512(_mm512_cvtpd_ps((__m512d)(v - below)));
            for (int pair = 0; pair < 4; ++pair) {
                const __m512i lane =
                    _mm512_inserti64x4(_mm512_set1_epi32(2 * pair), _mm256_set1_epi32(2 * pair + 1), 1);
                whole[pair] = _mm512_permutexvar_epi32(lane, floors);
                fraction[pair] = _mm512_permutexvar_ps(lane, rest);
            }
        };
        along(map.m, x, fx);
        along(map.m + 3, y, fy);
        for (int pair = 0; pair < 4; ++pair) {
            const __m512i from_first = _mm512_add_epi32(_mm512_slli_epi32(y[pair], 4), x[pair]);
            place[pair] = _mm512_castsi512_ps(
                _mm512_or_si512(_mm512_and_si512(from_first, _mm512_set1_epi32(255)), _mm512_set1_epi32(0x4b400000)));
        }
    }

    IMGOPT_INLINE __m512 along_x(int pair, int block) const {
        return _mm512_fmadd_ps(step_x, _mm512_load_ps(kPairLane.index[block]), fx[pair]);
    }
    IMGOPT_INLINE __m512 along_y(int pair, int block) const {
        return _mm512_fmadd_ps(step_y, _mm512_load_ps(kPairLane.index[block]), fy[pair]);
    }
    IMGOPT_INLINE Points points(int pair, int block) const {
        const __m512 px = along_x(pair, block), py = along_y(pair, block), wx = floored(px), wy = floored(py);
        return {_mm512_add_epi32(x[pair], _mm512_cvttps_epi32(wx)), _mm512_add_epi32(y[pair], _mm512_cvttps_epi32(wy)),
                _mm512_sub_ps(px, wx), _mm512_sub_ps(py, wy), 0xffff};
    }
    // The sums with 1.5 · 2^23 are exact and leave their last byte in that of a float.
    IMGOPT_INLINE __m512i place_of(__m512 wx, __m512 wy, int pair) const {
        return _mm512_castps_si512(_mm512_fmadd_ps(wy, _mm512_set1_ps(16), _mm512_add_ps(wx, place[pair])));
    }
    template <int taps>
    IMGOPT_INLINE InsidePoints inside(int pair, int block) const {
        const __m512 px = along_x(pair, block), py = along_y(pair, block);
        if constexpr (taps == 1) {
            // Rounded down, no sum reaches an integer that the exact one does not.
            const auto nearest = [](__m512 v) {
                constexpr int kDown = _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC;
                return floored(_mm512_add_round_ps(v, _mm512_set1_ps(0.5f), kDown));
            };
            return {place_of(nearest(px), nearest(py), pair), px, py};
        }
        const __m512 wx = floored(px), wy = floored(py);
        return {spread_bytes(place_of(wx, wy, pair)), _mm512_sub_ps(px, wx), _mm512_sub_ps(py, wy)};
    }
};

// perspective_point() of eight rows of up to kBlock columns: what each adds to the three rows of the matrix.
template <>
struct BlockRows<false> {
    alignas(64) double down[kSide][3];
    const double* m;
    int64_t x0;

    IMGOPT_INLINE BlockRows(const Map& map, int64_t first, int64_t y0) : m(map.m), x0(first) {
        for (int row = 0; row < kSide; ++row)
            for (int i = 0; i < 3; ++i) down[row][i] = m[3 * i + 1] * static_cast<double>(y0 + row) + m[3 * i + 2];
    }

    IMGOPT_INLINE HalfPoints half(int row, int block) const {
        return perspective_half<true>(m, down[row], x0 + kSide * block);
    }
    IMGOPT_INLINE Points points(int pair, int block) const {
        return points_of(half(2 * pair, block), half(2 * pair + 1, block));
    }
    template <int taps>
    IMGOPT_INLINE InsidePoints inside(int pair, int block) const {
        const HalfPoints a = half(2 * pair, block), b = half(2 * pair + 1, block);
        if constexpr (taps == 1) {
            Points at = points_of(a, b);
            round_to_nearest(at);
            return {_mm512_add_epi32(_mm512_slli_epi32(at.y, 4), at.x), at.fx, at.fy};
        }
        struct Spread {
            alignas(64) uint8_t index[64];

            constexpr Spread() : index{} {
                for (int i = 0; i < 64; ++i) index[i] = static_cast<uint8_t>(i / 4 * 8);
            }
        };
        static constexpr Spread kSpread;
        const auto place = [](const HalfPoints& at) {  // exact, and its last byte that of a float64
            const __m512d sum = _mm512_fmadd_pd(at.y, _mm512_set1_pd(16), at.x);
            return _mm512_castpd_si512(_mm512_add_pd(sum, _mm512_set1_pd(6755399441055744.0)));
        };
        return {_mm512_permutex2var_epi8(place(a), _mm512_load_si512(kSpread.index), place(b)), joined(a.fx, b.fx),
                joined(a.fy, b.fy)};
    }
};

// --- indices --------------------------------------------------------------------------------------------------------

// The places of each pixel's taps in the patch that begins at (x, y): four bytes, or the lowest one for nearest.
template <int taps>
IMGOPT_INLINE __m512i indices_inside(__m512i index, int32_t x, int32_t y) {
    const __m512i first = _mm512_set1_epi8(static_cast<char>(16 * y + x));
    return _mm512_add_epi8(index, _mm512_sub_epi8(_mm512_set1_epi32(taps == 1 ? 0 : 0x11011000), first));
}

// Tap k along one axis of coordinates that are mirrored already, from the patch's first pixel, or kOutside.
IMGOPT_INLINE __m512i tap_place(__m512i v, int k, int32_t n, int32_t first, Padding padding) {
    const __m512i start = _mm512_set1_epi32(first), last = _mm512_set1_epi32(n - 1);
    v = _mm512_add_epi32(v, _mm512_set1_epi32(k));
    if (padding == Padding::constant) {
        const __mmask16 kept = _mm512_cmple_epu32_mask(v, last);
        return _mm512_mask_sub_epi32(_mm512_set1_epi32(kOutside), kept, v, start);
    }
    if (padding == Padding::reflect) {
        const __mmask16 past = _mm512_cmpgt_epi32_mask(v, last);
        return _mm512_sub_epi32(_mm512_mask_mov_epi32(v, past, _mm512_set1_epi32(n - 2)), start);
    }
    return _mm512_sub_epi32(_mm512_min_epi32(_mm512_max_epi32(v, _mm512_setzero_si512()), last), start);
}

template <int taps>
IMGOPT_INLINE __m512i indices_at_border(const Points& at, const Source<uint8_t>& source, Padding padding, int32_t x,
                                        int32_t y) {
    const auto row_place = [&](int k) {
        const __m512i v = tap_place(at.y, k, source.height, y, padding);
        // kOutside stays: sixteen rows are 0 .. 15.
        return _mm512_mask_slli_epi32(v, _mm512_cmplt_epu32_mask(v, _mm512_set1_epi32(16)), v, 4);
    };
    __m512i columns = tap_place(at.x, 0, source.width, x, padding), rows = row_place(0);
    if constexpr (taps == 2) {
        columns = _mm512_or_si512(columns, _mm512_slli_epi32(tap_place(at.x, 1, source.width, x, padding), 16));
        columns = _mm512_or_si512(columns, _mm512_slli_epi32(columns, 8));
        rows = _mm512_or_si512(rows, _mm512_slli_epi32(row_place(1), 8));
        rows = _mm512_or_si512(rows, _mm512_slli_epi32(rows, 16));
    }
    return _mm512_or_si512(columns, rows);
}

}  // namespace
}  // namespace imgopt::avx512

// Nearest and bilinear uint8 warps from patches of the source in registers. Eight by eight output pixels reach at most
// 15 x 16 source pixels, as long as the image shrinks by less than 1.8: that patch of a channel fits four registers, in
// which vpermi2b looks up all taps of sixteen pixels in three instructions. So the source is read where it lies, row by
// row: no copy of it, no offsets in memory, no load per pixel. The last byte of a patch, beyond its pixels, is what
// taps outside the image look up.
#pragma once

#include "patch_plan_avx512.h"
#include "stores_avx512.h"

namespace imgopt::avx512 {
namespace {

constexpr __mmask64 kFillByte = 1ull << 63;  // of the last of a patch's registers
constexpr uint8_t kOutside = 0xff;           // its index

// --- coordinates ----------------------------------------------------------------------------------------------------

// affine_base() of eight rows, two to a register: lane i is of row i / 8.
struct RowPairs {
    __m512i x[4], y[4];
    __m512 fx[4], fy[4];

    IMGOPT_INLINE void place(const Map& map, int64_t x0, int64_t y0) {
        const Doubles y = Doubles{0, 1, 2, 3, 4, 5, 6, 7} + static_cast<double>(y0);
        const auto along = [&](const double* m, __m512i* whole, __m512* fraction) {
            const Doubles v = m[0] * static_cast<double>(x0) + (m[1] * y + m[2]), below = floor_of(v);
            const __m512i row = _mm512_castsi256_si512(_mm512_cvttpd_epi32((__m512d)below));
            const __m512 rest = _mm512_castps256_ps512(_mm512_cvtpd_ps((__m512d)(v - below)));
            for (int pair = 0; pair < 4; ++pair) {
                const __m512i lane =
                    _mm512_inserti64x4(_mm512_set1_epi32(2 * pair), _mm256_set1_epi32(2 * pair + 1), 1);
                whole[pair] = _mm512_permutexvar_epi32(lane, row);
                fraction[pair] = _mm512_permutexvar_ps(lane, rest);
            }
        };
        along(map.m, this->x, fx);
        along(map.m + 3, this->y, fy);
    }
};

struct PairLanes {
    alignas(64) float index[kSide][16];

    constexpr PairLanes() : index{} {
        for (int i = 0; i < 16 * kSide; ++i) index[i / 16][i % 16] = static_cast<float>(i / 16 * kSide + i % kSide);
    }
};
constexpr PairLanes kPairLane;

// The points of two rows of a block.
template <bool affine>
IMGOPT_INLINE Points points_of(const Map& map, const RowPairs& rows, const float* step, int pair, int block, int64_t x,
                               int64_t y) {
    if constexpr (affine) {
        const __m512 lane = _mm512_load_ps(kPairLane.index[block]);
        const __m512 px = _mm512_fmadd_ps(_mm512_set1_ps(step[0]), lane, rows.fx[pair]);
        const __m512 py = _mm512_fmadd_ps(_mm512_set1_ps(step[1]), lane, rows.fy[pair]);
        const __m512 wx = floored(px), wy = floored(py);
        return {_mm512_add_epi32(rows.x[pair], _mm512_cvttps_epi32(wx)),
                _mm512_add_epi32(rows.y[pair], _mm512_cvttps_epi32(wy)), _mm512_sub_ps(px, wx), _mm512_sub_ps(py, wy),
                0xffff};
    } else {
        return joined(perspective_half<true>(map.m, x, y + 2 * pair),
                      perspective_half<true>(map.m, x, y + 2 * pair + 1));
    }
}

// --- indices --------------------------------------------------------------------------------------------------------

// Byte 0 of each dword in all of its bytes.
IMGOPT_INLINE __m512i spread_bytes(__m512i v) {
    return _mm512_shuffle_epi8(
        v, _mm512_broadcast_i32x4(_mm_set_epi8(12, 12, 12, 12, 8, 8, 8, 8, 4, 4, 4, 4, 0, 0, 0, 0)));
}

// The places of each pixel's taps in the patch: four bytes, or the lowest one for nearest.
template <int taps>
IMGOPT_INLINE __m512i indices_inside(const Points& at, int32_t x, int32_t y) {
    const __m512i first =
        _mm512_add_epi32(_mm512_add_epi32(_mm512_slli_epi32(at.y, 4), at.x), _mm512_set1_epi32(-(16 * y + x)));
    if constexpr (taps == 1) return first;
    return _mm512_add_epi8(spread_bytes(first), _mm512_set1_epi32(0x11011000));
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

// --- patches --------------------------------------------------------------------------------------------------------

// vpermi2b indices that take two rows of pixels apart: the columns of channel 2 p of either row, then of channel 2 p
// + 1.
template <int C>
struct PatchIndices {
    alignas(64) uint8_t index[2][64];

    constexpr PatchIndices() : index{} {
        for (int pair = 0; pair < 2; ++pair)
            for (int i = 0; i < 64; ++i) {
                const int c = 2 * pair + i / 32, row = i / 16 % 2, column = i % 16;
                index[pair][i] = static_cast<uint8_t>(column < kPatchColumns && c < C ? 64 * row + C * column + c : 63);
            }
    }
};

// Registers of four rows of 16 bytes each.
template <int C>
struct Patch {
    __m512i part[4][4];  // channel; C of them

    IMGOPT_INLINE void load_plane(const uint8_t* from, int64_t row, int c) {
        const auto at = [&](int y) { return _mm_maskz_loadu_epi8(0x7fff, from + y * row); };
        for (int i = 0; i < 4; ++i) {
            const __m256i low = _mm256_inserti128_si256(_mm256_castsi128_si256(at(4 * i)), at(4 * i + 1), 1);
            const __m256i high = _mm256_inserti128_si256(_mm256_castsi128_si256(at(4 * i + 2)), at(4 * i + 3), 1);
            part[c][i] = _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
        }
    }
    IMGOPT_INLINE void load_pixels(const uint8_t* from, int64_t row) {
        static constexpr PatchIndices<C> kIndices;
        constexpr __mmask64 pixels = (1ull << kPatchColumns * C) - 1;
        const auto at = [&](int y) { return _mm512_maskz_loadu_epi8(pixels, from + y * row); };
        for (int i = 0; i < 4; ++i) {
            const __m512i rows[4] = {at(4 * i), at(4 * i + 1), at(4 * i + 2), at(4 * i + 3)};
            for (int pair = 0; pair < 2; ++pair) {
                const __m512i index = _mm512_load_si512(kIndices.index[pair]);
                const __m512i a = _mm512_permutex2var_epi8(rows[0], index, rows[1]);
                const __m512i b = _mm512_permutex2var_epi8(rows[2], index, rows[3]);
                part[2 * pair][i] = _mm512_inserti64x4(a, _mm512_castsi512_si256(b), 1);
                if (2 * pair + 1 < C) part[2 * pair + 1][i] = _mm512_shuffle_i64x2(a, b, 0xee);
            }
        }
    }
    IMGOPT_INLINE void load(const Source<uint8_t>& source, int32_t x, int32_t y) {
        const uint8_t* from = source.data + y * source.row + x * source.column;
        if (C > 1 && source.channel == 1) return load_pixels(from, source.row);
        for (int c = 0; c < C; ++c) load_plane(from + c * source.channel, source.row, c);
    }
    IMGOPT_INLINE void surround(const uint8_t* fill) {
        for (int c = 0; c < C; ++c)
            part[c][3] = _mm512_mask_mov_epi8(part[c][3], kFillByte, _mm512_set1_epi8(static_cast<char>(fill[c])));
    }
    IMGOPT_INLINE __m512i look_up(int c, __m512i index) const {
        const __m512i low = _mm512_permutex2var_epi8(part[c][0], index, part[c][1]);
        const __m512i high = _mm512_permutex2var_epi8(part[c][2], index, part[c][3]);
        return _mm512_mask_mov_epi8(low, _mm512_movepi8_mask(index), high);
    }
};

// --- a block --------------------------------------------------------------------------------------------------------

// What the blocks of an image share.
template <int C, class T>
struct PatchJob {
    const AffineWarp& p;
    const Map& map;
    const Source<uint8_t>& source;
    const Epilogue<C> epilogue;  // a copy that no store can change
    const float step[2];
    const uint8_t* fill;
    const int64_t image;
};

// A block: its number of kBlock columns, its first pixel, the pixels from there on in the tile, the patch's first one.
struct Block {
    int index;
    int64_t x0, y0, columns, rows;
    int32_t x, y;
};

// The first pixel of the patch of points that have been mirrored into the image.
IMGOPT_INLINE int32_t patch_start(const __m512i (&at)[4], int32_t side, int32_t room) {
    const int32_t least =
        _mm512_reduce_min_epi32(_mm512_min_epi32(_mm512_min_epi32(at[0], at[1]), _mm512_min_epi32(at[2], at[3])));
    return least < side - room ? least : side - room;
}

template <int C, int taps, bool affine, bool border, class T>
IMGOPT_INLINE void locate_block(const PatchJob<C, T>& job, const RowPairs& rows, Block& block, __m512i* index,
                                SplitWeights* weights) {
    const Source<uint8_t>& source = job.source;
    const Padding padding = job.p.padding;
    Points at[4];
    for (int pair = 0; pair < 4; ++pair) {
        at[pair] = points_of<affine>(job.map, rows, job.step, pair, block.index, block.x0, block.y0);
        if constexpr (taps == 1) round_to_nearest(at[pair]);
    }
    if (border && padding >= Padding::reflect) {
        for (int pair = 0; pair < 4; ++pair) {
            fold_axis(at[pair].x, at[pair].fx, source.width, padding);
            fold_axis(at[pair].y, at[pair].fy, source.height, padding);
        }
        block.x = patch_start({at[0].x, at[1].x, at[2].x, at[3].x}, source.width, kPatchColumns);
        block.y = patch_start({at[0].y, at[1].y, at[2].y, at[3].y}, source.height, kPatchRows);
    }
    for (int pair = 0; pair < 4; ++pair)
        index[pair] = border ? indices_at_border<taps>(at[pair], source, padding, block.x, block.y)
                             : indices_inside<taps>(at[pair], block.x, block.y);
    if constexpr (taps == 2)
        for (int half = 0; half < 4; half += 2) {
            const __m512 fx[2] = {at[half].fx, at[half + 1].fx}, fy[2] = {at[half].fy, at[half + 1].fy};
            weigh_bilinear(fx, fy, weights + half);
        }
}

// The bytes of 64 dwords, row by row of the block.
IMGOPT_INLINE __m512i joined_bytes(const __m512i* v) {
    struct Order {
        alignas(64) uint8_t index[64];

        constexpr Order() : index{} {  // packing leaves four pixels of each pair side by side in each 128 bits
            for (int i = 0; i < 64; ++i) index[i] = static_cast<uint8_t>(i % 16 / 4 * 16 + i / 16 * 4 + i % 4);
        }
    };
    static constexpr Order kOrder;
    const __m512i words[2] = {_mm512_packus_epi32(v[0], v[1]), _mm512_packus_epi32(v[2], v[3])};
    return _mm512_permutexvar_epi8(_mm512_load_si512(kOrder.index), _mm512_packus_epi16(words[0], words[1]));
}

// Sixteen of 64 pixels, the channels in registers of their own, as dwords of a level each.
template <int pair>
IMGOPT_INLINE __m512 widened_levels(__m512i plane) {
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm512_extracti32x4_epi32(plane, pair)));
}

template <int C, bool colored, class T>
IMGOPT_INLINE void finish_pair(const PatchJob<C, T>& job, const Block& block, int pair, __m512* samples, T* to) {
    const int64_t row_step = job.p.output_stride[2];
    const Target target{job.p.output_stride[1], job.p.output_stride[3] == 1 && C > 1, 0, 0};
    const int count = static_cast<int>(block.columns < kSide ? block.columns : kSide);
    if constexpr (colored) apply_color(job.epilogue.color, job.epilogue.unit, samples);
    to += 2 * pair * row_step;
    const Places<T> places{{to, to + row_step}, {count, 2 * pair + 1 < block.rows ? count : 0}, block.columns};
    store<C, false>(places, target, job.epilogue, samples);
}

template <int C, int taps, bool affine, bool border, bool colored, class T>
IMGOPT_INLINE void warp_block(const PatchJob<C, T>& job, const RowPairs& rows, Block block, T* to) {
    __m512i index[4];
    SplitWeights weights[4];
    locate_block<C, taps, affine, border>(job, rows, block, index, weights);
    Patch<C> patch;
    patch.load(job.source, block.x, block.y);
    if constexpr (border) patch.surround(job.fill);
    if constexpr (taps == 1) {
        const __m512i places = joined_bytes(index);
        __m512i planes[C];
        for (int c = 0; c < C; ++c) planes[c] = patch.look_up(c, places);
        const auto finish = [&]<int pair>() __attribute__((always_inline)) {
            if (2 * pair >= block.rows) return;
            __m512 samples[C];
            for (int c = 0; c < C; ++c) samples[c] = widened_levels<pair>(planes[c]);
            finish_pair<C, colored>(job, block, pair, samples, to);
        };
        finish.template operator()<0>();
        finish.template operator()<1>();
        finish.template operator()<2>();
        finish.template operator()<3>();
    } else {
        for (int pair = 0; pair < 4; ++pair) {
            if (2 * pair >= block.rows) break;
            __m512 samples[C];
            for (int c = 0; c < C; ++c)
                samples[c] = _mm512_cvtepi32_ps(weighted(patch.look_up(c, index[pair]), weights[pair]));
            finish_pair<C, colored>(job, block, pair, samples, to);
        }
    }
}

// Blocks at the border, beyond it, or cut off by the end of the tile.
template <int C, int taps, bool affine, bool colored, class T>
[[gnu::noinline]] void warp_any_block(const PatchJob<C, T>& job, const RowPairs& rows, const Block& block,
                                      int64_t reach, T* to) {
    if (reach == kBeyond) {
        Ahead nothing{};
        const int64_t x1 = block.x0 + (block.columns < kSide ? block.columns : kSide);
        const int64_t y1 = block.y0 + (block.rows < kSide ? block.rows : kSide);
        warp_tile<uint8_t, float>(job.p, job.map, job.source, job.image, block.y0, y1, block.x0, x1, nothing);
    } else if (reach == kAllFill) {
        for (int pair = 0; 2 * pair < block.rows && pair < 4; ++pair) {
            __m512 samples[C];
            for (int c = 0; c < C; ++c) samples[c] = _mm512_set1_ps(job.epilogue.fill[c]);
            finish_pair<C, colored>(job, block, pair, samples, to);
        }
    } else {
        warp_block<C, taps, affine, true, colored>(job, rows, block, to);
    }
}

// --- tiles ----------------------------------------------------------------------------------------------------------

// Output that is written soon, as the order of blocks is one that no processor foresees: one row of a strip.
template <class T>
IMGOPT_INLINE void prefetch_row(const AffineWarp& p, const T* to, int planes, int64_t columns) {
    const int64_t bytes = columns * p.output_stride[3] * int64_t{sizeof(T)};
    for (int plane = 0; plane < planes; ++plane, to += p.output_stride[1]) {
        const int64_t in_line = static_cast<int64_t>(reinterpret_cast<uintptr_t>(to) % 64);
        for (int64_t i = -in_line; i < bytes; i += 64) __builtin_prefetch(reinterpret_cast<const char*>(to) + i, 1, 3);
    }
}

// kBlock columns at a time, downwards: the patches of a block and of the one below it overlap.
template <int C, int taps, bool affine, bool colored, class T>
void warp_blocks(const PatchJob<C, T>& job, int64_t y0, int64_t y1, int64_t x0, int64_t x1, Ahead& ahead) {
    const AffineWarp& p = job.p;
    const int64_t row_step = p.output_stride[2], step = p.output_stride[3];
    T* output = static_cast<T*>(p.output) + job.image * p.output_stride[0];
    for (int64_t x = x0; x < x1; x += kBlock) {
        const int64_t columns = x1 - x < kBlock ? x1 - x : kBlock;
        const int blocks = static_cast<int>((columns + kSide - 1) / kSide);
        for (int64_t y = y0; y < y1; y += kSide) {
            Patches patches;
            RowPairs rows;
            plan_patches<taps>(job.map, job.source, p.padding, x, y, patches);
            if constexpr (affine) rows.place(job.map, x, y);
            T* to = output + y * row_step + x * step;
            for (int i = 0; i < blocks; ++i, to += kSide * step) {
                for (int row = i; row < kSide && y + row < y1; row += blocks) {
                    ahead.row();
                    if (y + kSide + row < y1)
                        prefetch_row(p, output + (y + kSide + row) * row_step + x * step, step == 1 ? C : 1, columns);
                }
                const int64_t column = x + i * kSide;
                const Block block{i, column, y, x1 - column, y1 - y, patches.x[i], patches.y[i]};
                if (patches.reach[i] == kInside && block.columns >= kSide && block.rows >= kSide)
                    warp_block<C, taps, affine, false, colored>(job, rows, block, to);
                else
                    warp_any_block<C, taps, affine, colored>(job, rows, block, patches.reach[i], to);
            }
        }
    }
}

// A tile of an image, x0 a multiple of kBlock; false: it has to be warped otherwise.
template <int C, int taps, bool colored, class T>
bool warp_patches(const AffineWarp& p, const Map& map, const Source<uint8_t>& source, const Epilogue<C>& epilogue,
                  const uint8_t* fill, int64_t image, int64_t y0, int64_t y1, int64_t x0, int64_t x1, Ahead& ahead) {
    if (!patches_fit<taps>(map, source, y0, y1, x0, x1)) return false;
    const PatchJob<C, T> job{p,    map,  source, epilogue, {static_cast<float>(map.m[0]), static_cast<float>(map.m[3])},
                             fill, image};
    if (map.affine)
        warp_blocks<C, taps, true, colored>(job, y0, y1, x0, x1, ahead);
    else
        warp_blocks<C, taps, false, colored>(job, y0, y1, x0, x1, ahead);
    return true;
}

}  // namespace
}  // namespace imgopt::avx512

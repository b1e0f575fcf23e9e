// Nearest and bilinear uint8 warps from patches of the source in registers. Eight by eight output pixels reach at most
// 15 x 16 source pixels, as long as the image shrinks by less than 1.8: that patch of a channel fits four registers, in
// which vpermi2b looks up all taps of sixteen pixels in three instructions. So the source is read where it lies, row by
// row: no copy of it, no offsets in memory, no load per pixel. The last byte of a patch, beyond its pixels, is what
// taps outside the image look up.
#pragma once

#include "patch_points_avx512.h"
#include "stores_avx512.h"
#include "stream_avx512.h"

namespace imgopt::avx512 {
namespace {

constexpr __mmask64 kFillByte = 1ull << 63;  // of the last of a patch's registers

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

// Written so that the compiler sees no address that the two layouts have in common: it would form those of all rows
// ahead of the choice between them, and keep them in vector registers.
IMGOPT_INLINE const uint8_t* kept_pointer(const uint8_t* from) {
    __asm__("" : "+r"(from));
    return from;
}

// Registers of four rows of 16 bytes each: four of them, or three where no block reaches more than twelve rows, which
// saves a fourth of the loads and two instructions of five per look-up.
template <int C, int parts>
struct Patch {
    __m512i part[4][parts];  // channel; C of them

    IMGOPT_INLINE void load_plane(const uint8_t* from, int64_t row, int c) {
        const int64_t triple = 3 * row;
        for (int i = 0; i < parts; ++i, from += kPartRows * row) {
            from = kept_pointer(from);
            const auto at = [&](int64_t y) { return _mm_maskz_loadu_epi8(0x7fff, from + y); };
            const __m256i low = _mm256_inserti128_si256(_mm256_castsi128_si256(at(0)), at(row), 1);
            const __m256i high = _mm256_inserti128_si256(_mm256_castsi128_si256(at(2 * row)), at(triple), 1);
            part[c][i] = _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
        }
    }
    IMGOPT_INLINE void load_pixels(const uint8_t* from, int64_t row) {
        static constexpr PatchIndices<C> kIndices;
        constexpr __mmask64 pixels = (1ull << kPatchColumns * C) - 1;
        const int64_t triple = 3 * row;
        for (int i = 0; i < parts; ++i, from += kPartRows * row) {
            from = kept_pointer(from);
            const auto at = [&](int64_t y) { return _mm512_maskz_loadu_epi8(pixels, from + y); };
            const __m512i rows[4] = {at(0), at(row), at(2 * row), at(triple)};
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
            part[c][parts - 1] =
                _mm512_mask_mov_epi8(part[c][parts - 1], kFillByte, _mm512_set1_epi8(static_cast<char>(fill[c])));
    }
    IMGOPT_INLINE __m512i look_up(int c, __m512i index) const {
        const __m512i low = _mm512_permutex2var_epi8(part[c][0], index, part[c][1]);
        const __mmask64 beyond = _mm512_movepi8_mask(index);
        if constexpr (parts == 3) return _mm512_mask_permutexvar_epi8(low, beyond, index, part[c][2]);
        return _mm512_mask_mov_epi8(low, beyond, _mm512_permutex2var_epi8(part[c][2], index, part[c][parts - 1]));
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
    const uint8_t* fill;
    const int64_t image;
    const Layout layout;  // of what the blocks are written to
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

template <int C, int taps, int parts, bool affine, bool border, class T>
IMGOPT_INLINE void locate_block(const PatchJob<C, T>& job, const BlockRows<affine>& rows, Block& block, __m512i* index,
                                PairedWeights* weights) {
    __m512 fx[4], fy[4];
    if constexpr (border) {
        const Source<uint8_t>& source = job.source;
        const Padding padding = job.p.padding;
        Points at[4];
        for (int pair = 0; pair < 4; ++pair) {
            at[pair] = rows.points(pair, block.index);
            if constexpr (taps == 1) round_to_nearest(at[pair]);
        }
        if (padding >= Padding::reflect) {
            for (int pair = 0; pair < 4; ++pair) {
                fold_axis(at[pair].x, at[pair].fx, source.width, padding);
                fold_axis(at[pair].y, at[pair].fy, source.height, padding);
            }
            block.x = patch_start({at[0].x, at[1].x, at[2].x, at[3].x}, source.width, kPatchColumns);
            block.y = patch_start({at[0].y, at[1].y, at[2].y, at[3].y}, source.height, parts * kPartRows);
        }
        for (int pair = 0; pair < 4; ++pair) {
            index[pair] = indices_at_border<taps>(at[pair], source, padding, block.x, block.y);
            fx[pair] = at[pair].fx;
            fy[pair] = at[pair].fy;
        }
    } else {
        for (int pair = 0; pair < 4; ++pair) {
            const InsidePoints at = rows.template inside<taps>(pair, block.index);
            index[pair] = taps == 1 ? at.index : indices_inside<taps>(at.index, block.x, block.y);
            fx[pair] = at.fx;
            fy[pair] = at.fy;
        }
    }
    if constexpr (taps == 2)
        for (int half = 0; half < 4; half += 2) weigh_bilinear(fx + half, fy + half, weights + half);
}

// The lowest bytes of 64 dwords.
IMGOPT_INLINE __m512i lowest_bytes(const __m512i* v) {
    struct Order {
        alignas(64) uint8_t index[64];

        constexpr Order() : index{} {
            for (int i = 0; i < 64; ++i) index[i] = static_cast<uint8_t>(4 * i);
        }
    };
    static constexpr Order kOrder;
    const __m512i order = _mm512_load_si512(kOrder.index), low = _mm512_permutex2var_epi8(v[0], order, v[1]);
    return _mm512_inserti64x4(low, _mm512_castsi512_si256(_mm512_permutex2var_epi8(v[2], order, v[3])), 1);
}

// Sixteen of 64 pixels, the channels in registers of their own, as dwords of a level each.
template <int pair>
IMGOPT_INLINE __m512 widened_levels(__m512i plane) {
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm512_extracti32x4_epi32(plane, pair)));
}

// Columns that a block and what its stores write beyond it need.
template <int C, class T>
constexpr int64_t kWholeColumns = sizeof(T) == 1 && C == 3 ? 11 : kSide;

// Where two rows of a block go. `whole`: all of its pixels are in the tile, and what is written beyond them too.
template <bool whole, class T>
IMGOPT_INLINE Places<T> places_of(int64_t row_step, const Block& block, int pair, T* to) {
    to += 2 * pair * row_step;
    const int count = whole || block.columns >= kSide ? kSide : static_cast<int>(block.columns);
    return {
        {to, to + row_step}, {count, whole || 2 * pair + 1 < block.rows ? count : 0}, whole ? kBlock : block.columns};
}

template <int C, bool colored, bool whole, class T>
IMGOPT_INLINE void finish_pair(const PatchJob<C, T>& job, const Layout& layout, const Block& block, int pair,
                               __m512* samples, T* to) {
    const Target target{layout.channel, layout.planar, 0, 0};
    if constexpr (colored) apply_color(job.epilogue.color, samples);
    store<C, kValues<2, colored>>(places_of<whole>(layout.row, block, pair, to), target, job.epilogue, samples);
}

// vpermi2b indices that bring two rows of a block's pixels to either half of a register: channels 0 and 1, then what
// these have become and one more channel at a time.
template <int C>
struct RowIndices {
    alignas(64) uint8_t index[4][C][64];  // [pair][channel]; of 0 and 1 the latter

    constexpr RowIndices() : index{} {
        for (int pair = 0; pair < 4; ++pair)
            for (int channel = 0; channel < C; ++channel)
                for (int i = 0; i < 64; ++i) {
                    const int pixel = i % 32 / C, c = i % 32 % C;
                    const int from = (2 * pair + i / 32) * kSide + pixel % kSide;
                    const int kept = channel < 2 ? from : i;
                    index[pair][channel][i] = static_cast<uint8_t>(c == channel ? 64 + from : kept);
                }
    }
};

// Two rows of a block of levels, channel by channel, as they are.
template <int C, int pair>
IMGOPT_INLINE void put_levels(const Places<uint8_t>& at, const Target& target, const __m512i* planes) {
    static constexpr RowIndices<C> kIndices;
    if (C == 1 || target.planar) {
        for (int c = 0; c < C; ++c) {
            const __m128i levels = _mm512_extracti32x4_epi32(planes[c], pair);
            put_eight(at.to[0] + c * target.channel, levels, at.count[0]);
            put_eight(at.to[1] + c * target.channel, _mm_unpackhi_epi64(levels, levels), at.count[1]);
        }
        return;
    }
    __m512i pixels = planes[0];
    for (int c = 1; c < C; ++c)
        pixels = _mm512_permutex2var_epi8(pixels, _mm512_load_si512(kIndices.index[pair][c]), planes[c]);
    put_pixels<C>(at, pixels);
}

template <int C, int taps, int parts, bool affine, bool border, bool colored, class T>
IMGOPT_INLINE void warp_block(const PatchJob<C, T>& job, const BlockRows<affine>& rows, Block block, T* to) {
    const Layout layout = job.layout;  // a copy that no store can change
    __m512i index[4];
    PairedWeights weights[4];
    Patch<C, parts> patch;
    if constexpr (!border) patch.load(job.source, block.x, block.y);
    locate_block<C, taps, parts, affine, border>(job, rows, block, index, weights);
    if constexpr (border) patch.load(job.source, block.x, block.y);
    if constexpr (border) patch.surround(job.fill);
    __m512i planes[C];
    if constexpr (taps == 1) {
        __m512i places = lowest_bytes(index);
        if constexpr (!border) places = indices_inside<1>(places, block.x, block.y);
        for (int c = 0; c < C; ++c) planes[c] = patch.look_up(c, places);
    }
    const auto finish = [&]<int pair>() __attribute__((always_inline)) {
        if (border && 2 * pair >= block.rows) return;
        if constexpr (taps == 1 && sizeof(T) == 1 && !colored) {
            const Target target{layout.channel, layout.planar, 0, 0};
            return put_levels<C, pair>(places_of<!border>(layout.row, block, pair, to), target, planes);
        }
        __m512 samples[C];
        for (int c = 0; c < C; ++c)
            samples[c] = taps == 1 ? widened_levels<pair>(planes[c])
                                   : _mm512_cvtepi32_ps(weighted(patch.look_up(c, index[pair]), weights[pair]));
        finish_pair<C, colored, !border>(job, layout, block, pair, samples, to);
    };
    finish.template operator()<0>();
    finish.template operator()<1>();
    finish.template operator()<2>();
    finish.template operator()<3>();
}

// Blocks at the border, beyond it, or cut off by the end of the tile.
template <int C, int taps, int parts, bool affine, bool colored, class T>
[[gnu::noinline]] void warp_any_block(const PatchJob<C, T>& job, const BlockRows<affine>& rows, const Block& block,
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
            finish_pair<C, colored, false>(job, job.layout, block, pair, samples, to);
        }
    } else {
        warp_block<C, taps, parts, affine, true, colored>(job, rows, block, to);
    }
}

// --- tiles ----------------------------------------------------------------------------------------------------------

// Output that is written soon, as the order of blocks is one that no processor foresees: one row of a strip.
template <class T>
IMGOPT_INLINE void prefetch_row(const T* to, int planes, int64_t plane, int64_t bytes) {
    for (int i = 0; i < planes; ++i, to += plane) {
        const uintptr_t first = reinterpret_cast<uintptr_t>(to), end = first + static_cast<uintptr_t>(bytes);
        for (uintptr_t line = first / kLine * kLine; line < end; line += kLine)
            __builtin_prefetch(reinterpret_cast<const char*>(line), 1, 3);
    }
}

// What is asked for between two blocks: of a strip of `blocks` of them, a share of the next image, and of the `rows`
// rows of the result from `below` on. Not inlined: the loop over the blocks has no register to spare.
template <class T>
[[gnu::noinline]] void fetch_ahead(Ahead& ahead, int block, int blocks, const T* below, int64_t rows, int planes,
                                   const Layout& layout, int64_t bytes) {
    for (int row = block; row < kSide; row += blocks) {
        ahead.row();
        if (row < rows) prefetch_row(below + row * layout.row, planes, layout.channel, bytes);
    }
}

// kBlock columns at a time, downwards: the patches of a block and of the one below it overlap.
template <int C, int taps, int parts, bool affine, bool colored, class T>
void warp_blocks(const PatchJob<C, T>& job, bool streamed, int64_t y0, int64_t y1, int64_t x0, int64_t x1,
                 Ahead& ahead) {
    const AffineWarp& p = job.p;
    const Layout result(p);
    const Map map = job.map;  // copies that no store can change
    const Source<uint8_t> source = job.source;
    const Padding padding = p.padding;
    const int64_t row_step = result.row, step = p.output_stride[3];
    const int planes = step == 1 ? C : 1;
    Stage<C, kSide, T> stage;
    T* output = static_cast<T*>(p.output) + job.image * p.output_stride[0];
    for (int64_t x = x0; x < x1; x += kBlock) {
        const int64_t columns_left = x1 - x, columns = columns_left < kBlock ? columns_left : kBlock;
        const int64_t row_bytes = columns * step * int64_t{sizeof(T)};
        const int blocks = static_cast<int>((columns + kSide - 1) / kSide);
        for (int64_t y = y0; y < y1; y += kSide) {
            Patches patches;
            plan_patches<taps, parts>(map, source, padding, x, y, patches);
            const BlockRows<affine> rows(map, x, y);
            T* const place = output + y * row_step + x * step;
            T* to = streamed ? stage.data : place;
            const T* below = place + kSide * row_step;
            const int64_t rows_below = streamed ? 0 : y1 - y - kSide;
            for (int i = 0; i < blocks; ++i, to += kSide * step) {
                fetch_ahead(ahead, i, blocks, below, rows_below, planes, result, row_bytes);
                const int64_t reach = patches.reach[i], rest = columns_left - i * kSide;
                const Block block{i, x + i * kSide, y, rest, y1 - y, patches.x[i], patches.y[i]};
                if (reach == kInside && rest >= kWholeColumns<C, T> && y + kSide <= y1)
                    warp_block<C, taps, parts, affine, false, colored>(job, rows, block, to);
                else
                    warp_any_block<C, taps, parts, affine, colored>(job, rows, block, reach, to);
            }
            if (streamed) stage.stream(result, y1 - y < kSide ? y1 - y : kSide, row_bytes, place);
        }
    }
}

// A tile of an image, x0 a multiple of kBlock; false: it has to be warped otherwise.
template <int C, int taps, bool colored, class T>
bool warp_patches(const AffineWarp& p, const Map& map, const Source<uint8_t>& source, const Epilogue<C>& epilogue,
                  const uint8_t* fill, int64_t image, int64_t y0, int64_t y1, int64_t x0, int64_t x1, Ahead& ahead) {
    const bool small = C == 3 && map.affine && patches_fit<taps, 3>(map, source, y0, y1, x0, x1);
    if (!small && !patches_fit<taps, 4>(map, source, y0, y1, x0, x1)) return false;
    const Layout result(p);
    // Blocks of homographies may be warped pixel by pixel, which writes to the result itself.
    const bool streamed = map.affine && is_streamed<T>(p);
    const Layout layout = streamed ? Stage<C, kSide, T>::layout(result) : result;
    const PatchJob<C, T> job{p, map, source, epilogue, fill, image, layout};
    if (small)
        warp_blocks<C, taps, C == 3 ? 3 : 4, true, colored>(job, streamed, y0, y1, x0, x1, ahead);
    else if (map.affine)
        warp_blocks<C, taps, 4, true, colored>(job, streamed, y0, y1, x0, x1, ahead);
    else
        warp_blocks<C, taps, 4, false, colored>(job, false, y0, y1, x0, x1, ahead);
    if (streamed) _mm_sfence();  // before another thread is told of the result
    return true;
}

}  // namespace
}  // namespace imgopt::avx512

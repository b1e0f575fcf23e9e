// int8_conv2d on AVX-512 VNNI: vpdpbusd multiplies four uint8 by four int8 and adds them to an int32, exactly. Tiles of
// 6 pixels by 64 channels keep 24 accumulators and load 10 values for 24 products, which leaves the two multipliers of
// the core, not its load ports, as the limit; narrower panels use taller tiles.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // gcc 12 on its own _mm512_undefined_*, GCC bug 105593
#pragma GCC diagnostic ignored "-Wuninitialized"        // the same
#endif
#include <immintrin.h>

#include "epilogue_avx512.h"
#include "steps.h"

namespace imgopt::avx512 {
namespace {

// A plain residual is read in whole vectors.
template <int NV>
bool has_plain_epilogue(const Tile& t) {
    return is_plain(*t.conv, t.range) && (!t.conv->residual || t.channels == NV * 16);
}

// Rows whose epilogue is not worth a place in the loop of the tiles: rare ones, and those of sorted pixels, which lie
// apart and have hundreds of products to every sum. `sums` holds `rows` of NV * 16.
template <int NV>
[[gnu::noinline]] void store_apart(const Tile& t, int64_t m, const int32_t* sums, int64_t rows) {
    const bool plain = has_plain_epilogue<NV>(t);
    for (int64_t i = m; i < m + rows; ++i, sums += NV * 16) {
        const int64_t pixel = t.at ? t.at[i] : t.pixel + i;
        if (t.rare) {
            store_rare(t, pixel, sums, 1, NV * 16);
            continue;
        }
        __m512i row[1][NV];
        for (int j = 0; j < NV; ++j) row[0][j] = _mm512_load_si512(sums + 16 * j);
        if (t.conv->residual)
            plain ? store_tile(Rows<NV, true, true>(t), pixel, row) : store_tile(Rows<NV, true, false>(t), pixel, row);
        else
            plain ? store_tile(Rows<NV, false, true>(t), pixel, row)
                  : store_tile(Rows<NV, false, false>(t), pixel, row);
    }
}

// The rows of a tile wherever they lie.
template <int MR>
struct ScatteredRows {
    const uint8_t* row[MR];
    int64_t c = 0;

    ScatteredRows(const uint8_t* const* rows, int64_t offset) {
#pragma GCC unroll 16
        for (int i = 0; i < MR; ++i) row[i] = rows[i] + offset;
    }
    const uint8_t* at(int i) const { return row[i] + c; }
    void advance() { c += 4; }
};

// Rows that follow each other. A pointer serves three of them, as twice a stride is a way of addressing: twelve
// pointers, and what else a loop needs, are more than there are registers.
template <int MR>
struct ConsecutiveRows {
    const uint8_t* third[(MR + 2) / 3];
    const int64_t stride;

    ConsecutiveRows(const uint8_t* first, int64_t step) : stride(step) {
#pragma GCC unroll 4
        for (int i = 0; i < MR; i += 3) third[i / 3] = first + i * step;
    }
    const uint8_t* at(int i) const { return third[i / 3] + i % 3 * stride; }
    void advance() {
#pragma GCC unroll 4
        for (int i = 0; i < MR; i += 3) {
            third[i / 3] += 4;
            asm("" : "+r"(third[i / 3]));  // or gcc makes twelve pointers of them
        }
    }
};

// Adds the products of a dword of every row.
template <bool FLIPPED, int MR, int NV, class Row>
[[gnu::always_inline]] inline void sum_dword(const Row& row, const uint8_t* weight, __m512i flip,
                                             __m512i (&sums)[MR][NV]) {
    __m512i w[NV];
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) w[j] = _mm512_loadu_si512(weight + 64 * j);
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i) {
        int32_t four;
        memcpy(&four, row.at(i), 4);
        __m512i x = _mm512_set1_epi32(four);
        if constexpr (FLIPPED) x = _mm512_xor_si512(x, flip);
#pragma GCC unroll 4
        for (int j = 0; j < NV; ++j) sums[i][j] = _mm512_dpbusd_epi32(sums[i][j], x, w[j]);
    }
}

// Adds the products of `inner` bytes of every row. FLIPPED: bytes of int8; FETCH: with every dword, a part of the next
// weights is fetched.
template <bool FLIPPED, bool FETCH, int MR, int NV, class Row>
[[gnu::always_inline]] inline void sum_dwords(Row row, int64_t inner, const uint8_t* weight, __m512i flip,
                                              const uint8_t*& next, int64_t next_bytes, __m512i (&sums)[MR][NV]) {
    for (const uint8_t* end = weight + inner * 16 * NV; weight != end; weight += 64 * NV) {
        if constexpr (FETCH) {
            __builtin_prefetch(next, 0, 2);
            next += next_bytes;
        }
        sum_dword<FLIPPED>(row, weight, flip, sums);
        row.advance();
    }
}

// What the sums of a tile begin with.
template <int MR, int NV>
[[gnu::always_inline]] inline void start_sums(const int32_t* offsets, __m512i (&sums)[MR][NV]) {
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) {
        const __m512i offset = _mm512_loadu_si512(offsets + 16 * j);
#pragma GCC unroll 16
        for (int i = 0; i < MR; ++i) sums[i][j] = offset;
    }
}

// The sums of the MR pixels whose rows are found at `rows`; SORTED: of the taps of their class.
template <bool SORTED, bool FLIPPED, int MR, int NV>
[[gnu::always_inline]] inline void sum_tile(const Tile& t, const uint8_t* const* rows, const uint8_t*& next,
                                            __m512i (&sums)[MR][NV]) {
    start_sums(t.conv->offset + t.channel, sums);
    const __m512i flip = _mm512_set1_epi8(static_cast<char>(t.conv->input_flip));
    const int64_t tap_bytes = t.inner * 16 * NV;
    for (int64_t i = 0; i < t.taps; ++i) {
        const int64_t tap = SORTED ? t.tap[i] : i;
        const ScatteredRows<MR> row(rows + tap * t.row_stride, t.row_offset);
        const uint8_t* weight = t.weight + tap * tap_bytes;
        if (t.next_bytes)
            sum_dwords<FLIPPED, true>(row, t.inner, weight, flip, next, t.next_bytes, sums);
        else
            sum_dwords<FLIPPED, false>(row, t.inner, weight, flip, next, 0, sums);
    }
}

template <int MR, int NV>
[[gnu::always_inline]] inline void store_tile_apart(const Tile& t, int64_t m, const __m512i (&sums)[MR][NV]) {
    alignas(64) int32_t values[MR * NV * 16];
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
        for (int j = 0; j < NV; ++j) _mm512_store_si512(values + (i * NV + j) * 16, sums[i][j]);
    store_apart<NV>(t, m, values, MR);
}

// What the sums of consecutive rows need of a Tile, in registers: after every store of bytes it would be read again.
struct ConsecutiveTile {
    const int32_t* offset;
    const uint8_t *first, *ends, *weight;
    int64_t stride, taps, tap_stride, inner, end_dwords, end_pitch, next_bytes;
    __m512i flip;

    explicit ConsecutiveTile(const Tile& t)
        : offset(t.conv->offset + t.channel),
          first(t.first),
          ends(t.ends),
          weight(t.weight),
          stride(t.first_stride),
          taps(t.taps),
          tap_stride(t.tap_stride),
          inner(t.inner),
          end_dwords(t.end_dwords),
          end_pitch(t.end_pitch),
          next_bytes(t.next_bytes),
          flip(_mm512_set1_epi8(static_cast<char>(t.conv->input_flip))) {}
};

// The sums of the MR pixels from `m` on.
template <bool FLIPPED, int MR, int NV>
[[gnu::always_inline]] inline void sum_consecutive(const ConsecutiveTile& t, int64_t m, const uint8_t*& next,
                                                   __m512i (&sums)[MR][NV]) {
    start_sums(t.offset, sums);
    const uint8_t *first = t.first + m * t.stride, *weight = t.weight;
    for (int64_t tap = 0; tap < t.taps; ++tap, first += t.tap_stride, weight += t.inner * 16 * NV) {
        const ConsecutiveRows<MR> row(first, t.stride);
        if (t.next_bytes)
            sum_dwords<FLIPPED, true>(row, t.inner, weight, t.flip, next, t.next_bytes, sums);
        else
            sum_dwords<FLIPPED, false>(row, t.inner, weight, t.flip, next, 0, sums);
    }
    const uint8_t* ends = t.ends + 4 * m;
    for (int64_t i = 0; i < t.end_dwords; ++i, ends += t.end_pitch, weight += 64 * NV)
        sum_dword<FLIPPED>(ConsecutiveRows<MR>(ends, 4), weight, t.flip, sums);
}

template <int MR, int NV>
[[gnu::noinline]] void apart_tiles(const Tile& t) {
    const uint8_t* next = t.next;
    for (int64_t m = 0; m < t.pixels; m += MR) {
        __m512i sums[MR][NV];
        if (t.first)
            sum_consecutive<true>(ConsecutiveTile(t), m, next, sums);
        else if (t.tap)
            sum_tile<true, true>(t, t.rows + m, next, sums);
        else
            sum_tile<false, true>(t, t.rows + m, next, sums);
        store_tile_apart<MR, NV>(t, m, sums);
    }
}

// A function for every epilogue: what the others need takes no registers then. PLAIN: uint8 comes in and goes out.
template <int MR, int NV, bool RESIDUAL, bool PLAIN>
[[gnu::noinline]] void byte_tiles(const Tile& t) {
    const Rows<NV, RESIDUAL, PLAIN> to(t);
    const uint8_t* next = t.next;
    for (int64_t m = 0; m < t.pixels; m += MR) {
        __m512i sums[MR][NV];
        to.template fetch<MR>(t.pixel + m);
        sum_tile<false, !PLAIN>(t, t.rows + m, next, sums);
        store_tile(reloaded(to), t.pixel + m, sums);
    }
}

// The same where the rows follow each other. With 32 channels a tile takes 75 cycles, 120 if its rows are found through
// a table.
template <int MR, int NV, bool RESIDUAL, bool PLAIN>
[[gnu::noinline]] void consecutive_tiles(const Tile& t) {
    const Rows<NV, RESIDUAL, PLAIN> to(t);
    const ConsecutiveTile from(t);
    const uint8_t *next = t.next, *ahead = t.ahead;
    const int64_t ahead_bytes = MR * t.ahead_bytes, pixel = t.pixel, pixels = t.pixels;
    for (int64_t m = 0; m < pixels; m += MR, ahead += ahead_bytes) {
        __m512i sums[MR][NV];
        prefetch(ahead, ahead_bytes);
        to.template fetch<MR>(pixel + m);
        sum_consecutive<!PLAIN>(from, m, next, sums);
        store_tile(to, pixel + m, sums);
    }
}

template <int MR, int NV, bool RESIDUAL, bool PLAIN>
void run(const Tile& t) {
    t.first ? consecutive_tiles<MR, NV, RESIDUAL, PLAIN>(t) : byte_tiles<MR, NV, RESIDUAL, PLAIN>(t);
}

template <int MR, int NV>
void tiles(const Tile& t) {
    const bool plain = has_plain_epilogue<NV>(t) && t.conv->input_flip == 0;
    if (t.at || t.rare) return apart_tiles<MR, NV>(t);
    if (t.conv->residual) return plain ? run<MR, NV, true, true>(t) : run<MR, NV, true, false>(t);
    plain ? run<MR, NV, false, true>(t) : run<MR, NV, false, false>(t);
}

}  // namespace
}  // namespace imgopt::avx512

#include "depthwise_avx512.h"

namespace imgopt::avx512 {
namespace {

// Pixels that are further apart do not lie in a vector by eights.
constexpr int64_t kMostStep = 63 / 7;

// The last bytes of four kernel rows of a first layer, for 16 pixels at a time, of which a vector that is loaded holds
// eight.
void collect_dwords(const uint8_t* row, int64_t pitch, int64_t step, int64_t pixels, uint8_t* out) {
    alignas(64) uint8_t places[64];
    for (int64_t i = 0; i < 64; ++i) places[i] = static_cast<uint8_t>(i / 4 % 8 * step + i / 32 * 64);
    const __m512i place = _mm512_load_si512(places);
    for (int64_t x = 0; x < pixels; x += 16) {
        __m512i dwords = _mm512_setzero_si512();
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
            const uint8_t* at = row + i * pitch + x * step;
            const __m512i low = _mm512_loadu_si512(at), high = _mm512_loadu_si512(at + 8 * step);
            const __m512i found = _mm512_maskz_permutex2var_epi8(0x1111111111111111u << i, low, place, high);
            dwords = _mm512_or_si512(dwords, found);
        }
        _mm512_store_si512(out + 4 * x, dwords);
    }
}

void collect_ends(const CopiedRows& from, int64_t pixels) {
    for (int64_t d = 0; d < from.end_dwords; ++d) {
        const uint8_t* row = from.rows + from.end + 4 * d * from.pitch;
        uint8_t* out = from.ends + d * from.end_pitch;
        if (from.step <= kMostStep)
            collect_dwords(row, from.pitch, from.step, pixels, out);
        else
            for (int64_t x = 0; x < pixels; ++x, row += from.step, out += 4) {
                const uint8_t dword[] = {row[0], row[from.pitch], row[2 * from.pitch], row[3 * from.pitch]};
                memcpy(out, dword, 4);
            }
    }
}

struct Vnni {
    using Product = int8_t;
    static constexpr int64_t kLanes = 16, kMaxVectors = 4;
    static constexpr int64_t kBlockPixels = 96;  // 9 taps of 96 pointers are 7 KB
    static constexpr int64_t kConsecutiveRows = 24;
    static constexpr int64_t kSortedPixels = 98;  // divides 14 x 14 and the larger maps of networks for 224 x 224
    static void collect_ends(const CopiedRows& from, int64_t pixels) { avx512::collect_ends(from, pixels); }
    static int64_t rows(int64_t vectors) { return vectors == 4 ? 6 : vectors == 3 ? 8 : 12; }
    static TileFunction tiles(int64_t rows, int64_t vectors) {
        static constexpr TileFunction one[] = {avx512::tiles<1, 1>,  avx512::tiles<2, 1>,  avx512::tiles<3, 1>,
                                               avx512::tiles<4, 1>,  avx512::tiles<5, 1>,  avx512::tiles<6, 1>,
                                               avx512::tiles<7, 1>,  avx512::tiles<8, 1>,  avx512::tiles<9, 1>,
                                               avx512::tiles<10, 1>, avx512::tiles<11, 1>, avx512::tiles<12, 1>};
        static constexpr TileFunction two[] = {avx512::tiles<1, 2>,  avx512::tiles<2, 2>,  avx512::tiles<3, 2>,
                                               avx512::tiles<4, 2>,  avx512::tiles<5, 2>,  avx512::tiles<6, 2>,
                                               avx512::tiles<7, 2>,  avx512::tiles<8, 2>,  avx512::tiles<9, 2>,
                                               avx512::tiles<10, 2>, avx512::tiles<11, 2>, avx512::tiles<12, 2>};
        static constexpr TileFunction three[] = {avx512::tiles<1, 3>, avx512::tiles<2, 3>, avx512::tiles<3, 3>,
                                                 avx512::tiles<4, 3>, avx512::tiles<5, 3>, avx512::tiles<6, 3>,
                                                 avx512::tiles<7, 3>, avx512::tiles<8, 3>};
        static constexpr TileFunction four[] = {avx512::tiles<1, 4>, avx512::tiles<2, 4>, avx512::tiles<3, 4>,
                                                avx512::tiles<4, 4>, avx512::tiles<5, 4>, avx512::tiles<6, 4>};
        const TileFunction* table = vectors == 1 ? one : vectors == 2 ? two : vectors == 3 ? three : four;
        return table[rows - 1];
    }
};

int64_t weight_bytes(const Int8Weight& w) {
    return is_depthwise(w) ? depthwise_weight_bytes(w) : igemm_weight_bytes<Vnni>(w);
}

void weight_pack(const Int8Weight& w, const int8_t* weight, uint8_t* packed) {
    is_depthwise(w) ? depthwise_weight_pack(w, weight, packed) : igemm_weight_pack<Vnni>(w, weight, packed);
}

int64_t units(const Int8Conv2d& p) { return is_depthwise(p.weight) ? depthwise_units(p) : igemm_units<Vnni>(p); }

void kernel(const Int8Conv2d& p, int64_t begin, int64_t end) {
    is_depthwise(p.weight) ? depthwise(p, begin, end) : igemm<Vnni>(p, begin, end);
}

}  // namespace

void int8_conv2d(KernelTable& table) {
    table.int8_weight_layout = "avx512";
    table.int8_weight_bytes = weight_bytes;
    table.int8_weight_pack = weight_pack;
    table.int8_conv2d_units = units;
    table.int8_conv2d = kernel;
    fill_steps(table);
}

}  // namespace imgopt::avx512

// int8_conv2d on AVX-512 VNNI: vpdpbusd multiplies four uint8 by four int8 and adds them to an int32, exactly. Tiles of
// 6 pixels by 64 channels keep 24 accumulators and load 10 values for 24 products, which leaves the two multipliers of
// the core, not its load ports, as the limit; narrower panels use taller tiles.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // gcc 12 on its own _mm512_undefined_*, GCC bug 105593
#pragma GCC diagnostic ignored "-Wuninitialized"        // the same
#endif
#include <immintrin.h>

#include "igemm.h"
#include "shift_avx512.h"
#include "steps.h"

namespace imgopt::avx512 {
namespace {

// What the epilogue of bytes needs, broadcast once. PLAIN: uint8 with zero point 0, of the residual too, and no
// narrower clamp, what follows a ReLU; half of the instructions behind the rounding do nothing then.
template <bool PLAIN>
struct ByteEpilogue {
    __m512i zero_point, low, high, flip;

    ByteEpilogue(const Int8Conv2d& p, ByteRange range)
        : zero_point(_mm512_set1_epi16(p.output_zero_point)),
          low(_mm512_set1_epi8(static_cast<char>(range.low))),
          high(_mm512_set1_epi8(static_cast<char>(range.high))),
          flip(_mm512_set1_epi8(static_cast<char>(p.output_flip))) {}

    // Two vectors of rounded values, saturated to words within 128-bit lanes, with the zero point.
    __m512i words(__m512i q0, __m512i q1) const {
        const __m512i words = _mm512_packs_epi32(q0, q1);
        return PLAIN ? words : _mm512_adds_epi16(words, zero_point);
    }

    // Dword 4L + j of the result holds channels 4L.. of vector j.
    __m512i bytes(__m512i q01, __m512i q23) const {
        const __m512i bytes = _mm512_packus_epi16(q01, q23);
        return PLAIN ? bytes : _mm512_xor_si512(_mm512_min_epu8(_mm512_max_epu8(bytes, low), high), flip);
    }
};

bool is_plain(const Int8Conv2d& p, ByteRange range) {
    const bool residual = !p.residual || (p.residual_zero_point == 0 && p.residual_flip == 0);
    return residual && p.output_zero_point == 0 && p.output_flip == 0 && range.low == 0 && range.high == 255;
}

// float(r - zero point) * multiplier of 16 channels; PLAIN: uint8 with zero point 0.
template <bool PLAIN>
struct ResidualTerm {
    __m128i flip;
    __m512i zero_point;
    __m512 multiplier;

    explicit ResidualTerm(const Int8Conv2d& p)
        : flip(_mm_set1_epi8(static_cast<char>(p.residual_flip))),
          zero_point(_mm512_set1_epi32(p.residual_zero_point)),
          multiplier(_mm512_set1_ps(p.residual_multiplier)) {}

    __m512 operator()(const uint8_t* residual, __mmask16 mask) const {
        const __m128i bytes = _mm_maskz_loadu_epi8(mask, residual);
        const __m512i r = _mm512_cvtepu8_epi32(PLAIN ? bytes : _mm_xor_si128(bytes, flip));
        return _mm512_mul_ps(_mm512_cvtepi32_ps(PLAIN ? r : _mm512_sub_epi32(r, zero_point)), multiplier);
    }
};

// Masked stores of bytes are slow, and the common remainders of a vector are halves of it.
inline void store_16(uint8_t* out, __m128i bytes, int64_t channels) {
    if (channels >= 16)
        _mm_storeu_si128(reinterpret_cast<__m128i*>(out), bytes);
    else if (channels == 8)
        _mm_storel_epi64(reinterpret_cast<__m128i*>(out), bytes);
    else
        _mm_mask_storeu_epi8(out, static_cast<__mmask16>((1u << channels) - 1), bytes);
}

// Float output, and multipliers that is_bounded refuses, a sum at a time; shifts in vectors.
[[gnu::noinline]] void store_rare(const Tile& t, int64_t pixel, const int32_t* sums, int64_t rows, int64_t width) {
    const Int8Conv2d& p = *t.conv;
    if (!p.shift || p.float_output) {
        for (int64_t i = 0; i < rows; ++i)
            for (int64_t c = 0; c < t.channels; ++c) store_sum(p, pixel + i, t.channel + c, sums[i * width + c]);
        return;
    }
    const ShiftEpilogue to_bytes(p);
    for (int64_t i = 0; i < rows; ++i)
        for (int64_t c = 0; c < t.channels; c += 16) {
            const int64_t left = t.channels - c, at = t.channel + c;
            const __mmask16 mask = static_cast<__mmask16>(left < 16 ? (1 << left) - 1 : -1);
            const __m128i bytes = to_bytes(pixel + i, at, _mm512_load_si512(sums + i * width + c), mask);
            store_16(static_cast<uint8_t*>(p.output) + (pixel + i) * p.output_stride + at, bytes, left);
        }
}

inline void store_32(uint8_t* out, __m256i bytes, int64_t channels) {
    if (channels >= 32) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), bytes);
    } else {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm256_castsi256_si128(bytes));
        store_16(out + 16, _mm256_extracti128_si256(bytes, 1), channels - 16);
    }
}

// A vector of bytes holds one row of the tile, two rows of at most 32 channels, or four of at most 16.
template <int NV, int ROWS>
[[gnu::always_inline]] inline void store_rows(uint8_t* out, int64_t stride, __m512i bytes, int64_t channels) {
    if constexpr (NV >= 3) {
        if (NV == 4 && channels == 64) {
            _mm512_storeu_si512(out, bytes);
        } else {
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm512_castsi512_si256(bytes));
            if (NV == 4 && channels > 48)
                store_32(out + 32, _mm512_extracti64x4_epi64(bytes, 1), channels - 32);
            else
                store_16(out + 32, _mm512_extracti32x4_epi32(bytes, 2), channels - 32);
        }
    } else if constexpr (NV == 2) {
        store_32(out, _mm512_castsi512_si256(bytes), channels);
        if constexpr (ROWS > 1) store_32(out + stride, _mm512_extracti64x4_epi64(bytes, 1), channels);
    } else {
        store_16(out, _mm512_castsi512_si128(bytes), channels);
        if constexpr (ROWS > 1) store_16(out + stride, _mm512_extracti32x4_epi32(bytes, 1), channels);
        if constexpr (ROWS > 2) store_16(out + 2 * stride, _mm512_extracti32x4_epi32(bytes, 2), channels);
        if constexpr (ROWS > 3) store_16(out + 3 * stride, _mm512_extracti32x4_epi32(bytes, 3), channels);
    }
}

// What the epilogue of a tile needs beside its sums. Read once per run of tiles: stores of bytes may change anything,
// for all that a compiler knows, and reading it again for every vector was half of the instructions of a layer's
// residual.
template <int NV, bool RESIDUAL, bool PLAIN>
struct Rows {
    ByteEpilogue<PLAIN> to_bytes;
    ResidualTerm<PLAIN> term;
    const float* multiplier;
    uint8_t* out;
    const uint8_t* residual;
    int64_t out_stride, residual_stride, channels;
    __mmask16 mask[NV];

    explicit Rows(const Tile& t)
        : to_bytes(*t.conv, t.range),
          term(*t.conv),
          multiplier(t.conv->multiplier + t.channel),
          out(static_cast<uint8_t*>(t.conv->output) + t.channel),
          residual(t.conv->residual + t.channel),
          out_stride(t.conv->output_stride),
          residual_stride(t.conv->residual_stride),
          channels(t.channels) {
        for (int j = 0; j < NV; ++j) {
            const int64_t left = channels - 16 * j;
            mask[j] = static_cast<__mmask16>(left < 16 ? (1 << left) - 1 : -1);
        }
    }
};

// The epilogue of rows FIRST.. of a tile at output pixel `pixel`, in registers.
template <int FIRST, int MR, int NV, bool RESIDUAL, bool PLAIN>
[[gnu::always_inline]] inline void store_tile(const Rows<NV, RESIDUAL, PLAIN>& to, int64_t pixel,
                                              const __m512i (&sums)[MR][NV]) {
    constexpr int kRows = NV >= 3 ? 1 : 4 / NV, rows = FIRST + kRows <= MR ? kRows : MR - FIRST;
    __m512i q[4] = {};
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
        for (int j = 0; j < NV; ++j) {
            const __m512 multiplier = _mm512_loadu_ps(to.multiplier + 16 * j);
            __m512 y = _mm512_mul_ps(_mm512_cvtepi32_ps(sums[FIRST + r][j]), multiplier);
            if constexpr (RESIDUAL)
                y = _mm512_add_ps(y,
                                  to.term(to.residual + (pixel + FIRST + r) * to.residual_stride + 16 * j, to.mask[j]));
            q[NV >= 3 ? j : r * NV + j] = _mm512_cvtps_epi32(y);
        }
    }
    // Dword 4L + j to 4j + L.
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const __m512i bytes = to.to_bytes.bytes(to.to_bytes.words(q[0], q[1]), to.to_bytes.words(q[2], q[3]));
    store_rows<NV, rows>(to.out + (pixel + FIRST) * to.out_stride, to.out_stride,
                         _mm512_permutexvar_epi32(order, bytes), to.channels);
    if constexpr (FIRST + rows < MR) store_tile<FIRST + rows>(to, pixel, sums);
}

// Rows whose epilogue is not worth a place in the loop of the tiles: rare ones, and those of sorted pixels, which lie
// apart and have hundreds of products to every sum. `sums` holds `rows` of NV * 16.
template <int NV>
[[gnu::noinline]] void store_apart(const Tile& t, int64_t m, const int32_t* sums, int64_t rows) {
    const bool plain = is_plain(*t.conv, t.range);
    for (int64_t i = m; i < m + rows; ++i, sums += NV * 16) {
        const int64_t pixel = t.at ? t.at[i] : t.pixel + i;
        if (t.rare) {
            store_rare(t, pixel, sums, 1, NV * 16);
            continue;
        }
        __m512i row[1][NV];
        for (int j = 0; j < NV; ++j) row[0][j] = _mm512_load_si512(sums + 16 * j);
        if (t.conv->residual)
            plain ? store_tile<0>(Rows<NV, true, true>(t), pixel, row)
                  : store_tile<0>(Rows<NV, true, false>(t), pixel, row);
        else
            plain ? store_tile<0>(Rows<NV, false, true>(t), pixel, row)
                  : store_tile<0>(Rows<NV, false, false>(t), pixel, row);
    }
}

// Adds the products of one tap, or of one kernel row.
template <int MR, int NV>
[[gnu::always_inline]] inline void sum_tap(const Tile& t, const uint8_t* const* rows, const uint8_t* weight,
                                           __m512i flip, const uint8_t*& next, __m512i (&sums)[MR][NV]) {
    const uint8_t* row[MR];
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i) row[i] = rows[i] + t.row_offset;
    for (int64_t c = 0; c < t.inner; c += 4, weight += 64 * NV, next += t.next_bytes) {
        __builtin_prefetch(next, 0, 2);
        __m512i w[NV];
#pragma GCC unroll 4
        for (int j = 0; j < NV; ++j) w[j] = _mm512_loadu_si512(weight + 64 * j);
#pragma GCC unroll 16
        for (int i = 0; i < MR; ++i) {
            int32_t four;
            memcpy(&four, row[i] + c, 4);
            const __m512i x = _mm512_xor_si512(_mm512_set1_epi32(four), flip);
#pragma GCC unroll 4
            for (int j = 0; j < NV; ++j) sums[i][j] = _mm512_dpbusd_epi32(sums[i][j], x, w[j]);
        }
    }
}

// The sums of the MR pixels whose rows are found at `rows`; SORTED: of the taps of their class.
template <bool SORTED, int MR, int NV>
[[gnu::always_inline]] inline void sum_tile(const Tile& t, const uint8_t* const* rows, const uint8_t*& next,
                                            __m512i (&sums)[MR][NV]) {
    const int32_t* offsets = t.conv->offset + t.channel;
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) {
        const __m512i offset = _mm512_loadu_si512(offsets + 16 * j);
#pragma GCC unroll 16
        for (int i = 0; i < MR; ++i) sums[i][j] = offset;
    }
    const __m512i flip = _mm512_set1_epi8(static_cast<char>(t.conv->input_flip));
    const uint8_t* weight = t.weight;
    const int64_t tap_bytes = t.inner * 16 * NV;
    if constexpr (SORTED) {
        for (int64_t i = 0; i < t.taps; ++i)
            sum_tap<MR, NV>(t, rows + t.tap[i] * t.row_stride, weight + t.tap[i] * tap_bytes, flip, next, sums);
    } else {
        for (int64_t i = 0; i < t.taps; ++i, rows += t.row_stride, weight += tap_bytes)
            sum_tap<MR, NV>(t, rows, weight, flip, next, sums);
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

template <bool SORTED, int MR, int NV>
[[gnu::always_inline]] inline void sum_and_store_apart(const Tile& t) {
    const uint8_t* next = t.next;
    for (int64_t m = 0; m < t.pixels; m += MR) {
        __m512i sums[MR][NV];
        sum_tile<SORTED, MR, NV>(t, t.rows + m, next, sums);
        store_tile_apart<MR, NV>(t, m, sums);
    }
}

template <int MR, int NV>
[[gnu::noinline]] void apart_tiles(const Tile& t) {
    t.tap ? sum_and_store_apart<true, MR, NV>(t) : sum_and_store_apart<false, MR, NV>(t);
}

// A function for every epilogue: what the others need takes no registers then.
template <int MR, int NV, bool RESIDUAL, bool PLAIN>
[[gnu::noinline]] void byte_tiles(const Tile& t) {
    const Rows<NV, RESIDUAL, PLAIN> to(t);
    const uint8_t* next = t.next;
    for (int64_t m = 0; m < t.pixels; m += MR) {
        __m512i sums[MR][NV];
        prefetch(t.ahead + m * t.ahead_bytes, MR * t.ahead_bytes);
        sum_tile<false, MR, NV>(t, t.rows + m, next, sums);
        store_tile<0>(to, t.pixel + m, sums);
    }
}

template <int MR, int NV>
void tiles(const Tile& t) {
    const bool plain = is_plain(*t.conv, t.range);
    if (t.at || t.rare) return apart_tiles<MR, NV>(t);
    if (t.conv->residual) return plain ? byte_tiles<MR, NV, true, true>(t) : byte_tiles<MR, NV, true, false>(t);
    plain ? byte_tiles<MR, NV, false, true>(t) : byte_tiles<MR, NV, false, false>(t);
}

}  // namespace
}  // namespace imgopt::avx512

#include "depthwise_avx512.h"

namespace imgopt::avx512 {
namespace {

struct Vnni {
    using Product = int8_t;
    static constexpr int64_t kLanes = 16, kMaxVectors = 4;
    static constexpr int64_t kBlockPixels = 96;   // 9 taps of 96 pointers are 7 KB
    static constexpr int64_t kSortedPixels = 98;  // divides 14 x 14 and the larger maps of networks for 224 x 224
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

// int8_conv2d on AVX-512 VNNI: vpdpbusd multiplies four uint8 by four int8 and adds them to an int32, exactly. Tiles of
// 6 pixels by 64 channels keep 24 accumulators and load 10 values for 24 products, which leaves the two multipliers of
// the core, not its load ports, as the limit; narrower panels use taller tiles.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // gcc 12 on its own _mm512_undefined_*, GCC bug 105593
#endif
#include <immintrin.h>

#include "igemm.h"
#include "steps.h"

namespace imgopt::avx512 {
namespace {

// What the epilogue of bytes needs, broadcast once per tile.
struct ByteEpilogue {
    __m512i zero_point, low, high, flip;

    ByteEpilogue(const Int8Conv2d& p, ByteRange range)
        : zero_point(_mm512_set1_epi16(p.output_zero_point)),
          low(_mm512_set1_epi8(static_cast<char>(range.low))),
          high(_mm512_set1_epi8(static_cast<char>(range.high))),
          flip(_mm512_set1_epi8(static_cast<char>(p.output_flip))) {}

    // Saturates 64 rounded values to bytes. Packing works within 128-bit lanes, so dword 4L + j of the result holds
    // channels 4L.. of vector j.
    __m512i operator()(__m512i q0, __m512i q1, __m512i q2, __m512i q3) const {
        const __m512i q01 = _mm512_adds_epi16(_mm512_packs_epi32(q0, q1), zero_point);
        const __m512i q23 = _mm512_adds_epi16(_mm512_packs_epi32(q2, q3), zero_point);
        const __m512i bytes = _mm512_packus_epi16(q01, q23);
        return _mm512_xor_si512(_mm512_min_epu8(_mm512_max_epu8(bytes, low), high), flip);
    }
};

// y rounded to an integer. The minimum keeps the conversion from turning a huge y into INT_MIN; a very negative one
// becomes INT_MIN as it should.
__m512i round_to_int(__m512 y) { return _mm512_cvtps_epi32(_mm512_min_ps(y, _mm512_set1_ps(1073741824.0f))); }

__m512 add_residual(__m512 y, const Int8Conv2d& p, const uint8_t* residual, __mmask16 mask) {
    const __m128i bytes = _mm_xor_si128(_mm_maskz_loadu_epi8(mask, residual), _mm_set1_epi8(p.residual_flip));
    const __m512i r = _mm512_sub_epi32(_mm512_cvtepu8_epi32(bytes), _mm512_set1_epi32(p.residual_zero_point));
    return _mm512_add_ps(y, _mm512_mul_ps(_mm512_cvtepi32_ps(r), _mm512_set1_ps(p.residual_multiplier)));
}

__mmask16 mask_of(int64_t channels) {
    return channels >= 16 ? 0xffff : static_cast<__mmask16>((1u << (channels > 0 ? channels : 0)) - 1);
}

// Stores one row of sums the slow way: shifts, or the channels' tail of float output.
template <int NV>
[[gnu::noinline]] void store_sums(const Tile& t, int64_t pixel, const __m512i* sums) {
    alignas(64) int32_t values[NV * 16];
    for (int j = 0; j < NV; ++j) _mm512_store_si512(values + 16 * j, sums[j]);
    for (int64_t c = 0; c < t.channels; ++c) store_sum(*t.conv, pixel, t.channel + c, values[c]);
}

template <int NV>
void store_floats(const Tile& t, int64_t pixel, const __m512* y) {
    const Int8Conv2d& p = *t.conv;
    float* out = static_cast<float*>(p.output) + pixel * p.output_stride + t.channel;
    for (int j = 0; j < NV; ++j) {
        const __m512 clamped = _mm512_min_ps(_mm512_max_ps(y[j], _mm512_set1_ps(p.low)), _mm512_set1_ps(p.high));
        _mm512_mask_storeu_ps(out + 16 * j, mask_of(t.channels - 16 * j), clamped);
    }
}

template <int NV>
void store_bytes(uint8_t* out, __m512i bytes, int64_t channels) {
    // Dword 4L + j to 4j + L.
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    bytes = _mm512_permutexvar_epi32(order, bytes);
    if (channels < NV * 16)
        _mm512_mask_storeu_epi8(out, (uint64_t{1} << channels) - 1, bytes);
    else if constexpr (NV == 4)
        _mm512_storeu_si512(out, bytes);
    else {
        if constexpr (NV >= 2) _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm512_castsi512_si256(bytes));
        if constexpr (NV == 1) _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm512_castsi512_si128(bytes));
        if constexpr (NV == 3)
            _mm_storeu_si128(reinterpret_cast<__m128i*>(out + 32), _mm512_extracti32x4_epi32(bytes, 2));
    }
}

template <int MR, int NV>
void tile(const Tile& t) {
    const Int8Conv2d& p = *t.conv;
    __m512i sums[MR][NV];
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) {
        const __m512i offset = _mm512_loadu_si512(p.offset + t.channel + 16 * j);
#pragma GCC unroll 16
        for (int i = 0; i < MR; ++i) sums[i][j] = offset;
    }
    const __m512i flip = _mm512_set1_epi8(static_cast<char>(p.input_flip));
    const uint8_t* weight = t.weight;
    for (int64_t tap = 0; tap < t.taps; ++tap) {
        const uint8_t* row[MR];
#pragma GCC unroll 16
        for (int i = 0; i < MR; ++i) row[i] = t.rows[tap * t.row_stride + i] + t.row_offset;
        for (int64_t c = 0; c < t.inner; c += 4, weight += 64 * NV) {
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

    const ByteEpilogue to_bytes(p, t.range);
    __m512 multiplier[NV];
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) multiplier[j] = _mm512_loadu_ps(p.multiplier + t.channel + 16 * j);
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i) {
        if (p.shift && !p.float_output) {
            store_sums<NV>(t, t.pixel + i, sums[i]);
            continue;
        }
        __m512 y[NV];
#pragma GCC unroll 4
        for (int j = 0; j < NV; ++j) y[j] = _mm512_mul_ps(_mm512_cvtepi32_ps(sums[i][j]), multiplier[j]);
        if (p.residual) {
            const uint8_t* residual = p.residual + (t.pixel + i) * p.residual_stride + t.channel;
#pragma GCC unroll 4
            for (int j = 0; j < NV; ++j) y[j] = add_residual(y[j], p, residual + 16 * j, mask_of(t.channels - 16 * j));
        }
        if (p.float_output) {
            store_floats<NV>(t, t.pixel + i, y);
            continue;
        }
        __m512i q[4];
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) q[j] = j < NV ? round_to_int(y[j < NV ? j : 0]) : _mm512_setzero_si512();
        uint8_t* out = static_cast<uint8_t*>(p.output) + (t.pixel + i) * p.output_stride + t.channel;
        store_bytes<NV>(out, to_bytes(q[0], q[1], q[2], q[3]), t.channels);
    }
}

}  // namespace
}  // namespace imgopt::avx512

#include "depthwise_avx512.h"

namespace imgopt::avx512 {
namespace {

struct Vnni {
    using Product = int8_t;
    static constexpr int64_t kLanes = 16, kMaxVectors = 4;
    static constexpr int64_t kBlockPixels = 96;  // 9 taps of 96 pointers are 7 KB
    static int64_t rows(int64_t vectors) { return vectors == 4 ? 6 : vectors == 3 ? 8 : 12; }
    static TileFunction tile(int64_t rows, int64_t vectors) {
        static constexpr TileFunction one[] = {avx512::tile<1, 1>,  avx512::tile<2, 1>,  avx512::tile<3, 1>,
                                               avx512::tile<4, 1>,  avx512::tile<5, 1>,  avx512::tile<6, 1>,
                                               avx512::tile<7, 1>,  avx512::tile<8, 1>,  avx512::tile<9, 1>,
                                               avx512::tile<10, 1>, avx512::tile<11, 1>, avx512::tile<12, 1>};
        static constexpr TileFunction two[] = {avx512::tile<1, 2>,  avx512::tile<2, 2>,  avx512::tile<3, 2>,
                                               avx512::tile<4, 2>,  avx512::tile<5, 2>,  avx512::tile<6, 2>,
                                               avx512::tile<7, 2>,  avx512::tile<8, 2>,  avx512::tile<9, 2>,
                                               avx512::tile<10, 2>, avx512::tile<11, 2>, avx512::tile<12, 2>};
        static constexpr TileFunction three[] = {avx512::tile<1, 3>, avx512::tile<2, 3>, avx512::tile<3, 3>,
                                                 avx512::tile<4, 3>, avx512::tile<5, 3>, avx512::tile<6, 3>,
                                                 avx512::tile<7, 3>, avx512::tile<8, 3>};
        static constexpr TileFunction four[] = {avx512::tile<1, 4>, avx512::tile<2, 4>, avx512::tile<3, 4>,
                                                avx512::tile<4, 4>, avx512::tile<5, 4>, avx512::tile<6, 4>};
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

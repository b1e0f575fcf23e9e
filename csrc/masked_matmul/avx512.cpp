// masked_matmul with 512-bit vectors: panels of 64 samples, sixteen sums of a quad in half of the registers.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC 12 on its own _mm512_undefined_ps()
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop

#include "lanes.h"

namespace imgopt::avx512 {
namespace {

struct Lanes {
    using Reg = __m512;
    static constexpr int kWidth = 16, kRegs = 4;

    static Reg zero() { return _mm512_setzero_ps(); }
    static Reg splat(float x) { return _mm512_set1_ps(x); }
    static Reg load_four(const float* from) { return _mm512_broadcast_f32x4(_mm_loadu_ps(from)); }
    static Reg spread(Reg four, int i) { return _mm512_permutevar_ps(four, _mm512_set1_epi32(i)); }
    static Reg load(const float* from) { return _mm512_loadu_ps(from); }
    static void store(float* to, Reg x) { _mm512_storeu_ps(to, x); }
    static Reg add(Reg a, Reg b) { return _mm512_add_ps(a, b); }
    static Reg mul(Reg a, Reg b) { return _mm512_mul_ps(a, b); }
    static Reg min(Reg a, Reg b) { return _mm512_min_ps(a, b); }
    static Reg max(Reg a, Reg b) { return _mm512_max_ps(a, b); }
    static Reg fma(Reg a, Reg b, Reg c) { return _mm512_fmadd_ps(a, b, c); }

    static __mmask16 first(int count) { return static_cast<__mmask16>((1u << count) - 1); }

    static Reg load_part(const float* from, int count) { return _mm512_maskz_loadu_ps(first(count), from); }
    static Reg load_part(const BFloat16* from, int count) {
        const __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first(count), from));
        return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
    }
    static Reg load_part(const Half* from, int count) {
        return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(count), from));
    }

    static void store_part(float* to, Reg x, int count) { _mm512_mask_storeu_ps(to, first(count), x); }
    static void store_part(BFloat16* to, Reg x, int count) {
        const __m512i bits = _mm512_castps_si512(x);
        const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
        __m512i rounded =
            _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
        rounded = _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc0));
        _mm256_mask_storeu_epi16(to, first(count), _mm512_cvtepi32_epi16(rounded));
    }
    static void store_part(Half* to, Reg x, int count) {
        _mm256_mask_storeu_epi16(to, first(count), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    }

    // Sixteen columns of which the first steps * kDistinct may be read, one per lane.
    template <int kDistinct>
    static IMGOPT_INLINE __m512i columns(const uint8_t* from, int steps) {
        const __mmask16 present = static_cast<__mmask16>((1u << steps * kDistinct) - 1);
        __m128i bytes = _mm_maskz_loadu_epi8(present, from);
        if constexpr (kDistinct == 1)
            bytes = _mm_shuffle_epi8(bytes, _mm_setr_epi8(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3));
        if constexpr (kDistinct == 2) bytes = _mm_unpacklo_epi8(bytes, bytes);
        return _mm512_cvtepu8_epi32(bytes);
    }
    // 128 numbers in eight registers, of which four instructions select from two each: a third of a gather's time.
    static constexpr int kFew = 3, kNearColumns = 128;
    struct Table {
        Reg part[8];
        explicit Table(const float* x) {
            for (int i = 0; i < 8; ++i) part[i] = load(x + i * 16);
        }
    };
    static IMGOPT_INLINE Reg look_up(const Table& table, __m512i at) {
        const __mmask16 odd = _mm512_test_epi32_mask(at, _mm512_set1_epi32(32));
        const __mmask16 high = _mm512_test_epi32_mask(at, _mm512_set1_epi32(64));
        const Reg* t = table.part;
        const Reg a =
            _mm512_mask_blend_ps(odd, _mm512_permutex2var_ps(t[0], at, t[1]), _mm512_permutex2var_ps(t[2], at, t[3]));
        const Reg b =
            _mm512_mask_blend_ps(odd, _mm512_permutex2var_ps(t[4], at, t[5]), _mm512_permutex2var_ps(t[6], at, t[7]));
        return _mm512_mask_blend_ps(high, a, b);
    }
    static IMGOPT_INLINE void sum_steps(Reg x, float* sums) {
        const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
        _mm_storeu_ps(sums, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
    }

    static IMGOPT_INLINE void transpose(Reg (&t)[16]) {
        Reg u[16];
#pragma GCC unroll 8
        for (int i = 0; i < 16; i += 2) {  // pairs of rows
            u[i] = _mm512_unpacklo_ps(t[i], t[i + 1]);
            u[i + 1] = _mm512_unpackhi_ps(t[i], t[i + 1]);
        }
#pragma GCC unroll 4
        for (int i = 0; i < 16; i += 4) {  // 4 x 4 within the 128-bit lanes
            const __m512d a = _mm512_castps_pd(u[i]), b = _mm512_castps_pd(u[i + 1]);
            const __m512d c = _mm512_castps_pd(u[i + 2]), d = _mm512_castps_pd(u[i + 3]);
            t[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, c));
            t[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, c));
            t[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(b, d));
            t[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(b, d));
        }
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {  // then the lanes themselves
            const Reg low = _mm512_shuffle_f32x4(t[i], t[i + 4], 0x88),
                      high = _mm512_shuffle_f32x4(t[i], t[i + 4], 0xdd);
            const Reg low2 = _mm512_shuffle_f32x4(t[i + 8], t[i + 12], 0x88);
            const Reg high2 = _mm512_shuffle_f32x4(t[i + 8], t[i + 12], 0xdd);
            u[i] = _mm512_shuffle_f32x4(low, low2, 0x88);
            u[i + 8] = _mm512_shuffle_f32x4(low, low2, 0xdd);
            u[i + 4] = _mm512_shuffle_f32x4(high, high2, 0x88);
            u[i + 12] = _mm512_shuffle_f32x4(high, high2, 0xdd);
        }
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) t[i] = u[i];
    }

    template <int kCount>
    static IMGOPT_INLINE Reg join(Reg a, Reg b) {
        if constexpr (kCount == 2) return add(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
        if constexpr (kCount == 4) {
            const __m512d c = _mm512_castps_pd(a), d = _mm512_castps_pd(b);
            return add(_mm512_castpd_ps(_mm512_unpacklo_pd(c, d)), _mm512_castpd_ps(_mm512_unpackhi_pd(c, d)));
        }
        return add(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
    }

    struct Dot {
        using Reg = __m512i;
        static constexpr int kWidth = 16;
        static constexpr bool kSigned = false;

        static Reg zero() { return _mm512_setzero_si512(); }
        static Reg splat(int32_t x) { return _mm512_set1_epi32(x); }
        static Reg load_four(const int32_t* from) {
            return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
        }
        static Reg spread(Reg four, int i) {
            return _mm512_castps_si512(_mm512_permutevar_ps(_mm512_castsi512_ps(four), _mm512_set1_epi32(i)));
        }
        static Reg load(const float* from) { return _mm512_loadu_si512(from); }
        static void store(float* to, Reg x) { _mm512_storeu_si512(to, x); }
        static Reg add(Reg a, Reg b) { return _mm512_add_epi32(a, b); }
        static Reg fma(Reg value, Reg x, Reg sum) { return _mm512_dpbusd_epi32(sum, x, value); }
    };

    static Reg gather(const float* from, const int32_t* index) {
        const __m512i at = _mm512_loadu_si512(index);
        return _mm512_mask_i32gather_ps(zero(), _mm512_cmpge_epi32_mask(at, _mm512_setzero_si512()), at, from, 4);
    }
};

}  // namespace

void masked_matmul(KernelTable& table) { table.masked = Exports<Lanes>::kTable; }

}  // namespace imgopt::avx512

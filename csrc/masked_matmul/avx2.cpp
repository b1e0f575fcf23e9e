// masked_matmul with 256-bit vectors: panels of 16 samples, eight sums of a quad in half of the registers.
#include <immintrin.h>

#include "lanes.h"

namespace imgopt::avx2 {
namespace {

struct Lanes {
    using Reg = __m256;
    static constexpr int kWidth = 8, kRegs = 2;

    static Reg zero() { return _mm256_setzero_ps(); }
    static Reg splat(float x) { return _mm256_set1_ps(x); }
    static Reg load_four(const float* from) { return _mm256_broadcast_ps(reinterpret_cast<const __m128*>(from)); }
    static Reg spread(Reg four, int i) { return _mm256_permutevar_ps(four, _mm256_set1_epi32(i)); }
    static Reg load(const float* from) { return _mm256_loadu_ps(from); }
    static void store(float* to, Reg x) { _mm256_storeu_ps(to, x); }
    static Reg add(Reg a, Reg b) { return _mm256_add_ps(a, b); }
    static Reg mul(Reg a, Reg b) { return _mm256_mul_ps(a, b); }
    static Reg min(Reg a, Reg b) { return _mm256_min_ps(a, b); }
    static Reg max(Reg a, Reg b) { return _mm256_max_ps(a, b); }
    static Reg fma(Reg a, Reg b, Reg c) { return _mm256_fmadd_ps(a, b, c); }

    static __m256i first(int count) {
        const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
        return _mm256_cmpgt_epi32(_mm256_set1_epi32(count), lane);
    }
    // Eight 16-bit numbers of which `count` may be touched.
    static __m128i load_words(const void* from, int count) {
        if (count == 8) return _mm_loadu_si128(static_cast<const __m128i*>(from));
        uint16_t words[8] = {};
        memcpy(words, from, static_cast<size_t>(count) * 2);
        return _mm_loadu_si128(reinterpret_cast<const __m128i*>(words));
    }
    static void store_words(void* to, __m128i x, int count) {
        if (count == 8) return _mm_storeu_si128(static_cast<__m128i*>(to), x);
        uint16_t words[8];
        _mm_storeu_si128(reinterpret_cast<__m128i*>(words), x);
        memcpy(to, words, static_cast<size_t>(count) * 2);
    }

    static Reg load_part(const float* from, int count) {
        return count == 8 ? load(from) : _mm256_maskload_ps(from, first(count));
    }
    static Reg load_part(const BFloat16* from, int count) {
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load_words(from, count)), 16));
    }
    static Reg load_part(const Half* from, int count) { return _mm256_cvtph_ps(load_words(from, count)); }

    static void store_part(float* to, Reg x, int count) {
        if (count == 8) return store(to, x);
        _mm256_maskstore_ps(to, first(count), x);
    }
    static void store_part(BFloat16* to, Reg x, int count) {
        const __m256i bits = _mm256_castps_si256(x);
        const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
        const __m256i rounded =
            _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
        const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
        const __m256i words = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), nan);
        store_words(to, _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)), count);
    }
    static void store_part(Half* to, Reg x, int count) {
        store_words(to, _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), count);
    }

    static constexpr int kFew = 0;  // with gathers of eight it took 1.3 times as long as a panel

    static IMGOPT_INLINE void transpose(Reg (&t)[8]) {
        Reg u[8];
#pragma GCC unroll 4
        for (int i = 0; i < 8; i += 2) {
            u[i] = _mm256_unpacklo_ps(t[i], t[i + 1]);
            u[i + 1] = _mm256_unpackhi_ps(t[i], t[i + 1]);
        }
#pragma GCC unroll 2
        for (int i = 0; i < 8; i += 4) {
            const __m256d a = _mm256_castps_pd(u[i]), b = _mm256_castps_pd(u[i + 1]);
            const __m256d c = _mm256_castps_pd(u[i + 2]), d = _mm256_castps_pd(u[i + 3]);
            t[i] = _mm256_castpd_ps(_mm256_unpacklo_pd(a, c));
            t[i + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(a, c));
            t[i + 2] = _mm256_castpd_ps(_mm256_unpacklo_pd(b, d));
            t[i + 3] = _mm256_castpd_ps(_mm256_unpackhi_pd(b, d));
        }
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
            u[i] = _mm256_permute2f128_ps(t[i], t[i + 4], 0x20);
            u[i + 4] = _mm256_permute2f128_ps(t[i], t[i + 4], 0x31);
        }
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) t[i] = u[i];
    }

    template <int kCount>
    static IMGOPT_INLINE Reg join(Reg a, Reg b) {
        if constexpr (kCount == 2) return add(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
        if constexpr (kCount == 4) {
            const __m256d c = _mm256_castps_pd(a), d = _mm256_castps_pd(b);
            return add(_mm256_castpd_ps(_mm256_unpacklo_pd(c, d)), _mm256_castpd_ps(_mm256_unpackhi_pd(c, d)));
        }
        return add(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
    }

    static IMGOPT_INLINE void sum_steps(Reg x, float* sums) {
        _mm_storeu_ps(sums, _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1)));
    }

    // Bytes of x are split into even and odd ones, which 16-bit products with the likewise split weights add in pairs:
    // the instruction that takes bytes as they are saturates.
    struct Dot {
        using Reg = __m256i;
        static constexpr int kWidth = 8;
        static constexpr bool kSigned = false;

        static Reg zero() { return _mm256_setzero_si256(); }
        static Reg splat(int32_t x) { return _mm256_set1_epi32(x); }
        static Reg load_four(const int32_t* from) {
            return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
        }
        static Reg spread(Reg four, int i) {
            return _mm256_castps_si256(_mm256_permutevar_ps(_mm256_castsi256_ps(four), _mm256_set1_epi32(i)));
        }
        static Reg load(const float* from) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)); }
        static void store(float* to, Reg x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), x); }
        static Reg add(Reg a, Reg b) { return _mm256_add_epi32(a, b); }
        static Reg fma(Reg value, Reg x, Reg sum) {
            const Reg even = _mm256_madd_epi16(_mm256_and_si256(x, _mm256_set1_epi16(255)),
                                               _mm256_srai_epi16(_mm256_slli_epi16(value, 8), 8));
            const Reg odd = _mm256_madd_epi16(_mm256_srli_epi16(x, 8), _mm256_srai_epi16(value, 8));
            return add(sum, add(even, odd));
        }
    };

    static Reg gather(const float* from, const int32_t* index) {
        const __m256i at = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(index));
        const __m256i valid = _mm256_cmpgt_epi32(at, _mm256_set1_epi32(-1));
        return _mm256_mask_i32gather_ps(zero(), from, at, _mm256_castsi256_ps(valid), 4);
    }
};

}  // namespace

void masked_matmul(KernelTable& table) { table.masked = Exports<Lanes>::kTable; }

}  // namespace imgopt::avx2

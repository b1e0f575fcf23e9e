// masked_matmul with 128-bit vectors: panels of 16 samples, sixteen sums of a quad in half of the registers.
#include <arm_neon.h>

#include "lanes.h"

namespace imgopt::neon {
namespace {

struct Lanes {
    using Reg = float32x4_t;
    static constexpr int kWidth = 4, kRegs = 4;

    static Reg zero() { return vdupq_n_f32(0); }
    static Reg splat(float x) { return vdupq_n_f32(x); }
    static Reg load_four(const float* from) { return vld1q_f32(from); }
    static Reg spread(Reg four, int i) { return vdupq_n_f32(four[i]); }  // a lane of the multiply-add
    static Reg load(const float* from) { return vld1q_f32(from); }
    static void store(float* to, Reg x) { vst1q_f32(to, x); }
    static Reg add(Reg a, Reg b) { return vaddq_f32(a, b); }
    static Reg mul(Reg a, Reg b) { return vmulq_f32(a, b); }
    static Reg min(Reg a, Reg b) { return vminq_f32(a, b); }
    static Reg max(Reg a, Reg b) { return vmaxq_f32(a, b); }
    static Reg fma(Reg a, Reg b, Reg c) { return vfmaq_f32(c, a, b); }

    // Four numbers of which `count` may be touched.
    template <class T>
    static void copy(T* to, const void* from, int count) {
        memcpy(to, from, static_cast<size_t>(count) * sizeof(T));
    }
    static uint16x4_t load_words(const void* from, int count) {
        uint16_t words[4] = {};
        copy(words, from, count);
        return vld1_u16(words);
    }

    static Reg load_part(const float* from, int count) {
        if (count == 4) return load(from);
        float lanes[4] = {};
        copy(lanes, from, count);
        return load(lanes);
    }
    static Reg load_part(const BFloat16* from, int count) {
        return vreinterpretq_f32_u32(vshll_n_u16(load_words(from, count), 16));
    }
    static Reg load_part(const Half* from, int count) {
        return vcvt_f32_f16(vreinterpret_f16_u16(load_words(from, count)));
    }

    static void store_part(float* to, Reg x, int count) {
        if (count == 4) return store(to, x);
        float lanes[4];
        store(lanes, x);
        copy(to, lanes, count);
    }
    static void store_part(BFloat16* to, Reg x, int count) {
        const uint32x4_t bits = vreinterpretq_u32_f32(x);
        const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
        const uint32x4_t rounded = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
        const uint16x4_t number = vmovn_u32(vceqq_f32(x, x));
        const uint16x4_t words = vbsl_u16(number, vshrn_n_u32(rounded, 16), vdup_n_u16(0x7fc0));
        uint16_t lanes[4];
        vst1_u16(lanes, words);
        copy(reinterpret_cast<uint16_t*>(to), lanes, count);
    }
    static void store_part(Half* to, Reg x, int count) {
        uint16_t lanes[4];
        vst1_u16(lanes, vreinterpret_u16_f16(vcvt_f16_f32(x)));
        copy(reinterpret_cast<uint16_t*>(to), lanes, count);
    }

    static constexpr int kFew = 0;  // four lanes and no gather: a panel of four samples is as good

    static IMGOPT_INLINE void transpose(Reg (&t)[4]) {
        const float32x4x2_t a = vtrnq_f32(t[0], t[1]), b = vtrnq_f32(t[2], t[3]);
        t[0] = vcombine_f32(vget_low_f32(a.val[0]), vget_low_f32(b.val[0]));
        t[1] = vcombine_f32(vget_low_f32(a.val[1]), vget_low_f32(b.val[1]));
        t[2] = vcombine_f32(vget_high_f32(a.val[0]), vget_high_f32(b.val[0]));
        t[3] = vcombine_f32(vget_high_f32(a.val[1]), vget_high_f32(b.val[1]));
    }

    template <int kCount>
    static IMGOPT_INLINE Reg join(Reg a, Reg b) {
        return vpaddq_f32(a, b);
    }

    static void sum_steps(Reg x, float* sums) { store(sums, x); }

    struct Dot {
        using Reg = int32x4_t;
        static constexpr int kWidth = 4;
        static constexpr bool kSigned = true;

        static Reg zero() { return vdupq_n_s32(0); }
        static Reg splat(int32_t x) { return vdupq_n_s32(x); }
        static const int32_t* load_four(const int32_t* from) { return from; }
        static Reg spread(const int32_t* four, int i) { return vdupq_n_s32(four[i]); }
        static Reg load(const float* from) { return vreinterpretq_s32_f32(vld1q_f32(from)); }
        static void store(float* to, Reg x) { vst1q_f32(to, vreinterpretq_f32_s32(x)); }
        static Reg add(Reg a, Reg b) { return vaddq_s32(a, b); }
        static Reg fma(Reg value, Reg x, Reg sum) {
            return vdotq_s32(sum, vreinterpretq_s8_s32(x), vreinterpretq_s8_s32(value));
        }
    };

    // There is no gather; four scalar loads are what it would be.
    static Reg gather(const float* from, const int32_t* index) {
        float lanes[4];
        for (int i = 0; i < 4; ++i) lanes[i] = index[i] < 0 ? 0.0f : from[index[i]];
        return load(lanes);
    }
};

}  // namespace

void masked_matmul(KernelTable& table) { table.masked = Exports<Lanes>::kTable; }

}  // namespace imgopt::neon

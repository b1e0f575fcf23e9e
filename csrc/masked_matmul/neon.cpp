// masked_matmul with NEON: panels of 16 samples, sixteen sums of a quad in half of the 32 registers.
#include <arm_neon.h>

#include "lanes.h"

namespace imgopt::neon {
namespace {

struct Lanes {
    using Reg = float32x4_t;
    static constexpr int kWidth = 4, kRegs = 4;

    static Reg zero() { return vdupq_n_f32(0); }
    static Reg splat(float x) { return vdupq_n_f32(x); }
    static Reg load(const float* from) { return vld1q_f32(from); }
    static void store(float* to, Reg x) { vst1q_f32(to, x); }
    static Reg add(Reg a, Reg b) { return vaddq_f32(a, b); }
    static Reg mul(Reg a, Reg b) { return vmulq_f32(a, b); }
    static Reg fma(Reg a, Reg b, Reg c) { return vfmaq_f32(c, a, b); }

    // Four numbers of which `count` may be touched.
    template <class Storage>
    static Reg load_part(const Storage* from, int count) {
        Storage part[4] = {};
        memcpy(part, from, static_cast<size_t>(count) * sizeof(Storage));
        return widened(part);
    }
    static Reg widened(const float* from) { return vld1q_f32(from); }
    static Reg widened(const BFloat16* from) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(&from->bits), 16)); }
    static Reg widened(const Half* from) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(&from->bits))); }

    template <class Storage>
    static void store_part(Storage* to, Reg x, int count) {
        Storage part[4];
        narrowed(x, part);
        memcpy(to, part, static_cast<size_t>(count) * sizeof(Storage));
    }
    static void narrowed(Reg x, float* to) { vst1q_f32(to, x); }
    static void narrowed(Reg x, BFloat16* to) {
        const uint32x4_t bits = vreinterpretq_u32_f32(x);
        const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
        const uint32x4_t rounded = vshrq_n_u32(vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff))), 16);
        vst1_u16(&to->bits, vmovn_u32(vbslq_u32(vceqq_f32(x, x), rounded, vdupq_n_u32(0x7fc0))));
    }
    static void narrowed(Reg x, Half* to) { vst1_u16(&to->bits, vreinterpret_u16_f16(vcvt_f16_f32(x))); }

    static Reg low_halves(Reg a, Reg b) { return vcombine_f32(vget_low_f32(a), vget_low_f32(b)); }
    static Reg high_halves(Reg a, Reg b) { return vcombine_f32(vget_high_f32(a), vget_high_f32(b)); }

    static void transpose(Reg (&t)[4]) {
        const float32x4x2_t a = vtrnq_f32(t[0], t[1]), b = vtrnq_f32(t[2], t[3]);
        t[0] = low_halves(a.val[0], b.val[0]);
        t[1] = low_halves(a.val[1], b.val[1]);
        t[2] = high_halves(a.val[0], b.val[0]);
        t[3] = high_halves(a.val[1], b.val[1]);
    }

    template <int kCount>
    static Reg join(Reg a, Reg b) {
        if constexpr (kCount == 2) return add(vzip1q_f32(a, b), vzip2q_f32(a, b));
        return add(low_halves(a, b), high_halves(a, b));
    }

    static Reg gather(const float* from, const int32_t* index) {
        float part[4];
        for (int i = 0; i < 4; ++i) part[i] = index[i] < 0 ? 0.0f : from[index[i]];
        return vld1q_f32(part);
    }
};

}  // namespace

void masked_matmul(KernelTable& table) {
    table.masked = {lanes_matmul<Lanes>, lanes_weight_grad<Lanes>, lanes_values<Lanes>};
}

}  // namespace imgopt::neon

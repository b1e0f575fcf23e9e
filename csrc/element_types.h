// The element types that C++ lacks, and every type's way to float32 and back. For the arithmetic.h of a column; the
// content is local to the unit that includes it. A NaN stays one; its payload is no part of any contract.
#pragma once

#include "kernels.h"

namespace imgopt {
namespace {

struct Half {
    uint16_t bits;
};
struct BFloat16 {
    uint16_t bits;
};

IMGOPT_HD inline float float_of_bits(uint32_t bits) {
    float v;
    __builtin_memcpy(&v, &bits, 4);
    return v;
}
IMGOPT_HD inline uint32_t bits_of_float(float v) {
    uint32_t bits;
    __builtin_memcpy(&bits, &v, 4);
    return bits;
}

IMGOPT_HD inline float widened(uint8_t v) { return v; }
IMGOPT_HD inline float widened(int8_t v) { return v; }
IMGOPT_HD inline float widened(float v) { return v; }
IMGOPT_HD inline double widened(double v) { return v; }
IMGOPT_HD inline float widened(BFloat16 v) { return float_of_bits(uint32_t{v.bits} << 16); }
IMGOPT_HD inline float widened(Half v) {
    const uint32_t sign = uint32_t{v.bits} << 16 & 0x80000000u;
    const uint32_t rest = uint32_t{v.bits & 0x7fffu} << 13;
    // Re-biased by a multiplication with 2^112, which also makes subnormals right; infinity and NaN by hand. Without a
    // branch, for the loops over many.
    const uint32_t ordinary = bits_of_float(float_of_bits(rest) * 0x1p112f);
    return float_of_bits(sign | (rest >= 0x0f800000u ? rest | 0x7f800000u : ordinary));
}

IMGOPT_HD inline void narrow(float v, float* to) { *to = v; }
IMGOPT_HD inline void narrow(float v, double* to) { *to = v; }
IMGOPT_HD inline void narrow(float v, BFloat16* to) {
    const uint32_t bits = bits_of_float(v);
    const uint32_t rounded = bits + 0x7fff + (bits >> 16 & 1);  // half to even; without a branch, as above
    to->bits = static_cast<uint16_t>((v != v ? bits | 0x400000 : rounded) >> 16);
}
IMGOPT_HD inline void narrow(float v, Half* to) {
    const uint32_t bits = bits_of_float(v);
    const uint32_t sign = bits >> 16 & 0x8000u;
    const uint32_t magnitude = bits & 0x7fffffffu;
    uint32_t result;
    if (magnitude > 0x7f800000u) {
        result = 0x7e00u | (magnitude >> 13 & 0x3ffu);  // a quiet NaN
    } else if (magnitude >= 0x477ff000u) {
        result = 0x7c00u;  // 65520 and more round to infinity
    } else if (magnitude < 0x38800000u) {
        // Subnormal: adding 0.5 leaves the value in units of 2^-24 in the last bits, rounded to even.
        result = bits_of_float(float_of_bits(magnitude) + 0.5f) - 0x3f000000u;
    } else {
        result = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1)) >> 13;
    }
    to->bits = static_cast<uint16_t>(sign | result);
}
IMGOPT_HD inline void narrow(double v, double* to) { *to = v; }
template <class T>
IMGOPT_HD inline void narrow(double v, T* to) {
    narrow(static_cast<float>(v), to);
}

}  // namespace
}  // namespace imgopt

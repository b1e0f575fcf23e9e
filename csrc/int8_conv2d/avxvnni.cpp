// int8_conv2d on AVX-VNNI: the 256-bit vpdpbusd of processors without AVX-512, four exact products per dword.
#include "depthwise_ymm.h"

namespace imgopt::avxvnni {
namespace {

struct Bytes {
    using Product = int8_t;
    __m256i flip;

    explicit Bytes(const Int8Conv2d& p) : flip(_mm256_set1_epi8(static_cast<char>(p.input_flip))) {}
    __m256i left(__m256i x) const { return _mm256_xor_si256(x, flip); }
    __m256i operator()(__m256i sum, __m256i x, __m256i w) const { return _mm256_dpbusd_avx_epi32(sum, x, w); }
};

}  // namespace

void int8_conv2d(KernelTable& table) { Convolution<Bytes>::fill(table, "avxvnni"); }

}  // namespace imgopt::avxvnni

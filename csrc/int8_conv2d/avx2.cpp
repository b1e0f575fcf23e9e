// int8_conv2d on AVX2, exactly. vpmaddubsw would add two products of bytes in 16 bits, where they saturate; so the
// input rows of a block of pixels are widened to words once, for all taps and output channels, and vpmaddwd multiplies
// words. The multipliers are as busy as with vpmaddubsw and its second step: two instructions for 32 products either
// way.
#include "depthwise_ymm.h"
#include "steps.h"

namespace imgopt::avx2 {
namespace {

struct Words {
    using Product = int16_t;

    explicit Words(const Int8Conv2d&) {}
    __m256i left(__m256i x) const { return x; }  // flipped when they were widened
    __m256i operator()(__m256i sum, __m256i x, __m256i w) const {
        return _mm256_add_epi32(sum, _mm256_madd_epi16(x, w));
    }
};

}  // namespace

void int8_conv2d(KernelTable& table) {
    Convolution<Words>::fill(table, "avx2");
    fill_steps(table);
}

}  // namespace imgopt::avx2

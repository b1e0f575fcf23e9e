// int8_conv2d on AVX2, exactly: by bytes where the weights allow it (pairs_avx2.h), otherwise the input rows of a block
// of pixels are widened to words once, for all taps and output channels, and vpmaddwd multiplies words.
#include "depthwise_ymm.h"
#include "pairs_avx2.h"
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

using Wide = Convolution<Words>;

constexpr int64_t kKindBytes = 64;  // behind a layer's weights: whether they are paired bytes

int64_t kind_at(const Int8Weight& w) {
    const int64_t wide = Wide::weight_bytes(w), paired = may_pair(w) ? PairedLayout(w).bytes() : 0;
    return wide > paired ? wide : paired;
}
bool is_paired(const Int8Conv2d& p) { return p.packed[kind_at(p.weight)] != 0; }

int64_t weight_bytes(const Int8Weight& w) { return kind_at(w) + kKindBytes; }

// Bytes that neither kind takes are zeros: equal weights are packed into equal bytes.
void weight_pack(const Int8Weight& w, const int8_t* weight, uint8_t* packed) {
    memset(packed, 0, weight_bytes(w));
    const bool paired = may_pair(w) && paired_weight_pack(w, weight, packed);
    if (!paired) Wide::weight_pack(w, weight, packed);
    memset(packed + kind_at(w), paired, kKindBytes);
}

int64_t units(const Int8Conv2d& p) { return is_paired(p) ? igemm_units<Paired>(p) : Wide::units(p); }

void kernel(const Int8Conv2d& p, int64_t begin, int64_t end) {
    is_paired(p) ? igemm<Paired>(p, begin, end) : Wide::kernel(p, begin, end);
}

}  // namespace

void int8_conv2d(KernelTable& table) {
    table.int8_weight_layout = "avx2";
    table.int8_weight_bytes = weight_bytes;
    table.int8_weight_pack = weight_pack;
    table.int8_conv2d_units = units;
    table.int8_conv2d = kernel;
    fill_steps(table);
}

}  // namespace imgopt::avx2

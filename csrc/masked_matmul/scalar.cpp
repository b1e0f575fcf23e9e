// masked_matmul in plain C: the specification that every vector unit is tested against.
#include "arithmetic.h"

namespace imgopt::scalar {
namespace {

void matmul(const MaskedMatmul& p, int64_t begin, int64_t end) {
    IMGOPT_BY_DTYPE(p.x.dtype, plain_matmul, p, begin, end)
}

void weight_grad(const MaskedWeightGrad& p, int64_t begin, int64_t end) {
    IMGOPT_BY_DTYPE(p.x.dtype, plain_weight_grad, p, begin, end)
}

void values(const MaskedValues& p, int64_t begin, int64_t end) { IMGOPT_BY_DTYPE(p.dtype, plain_values, p, begin, end) }

}  // namespace

void masked_matmul(KernelTable& table) { table.masked = {matmul, weight_grad, values}; }

}  // namespace imgopt::scalar

// masked_matmul in plain C: the specification that every vector unit is tested against.
#include "arithmetic.h"

namespace imgopt::scalar {
namespace {

void matmul(const MaskedMatmul& p, int64_t begin, int64_t end) {
    by_dtype(p.x.dtype,
             [&]<class Storage, class Sum>(Types<Storage, Sum>) { plain_matmul<Storage, Sum>(p, begin, end); });
}

void weight_grad(const MaskedWeightGrad& p, int64_t begin, int64_t end) {
    by_dtype(p.x.dtype,
             [&]<class Storage, class Sum>(Types<Storage, Sum>) { plain_weight_grad<Storage, Sum>(p, begin, end); });
}

void int8_matmul(const Int8MaskedMatmul& p, int64_t begin, int64_t end) {
    by_int8(p,
            [&]<class Input, class Output>(Types<Input, Output>) { plain_int8_matmul<Input, Output>(p, begin, end); });
}

}  // namespace

void masked_matmul(KernelTable& table) { table.masked = {matmul, weight_grad, any_values, int8_matmul}; }

}  // namespace imgopt::scalar

#include "arithmetic.h"

namespace imgopt::avx2 {

void masked_sgd(KernelTable& table) { table.masked_sgd = imgopt::masked_sgd; }

}  // namespace imgopt::avx2

#include "arithmetic.h"

namespace imgopt::scalar {

void masked_sgd(KernelTable& table) { table.masked_sgd = imgopt::masked_sgd; }

}  // namespace imgopt::scalar

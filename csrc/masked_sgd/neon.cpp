#include "arithmetic.h"

namespace imgopt::neon {

void masked_sgd(KernelTable& table) { table.masked_sgd = imgopt::masked_sgd; }

}  // namespace imgopt::neon

#include "../kernels.h"

namespace imgopt::neon {

void masked_matmul(KernelTable&) {}

}  // namespace imgopt::neon

#include "../kernels.h"

namespace imgopt::scalar {

void masked_matmul(KernelTable&) {}

}  // namespace imgopt::scalar

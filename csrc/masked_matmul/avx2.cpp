#include "../kernels.h"

namespace imgopt::avx2 {

void masked_matmul(KernelTable&) {}

}  // namespace imgopt::avx2

#include "../kernels.h"

namespace imgopt::avx512 {

void masked_matmul(KernelTable&) {}

}  // namespace imgopt::avx512

#include "../kernels.h"

namespace imgopt::avx512 {

void int8_conv2d(KernelTable&) {}

}  // namespace imgopt::avx512

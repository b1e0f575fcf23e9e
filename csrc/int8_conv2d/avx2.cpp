#include "../kernels.h"

namespace imgopt::avx2 {

void int8_conv2d(KernelTable&) {}

}  // namespace imgopt::avx2

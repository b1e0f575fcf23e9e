#include "../kernels.h"

namespace imgopt::scalar {

void int8_conv2d(KernelTable&) {}

}  // namespace imgopt::scalar

#include "../kernels.h"

namespace imgopt::neon {

void int8_conv2d(KernelTable&) {}

}  // namespace imgopt::neon

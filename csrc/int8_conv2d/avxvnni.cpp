#include "../kernels.h"

namespace imgopt::avxvnni {

void int8_conv2d(KernelTable&) {}

}  // namespace imgopt::avxvnni

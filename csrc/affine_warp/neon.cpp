#include "../kernels.h"

namespace imgopt::neon {

void affine_warp(KernelTable&) {}

}  // namespace imgopt::neon

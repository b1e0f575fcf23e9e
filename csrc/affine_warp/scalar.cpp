#include "../kernels.h"

namespace imgopt::scalar {

void affine_warp(KernelTable&) {}

}  // namespace imgopt::scalar

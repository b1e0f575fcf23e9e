#include "../kernels.h"

namespace imgopt::avx2 {

void affine_warp(KernelTable&) {}

}  // namespace imgopt::avx2

#include "../kernels.h"

namespace imgopt::avx512 {

void affine_warp(KernelTable&) {}

}  // namespace imgopt::avx512

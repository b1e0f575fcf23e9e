// affine_warp, portable: the specification that the vector units are tested against, bit by bit.
#include "backward.h"
#include "rows.h"

namespace imgopt::scalar {

void affine_warp(KernelTable& table) {
    table.affine_warp = warp_rows<float>;
    table.affine_warp_f64 = warp_rows<double>;
    table.affine_warp_backward = kWarpBackward<float>;
    table.affine_warp_backward_f64 = kWarpBackward<double>;
}

}  // namespace imgopt::scalar

// affine_warp, portable: the specification that the vector units are tested against, bit by bit.
#include "backward.h"
#include "rows.h"

namespace imgopt::scalar {

void affine_warp(KernelTable& table) {
    table.affine_warp = warp_rows;
    table.affine_warp_backward = warp_backward;
}

}  // namespace imgopt::scalar

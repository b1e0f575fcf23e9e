// affine_warp on AArch64: the portable kernel as the compiler vectorises it there; the same bits as everywhere.
#include "backward.h"
#include "rows.h"

namespace imgopt::neon {

void affine_warp(KernelTable& table) {
    table.affine_warp = warp_rows;
    table.affine_warp_backward = warp_backward;
}

}  // namespace imgopt::neon

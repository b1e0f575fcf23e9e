#include "arithmetic.h"

namespace imgopt::avx2 {

void photometric(KernelTable& table) {
    table.adjust_hue = adjust_hue;
    table.adjust_sharpness = adjust_sharpness;
}

}  // namespace imgopt::avx2

#include "arithmetic.h"

namespace imgopt::avx512 {

void photometric(KernelTable& table) {
    table.adjust_hue = adjust_hue;
    table.adjust_sharpness = adjust_sharpness;
}

}  // namespace imgopt::avx512

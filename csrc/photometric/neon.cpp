#include "arithmetic.h"

namespace imgopt::neon {

void photometric(KernelTable& table) {
    table.adjust_hue = adjust_hue;
    table.adjust_sharpness = adjust_sharpness;
}

}  // namespace imgopt::neon

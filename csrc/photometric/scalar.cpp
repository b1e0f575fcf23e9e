#include "arithmetic.h"

namespace imgopt::scalar {

void photometric(KernelTable& table) {
    table.adjust_hue = adjust_hue;
    table.adjust_sharpness = adjust_sharpness;
}

}  // namespace imgopt::scalar

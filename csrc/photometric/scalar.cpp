#include "passes.h"
#include "statistics.h"

namespace imgopt::scalar {

void photometric(KernelTable& table) {
    table.adjust_hue = adjust_hue<PlainRuns>;
    table.lookup = lookup<PlainRuns>;
    table.adjust_sharpness = adjust_sharpness<PlainRuns>;
    table.channel_sums = channel_sums;
    table.level_histogram = level_histogram;
}

}  // namespace imgopt::scalar

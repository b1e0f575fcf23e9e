#include "runs_avx2.h"
#include "statistics.h"

namespace imgopt::avx2 {

void photometric(KernelTable& table) {
    table.adjust_hue = adjust_hue<Avx2Runs>;
    table.lookup = lookup<Avx2Runs>;
    table.adjust_sharpness = adjust_sharpness<Avx2Runs>;
    table.channel_sums = channel_sums;
    table.level_histogram = level_histogram;
}

}  // namespace imgopt::avx2

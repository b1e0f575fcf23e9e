#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC PR 105593: its own unmasked intrinsics
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

#include "runs_avx512.h"
#include "statistics.h"

namespace imgopt::avx512 {

void photometric(KernelTable& table) {
    table.adjust_hue = adjust_hue<Avx512Runs>;
    table.lookup = lookup<Avx512Runs>;
    table.adjust_sharpness = adjust_sharpness<Avx512Runs>;
    table.channel_sums = channel_sums;
    table.level_histogram = level_histogram;
}

}  // namespace imgopt::avx512

#include "../torch_stable.h"

STABLE_TORCH_LIBRARY_IMPL(imgopt_fast, CPU, m) { (void)m; }

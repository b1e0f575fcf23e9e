// Large pages for large outputs. A batch of 64 float32 images is 38 MB, which the C library maps afresh for every
// tensor: in pages of 4 KiB the first write of each takes 15 ms of faults on a virtual machine, several times what
// filling them takes; in pages of 2 MiB it takes 2 ms. Where transparent huge pages are on demand (the usual setting
// of "madvise"), this is the demand; elsewhere it changes nothing.
#pragma once

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace imgopt {

// Only whole large pages inside [data, data + bytes): no memory beyond the output's own is taken.
inline void prefer_large_pages([[maybe_unused]] void* data, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    constexpr uintptr_t kLarge = 2 << 20;
    const uintptr_t from = reinterpret_cast<uintptr_t>(data);
    const uintptr_t first = (from + kLarge - 1) / kLarge * kLarge;
    const uintptr_t end = (from + static_cast<uintptr_t>(bytes)) / kLarge * kLarge;
    if (end > first) madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
#endif
}

}  // namespace imgopt

// Memory of large outputs. A batch of 64 float32 images is 38 MB, which the C library takes fresh from the system for
// every tensor and gives back when the tensor dies; the system clears it page by page as it is written: 3 ms in pages
// of 2 MiB, 15 ms in those of 4 KiB, 20 and more where it first has to move memory about to find large pages, and 3.5
// ms is what filling it takes. A training loop drops a batch before it makes the next of the same size, so the last few
// blocks are kept for the next output: at most kMostBytes of them.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <mutex>

#include "torch_stable.h"

#if defined(__linux__)
#include <sys/mman.h>

// Part of the stable ABI from torch 2.11 on; null in a 2.10, which then allocates as for any tensor.
extern "C" [[gnu::weak]] AOTITorchError torch_from_blob(void* data, int64_t ndim, const int64_t* sizes,
                                                        const int64_t* strides, int64_t storage_offset, int32_t dtype,
                                                        int32_t device_type, int32_t device_index,
                                                        AtenTensorHandle* result, int32_t layout, const uint8_t* opaque,
                                                        int64_t opaque_size, void (*deleter)(void* data, void* context),
                                                        void* context);
#endif

namespace imgopt {

constexpr int64_t kLargePage = 2 << 20;
constexpr int64_t kMostBytes = 256 << 20;  // kept, over all blocks
constexpr int kMostBlocks = 8;

// Fresh memory for std::free, null if there is none; `bytes`: a multiple of kLargePage.
inline void* large_pages(int64_t bytes) {
    void* fresh = std::aligned_alloc(kLargePage, static_cast<size_t>(bytes));
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    if (fresh) madvise(fresh, static_cast<size_t>(bytes), MADV_HUGEPAGE);
#endif
    return fresh;
}

// Blocks that nobody uses, the longest unused first. A lock that is taken (another thread's, or one that a fork has
// frozen) is not waited for: the block then comes from the system, or goes back to it.
class SpareBlocks {
  public:
    // A block of at least `bytes`, a multiple of kLargePage, which is raised to the size of the block; null if there is
    // no memory.
    void* take(int64_t* bytes) {
        if (const std::unique_lock lock(mutex_, std::try_to_lock); lock)
            for (int i = count_ - 1; i >= 0; --i)
                if (blocks_[i].bytes >= *bytes && blocks_[i].bytes <= *bytes + *bytes / 4) {
                    *bytes = blocks_[i].bytes;
                    return removed(i);
                }
        return large_pages(*bytes);
    }

    void give(void* block, int64_t bytes) {
        const std::unique_lock lock(mutex_, std::try_to_lock);
        if (!lock || bytes > kMostBytes) return std::free(block);
        while (count_ == kMostBlocks || total_ + bytes > kMostBytes) std::free(removed(0));
        blocks_[count_++] = {block, bytes};
        total_ += bytes;
    }

    // Never destroyed: tensors may outlive every static object.
    static SpareBlocks& shared() {
        static SpareBlocks& blocks = *new SpareBlocks;
        return blocks;
    }

  private:
    struct Block {
        void* data;
        int64_t bytes;
    };

    void* removed(int index) {
        const Block block = blocks_[index];
        for (--count_; index < count_; ++index) blocks_[index] = blocks_[index + 1];
        total_ -= block.bytes;
        return block.data;
    }

    std::mutex mutex_;
    Block blocks_[kMostBlocks];
    int count_ = 0;
    int64_t total_ = 0;
};

using torch::headeronly::MemoryFormat;

// Bytes of a tensor, rounded up to large pages; 0 where that is no more than one page, or more than any machine has.
inline int64_t large_bytes(const std::vector<int64_t>& sizes, ScalarType dtype) {
    const bool byte = dtype == ScalarType::Byte || dtype == ScalarType::Char;
    double bytes = byte ? 1 : dtype == ScalarType::Double ? 8 : dtype == ScalarType::Float ? 4 : 2;
    for (int64_t size : sizes) bytes *= static_cast<double>(size);
    if (bytes <= kLargePage || bytes > 0x1p46) return 0;
    return (static_cast<int64_t>(bytes) + kLargePage - 1) / kLargePage * kLargePage;
}

// A dense uint8, int8 or floating tensor (N, C, H, W) on the CPU, its values not set. By the C functions of the stable
// ABI: torch::stable::empty goes through the dispatcher's boxes, 0.7 us more.
inline Tensor new_output(const std::vector<int64_t>& sizes, ScalarType dtype, MemoryFormat layout) {
    const torch::stable::Device cpu(torch::headeronly::DeviceType::CPU);
    const int64_t c = sizes[1], h = sizes[2], w = sizes[3];
    if (sizes[0] * c * h * w == 0) return torch::stable::empty(sizes, dtype, std::nullopt, cpu, std::nullopt, layout);
    const int64_t planar[] = {c * h * w, h * w, w, 1}, interleaved[] = {h * w * c, 1, w * c, c};
    const int64_t* strides = layout == MemoryFormat::ChannelsLast ? interleaved : planar;
    const auto code = [](auto v) { return torch::stable::detail::to<int32_t>(torch::stable::detail::from(v)); };
    AtenTensorHandle made;
#if defined(__linux__)
    int64_t bytes = torch_from_blob ? large_bytes(sizes, dtype) : 0;
    void* block = bytes ? SpareBlocks::shared().take(&bytes) : nullptr;
    if (block) {
        const auto give = [](void* data, void* size) {
            SpareBlocks::shared().give(data, static_cast<int64_t>(reinterpret_cast<intptr_t>(size)));
        };
        TORCH_ERROR_CODE_CHECK(torch_from_blob(block, 4, sizes.data(), strides, 0, code(dtype), code(cpu.type()), -1,
                                               &made, code(torch::headeronly::Layout::Strided), nullptr, 0, give,
                                               reinterpret_cast<void*>(static_cast<intptr_t>(bytes))));
        return Tensor(made);
    }
#endif
    TORCH_ERROR_CODE_CHECK(
        aoti_torch_empty_strided(4, sizes.data(), strides, code(dtype), code(cpu.type()), -1, &made));
    return Tensor(made);
}

}  // namespace imgopt

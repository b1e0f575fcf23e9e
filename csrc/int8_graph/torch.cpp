// int8_graph for torch on the CPU: one call runs a whole plan. The arena belongs to the calling thread and stays, so
// that a steady state allocates nothing but the outputs.
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

#include "../outputs.h"
#include "runner.h"

namespace imgopt {
namespace {

constexpr int64_t kGrainProducts = int64_t{1} << 18;  // multiply-adds worth a thread
constexpr int64_t kGrainBytes = int64_t{1} << 16;     // bytes of a memory-bound step worth a thread
// Bytes of the values of images that run together, per thread. From 1.5 to 6 MB ResNet-50 on 16 images takes the same
// time; one image at a time, whose weights are then read 16 times, took 5 % longer, and all at once 3 %.
constexpr int64_t kGroupBytes = int64_t{1} << 22;

// 64-byte aligned memory of this thread, apart from thread_scratch(), which the kernels use. In large pages a layer of
// 64 to 256 channels at 56 x 56 takes 0.95 of its time, and its sum with a residual as well.
uint8_t* arena(int64_t bytes) {
    struct Free {
        void operator()(void* p) const { std::free(p); }
    };
    thread_local std::unique_ptr<void, Free> block;
    thread_local int64_t size = 0;
    if (bytes > size) {
        const int64_t page = bytes > kLargePage ? kLargePage : 64;
        block.reset();
        size = 0;
        bytes = (bytes + page - 1) / page * page;
        block.reset(page == kLargePage ? large_pages(bytes) : std::aligned_alloc(64, static_cast<size_t>(bytes)));
        if (!block) throw std::bad_alloc();
        size = bytes;
    }
    return static_cast<uint8_t*>(block.get());
}

struct Cpu {
    bool holds(const Tensor& t) const { return t.is_cpu(); }
    uint8_t* arena(int64_t bytes) const { return imgopt::arena(bytes); }
    int64_t group_bytes() const { return kGroupBytes * torch::stable::get_num_threads(); }
    void copy(void* to, const void* from, int64_t bytes) const { std::memcpy(to, from, static_cast<size_t>(bytes)); }

    // The bytes for the active kernel are the program's, or, where those are another machine's, packed anew.
    void conv(Int8Conv2d& c, const int8_t* weight, const uint8_t* packed, int64_t bytes) const {
        Tensor repacked;
        if (!packed || !is_packed_for_kernel(c.weight, packed, bytes)) {
            repacked = torch::stable::empty({packed_bytes(c.weight)}, ScalarType::Byte);
            auto* fresh = static_cast<uint8_t*>(repacked.mutable_data_ptr());
            pack(c.weight, weight, fresh);
            packed = fresh;
        }
        c.packed = packed + kernel_bytes_at(c.weight);
        const KernelTable& table = kernels();
        const int64_t units = table.int8_conv2d_units(c);
        const int64_t products = c.batch * c.out_h * c.out_w * c.weight.out_channels * c.weight.group_channels *
                                 c.weight.kernel_h * c.weight.kernel_w;
        parallel_units(units, kGrainProducts * units / (products + 1) + 1,
                       [&](int64_t begin, int64_t end) { table.int8_conv2d(c, begin, end); });
    }

    void quantize(const Int8Quantize& q) const {
        parallel_units(q.batch * q.height, kGrainBytes / (q.width * q.channels + 1) + 1,
                       [&](int64_t begin, int64_t end) { kernels().int8_quantize(q, begin, end); });
    }
    void add(const Int8Add& a, int64_t pixels) const {
        parallel_units(pixels, kGrainBytes / a.channels + 1,
                       [&](int64_t begin, int64_t end) { kernels().int8_add(a, begin, end); });
    }
    void pool(const Int8Pool& q) const {
        const int64_t row_bytes = q.out_w * q.channels * q.kernel_h * q.kernel_w;
        parallel_units(q.batch * q.out_h, kGrainBytes / (row_bytes + 1) + 1,
                       [&](int64_t begin, int64_t end) { kernels().int8_pool(q, begin, end); });
    }
    void dequantize(const Int8Dequantize& d, int64_t pixels) const {
        parallel_units(pixels, kGrainBytes / d.channels + 1,
                       [&](int64_t begin, int64_t end) { kernels().int8_dequantize(d, begin, end); });
    }
    void flatten(const uint8_t* from, uint8_t* to, int64_t batch, int64_t area, int64_t channels) const {
        for (int64_t n = 0; n < batch; ++n, from += area * channels, to += area * channels)
            for (int64_t c = 0; c < channels; ++c)
                for (int64_t i = 0; i < area; ++i) to[c * area + i] = from[i * channels + c];
    }
};

std::vector<Tensor> int8_graph(std::vector<Tensor> inputs, Tensor plan, Tensor constants, Tensor packed,
                               std::vector<int64_t> /*outputs: for the fake only*/) {
    Cpu device;
    return run_graph(device, std::move(inputs), plan, constants, packed);
}

}  // namespace
}  // namespace imgopt

STABLE_TORCH_LIBRARY_IMPL(imgopt_fast, CPU, m) { m.impl("int8_graph", TORCH_BOX(&imgopt::int8_graph)); }

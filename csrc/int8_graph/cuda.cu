// int8_graph for torch on CUDA: a launch per step, over one arena of torch's allocator. The plan is read on the host,
// so nothing waits for the device and the whole call can be captured into a CUDA graph.
#include "../int8_conv2d/cuda_launch.h"
#include "runner.h"

namespace imgopt {
namespace {

class Cuda {
  public:
    // `rows`: the program's packed weights are the rows that the kernels read.
    Cuda(const Tensor& constants, bool rows) : launch_(constants), like_(constants), rows_(rows) {}

    bool holds(const Tensor& t) const {
        check_device(t, "inputs, constants, packed");
        return true;
    }
    uint8_t* arena(int64_t bytes) { return keep(bytes); }
    void copy(void* to, const void* from, int64_t bytes) const { launch_.copy(to, from, bytes); }

    void conv(Int8Conv2d& c, const int8_t* weight, const uint8_t* packed, int64_t bytes) {
        const int64_t needed = cuda_weight_bytes(c.weight);
        c.packed = packed;
        if (!rows_ || !packed || bytes < needed || reinterpret_cast<uintptr_t>(packed) % 16 != 0) {
            uint8_t* fresh = keep(needed);
            cuda_pack_weight(launch_, c.weight, weight, fresh);
            c.packed = fresh;
        }
        cuda_conv(launch_, c, [this](int64_t size) { return keep(size); });
    }
    void quantize(const Int8Quantize& q) const { cuda_quantize(launch_, q); }
    void add(const Int8Add& a, int64_t pixels) const { cuda_add(launch_, a, pixels); }
    void pool(const Int8Pool& q) const { cuda_pool(launch_, q); }
    void dequantize(const Int8Dequantize& d, int64_t pixels) const { cuda_dequantize(launch_, d, pixels); }
    void flatten(const uint8_t* from, uint8_t* to, int64_t batch, int64_t area, int64_t channels) const {
        cuda_flatten(launch_, from, to, batch, area, channels);
    }

  private:
    uint8_t* keep(int64_t bytes) {
        memory_.push_back(device_bytes(like_, bytes));
        return static_cast<uint8_t*>(memory_.back().mutable_data_ptr());
    }

    Launcher launch_;
    Tensor like_;
    std::vector<Tensor> memory_;
    bool rows_;
};

// Packed rows have two axes, which tells them from the bytes of a processor's kernel.
std::vector<Tensor> int8_graph(std::vector<Tensor> inputs, Tensor plan, Tensor constants, Tensor packed,
                               std::vector<int64_t> /*outputs: for the fake only*/) {
    Cuda device(constants, packed.dim() == 2);
    return run_graph(device, std::move(inputs), plan, constants, packed);
}

}  // namespace
}  // namespace imgopt

STABLE_TORCH_LIBRARY_IMPL(imgopt_fast, IMGOPT_CUDA_KEY, m) { m.impl("int8_graph", TORCH_BOX(&imgopt::int8_graph)); }

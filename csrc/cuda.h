// What every CUDA file needs of the device and of torch's CUDA side: launching on torch's current stream, memory from
// torch's allocator (so that a call never synchronizes and can be captured into a CUDA graph), and the few machine
// instructions that C++ has no words for.
//
// IMGOPT_CUDA_EMULATED: tests/cuda_emulator/cuda_emulator.h stands in for the device, and the same sources run on a
// machine without one, thread by thread. That finds wrong indices, fragments and barriers; it says nothing about speed.
#pragma once

#include "torch_stable.h"

#if defined(IMGOPT_CUDA_EMULATED)
#include "cuda_emulator.h"
#define IMGOPT_CUDA_KEY CPU
#else
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#define IMGOPT_CUDA_KEY CUDA
#endif

namespace imgopt {

// --- host: where and how kernels run -------------------------------------------------------------------------------

constexpr int64_t kMostBlocks = (int64_t{1} << 31) - 1;  // of the grid's first axis

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Blocks for a grid-stride loop over `count` items.
inline unsigned blocks_for(int64_t count, int64_t per_block) {
    const int64_t blocks = ceil_div(count, per_block);
    return static_cast<unsigned>(blocks < 1 ? 1 : blocks < kMostBlocks ? blocks : kMostBlocks);
}

#if !defined(IMGOPT_CUDA_EMULATED)

inline void check(cudaError_t status) { STD_TORCH_CHECK(status == cudaSuccess, "CUDA: ", cudaGetErrorString(status)); }

// The device of `t` and torch's current stream on it, for as long as the object lives.
class Launcher {
  public:
    explicit Launcher(const Tensor& t) : guard_(t.get_device_index()) {
        void* stream = nullptr;
        TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
        stream_ = static_cast<cudaStream_t>(stream);
    }

    template <class... P, class... A>
    void operator()(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared, A&&... arguments) const {
        allow_shared(kernel, shared);
        kernel<<<grid, block, shared, stream_>>>(static_cast<P>(arguments)...);
        check(cudaGetLastError());
    }

    // For a kernel that calls wait_for_predecessor() (compute capability 9.0): its blocks may start while those of the
    // kernel before it end, or once that has called let_successor_start().
    template <class... P, class... A>
    void overlapping(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared, A&&... arguments) const {
        cudaLaunchAttribute attribute{};
        attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
        attribute.val.programmaticStreamSerializationAllowed = 1;
        const cudaLaunchConfig_t config = configured(kernel, grid, block, shared, attribute);
        check(cudaLaunchKernelEx(&config, kernel, static_cast<P>(arguments)...));
    }

    // For a kernel whose blocks, `cluster` at a time, see each other's shared memory (compute capability 9.0).
    template <class... P, class... A>
    void clusters(void (*kernel)(P...), int cluster, dim3 grid, dim3 block, size_t shared, A&&... arguments) const {
        cudaLaunchAttribute attribute;
        const cudaLaunchConfig_t config = cluster_launch(kernel, cluster, grid, block, shared, attribute);
        check(cudaLaunchKernelEx(&config, kernel, static_cast<P>(arguments)...));
    }
    // Clusters that the device runs at once.
    template <class... P>
    int64_t resident_clusters(void (*kernel)(P...), int cluster, int threads, size_t shared) const {
        cudaLaunchAttribute attribute;
        const cudaLaunchConfig_t config = cluster_launch(kernel, cluster, cluster, threads, shared, attribute);
        int count = 0;
        check(cudaOccupancyMaxActiveClusters(&count, kernel, &config));
        return count;
    }

    void copy(void* to, const void* from, int64_t bytes) const {
        check(cudaMemcpyAsync(to, from, static_cast<size_t>(bytes), cudaMemcpyDeviceToDevice, stream_));
    }

    // Multiprocessors of the device.
    int64_t processors() const { return attribute(cudaDevAttrMultiProcessorCount); }
    // Shared memory that a block can have.
    size_t shared_bytes() const { return static_cast<size_t>(attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin)); }

    // Blocks of a kernel without dynamic shared memory that the device runs at once.
    template <class... P>
    int64_t resident_blocks(void (*kernel)(P...), int threads) const {
        int count = 0;
        check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&count, kernel, threads, 0));
        return count * processors();
    }

  private:
    template <class Kernel>
    static void allow_shared(Kernel kernel, size_t shared) {
        if (shared > (48 << 10))  // more than every device grants unasked
            check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                       cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)));
    }
    template <class Kernel>
    cudaLaunchConfig_t cluster_launch(Kernel kernel, int cluster, dim3 grid, dim3 block, size_t shared,
                                      cudaLaunchAttribute& attribute) const {
        attribute = {};
        attribute.id = cudaLaunchAttributeClusterDimension;
        attribute.val.clusterDim.x = static_cast<unsigned>(cluster);
        attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
        return configured(kernel, grid, block, shared, attribute);
    }
    template <class Kernel>
    cudaLaunchConfig_t configured(Kernel kernel, dim3 grid, dim3 block, size_t shared,
                                  cudaLaunchAttribute& attribute) const {
        allow_shared(kernel, shared);
        cudaLaunchConfig_t config{};
        config.gridDim = grid;
        config.blockDim = block;
        config.dynamicSmemBytes = shared;
        config.stream = stream_;
        config.attrs = &attribute;
        config.numAttrs = 1;
        return config;
    }
    static int attribute(cudaDeviceAttr which) {
        int device = 0, value = 0;
        check(cudaGetDevice(&device));
        check(cudaDeviceGetAttribute(&value, which, device));
        return value;
    }

    torch::stable::accelerator::DeviceGuard guard_;
    cudaStream_t stream_;
};

inline void check_device(const Tensor& t, const char* name) {
    STD_TORCH_CHECK(t.is_cuda(), name, ": expected on CUDA");
}

// --- device: shared memory, asynchronous copies, matrix fragments --------------------------------------------------

// Dynamic shared memory of the block.
template <class T>
__device__ __forceinline__ T* dynamic_shared() {
    extern __shared__ uint4 memory[];
    return reinterpret_cast<T*>(memory);
}

// Until the kernels before this one are done, for one that Launcher::overlapping() started; and the other side of it.
__device__ __forceinline__ void wait_for_predecessor() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;\n" ::: "memory");
#endif
}
__device__ __forceinline__ void let_successor_start() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;\n" ::: "memory");
#endif
}

template <class T>
__device__ __forceinline__ T load_cached(const T* from) {
    return __ldg(from);
}

// `bytes` of 16 (0 or 16) come from `from`, the rest is zero.
__device__ __forceinline__ void copy_16_async(void* shared, const void* from, int bytes) {
    const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }
// Waits until at most `pending` groups of this thread are under way.
template <int pending>
__device__ __forceinline__ void wait_copies() {
    asm volatile("cp.async.wait_group %0;\n" ::"n"(pending) : "memory");
}

// Four 8 × 8 matrices of 16-bit elements; lane i gives the address of row i % 8 of matrix i / 8.
__device__ __forceinline__ void load_matrices(uint32_t (&m)[4], const void* shared) {
    const uint32_t from = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
                 : "r"(from)
                 : "memory");
}

// Transposes an 8 × 8 matrix of 16-bit elements that the warp holds as load_matrices() leaves it.
__device__ __forceinline__ uint32_t transposed_matrix(uint32_t m) {
    uint32_t t;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;\n" : "=r"(t) : "r"(m));
    return t;
}

// sum += a · b: 16 × 32 of uint8 times 32 × 8 of int8.
__device__ __forceinline__ void multiply_u8_s8(int32_t (&sum)[4], const uint32_t (&a)[4], const uint32_t b0,
                                               const uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};\n"
        : "+r"(sum[0]), "+r"(sum[1]), "+r"(sum[2]), "+r"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// sum += a · b: 16 × 16 times 16 × 8 of bfloat16, or of float16.
template <bool brain>
__device__ __forceinline__ void multiply_half(float (&sum)[4], const uint32_t (&a)[4], const uint32_t b0,
                                              const uint32_t b1) {
    if constexpr (brain)
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};\n"
            : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    else
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};\n"
            : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// sum + the four products of unsigned and signed bytes.
__device__ __forceinline__ int32_t dot4(uint32_t u, uint32_t s, int32_t sum) {
    int32_t result;
    asm("dp4a.u32.s32 %0, %1, %2, %3;\n" : "=r"(result) : "r"(u), "r"(s), "r"(sum));
    return result;
}
// sum + the products of two signed 16-bit numbers and two unsigned bytes: the first two, and the last two.
__device__ __forceinline__ int32_t dot2_low(uint32_t two, uint32_t bytes, int32_t sum) {
    int32_t result;
    asm("dp2a.lo.s32.u32 %0, %1, %2, %3;\n" : "=r"(result) : "r"(two), "r"(bytes), "r"(sum));
    return result;
}
__device__ __forceinline__ int32_t dot2_high(uint32_t two, uint32_t bytes, int32_t sum) {
    int32_t result;
    asm("dp2a.hi.s32.u32 %0, %1, %2, %3;\n" : "=r"(result) : "r"(two), "r"(bytes), "r"(sum));
    return result;
}
// Bytes of the eight in a (0..3) and b (4..7), four bits of `order` each, lowest first.
__device__ __forceinline__ uint32_t bytes_of(uint32_t a, uint32_t b, uint32_t order) {
    return __byte_perm(a, b, order);
}
// The larger of each pair of unsigned bytes.
__device__ __forceinline__ uint32_t larger_bytes(uint32_t a, uint32_t b) { return __vmaxu4(a, b); }
// The low word of (high, low) >> bits.
__device__ __forceinline__ uint32_t shift_pair(uint32_t low, uint32_t high, uint32_t bits) {
    return __funnelshift_r(low, high, bits);
}

__device__ __forceinline__ uint32_t of_lane(uint32_t v, int lane) { return __shfl_sync(~0u, v, lane); }
// Known to the compiler as the same in all lanes, which it is.
__device__ __forceinline__ uint32_t warp_uniform(uint32_t v) { return of_lane(v, 0); }
__device__ __forceinline__ int lowest_bit(uint32_t bits) { return __ffs(static_cast<int>(bits)) - 1; }
__device__ __forceinline__ int set_bits(uint64_t bits) { return __popcll(bits); }

// 1 / v within two units in the last place.
__device__ __forceinline__ float reciprocal_of(float v) {
    float r;
    asm("rcp.approx.ftz.f32 %0, %1;\n" : "=f"(r) : "f"(v));
    return r;
}
__device__ __forceinline__ float sum_rounded_down(float a, float b) { return __fadd_rd(a, b); }
__device__ __forceinline__ double sum_rounded_down(double a, double b) { return __dadd_rd(a, b); }
__device__ __forceinline__ int32_t low_word(double v) { return __double2loint(v); }

__device__ __forceinline__ float float_of_half(uint16_t bits) {
    float v;
    asm("cvt.f32.f16 %0, %1;\n" : "=f"(v) : "h"(bits));
    return v;
}
__device__ __forceinline__ uint16_t half_of_float(float v) {
    uint16_t bits;
    asm("cvt.rn.f16.f32 %0, %1;\n" : "=h"(bits) : "f"(v));
    return bits;
}
__device__ __forceinline__ uint16_t bfloat16_of_float(float v) {
    uint16_t bits;
    asm("cvt.rn.bf16.f32 %0, %1;\n" : "=h"(bits) : "f"(v));
    return bits;
}
// Two side by side, the first in the low half.
__device__ __forceinline__ uint32_t halves_of_floats(float low, float high) {
    uint32_t bits;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;\n" : "=r"(bits) : "f"(high), "f"(low));
    return bits;
}
__device__ __forceinline__ uint32_t bfloat16s_of_floats(float low, float high) {
    uint32_t bits;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;\n" : "=r"(bits) : "f"(high), "f"(low));
    return bits;
}

// `v`, which a compiler then neither takes apart nor computes again where it is used.
template <class V>
__device__ __forceinline__ V kept(V v) {
    if constexpr (sizeof(V) == 8)
        asm("" : "+l"(v));
    else
        asm("" : "+r"(v));
    return v;
}

#endif

// i = quotient · by + rest, neither negative; 32-bit numbers take a fifth of the instructions that others do.
struct Split {
    int64_t quotient, rest;
};
__device__ inline Split split(int64_t i, int64_t by) {
    if ((i | by) >> 32 != 0) return {i / by, i % by};
    const uint32_t quotient = static_cast<uint32_t>(i) / static_cast<uint32_t>(by);
    return {quotient, static_cast<uint32_t>(i) - quotient * static_cast<uint32_t>(by)};
}

// Workspace on the device of `like`; it lives as long as the tensor, and torch hands it on in stream order.
inline Tensor device_bytes(const Tensor& like, int64_t bytes) {
    return torch::stable::new_empty(like, {bytes < 1 ? 1 : bytes}, ScalarType::Byte);
}

// `t`, contiguous, at an address that vector loads can start from: a view may begin anywhere.
inline Tensor aligned_contiguous(const Tensor& t) {
    const Tensor dense = torch::stable::contiguous(t);
    return reinterpret_cast<uintptr_t>(dense.const_data_ptr()) % 16 == 0 ? dense : torch::stable::clone(dense);
}

}  // namespace imgopt

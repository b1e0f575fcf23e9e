// What compute capability 9.0 adds and the kernels use: the copy engine (TMA), which moves boxes of a tensor between
// global and shared memory by itself, into several blocks of a cluster at once; barriers in shared memory (mbarrier)
// that count its bytes; and products of whole tiles by four warps (wgmma), read from shared memory. Rows of a tile are
// one span (64 or 128 bytes) long, and within eight of them the 16-byte chunks are exchanged ("swizzled") so that a
// column of chunks hits all banks; the copy engine writes and wgmma reads that order.
#pragma once

#include "cuda.h"

#if !defined(IMGOPT_CUDA_EMULATED)
#include <cudaTypedefs.h>
#endif

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900 && !defined(__CUDA_ARCH_FEAT_SM90_ALL)
#error "compile for 90a: plain 90 has no wgmma"
#endif

// Its code exists for sm_90a only; elsewhere its kernels are empty, and never launched.
#if defined(IMGOPT_CUDA_EMULATED) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define IMGOPT_HOPPER 1
#endif

namespace imgopt {

constexpr int kWarpGroup = 128;  // threads that multiply together
constexpr int kTileRows = 64;    // of the left operand of one product
constexpr int kProductDepth = 32;

// Bytes in global memory as a tensor, the innermost axis first. The address and the strides, from the second axis on,
// are multiples of 16.
struct ByteTensor {
    const void* data;
    uint32_t rank;
    uint64_t size[4], stride[3];
};

// The pixels of an image tensor (channels, width, height, batch) that one tap of a convolution sees: from `first` in
// steps of `step`, up to `last` (relative to the image's last pixel), in x and y.
struct PixelWindow {
    int first[2], last[2];
    uint32_t step[2];
};

}  // namespace imgopt

#if defined(IMGOPT_CUDA_EMULATED)
#include "cuda_hopper_emulated.h"
#else

namespace imgopt {

using TensorMap = CUtensorMap;

// --- host ----------------------------------------------------------------------------------------------------------

namespace {
__global__ void hopper_code() {}
}  // namespace

// Whether the current device has these instructions and the library was compiled for it, not for an older device whose
// code the driver has translated.
inline bool has_hopper_kernels() {
    int device = 0, major = 0, minor = 0;
    check(cudaGetDevice(&device));
    check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
    check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
    if (major != 9 || minor != 0) return false;
    static const bool compiled = [] {
        cudaFuncAttributes attributes;
        check(cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(hopper_code)));
        return attributes.ptxVersion >= 90;
    }();
    return compiled;
}

// A function of the driver's library, which is there wherever a device is: nothing to link with.
template <class Function>
Function driver_function(const char* name) {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    check(cudaGetDriverEntryPointByVersion(name, &function, 12000, cudaEnableDefault, &found));
    STD_TORCH_CHECK(found == cudaDriverEntryPointSuccess, "CUDA: the driver has no ", name);
    return reinterpret_cast<Function>(function);
}

inline CUtensorMapSwizzle swizzle_of(uint32_t span) {
    return span == 128 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B;
}

// Boxes of box[0] (64 or 128) by box[1], ... elements; beyond the tensor, zeros are read and nothing is written.
inline TensorMap box_map(const ByteTensor& t, const uint32_t (&box)[4]) {
    static const auto encode = driver_function<PFN_cuTensorMapEncodeTiled_v12000>("cuTensorMapEncodeTiled");
    const uint32_t steps[4] = {1, 1, 1, 1};
    TensorMap map;
    const CUresult status = encode(&map, CU_TENSOR_MAP_DATA_TYPE_UINT8, t.rank, const_cast<void*>(t.data), t.size,
                                   t.stride, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle_of(box[0]),
                                   CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    STD_TORCH_CHECK(status == CUDA_SUCCESS, "CUDA: cuTensorMapEncodeTiled failed with ", static_cast<int>(status));
    return map;
}

// Boxes of `channels` (64 or 128) of `pixels` consecutive pixels of the window; zeros beyond the image.
inline TensorMap window_map(const ByteTensor& t, const PixelWindow& w, uint32_t channels, uint32_t pixels) {
    static const auto encode = driver_function<PFN_cuTensorMapEncodeIm2col_v12000>("cuTensorMapEncodeIm2col");
    const uint32_t steps[4] = {1, w.step[0], w.step[1], 1};
    TensorMap map;
    const CUresult status =
        encode(&map, CU_TENSOR_MAP_DATA_TYPE_UINT8, t.rank, const_cast<void*>(t.data), t.size, t.stride, w.first,
               w.last, channels, pixels, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle_of(channels),
               CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    STD_TORCH_CHECK(status == CUDA_SUCCESS, "CUDA: cuTensorMapEncodeIm2col failed with ", static_cast<int>(status));
    return map;
}

#if defined(IMGOPT_HOPPER)

// --- device: barriers ----------------------------------------------------------------------------------------------

__device__ __forceinline__ uint32_t shared_address(const void* shared) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

using Barrier = uint64_t;  // in shared memory

// A phase ends after `arrivals` and all bytes that were announced.
__device__ __forceinline__ void start_barrier(Barrier* barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
// Between start_barrier() and the block's first barrier: the copy engine sees them too.
__device__ __forceinline__ void publish_barriers() {
    asm volatile("fence.mbarrier_init.release.cluster;\n" ::: "memory");
}
__device__ __forceinline__ void arrive(Barrier* barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];\n" ::"r"(shared_address(barrier)) : "memory");
}
__device__ __forceinline__ void arrive_expecting(Barrier* barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n" ::"r"(shared_address(barrier)), "r"(bytes)
                 : "memory");
}
// Waits for the end of the phase of this parity; the one before the first counts as ended.
__device__ __forceinline__ void wait_for(Barrier* barrier, uint32_t parity) {
    asm volatile(
        "{\n.reg .pred done;\nagain:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@!done bra again;\n}\n" ::"r"(
            shared_address(barrier)),
        "r"(parity)
        : "memory");
}
// Among the threads of one warp group of the block.
__device__ __forceinline__ void group_barrier(int group) {
    asm volatile("bar.sync %0, 128;\n" ::"r"(group + 1) : "memory");
}
// Among the first `groups` warp groups.
template <int groups>
__device__ __forceinline__ void groups_barrier() {
    asm volatile("bar.sync 1, %0;\n" ::"n"(groups * kWarpGroup) : "memory");
}
// Orders this thread's stores to shared memory before what the copy engine and wgmma do after the next barrier.
__device__ __forceinline__ void publish_stores() { asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory"); }

// --- device: clusters of blocks, and registers that warp groups hand each other
// ---------------------------------------

__device__ __forceinline__ int cluster_rank() {
    int rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;\n" : "=r"(rank));
    return rank;
}
__device__ __forceinline__ void cluster_barrier() {
    asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;\n" ::: "memory");
}
// At the barrier that has the place of `barrier` in the shared memory of another block of the cluster.
__device__ __forceinline__ void arrive_in(Barrier* barrier, int rank) {
    asm volatile(
        "{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %0, %1;\n"
        "mbarrier.arrive.shared::cluster.b64 _, [there];\n}\n" ::"r"(shared_address(barrier)),
        "r"(rank)
        : "memory");
}
// By all threads of a warp group; what it keeps, or has from then on, per thread.
template <int registers>
__device__ __forceinline__ void give_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;\n" ::"n"(registers));
}
template <int registers>
__device__ __forceinline__ void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;\n" ::"n"(registers));
}

// --- device: the copy engine. One thread starts a copy ---------------------------------------------------------------

__device__ __forceinline__ void load_window(void* to, const TensorMap& map, Barrier* barrier, int channel, int x, int y,
                                            int n, int right, int down) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.im2col.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, "
        "%6}], [%2], {%7, %8};\n" ::"r"(shared_address(to)),
        "l"(&map), "r"(shared_address(barrier)), "r"(channel), "r"(x), "r"(y), "r"(n),
        "h"(static_cast<uint16_t>(right)), "h"(static_cast<uint16_t>(down))
        : "memory");
}
__device__ __forceinline__ void load_box(void* to, const TensorMap& map, Barrier* barrier, int x, int y, int z, int n) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], "
        "[%2];\n" ::"r"(shared_address(to)),
        "l"(&map), "r"(shared_address(barrier)), "r"(x), "r"(y), "r"(z), "r"(n)
        : "memory");
}
__device__ __forceinline__ void load_box(void* to, const TensorMap& map, Barrier* barrier, int x, int y, int z) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], "
        "[%2];\n" ::"r"(shared_address(to)),
        "l"(&map), "r"(shared_address(barrier)), "r"(x), "r"(y), "r"(z)
        : "memory");
}
__device__ __forceinline__ void load_box(void* to, const TensorMap& map, Barrier* barrier, int x, int y) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], "
        "[%2];\n" ::"r"(shared_address(to)),
        "l"(&map), "r"(shared_address(barrier)), "r"(x), "r"(y)
        : "memory");
}
// Into the same place of all `blocks` of the cluster, and to each one's barrier.
template <int blocks>
__device__ __forceinline__ void load_box_for_all(void* to, const TensorMap& map, Barrier* barrier, int x, int y) {
    if constexpr (blocks == 1)
        load_box(to, map, barrier, x, y);
    else
        asm volatile(
            "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, "
            "{%3, %4}], [%2], %5;\n" ::"r"(shared_address(to)),
            "l"(&map), "r"(shared_address(barrier)), "r"(x), "r"(y), "h"(static_cast<uint16_t>((1 << blocks) - 1))
            : "memory");
}
// Addresses and bytes are multiples of 16.
__device__ __forceinline__ void load_bytes(void* to, const void* from, int bytes, Barrier* barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];\n" ::"r"(
                     shared_address(to)),
                 "l"(from), "r"(bytes), "r"(shared_address(barrier))
                 : "memory");
}
__device__ __forceinline__ void store_box(const void* from, const TensorMap& map, int x, int y) {
    asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];\n" ::"l"(&map),
                 "r"(shared_address(from)), "r"(x), "r"(y)
                 : "memory");
}
__device__ __forceinline__ void store_box(const void* from, const TensorMap& map, int x, int y, int z, int n) {
    asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5}], [%1];\n" ::"l"(&map),
                 "r"(shared_address(from)), "r"(x), "r"(y), "r"(z), "r"(n)
                 : "memory");
}
__device__ __forceinline__ void commit_stores() { asm volatile("cp.async.bulk.commit_group;\n" ::: "memory"); }
// Until this thread's stores have read shared memory, or have arrived.
__device__ __forceinline__ void wait_until_read() { asm volatile("cp.async.bulk.wait_group.read 0;\n" ::: "memory"); }
__device__ __forceinline__ void wait_until_stored() { asm volatile("cp.async.bulk.wait_group 0;\n" ::: "memory"); }

// --- device: products ----------------------------------------------------------------------------------------------

// A tile with rows of `span` bytes, from any row on of memory that starts at a multiple of 1024: chunks are exchanged
// by their address (measured: the descriptor's base offset stays 0). + 2 per product along a row.
template <int span>
__device__ __forceinline__ uint64_t tile_of(const void* shared) {
    constexpr uint64_t eight_rows = 8 * span / 16, order = span == 128 ? 1 : 2;
    const uint32_t address = shared_address(shared);
    return (address & 0x3ffff) >> 4 | uint64_t{1} << 16 | eight_rows << 32 | order << 62;
}

__device__ __forceinline__ void begin_products() { asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory"); }
__device__ __forceinline__ void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory"); }
// Until at most `pending` committed groups are under way.
template <int pending = 0>
__device__ __forceinline__ void wait_products() {
    asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(pending) : "memory");
}

// Operands of multiply_block() in shared memory; + n: 16 n bytes on.
// Of x: a tile with rows of 128 bytes that starts at a multiple of 1024; + 2 per 16 of the common axis.
__device__ __forceinline__ uint32_t tile_place(const void* shared) {
    return (shared_address(shared) & 0x3ffff) >> 4 | 1u << 16;
}
// Of the weight: matrices of 8 × 8, rows of eight of the common axis, side / 8 of them to a row of matrices; + 16 per
// 16 of the common axis.
__device__ __forceinline__ uint32_t block_place(const void* shared) {
    return (shared_address(shared) & 0x3ffff) >> 4 | 8u << 16;
}

// s += 64 × 16 times 16 × side of bfloat16 or float16. The sums lie as in multiply_tiles().
template <bool brain, int side>
__device__ __forceinline__ void multiply_block(float (&s)[side / 2], uint32_t x, uint32_t block) {
    const uint64_t left = uint64_t{64 | 1u << 30} << 32 | x, right = uint64_t{side} << 32 | block;
#define IMGOPT_MULTIPLY_16(type)                                                                                  \
    asm volatile("wgmma.mma_async.sync.aligned.m64n16k16.f32." type "." type                                      \
                 " {%0, %1, %2, %3, %4, %5, %6, %7}, %8, %9, 1, 1, 1, 0, 0;\n"                                    \
                 : "+f"(s[0]), "+f"(s[1]), "+f"(s[2]), "+f"(s[3]), "+f"(s[4]), "+f"(s[5]), "+f"(s[6]), "+f"(s[7]) \
                 : "l"(left), "l"(right))
#define IMGOPT_MULTIPLY_32(type)                                                                                   \
    asm volatile("wgmma.mma_async.sync.aligned.m64n32k16.f32." type "." type                                       \
                 " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, %16, %17, 1, 1, 1, 0, " \
                 "0;\n"                                                                                            \
                 : "+f"(s[0]), "+f"(s[1]), "+f"(s[2]), "+f"(s[3]), "+f"(s[4]), "+f"(s[5]), "+f"(s[6]), "+f"(s[7]), \
                   "+f"(s[8]), "+f"(s[9]), "+f"(s[10]), "+f"(s[11]), "+f"(s[12]), "+f"(s[13]), "+f"(s[14]),        \
                   "+f"(s[15])                                                                                     \
                 : "l"(left), "l"(right))
    if constexpr (brain && side == 16)
        IMGOPT_MULTIPLY_16("bf16");
    else if constexpr (side == 16)
        IMGOPT_MULTIPLY_16("f16");
    else if constexpr (brain)
        IMGOPT_MULTIPLY_32("bf16");
    else
        IMGOPT_MULTIPLY_32("f16");
#undef IMGOPT_MULTIPLY_16
#undef IMGOPT_MULTIPLY_32
}

#define IMGOPT_SUMS_4(i) "+r"(s[i]), "+r"(s[(i) + 1]), "+r"(s[(i) + 2]), "+r"(s[(i) + 3])
#define IMGOPT_SUMS_16(i) IMGOPT_SUMS_4(i), IMGOPT_SUMS_4((i) + 4), IMGOPT_SUMS_4((i) + 8), IMGOPT_SUMS_4((i) + 12)
#define IMGOPT_SUMS_32(i) IMGOPT_SUMS_16(i), IMGOPT_SUMS_16((i) + 16)

// s (+)= 64 × 32 of uint8 times 32 × columns of int8. Of warp w of the group, lane l: s[4 j + i] is row 16 w + l / 4 +
// 8 (i / 2), column 8 j + 2 (l % 4) + i % 2.
template <int columns>
__device__ __forceinline__ void multiply_tiles(int32_t (&s)[columns / 2], uint64_t a, uint64_t b, int more);

// clang-format off
template <>
__device__ __forceinline__ void multiply_tiles<64>(int32_t (&s)[32], uint64_t a, uint64_t b, int more) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k32.s32.u8.s8 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, "
        "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
        "}, %32, %33, p;\n}\n"
        : IMGOPT_SUMS_32(0)
        : "l"(a), "l"(b), "r"(more));
}
template <>
__device__ __forceinline__ void multiply_tiles<128>(int32_t (&s)[64], uint64_t a, uint64_t b, int more) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k32.s32.u8.s8 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, "
        "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, "
        "%42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, "
        "%62, %63"
        "}, %64, %65, p;\n}\n"
        : IMGOPT_SUMS_32(0), IMGOPT_SUMS_32(32)
        : "l"(a), "l"(b), "r"(more));
}
template <>
__device__ __forceinline__ void multiply_tiles<256>(int32_t (&s)[128], uint64_t a, uint64_t b, int more) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %130, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n256k32.s32.u8.s8 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, "
        "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, "
        "%42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, "
        "%62, %63, %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, "
        "%82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, "
        "%101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, %112, %113, %114, %115, %116, "
        "%117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
        "}, %128, %129, p;\n}\n"
        : IMGOPT_SUMS_32(0), IMGOPT_SUMS_32(32), IMGOPT_SUMS_32(64), IMGOPT_SUMS_32(96)
        : "l"(a), "l"(b), "r"(more));
}
// clang-format on
#undef IMGOPT_SUMS_32
#undef IMGOPT_SUMS_16
#undef IMGOPT_SUMS_4

#endif

}  // namespace imgopt

#endif

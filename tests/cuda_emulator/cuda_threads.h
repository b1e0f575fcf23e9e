// How the emulated device runs a kernel: block by block, the threads of a block as coroutines that switch where the
// device would wait (barriers, and the instructions that a warp executes together). Shared memory starts out poisoned,
// so a missing barrier shows as a wrong result.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__
#define __grid_constant__
#define __shared__ static
#define __launch_bounds__(...)

struct alignas(16) uint4 {
    uint32_t x, y, z, w;
};
struct alignas(8) uint2 {
    uint32_t x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(8) float2 {
    float x, y;
};
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

inline float __uint_as_float(uint32_t bits) {
    float v;
    std::memcpy(&v, &bits, 4);
    return v;
}
inline uint32_t __float_as_uint(float v) {
    uint32_t bits;
    std::memcpy(&bits, &v, 4);
    return bits;
}

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

namespace imgopt::emulator {

constexpr int kWarp = 32;
constexpr size_t kStack = 256 << 10;

struct Copy {
    void* to;
    const void* from;
    int bytes;
};

struct Thread {
    dim3 index;
    int number = 0, rank = 0;  // in its block; of its block in a cluster
    bool done = false;
    int64_t block_waits = 0, group_waits = 0, warp_waits = 0, cluster_waits = 0;  // barriers that it has reached
    std::vector<Copy> open;
    std::deque<std::vector<Copy>> groups;
    bool started = false;
    jmp_buf place;  // where it goes on, once started: a jump is no system call, as a switch of contexts is
    ucontext_t context;
    std::unique_ptr<char[]> stack;
};

struct Exchange {  // what the lanes of a warp show each other
    uint32_t words[kWarp][6];
    const void* addresses[kWarp];
};

struct Device {
    dim3 grid, block, block_index;  // block_index: of the first block of a cluster
    int cluster = 1, block_threads = 0;
    std::vector<Thread> threads;  // of all blocks of a cluster
    std::vector<Exchange> warps;
    std::vector<uint4> shared;  // of each block, one after the other
    size_t block_shared = 0;
    Thread* current = nullptr;
    jmp_buf scheduler;
    std::function<void()> body;
};

inline Device& device() {
    static Device d;
    return d;
}

inline void yield_thread() {
    if (_setjmp(device().current->place) == 0) _longjmp(device().scheduler, 1);
}

// Whether every living thread of [first, last) of the current block has reached as many barriers as `waits` says.
inline bool all_reached(int first, int last, int64_t Thread::* waits, int64_t count) {
    const int block = device().current->rank * device().block_threads;
    for (int i = block + first; i < block + last; ++i) {
        const Thread& t = device().threads[static_cast<size_t>(i)];
        if (!t.done && t.*waits < count) return false;
    }
    return true;
}

inline void block_barrier() {
    Thread* me = device().current;
    const int64_t count = ++me->block_waits;
    while (!all_reached(0, device().block_threads, &Thread::block_waits, count)) yield_thread();
}

inline void warp_barrier() {
    Thread* me = device().current;
    const int64_t count = ++me->warp_waits;
    const int first = me->number / kWarp * kWarp;
    const int last = std::min(first + kWarp, device().block_threads);
    while (!all_reached(first, last, &Thread::warp_waits, count)) yield_thread();
}

inline int lane() { return device().current->number % kWarp; }
inline Exchange& exchange() {
    const Thread& t = *device().current;
    return device()
        .warps[static_cast<size_t>(t.rank * ((device().block_threads + kWarp - 1) / kWarp) + t.number / kWarp)];
}
inline uint4* shared_of(int rank) { return device().shared.data() + static_cast<size_t>(rank) * device().block_shared; }
inline dim3 block_index() {
    const Device& d = device();
    return {d.block_index.x + static_cast<unsigned>(d.current->rank), d.block_index.y, d.block_index.z};
}

inline void run_thread() {
    device().body();
    device().current->done = true;
    yield_thread();
}

// Runs a thread until it waits or ends.
inline void resume(Thread& t) {
    Device& d = device();
    d.current = &t;
    if (_setjmp(d.scheduler) != 0) return;
    if (t.started) _longjmp(t.place, 1);
    t.started = true;
    setcontext(&t.context);
}

inline void run_block() {  // or the blocks of a cluster
    Device& d = device();
    std::memset(static_cast<void*>(d.shared.data()), 0xCD, d.shared.size() * sizeof(uint4));
    for (Thread& t : d.threads) {
        t.done = t.started = false;
        t.block_waits = t.group_waits = t.warp_waits = t.cluster_waits = 0;
        t.open.clear();
        t.groups.clear();
        getcontext(&t.context);
        t.context.uc_stack.ss_sp = t.stack.get();
        t.context.uc_stack.ss_size = kStack;
        t.context.uc_link = nullptr;
        makecontext(&t.context, run_thread, 0);
    }
    for (size_t left = d.threads.size(); left > 0;) {
        left = 0;
        for (Thread& t : d.threads) {
            if (t.done) continue;
            resume(t);
            left += !t.done;
        }
    }
}

inline void launch(dim3 grid, dim3 block, size_t shared, std::function<void()> body, int cluster = 1) {
    Device& d = device();
    d.grid = grid;
    d.block = block;
    d.body = std::move(body);
    d.cluster = cluster;
    d.block_threads = static_cast<int>(block.x * block.y * block.z);
    const size_t of_block = static_cast<size_t>(d.block_threads), count = of_block * static_cast<size_t>(cluster);
    if (d.threads.size() != count) {
        d.threads = std::vector<Thread>(count);
        for (Thread& t : d.threads) t.stack = std::make_unique<char[]>(kStack);
    }
    d.warps = std::vector<Exchange>((of_block + kWarp - 1) / kWarp * static_cast<size_t>(cluster));
    for (size_t thread = 0; thread < count; ++thread) {  // the same number of threads may come in another shape
        const size_t i = thread % of_block;
        d.threads[thread].number = static_cast<int>(i);
        d.threads[thread].rank = static_cast<int>(thread / of_block);
        d.threads[thread].index = {static_cast<unsigned>(i % block.x), static_cast<unsigned>(i / block.x % block.y),
                                   static_cast<unsigned>(i / block.x / block.y)};
    }
    d.block_shared = (shared + 1023) / 1024 * (1024 / sizeof(uint4));  // aligned alike in all blocks of a cluster
    d.shared.resize(d.block_shared * static_cast<size_t>(cluster));
    for (unsigned z = 0; z < grid.z; ++z)
        for (unsigned y = 0; y < grid.y; ++y)
            for (unsigned x = 0; x < grid.x; x += static_cast<unsigned>(cluster)) {
                d.block_index = {x, y, z};
                run_block();
            }
}

}  // namespace imgopt::emulator

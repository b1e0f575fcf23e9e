// The part of cuda_hopper.h that is the device's: tensor maps as they were declared, barriers that count bytes, stores
// and products of tiles. A copy lands when its barrier's phase ends, a store when its thread waits for it, no earlier;
// a product reads shared memory at once.
#pragma once

#include <map>

#define __grid_constant__

namespace imgopt {

inline bool has_hopper_kernels() { return true; }

struct TensorMap {
    ByteTensor tensor;
    uint32_t box[4];
    PixelWindow window;
};

inline TensorMap box_map(const ByteTensor& t, const uint32_t (&box)[4]) {
    return {t, {box[0], box[1], box[2], box[3]}, {}};
}
inline TensorMap window_map(const ByteTensor& t, const PixelWindow& w, uint32_t channels, uint32_t pixels) {
    return {t, {channels, pixels, 1, 1}, w};
}

using Barrier = uint64_t;

namespace emulator {

struct BarrierState {
    int arrivals, pending;
    int64_t bytes;
    uint32_t phase;
    std::vector<std::function<void()>> copies;
};

inline BarrierState& state_of(const Barrier* barrier) {
    static std::map<const Barrier*, BarrierState> states;
    return states[barrier];
}

inline void settle(BarrierState& b) {
    if (b.pending > 0 || b.bytes != 0) return;
    for (const auto& copy : b.copies) copy();
    b = {b.arrivals, b.arrivals, 0, b.phase ^ 1, {}};
}

inline std::vector<std::function<void()>>& stores() {
    static std::map<int, std::vector<std::function<void()>>> of_thread;
    return of_thread[device().current->number];
}

// Byte `at` of row `row` of a tile of rows of `span` bytes, chunks exchanged by the address.
inline uint8_t* tile_byte(const void* tile, int64_t row, int64_t at, int64_t span) {
    const uintptr_t address = reinterpret_cast<uintptr_t>(tile) + static_cast<uintptr_t>(row * span + at);
    return reinterpret_cast<uint8_t*>(address ^ (address >> 7 & (span == 128 ? 7 : 3)) << 4);
}

// Null outside of the tensor.
inline uint8_t* element(const ByteTensor& t, const int64_t (&at)[4]) {
    int64_t offset = at[0];
    for (uint32_t i = 0; i < t.rank; ++i) {
        if (at[i] < 0 || at[i] >= static_cast<int64_t>(t.size[i])) return nullptr;
        if (i > 0) offset += at[i] * static_cast<int64_t>(t.stride[i - 1]);
    }
    return static_cast<uint8_t*>(const_cast<void*>(t.data)) + offset;
}

inline void start_copy(Barrier* barrier, int64_t bytes, std::function<void()> copy) {
    BarrierState& b = state_of(barrier);
    b.bytes -= bytes;
    b.copies.push_back(std::move(copy));
    settle(b);
}

}  // namespace emulator

inline void start_barrier(Barrier* barrier, int arrivals) {
    emulator::state_of(barrier) = {arrivals, arrivals, 0, 0, {}};
}
inline void publish_barriers() {}
inline void arrive_expecting(Barrier* barrier, int bytes) {
    emulator::BarrierState& b = emulator::state_of(barrier);
    --b.pending;
    b.bytes += bytes;
    emulator::settle(b);
}
inline void arrive(Barrier* barrier) { arrive_expecting(barrier, 0); }
inline void wait_for(Barrier* barrier, uint32_t parity) {
    while (emulator::state_of(barrier).phase == parity) emulator::yield_thread();
}
inline void group_barrier(int group) {
    emulator::Thread* me = emulator::device().current;
    const int64_t count = ++me->group_waits;
    while (!emulator::all_reached(group * 128, group * 128 + 128, &emulator::Thread::group_waits, count))
        emulator::yield_thread();
}
template <int groups>
void groups_barrier() {
    emulator::Thread* me = emulator::device().current;
    const int64_t count = ++me->group_waits;
    while (!emulator::all_reached(0, groups * 128, &emulator::Thread::group_waits, count)) emulator::yield_thread();
}
inline void publish_stores() {}

inline int cluster_rank() { return emulator::device().current->rank; }
inline void cluster_barrier() {
    emulator::Device& d = emulator::device();
    const int64_t count = ++d.current->cluster_waits;
    const auto reached = [&] {
        return std::all_of(d.threads.begin(), d.threads.end(),
                           [&](const emulator::Thread& t) { return t.done || t.cluster_waits >= count; });
    };
    while (!reached()) emulator::yield_thread();
}
// What is at `own`'s place in the shared memory of another block of the cluster.
template <class T>
T* in_block(T* own, int rank) {
    const auto offset = reinterpret_cast<uintptr_t>(own) -
                        reinterpret_cast<uintptr_t>(emulator::shared_of(emulator::device().current->rank));
    return reinterpret_cast<T*>(reinterpret_cast<uintptr_t>(emulator::shared_of(rank)) + offset);
}
inline void arrive_in(Barrier* barrier, int rank) { arrive(in_block(barrier, rank)); }
template <int registers>
void give_registers() {}
template <int registers>
void take_registers() {}

inline void load_window(void* to, const TensorMap& map, Barrier* barrier, int channel, int x, int y, int n, int right,
                        int down) {
    const int64_t span = map.box[0];
    emulator::start_copy(barrier, span * map.box[1], [=] {
        const PixelWindow& w = map.window;
        int64_t at[4] = {channel, x, y, n};
        for (int64_t row = 0; row < map.box[1]; ++row) {
            for (int64_t i = 0; i < span; ++i) {
                const uint8_t* from = emulator::element(map.tensor, {channel + i, at[1] + right, at[2] + down, at[3]});
                *emulator::tile_byte(to, row, i, span) = from ? *from : 0;
            }
            for (int axis = 0; axis < 2; ++axis) {
                at[1 + axis] += w.step[axis];
                if (at[1 + axis] <= static_cast<int64_t>(map.tensor.size[1 + axis]) - 1 + w.last[axis]) break;
                at[1 + axis] = w.first[axis];
                if (axis == 1) ++at[3];
            }
        }
    });
}
inline void load_box(void* to, const TensorMap& map, Barrier* barrier, int x, int y, int z = 0, int n = 0) {
    const int64_t span = map.box[0], lines = map.box[1], rows = lines * map.box[2];
    emulator::start_copy(barrier, span * rows, [=] {
        for (int64_t row = 0; row < rows; ++row)
            for (int64_t i = 0; i < span; ++i) {
                const uint8_t* from = emulator::element(map.tensor, {x + i, y + row % lines, z + row / lines, n});
                *emulator::tile_byte(to, row, i, span) = from ? *from : 0;
            }
    });
}
template <int blocks>
void load_box_for_all(void* to, const TensorMap& map, Barrier* barrier, int x, int y) {
    for (int rank = 0; rank < blocks; ++rank) load_box(in_block(to, rank), map, in_block(barrier, rank), x, y);
}
inline void load_bytes(void* to, const void* from, int bytes, Barrier* barrier) {
    emulator::start_copy(barrier, bytes, [=] { std::memcpy(to, from, static_cast<size_t>(bytes)); });
}
inline void store_box(const void* from, const TensorMap& map, int x, int y, int z = 0, int n = 0) {
    const int64_t span = map.box[0], lines = map.box[1], rows = lines * map.box[2];
    emulator::stores().push_back([=] {
        for (int64_t row = 0; row < rows; ++row)
            for (int64_t i = 0; i < span; ++i)
                if (uint8_t* to = emulator::element(map.tensor, {x + i, y + row % lines, z + row / lines, n}))
                    *to = *emulator::tile_byte(from, row, i, span);
    });
}
inline void commit_stores() {}
inline void wait_until_read() {
    for (const auto& store : emulator::stores()) store();
    emulator::stores().clear();
}
inline void wait_until_stored() { wait_until_read(); }

template <int span>
uint64_t tile_of(const void* shared) {
    return reinterpret_cast<uintptr_t>(shared) >> 4 | uint64_t{span == 128 ? 1 : 2} << 62;
}
inline void begin_products() {}
inline void commit_products() {}
template <int pending = 0>
void wait_products() {}

// Chunks of 16 bytes from the start of the block's shared memory.
inline uint32_t tile_place(const void* shared) {
    const auto start = reinterpret_cast<uintptr_t>(emulator::shared_of(emulator::device().current->rank));
    return static_cast<uint32_t>((reinterpret_cast<uintptr_t>(shared) - start) / 16);
}
inline uint32_t block_place(const void* shared) { return tile_place(shared); }
template <bool brain, int side>
void multiply_block(float (&s)[side / 2], uint32_t x, uint32_t block) {
    const auto* shared = reinterpret_cast<const char*>(emulator::shared_of(emulator::device().current->rank));
    const int lane = emulator::lane(), warp = emulator::device().current->number / 32 % 4;
    uint32_t a[4], b[2];
    for (int i = 0; i < 4; ++i)
        std::memcpy(
            a + i,
            emulator::tile_byte(shared + x * 16, warp * 16 + lane / 4 + i % 2 * 8, i / 2 * 16 + lane % 4 * 4, 128), 4);
    for (int j = 0; j < side / 8; ++j) {
        for (int k = 0; k < 2; ++k)
            std::memcpy(b + k, shared + block * 16 + (j * side / 8 + k) * 128 + lane / 4 * 16 + lane % 4 * 4, 4);
        float sums[4] = {s[4 * j], s[4 * j + 1], s[4 * j + 2], s[4 * j + 3]};
        multiply_half<brain>(sums, a, b[0], b[1]);
        std::copy(sums, sums + 4, s + 4 * j);
    }
}

template <int columns>
void multiply_tiles(int32_t (&s)[columns / 2], uint64_t a, uint64_t b, int more) {
    const int thread = emulator::device().current->number % 128, lane = thread % 32;
    const int64_t span = a >> 62 == 1 ? 128 : 64;
    const auto byte = [&](uint64_t tile, int64_t row, int k) {
        return *emulator::tile_byte(reinterpret_cast<const void*>(tile << 2 >> 2 << 4), row, k, span);
    };
    for (int i = 0; i < columns / 2; ++i) {
        const int row = thread / 32 * 16 + lane / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
        uint32_t sum = more ? static_cast<uint32_t>(s[i]) : 0;
        for (int k = 0; k < 32; ++k)
            sum += static_cast<uint32_t>(byte(a, row, k) * static_cast<int8_t>(byte(b, column, k)));
        s[i] = static_cast<int32_t>(sum);
    }
}

}  // namespace imgopt

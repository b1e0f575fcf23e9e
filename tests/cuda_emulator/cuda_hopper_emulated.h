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
    uint32_t box[3];
    PixelWindow window;
};

inline TensorMap box_map(const ByteTensor& t, const uint32_t (&box)[3]) { return {t, {box[0], box[1], box[2]}, {}}; }
inline TensorMap window_map(const ByteTensor& t, const PixelWindow& w, uint32_t channels, uint32_t pixels) {
    return {t, {channels, pixels, 1}, w};
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
inline void publish_stores() {}

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
inline void load_box(void* to, const TensorMap& map, Barrier* barrier, int x, int y, int z = 0) {
    const int64_t span = map.box[0], lines = map.box[1], rows = lines * map.box[2];
    emulator::start_copy(barrier, span * rows, [=] {
        for (int64_t row = 0; row < rows; ++row)
            for (int64_t i = 0; i < span; ++i) {
                const uint8_t* from = emulator::element(map.tensor, {x + i, y + row % lines, z + row / lines, 0});
                *emulator::tile_byte(to, row, i, span) = from ? *from : 0;
            }
    });
}
inline void store_box(const void* from, const TensorMap& map, int x, int y) {
    const int64_t span = map.box[0];
    emulator::stores().push_back([=] {
        for (int64_t row = 0; row < map.box[1]; ++row)
            for (int64_t i = 0; i < span; ++i)
                if (uint8_t* to = emulator::element(map.tensor, {x + i, y + row, 0, 0}))
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
inline void wait_products() {}

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

// A CUDA device in a few hundred lines, for tests: cuda_threads.h runs the threads, here are the language's names and
// the instructions that csrc/cuda.h promises the kernels. An asynchronous copy happens no earlier than the wait that
// promises it, so a missing wait shows as a wrong result. Included by csrc/cuda.h in place of CUDA's headers.
#pragma once

#include <algorithm>
#include <cfenv>

#include "cuda_threads.h"

#define threadIdx (::imgopt::emulator::device().current->index)
#define blockIdx (::imgopt::emulator::block_index())
#define blockDim (::imgopt::emulator::device().block)
#define gridDim (::imgopt::emulator::device().grid)

inline void __syncthreads() { imgopt::emulator::block_barrier(); }
inline void __syncwarp() { imgopt::emulator::warp_barrier(); }

template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
    static_assert(sizeof(T) <= 16);
    imgopt::emulator::Exchange& e = imgopt::emulator::exchange();
    std::memcpy(e.words[imgopt::emulator::lane()], &value, sizeof(T));
    imgopt::emulator::warp_barrier();
    T other;
    std::memcpy(&other, e.words[imgopt::emulator::lane() ^ mask], sizeof(T));
    imgopt::emulator::warp_barrier();
    return other;
}

inline unsigned long long atomicAdd(unsigned long long* at, unsigned long long value) {
    const unsigned long long before = *at;
    *at += value;
    return before;
}
inline unsigned atomicMax(unsigned* at, unsigned value) {
    const unsigned before = *at;
    *at = value > before ? value : before;
    return before;
}

namespace imgopt {

class Launcher {
  public:
    explicit Launcher(const Tensor&) {}
    template <class... P, class... A>
    void operator()(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared, A&&... arguments) const {
        emulator::launch(grid, block, shared, [&] { kernel(static_cast<P>(arguments)...); });
    }
    template <class... P, class... A>
    void overlapping(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared, A&&... arguments) const {
        (*this)(kernel, grid, block, shared, arguments...);
    }
    template <class... P, class... A>
    void clusters(void (*kernel)(P...), int cluster, dim3 grid, dim3 block, size_t shared, A&&... arguments) const {
        emulator::launch(grid, block, shared, [&] { kernel(static_cast<P>(arguments)...); }, cluster);
    }
    template <class... P>
    int64_t resident_clusters(void (*)(P...), int, int, size_t) const {
        return 2;
    }
    void copy(void* to, const void* from, int64_t bytes) const { std::memcpy(to, from, static_cast<size_t>(bytes)); }
    size_t shared_bytes() const { return 227 << 10; }
    int64_t processors() const { return 4; }  // few, so that small problems reach every tile size
    template <class... P>
    int64_t resident_blocks(void (*)(P...), int) const {
        return 2;
    }
};

inline void check_device(const Tensor&, const char*) {}

inline void wait_for_predecessor() {}
inline void let_successor_start() {}

template <class T>
T* dynamic_shared() {
    return reinterpret_cast<T*>(emulator::shared_of(emulator::device().current->rank));
}
template <class T>
T load_cached(const T* from) {
    return *from;
}

inline void copy_16_async(void* shared, const void* from, int bytes) {
    emulator::device().current->open.push_back({shared, from, bytes});
}
inline void commit_copies() {
    emulator::Thread& t = *emulator::device().current;
    t.groups.push_back(std::move(t.open));
    t.open.clear();
}
template <int pending>
void wait_copies() {
    std::deque<std::vector<emulator::Copy>>& groups = emulator::device().current->groups;
    for (; groups.size() > static_cast<size_t>(pending); groups.pop_front())
        for (const emulator::Copy& c : groups.front()) {
            std::memset(c.to, 0, 16);
            std::memcpy(c.to, c.from, static_cast<size_t>(c.bytes));
        }
}

inline void load_matrices(uint32_t (&m)[4], const void* shared) {
    emulator::Exchange& e = emulator::exchange();
    const int lane = emulator::lane();
    e.addresses[lane] = shared;
    emulator::warp_barrier();
    for (int i = 0; i < 4; ++i)
        std::memcpy(&m[i], static_cast<const char*>(e.addresses[8 * i + lane / 4]) + 4 * (lane % 4), 4);
    emulator::warp_barrier();
}

inline uint32_t transposed_matrix(uint32_t m) {
    emulator::Exchange& e = emulator::exchange();
    const int lane = emulator::lane();
    e.words[lane][0] = m;
    emulator::warp_barrier();
    uint32_t result = 0;  // elements (row, 2 t) and (row, 2 t + 1) of the transposed
    for (int half = 0; half < 2; ++half) {
        const int row = 2 * (lane % 4) + half, column = lane / 4;
        const uint32_t word = e.words[4 * row + column / 2][0];
        result |= (word >> (column % 2 * 16) & 0xffff) << (16 * half);
    }
    emulator::warp_barrier();
    return result;
}

// Every lane shows its fragments and sums its own four results. element(lane, first word, k of the row) as the device
// distributes them: a row's 32-bit words lie with four neighbouring lanes, and the second half in the next registers.
template <class Sum, class Product>
void multiply_fragments(Sum (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, const Product& product) {
    emulator::Exchange& e = emulator::exchange();
    const int lane = emulator::lane();
    for (int i = 0; i < 4; ++i) e.words[lane][i] = a[i];
    e.words[lane][4] = b0;
    e.words[lane][5] = b1;
    emulator::warp_barrier();
    for (int i = 0; i < 4; ++i) {
        const int row = lane / 4, column = 2 * (lane % 4) + i % 2;
        for (int word = 0; word < 8; ++word) {
            const uint32_t left = e.words[4 * row + word % 4][i / 2 + word / 4 * 2];
            const uint32_t right = e.words[4 * column + word % 4][4 + word / 4];
            product(sum[i], left, right);
        }
    }
    emulator::warp_barrier();
}

inline int32_t dot4(uint32_t u, uint32_t s, int32_t sum) {
    uint32_t total = static_cast<uint32_t>(sum);
    for (int i = 0; i < 32; i += 8)
        total += static_cast<uint32_t>(static_cast<int32_t>(u >> i & 0xff) * static_cast<int8_t>(s >> i & 0xff));
    return static_cast<int32_t>(total);
}

inline int32_t dot2_low(uint32_t two, uint32_t bytes, int32_t sum) {
    for (int i = 0; i < 2; ++i)
        sum += static_cast<int16_t>(two >> (16 * i)) * static_cast<int32_t>(bytes >> (8 * i) & 0xff);
    return sum;
}
inline int32_t dot2_high(uint32_t two, uint32_t bytes, int32_t sum) { return dot2_low(two, bytes >> 16, sum); }

inline void multiply_u8_s8(int32_t (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    multiply_fragments(sum, a, b0, b1, [](int32_t& to, uint32_t u, uint32_t s) { to = dot4(u, s, to); });
}

inline float float_of_half(uint16_t bits) {
    const int exponent = bits >> 10 & 31, fraction = bits & 1023;
    const float sign = bits >> 15 ? -1.0f : 1.0f;
    if (exponent == 31) return fraction ? __builtin_nanf("") : sign * __builtin_inff();
    if (exponent == 0) return sign * static_cast<float>(fraction) * 0x1p-24f;
    return sign * __builtin_ldexpf(static_cast<float>(1024 + fraction), exponent - 25);
}

template <bool brain>
void multiply_half(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    const auto value = [](uint32_t word, int half) {
        const uint16_t bits = static_cast<uint16_t>(word >> (16 * half));
        if constexpr (!brain) return float_of_half(bits);
        const uint32_t wide = static_cast<uint32_t>(bits) << 16;
        float v;
        std::memcpy(&v, &wide, 4);
        return v;
    };
    multiply_fragments(sum, a, b0, b1, [&](float& to, uint32_t left, uint32_t right) {
        for (int half = 0; half < 2; ++half) to += value(left, half) * value(right, half);
    });
}

inline uint32_t bytes_of(uint32_t a, uint32_t b, uint32_t order) {
    const uint64_t all = static_cast<uint64_t>(b) << 32 | a;
    uint32_t result = 0;
    for (int i = 0; i < 4; ++i) result |= static_cast<uint32_t>(all >> (order >> (4 * i) & 7) * 8 & 0xff) << (8 * i);
    return result;
}
inline uint32_t larger_bytes(uint32_t a, uint32_t b) {
    uint32_t result = 0;
    for (int i = 0; i < 32; i += 8) result |= std::max(a >> i & 0xff, b >> i & 0xff) << i;
    return result;
}
inline uint32_t shift_pair(uint32_t low, uint32_t high, uint32_t bits) {
    return static_cast<uint32_t>((static_cast<uint64_t>(high) << 32 | low) >> (bits & 31));
}

inline uint16_t half_of_float(float v) {  // round half to even, by the two neighbours' distance
    if (v != v) return 0x7fff;
    const uint16_t sign = __builtin_signbitf(v) ? 0x8000 : 0;
    const float size = __builtin_fabsf(v);
    if (size == 0) return sign;
    if (size >= 65520.0f) return static_cast<uint16_t>(sign | 0x7c00);
    int exponent;
    __builtin_frexpf(size, &exponent);
    const float unit = __builtin_ldexpf(1.0f, (exponent < -13 ? -13 : exponent) - 11);
    const float steps = __builtin_rintf(size / unit);
    const int first = exponent < -13 ? 0 : (exponent + 13) << 10;
    return static_cast<uint16_t>(sign | (first + static_cast<int>(steps)));
}
inline uint16_t bfloat16_of_float(float v) {
    uint32_t bits;
    std::memcpy(&bits, &v, 4);
    if (v != v) return 0x7fff;
    return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline uint32_t halves_of_floats(float low, float high) {
    return half_of_float(low) | static_cast<uint32_t>(half_of_float(high)) << 16;
}
inline uint32_t bfloat16s_of_floats(float low, float high) {
    return bfloat16_of_float(low) | static_cast<uint32_t>(bfloat16_of_float(high)) << 16;
}

inline uint32_t of_lane(uint32_t v, int from) {
    emulator::Exchange& e = emulator::exchange();
    e.words[emulator::lane()][0] = v;
    emulator::warp_barrier();
    const uint32_t other = e.words[from][0];
    emulator::warp_barrier();
    return other;
}
inline uint32_t warp_uniform(uint32_t v) { return v; }
inline int lowest_bit(uint32_t bits) { return __builtin_ctz(bits); }
inline int set_bits(uint64_t bits) { return __builtin_popcountll(bits); }

inline float reciprocal_of(float v) { return 1 / v; }
template <class V>
V kept(V v) {
    return v;
}

template <class T>
T sum_rounded_down(T a, T b) {
    const int before = std::fegetround();
    std::fesetround(FE_DOWNWARD);
    volatile T x = a;
    volatile T sum = x + b;
    std::fesetround(before);
    return sum;
}
inline int32_t low_word(double v) {
    int32_t word;
    std::memcpy(&word, &v, sizeof(word));
    return word;
}

}  // namespace imgopt

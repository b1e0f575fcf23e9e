// Times the probe kernels of the active instruction set. A rate is what the machine can do, so the best of several
// short runs counts, and every run is checked: the arithmetic loops count their own multiply-adds (each product is
// 1), the memory loops return a sum that only a complete pass gives.
#include <time.h>

#include <map>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>

#include "../numpy_module.h"

namespace imgopt {
namespace {

constexpr int64_t kRounds = 1 << 18;        // about a millisecond of arithmetic; exact in float32 below 2^24
constexpr int kRepeats = 8;                 // of each arithmetic loop
constexpr int64_t kCachedBytes = 64 << 20;  // read or copied in one run over a buffer that fits in a cache
constexpr int kMemoryRepeats = 4;
constexpr int64_t kSmallest = 64 << 10;
constexpr int64_t kDramLimit = 256 << 20;  // bytes; a last-level cache of more than a quarter of it is not outrun

// The time that this thread has spent on a core: other programs on a busy machine do not count.
double thread_seconds() {
    timespec now;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
    return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

template <class Run>
double seconds(const Run& run) {
    const double start = thread_seconds();
    run();
    return thread_seconds() - start;
}

// Operations per second of an arithmetic loop; a multiply-add is two.
double arithmetic_rate(int64_t (*loop)(int64_t, const Probe::Operands&), const Probe::Operands& operands) {
    double best = 0;
    for (int i = 0; i < kRepeats; ++i) {
        int64_t count = 0;
        const double time = seconds([&] { count = loop(kRounds, operands); });
        if (count <= 0 || count % kRounds != 0) throw std::runtime_error("probe: an arithmetic loop miscounted");
        best = std::max(best, 2.0 * static_cast<double>(count) / time);
    }
    return best;
}

class Buffer {
  public:
    explicit Buffer(int64_t bytes) : data_(static_cast<char*>(::operator new(bytes, std::align_val_t{4096}))) {
        std::fill_n(data_.get(), bytes, 1);  // every page is real memory, not the shared page of zeros
    }
    char* get() { return data_.get(); }

  private:
    struct Free {
        void operator()(void* p) const { ::operator delete(p, std::align_val_t{4096}); }
    };
    std::unique_ptr<char, Free> data_;
};

// Bytes per second that a buffer of `bytes` is read with, over and over.
double read_rate(const Probe& probe, char* source, int64_t bytes) {
    const int64_t passes = std::max<int64_t>(1, kCachedBytes / bytes);
    const uint64_t expected = static_cast<uint64_t>(bytes / 8 * passes) * 0x0101010101010101u;
    double best = 0;
    for (int i = 0; i < kMemoryRepeats; ++i) {
        uint64_t sum = 0;
        const double time = seconds([&] {
            for (int64_t pass = 0; pass < passes; ++pass) sum += probe.read(source, bytes);
        });
        if (sum != expected) throw std::runtime_error("probe: the read loop missed a part of its buffer");
        best = std::max(best, static_cast<double>(bytes * passes) / time);
    }
    return best;
}

// Bytes per second, read and written together, of copying one half of a buffer of `bytes` onto the other. Plain
// stores: the line that is written is fetched first, as it is in any kernel that does not stream past the caches.
double copy_rate(const Probe& probe, char* buffer, int64_t bytes) {
    const int64_t half = bytes / 2, passes = std::max<int64_t>(1, kCachedBytes / bytes);
    double best = 0;
    for (int i = 0; i < kMemoryRepeats; ++i) {
        std::fill_n(buffer + half, half, 2);
        const double time = seconds([&] {
            for (int64_t pass = 0; pass < passes; ++pass) probe.copy(buffer, buffer + half, half);
        });
        if (!std::equal(buffer, buffer + half, buffer + half)) throw std::runtime_error("probe: an incomplete copy");
        best = std::max(best, static_cast<double>(2 * half * passes) / time);
    }
    return best;
}

int64_t whole_blocks(int64_t bytes) { return bytes / 8192 * 8192; }

std::map<std::string, double> measure_rates(int64_t l2_bytes, int64_t l3_bytes) {
    if (l2_bytes < kSmallest || l3_bytes < l2_bytes)
        throw py::value_error("l2_bytes, l3_bytes: expected 65536 <= l2_bytes <= l3_bytes");
    const Probe& probe = kernels().probe;
    // Half of L2 and a quarter of L3: other programs, and on servers other cores, use them too.
    const int64_t sizes[3] = {whole_blocks(l2_bytes / 2), whole_blocks(std::max(l3_bytes / 4, l2_bytes)),
                              whole_blocks(std::min(4 * l3_bytes, kDramLimit))};
    std::map<std::string, double> rates;
    double fma, int8_dot, read[3], copy[3];
    {
        py::gil_scoped_release release;
        const Probe::Operands operands;
        fma = arithmetic_rate(probe.fma, operands);
        int8_dot = arithmetic_rate(probe.int8_dot, operands);
        Buffer buffer(sizes[2]);
        for (int i = 0; i < 3; ++i) {
            read[i] = read_rate(probe, buffer.get(), sizes[i]);
            copy[i] = copy_rate(probe, buffer.get(), sizes[i]);
        }
    }
    rates["fma"] = fma;
    rates["int8_dot"] = int8_dot;
    const char* const levels[3] = {"l2", "l3", "dram"};
    for (int i = 0; i < 3; ++i) {
        rates[std::string("read_") + levels[i]] = read[i];
        rates[std::string("copy_") + levels[i]] = copy[i];
    }
    return rates;
}

int64_t int8_products(int64_t rounds) {
    if (rounds < 1 || rounds > kRounds) throw py::value_error("rounds: expected 1 <= rounds <= 2^18");
    const py::gil_scoped_release release;
    return kernels().probe.int8_dot(rounds, Probe::Operands());
}

}  // namespace

void register_probe(py::module_& m) {
    m.def("int8_products", &int8_products, py::arg("rounds"),
          "The loop behind `int8_dot` of measure_rates, to be timed in turns with what its rate is compared with; "
          "returns how many multiply-adds it did.");
    m.def("measure_rates", &measure_rates, py::arg("l2_bytes"), py::arg("l3_bytes"),
          "Rates of one core under the active instruction set, measured now: `fma` (flop/s) and `int8_dot` (op/s), a "
          "multiply-add being two; `read_*` and `copy_*` (bytes/s; a copy counts what it reads and what it writes) in "
          "buffers that fit L2, L3 or neither, for caches of the given sizes.");
}

}  // namespace imgopt

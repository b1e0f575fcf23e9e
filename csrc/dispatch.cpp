// Chooses the instruction set once, from CPUID and XCR0, and fills the table in ascending order, so that each unit
// only names what it does better than the one before. IMGOPT_ISA forces one; set_isa() changes it while running
// (tests do), which is why the active entry is an atomic index into tables that are never written again.
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>

#include "kernels.h"

#if defined(IMGOPT_HAVE_NEON) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace imgopt {
namespace {

struct Isa {
    const char* name;
    bool (*supported)();
    void (*fill)(KernelTable&);
};

void fill_scalar(KernelTable& t) {
    scalar::affine_warp(t);
    scalar::int8_conv2d(t);
    scalar::masked_matmul(t);
    scalar::masked_sgd(t);
    scalar::photometric(t);
    scalar::probe(t);
}

#if defined(IMGOPT_HAVE_AVX2)
// __builtin_cpu_supports reads CPUID and, for the AVX families, XCR0: a system that does not save the registers
// reports the feature as absent.
bool has_avx2() {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
void fill_avx2(KernelTable& t) {
    avx2::affine_warp(t);
    avx2::int8_conv2d(t);
    avx2::masked_matmul(t);
    avx2::masked_sgd(t);
    avx2::photometric(t);
    avx2::probe(t);
}
#endif

#if defined(IMGOPT_HAVE_AVXVNNI)
bool has_avxvnni() { return has_avx2() && __builtin_cpu_supports("avxvnni"); }
void fill_avxvnni(KernelTable& t) {
    avxvnni::int8_conv2d(t);
    avxvnni::probe(t);
}
#endif

#if defined(IMGOPT_HAVE_AVX512)
// The level of Ice Lake and Zen 4. Processors with AVX-512 but without VNNI and VBMI take the AVX2 units.
bool has_avx512() {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi");
}
void fill_avx512(KernelTable& t) {
    avx512::affine_warp(t);
    avx512::int8_conv2d(t);
    avx512::masked_matmul(t);
    avx512::masked_sgd(t);
    avx512::photometric(t);
    avx512::probe(t);
}
#endif

#if defined(IMGOPT_HAVE_NEON)
// The units use the dot product and half precision of ARMv8.2, which a Cortex-A72, say, does not have.
bool has_neon() {
#if defined(__linux__)
    const unsigned long have = getauxval(AT_HWCAP);
    return (have & HWCAP_ASIMDDP) && (have & HWCAP_ASIMDHP);
#else
    return true;  // every 64-bit processor of Apple's that runs macOS
#endif
}
void fill_neon(KernelTable& t) {
    neon::affine_warp(t);
    neon::int8_conv2d(t);
    neon::masked_matmul(t);
    neon::masked_sgd(t);
    neon::photometric(t);
    neon::probe(t);
}
#endif

bool always() { return true; }

constexpr Isa kIsas[] = {
    {"scalar", always, fill_scalar},
#if defined(IMGOPT_HAVE_AVX2)
    {"avx2", has_avx2, fill_avx2},
#endif
#if defined(IMGOPT_HAVE_AVXVNNI)
    {"avxvnni", has_avxvnni, fill_avxvnni},
#endif
#if defined(IMGOPT_HAVE_AVX512)
    {"avx512", has_avx512, fill_avx512},
#endif
#if defined(IMGOPT_HAVE_NEON)
    {"neon", has_neon, fill_neon},
#endif
};
constexpr int kCount = sizeof(kIsas) / sizeof(kIsas[0]);

// One filled table per supported instruction set, built on first use.
struct Tables {
    KernelTable table[kCount];
    const char* name[kCount + 1];
    int count = 0;

    Tables() {
        KernelTable t{};
        for (const Isa& isa : kIsas) {
            if (!isa.supported()) continue;
            isa.fill(t);
            table[count] = t;
            name[count++] = isa.name;
        }
        name[count] = nullptr;
    }

    int find(const char* wanted) const {
        for (int i = 0; i < count; ++i)
            if (std::strcmp(name[i], wanted) == 0) return i;
        std::string have;
        for (int i = 0; i < count; ++i) have += std::string(i ? ", " : "") + name[i];
        throw std::invalid_argument("IMGOPT_ISA: expected one of " + have + " (what this processor has), got '" +
                                    wanted + "'");
    }
};

const Tables& tables() {
    static const Tables instance;
    return instance;
}

std::atomic<int> active{-1};

int active_index() {
    int index = active.load(std::memory_order_acquire);
    if (index >= 0) return index;
    const char* wanted = std::getenv("IMGOPT_ISA");
    index = wanted && *wanted ? tables().find(wanted) : tables().count - 1;
    active.store(index, std::memory_order_release);
    return index;
}

}  // namespace

const KernelTable& kernels() { return tables().table[active_index()]; }

const char* const* supported_isas() { return tables().name; }

const char* active_isa() { return tables().name[active_index()]; }

void set_isa(const char* name) { active.store(tables().find(name), std::memory_order_release); }

void* thread_scratch(int64_t bytes) {
    struct Free {
        void operator()(void* p) const { ::operator delete(p, std::align_val_t{64}); }
    };
    thread_local std::unique_ptr<void, Free> block;
    thread_local int64_t size = 0;
    if (bytes > size) {
        block.reset();
        block.reset(::operator new(static_cast<size_t>(bytes), std::align_val_t{64}));
        size = bytes;
    }
    return block.get();
}

}  // namespace imgopt

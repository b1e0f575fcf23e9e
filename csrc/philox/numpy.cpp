// Philox4x32-10 for a batch of samples: src/imgopt_fast/augment/philox.py defines the numbers and has them in NumPy,
// bit for bit. There they took a fifth of a pipeline's time beside the kernels, forty operations on arrays of a few
// hundred words; here a pipeline of four blocks and 64 samples takes 3 us.
#include "../numpy_module.h"

namespace imgopt {
namespace {

using Words = py::array_t<uint64_t, py::array::c_style>;

constexpr int kRounds = 10, kWords = 4;
constexpr int64_t kLanes = 32;  // samples at a time: the compiler's vectors
constexpr uint32_t kMultiply0 = 0xD2511F53, kMultiply2 = 0xCD9E8D57;
constexpr uint32_t kWeyl0 = 0x9E3779B9, kWeyl1 = 0xBB67AE85;  // golden ratio and sqrt(3) - 1, in units of 2^-32
constexpr double kUnit = 1.0 / 4294967296.0;

struct Counters {
    uint32_t word[kWords][kLanes];
};

void encrypt(Counters& c, uint64_t seed) {
    uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < kRounds; ++round, key0 += kWeyl0, key1 += kWeyl1)
        for (int64_t i = 0; i < kLanes; ++i) {
            const uint64_t product0 = uint64_t{kMultiply0} * c.word[0][i];
            const uint64_t product2 = uint64_t{kMultiply2} * c.word[2][i];
            c.word[0][i] = static_cast<uint32_t>(product2 >> 32) ^ c.word[1][i] ^ key0;
            c.word[1][i] = static_cast<uint32_t>(product2);
            c.word[2][i] = static_cast<uint32_t>(product0 >> 32) ^ c.word[3][i] ^ key1;
            c.word[3][i] = static_cast<uint32_t>(product0);
        }
}

py::array_t<double> philox_uniforms(uint64_t seed, uint32_t epoch, const Words& index, const Words& blocks) {
    if (index.ndim() != 1 || blocks.ndim() != 1) throw py::value_error("index, blocks: expected one dimension");
    const int64_t samples = index.size(), rows = blocks.size() * kWords;
    py::array_t<double> result({rows, samples});
    const uint64_t *sample = index.data(), *block = blocks.data();
    double* to = result.mutable_data();
    for (int64_t row = 0; row < rows; row += kWords, ++block)
        for (int64_t first = 0; first < samples; first += kLanes) {
            const int64_t count = std::min(kLanes, samples - first);
            Counters c{};
            for (int64_t i = 0; i < count; ++i) {
                c.word[0][i] = static_cast<uint32_t>(sample[first + i]);
                c.word[1][i] = static_cast<uint32_t>(sample[first + i] >> 32);
            }
            std::fill_n(c.word[2], count, epoch);
            std::fill_n(c.word[3], count, static_cast<uint32_t>(*block));
            encrypt(c, seed);
            for (int w = 0; w < kWords; ++w)
                for (int64_t i = 0; i < count; ++i) to[(row + w) * samples + first + i] = c.word[w][i] * kUnit;
        }
    return result;
}

}  // namespace

void register_philox(py::module_& m) {
    m.def("philox_uniforms", &philox_uniforms, py::arg("seed"), py::arg("epoch"), py::arg("index").noconvert(),
          py::arg("blocks").noconvert(), "Numbers in [0, 1), (4 * blocks, samples); see imgopt_fast.augment.philox.");
}

}  // namespace imgopt

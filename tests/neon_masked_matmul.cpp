// Compares the NEON unit of masked_matmul with the scalar one, without torch or Python: test_masked_matmul.py
// cross-compiles it and runs it in an emulator. Float results may differ by the rounding of fused multiply-adds,
// integer ones not at all. Exit status: the number of cases that differ.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "kernels.h"

namespace imgopt {
void* thread_scratch(int64_t bytes) {
    static std::vector<char> block(1 << 23);
    return bytes <= (1 << 23) - 64 ? block.data() + (64 - reinterpret_cast<uintptr_t>(block.data()) % 64) : nullptr;
}
}  // namespace imgopt

using namespace imgopt;

namespace {

std::mt19937 generator(1);

float uniform() { return static_cast<float>(generator()) * 0x1p-31f - 1.0f; }

// Any numbers of steps of the three kinds on any columns: what a structure means does not depend on a mask.
struct Structure {
    std::vector<int32_t> quads, wide, source;
    std::vector<uint8_t> narrow;
    RowQuads view;

    Structure(int64_t rows, int64_t columns, int64_t block) {
        const int64_t blocks = (columns + block - 1) / block, per_block = (rows + 3) / 4;
        for (int64_t b = 0; b < blocks; ++b)
            for (int64_t q = 0; q < per_block; ++q) {
                for (int r = 0; r < 4; ++r) quads.push_back(static_cast<int32_t>(4 * q + 3 - r));
                quads.push_back(static_cast<int32_t>(source.size() / 4));
                quads.push_back(static_cast<int32_t>(wide.size()));
                const uint32_t width = static_cast<uint32_t>(std::min(block, columns - b * block));
                for (const int distinct : {1, 2, 4}) {
                    const int32_t steps = static_cast<int32_t>(generator() % 12);
                    quads.push_back(steps);
                    for (int32_t i = 0; i < steps * distinct; ++i)
                        wide.push_back(static_cast<int32_t>(generator() % width));
                    for (int32_t i = 0; i < steps * 4; ++i) {
                        const bool padding = 4 * q + 3 - i % 4 >= rows || generator() % 9 == 0;
                        source.push_back(padding ? -1 : static_cast<int32_t>(source.size()));
                    }
                }
            }
        narrow.assign(wide.begin(), wide.end());
        const bool is_wide = block > 256;
        view = {quads.data(), is_wide ? static_cast<const void*>(wide.data()) : narrow.data(), rows, blocks, block,
                is_wide};
    }

    // Per row, over groups of four values: what an instruction that moves its inputs by 128 has to take back.
    std::vector<int32_t> sums_of(const std::vector<int8_t>& groups) const {
        std::vector<int32_t> sums(static_cast<size_t>((view.rows + 3) / 4 * 4));
        for (size_t q = 0; q < quads.size(); q += RowQuads::kFields) {
            const int32_t steps = quads[q + 6] + quads[q + 7] + quads[q + 8];
            for (int32_t i = 4 * quads[q + 4]; i < 4 * (quads[q + 4] + steps); ++i)
                for (int k = 0; k < 4; ++k)
                    sums[static_cast<size_t>(quads[q + static_cast<size_t>(i % 4)])] +=
                        groups[static_cast<size_t>(4 * i + k)];
        }
        return sums;
    }
};

bool near(const std::vector<float>& a, const std::vector<float>& b) {
    for (size_t i = 0; i < a.size(); ++i)
        if (!(std::fabs(a[i] - b[i]) <= 1e-4f)) return false;
    return true;
}

}  // namespace

int main() {
    KernelTable tables[2] = {};
    scalar::masked_matmul(tables[0]);
    neon::masked_matmul(tables[1]);
    int cases = 0, differ = 0;
    const auto count = [&](bool same) { ++cases, differ += !same; };
    for (const int64_t block : {64, 256, 300})
        for (const int64_t samples : {1, 5, 16, 67}) {
            const int64_t rows = 70, columns = 300, windows = 2, units = windows * ((samples + 63) / 64);
            const Structure s(rows, columns, block);
            const size_t size = s.source.size();
            std::vector<float> x(static_cast<size_t>(samples * columns)), grad(static_cast<size_t>(samples * rows)),
                weight(size), bias(rows);
            for (std::vector<float>* all : {&x, &grad, &weight, &bias})
                for (float& v : *all) v = uniform();
            const MaskedInput input{DType::f32, x.data(), samples, columns, columns, {1, 1},
                                    {1, 1},     {1, 1},   {1, 1},  {0, 0},  {1, 1},  {1, 1}};
            std::vector<float> values[2], output[2], gradient[2];
            for (int i = 0; i < 2; ++i) {
                const Masked& kernels = tables[i].masked;
                values[i].resize(size);
                kernels.values({DType::f32, weight.data(), s.source.data(), values[i].data()}, 0,
                               static_cast<int64_t>(size));
                output[i].assign(grad.size(), NAN);
                const double high = block == 64 ? 0.5 : 1e9;
                kernels.matmul({s.view, input, values[i].data(), bias.data(), output[i].data(), -1e9, high}, 0, units);
                std::vector<float> sums(size, NAN);
                gradient[i].assign(size, 0);
                kernels.weight_grad(
                    {s.view, input, grad.data(), s.source.data(), sums.data(), gradient[i].data(), rows, 0}, 0,
                    windows);
            }
            count(values[0] == values[1]);
            count(near(output[0], output[1]));
            count(near(gradient[0], gradient[1]));
            if (block > Int8MaskedMatmul::kLargestBlock) continue;
            // The same structure over groups of four columns.
            std::vector<uint8_t> bytes(x.size() * 4), result[2];
            for (uint8_t& b : bytes) b = static_cast<uint8_t>(generator());
            std::vector<int8_t> groups(size * 4);
            for (int8_t& v : groups) v = static_cast<int8_t>(generator());
            const std::vector<int32_t> offsets(rows, 5), weight_sum = s.sums_of(groups);
            const std::vector<float> multiplier(rows, 0.001f);
            for (const DType dtype : {DType::u8, DType::i8}) {
                for (int i = 0; i < 2; ++i) {
                    result[i].resize(grad.size());
                    tables[i].masked.int8_matmul(
                        {s.view, dtype, DType::u8, bytes.data(), groups.data(), offsets.data(), multiplier.data(),
                         result[i].data(), samples, columns * 4, 7, 100, -100.0f, 155.0f, weight_sum.data()},
                        0, units);
                }
                count(result[0] == result[1]);
            }
        }
    std::printf("%d cases, %d differ\n", cases, differ);
    return differ;
}

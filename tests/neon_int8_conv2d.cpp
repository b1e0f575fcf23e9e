// Compares the NEON unit of int8_conv2d with the scalar one, byte for byte, without torch or Python:
// test_int8_conv2d.py cross-compiles it and runs it in an emulator. Exit status: the number of cases that differ.
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "kernels.h"

namespace imgopt {
void* thread_scratch(int64_t bytes) {
    static std::vector<char> block(1 << 22);
    return bytes <= (1 << 22) - 64 ? block.data() + (64 - reinterpret_cast<uintptr_t>(block.data()) % 64) : nullptr;
}
}  // namespace imgopt

using namespace imgopt;

struct Geometry {
    int64_t height, width, channels, outputs, kernel, groups, stride, padding, dilation;
};
constexpr Geometry kGeometries[] = {
    {9, 7, 16, 32, 3, 1, 1, 1, 1},  {9, 7, 3, 17, 7, 1, 2, 3, 1},     {5, 5, 64, 16, 1, 1, 1, 0, 1},
    {6, 8, 12, 12, 3, 12, 1, 1, 1}, {6, 8, 12, 24, 3, 4, 2, 1, 2},    {4, 4, 5, 6, 2, 1, 1, 1, 1},
    {1, 1, 1, 1, 1, 1, 1, 0, 1},    {13, 40, 16, 130, 3, 1, 1, 1, 1}, {6, 9, 40, 40, 5, 40, 2, 2, 1},
    {7, 6, 16, 16, 3, 16, 1, 1, 1}, {5, 9, 33, 33, 4, 33, 1, 3, 2},   {3, 5, 7, 7, 1, 7, 1, 0, 1},
    {7, 7, 16, 20, 3, 1, 1, 1, 1},
};

int main() {
    KernelTable tables[2] = {};
    scalar::int8_conv2d(tables[0]);
    neon::int8_conv2d(tables[1]);
    std::mt19937 random(1);
    int cases = 0, differ = 0;
    for (const Geometry& g : kGeometries) {
        for (int variant = 0; variant < 10; ++variant, ++cases) {
            Int8Conv2d p{};
            p.weight = {g.outputs, g.channels / g.groups, g.groups, g.kernel, g.kernel};
            p.batch = 2;
            p.in_h = g.height;
            p.in_w = g.width;
            p.input_stride = g.channels;
            p.stride_h = p.stride_w = g.stride;
            p.dilation_h = p.dilation_w = g.dilation;
            p.pad_top = p.pad_left = g.padding;
            p.out_h = (g.height + 2 * g.padding - g.dilation * (g.kernel - 1) - 1) / g.stride + 1;
            p.out_w = (g.width + 2 * g.padding - g.dilation * (g.kernel - 1) - 1) / g.stride + 1;
            p.output_stride = p.residual_stride = g.outputs;
            p.input_flip = variant & 1 ? 0x80 : 0;
            p.input_zero_point = variant % 3 ? 77 : 0;  // 0: other units leave out taps in padding
            p.output_zero_point = 100;
            p.float_output = variant < 8 && variant & 2;
            const bool shifts = variant >= 6, huge = variant == 5;
            p.low = p.float_output ? -1e30f : -100.0f;
            p.high = p.float_output ? 1e30f : 155.0f;
            const size_t outputs = static_cast<size_t>(2 * p.out_h * p.out_w * g.outputs);
            std::vector<uint8_t> input(static_cast<size_t>(2 * g.height * g.width * g.channels)), residual(outputs);
            std::vector<int8_t> weight(static_cast<size_t>(g.outputs * p.weight.group_channels * g.kernel * g.kernel));
            std::vector<int32_t> offset(static_cast<size_t>(g.outputs + kChannelSlack));
            // Multipliers beyond 0.5 make values that no int32 holds.
            std::vector<float> multiplier(offset.size(), huge ? 1e30f : 0.003f);
            std::vector<Int8Shift> shift(offset.size());
            for (auto& s : shift)
                s = {static_cast<int8_t>(variant == 9 ? static_cast<int>(random() % 94) - 31 : 5 + random() % 9),
                     static_cast<int8_t>(variant == 9 ? random() % 30 : random() % 3),
                     static_cast<int8_t>(variant == 9 ? random() % 52 : random() % 8), 0};
            for (auto& x : input) x = static_cast<uint8_t>(random());
            for (auto& x : residual) x = static_cast<uint8_t>(random());
            for (auto& x : weight) x = static_cast<int8_t>(random());
            for (auto& x : offset) x = static_cast<int32_t>(random() % 2000);
            p.input = input.data();
            p.offset = offset.data();
            p.multiplier = multiplier.data();
            p.shift = shifts ? shift.data() : nullptr;
            p.residual = variant % 4 == 1 || variant % 4 == 2 ? residual.data() : nullptr;
            p.residual_multiplier = 0.3f;
            p.residual_zero_point = 9;
            std::vector<uint8_t> results[2];
            for (int i = 0; i < 2; ++i) {
                const KernelTable& table = tables[i];
                std::vector<uint8_t> packed(static_cast<size_t>(table.int8_weight_bytes(p.weight)));
                table.int8_weight_pack(p.weight, weight.data(), packed.data());
                results[i].assign(outputs * (p.float_output ? 4 : 1), 1);
                p.packed = packed.data();
                p.output = results[i].data();
                table.int8_conv2d(p, 0, table.int8_conv2d_units(p));
            }
            differ += results[0] != results[1];
        }
    }
    std::printf("%d cases, %d differ\n", cases, differ);
    return differ;
}

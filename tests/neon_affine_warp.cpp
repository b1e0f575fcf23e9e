// Compares the NEON unit of affine_warp with the scalar one, bit by bit, without torch or Python:
// test_affine_warp_isas.py cross-compiles it and runs it in an emulator. Guard bytes around every image and output
// catch what writes beyond them. With an argument, `scalar` or `neon`, it does one warp of 64 x 64 pixels as often as a
// second argument says, for counting instructions. Exit status: the number of cases that differ.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "kernels.h"

namespace imgopt {
void* thread_scratch(int64_t bytes) {
    static std::vector<char> block(1 << 24);
    return bytes <= (1 << 24) - 64 ? block.data() + (64 - reinterpret_cast<uintptr_t>(block.data()) % 64) : nullptr;
}
}  // namespace imgopt

using namespace imgopt;

namespace {

constexpr int64_t kGuard = 64;
constexpr double kInfinite = HUGE_VAL;
std::mt19937 generator(1);

int64_t bytes_of(DType dtype) { return dtype == DType::u8 ? 1 : dtype == DType::f32 ? 4 : dtype == DType::f64 ? 8 : 2; }
double uniform() { return generator() * 0x1p-32; }

void set_strides(int64_t* to, int64_t c, int64_t h, int64_t w, bool interleaved) {
    const int64_t planar[] = {c * h * w, h * w, w, 1}, pixels[] = {c * h * w, 1, w * c, c};
    std::memcpy(to, interleaved ? pixels : planar, 4 * sizeof(int64_t));
}

// Any matrix: a turn, a homography, huge, degenerate, not finite.
void draw_matrix(int kind, double side, double* m) {
    static constexpr double kExtremes[] = {0, 1e-30, -1, 2.5, -3e5, 1e9, 1e300, kInfinite, -kInfinite, NAN};
    const double angle = uniform() * 6.3, scale = 0.3 + 2 * uniform(), c = std::cos(angle) * scale,
                 s = std::sin(angle) * scale, half = side / 2;
    const double turn[9] = {c, -s, half - c * half + s * half + 0.3, s, c, half - s * half - c * half, 0, 0, 1};
    std::memcpy(m, turn, sizeof turn);
    if (kind == 1) {
        m[6] = 0.6 * (uniform() - 0.5) / side;
        m[7] = 0.6 * (uniform() - 0.5) / side;
    }
    if (kind == 2)
        for (int i = 0; i < 6; ++i) m[i] = kExtremes[generator() % 10];
    if (kind == 3)
        for (int i = 0; i < 9; ++i) m[i] = kExtremes[generator() % 10];
}

struct Problem {
    AffineWarp p{};
    std::vector<uint8_t> images, table;
    std::vector<double> matrix, fill, scale, offset, color;

    Problem(int64_t c, int64_t h, int64_t w, int64_t out_h, int64_t out_w, DType output, bool interleaved_in,
            bool interleaved_out, int kind) {
        p.batch = 2;
        p.channels = c;
        p.height = h;
        p.width = w;
        p.output_height = out_h;
        p.output_width = out_w;
        p.images_dtype = DType::u8;
        p.output_dtype = output;
        images.resize(static_cast<size_t>(2 * c * h * w + 2 * kGuard));
        for (uint8_t& v : images) v = static_cast<uint8_t>(generator());
        p.images = images.data() + kGuard;
        set_strides(p.images_stride, c, h, w, interleaved_in);
        set_strides(p.output_stride, c, out_h, out_w, interleaved_out);
        matrix.resize(18);
        for (int i = 0; i < 2; ++i) draw_matrix(kind, static_cast<double>(w), matrix.data() + 9 * i);
        for (int64_t i = 0; i < c; ++i) {
            fill.push_back(static_cast<double>(generator() % 256));
            scale.push_back(output == DType::u8 ? 1 : 1 + 3 * uniform());
            offset.push_back(output == DType::u8 ? -0.0 : -2 * uniform());
        }
        p.matrix = matrix.data();
        p.matrix_stride = 9;
        p.fill = fill.data();
        p.scale = scale.data();
        p.offset = offset.data();
        p.color_stride = 12;
    }

    // Any finite values below 2 instead of levels.
    void make_floating(DType dtype) {
        p.images_dtype = dtype;
        p.table = nullptr;
        const int64_t bytes = 2 * p.channels * p.height * p.width * bytes_of(dtype);
        images.resize(static_cast<size_t>(bytes + 2 * kGuard));
        p.images = images.data() + kGuard;
        for (int64_t i = 0; i < bytes; ++i) images[kGuard + i] = static_cast<uint8_t>(generator());
        for (int64_t i = bytes_of(dtype) - 1; i < bytes; i += bytes_of(dtype)) images[kGuard + i] &= 0x3f;
    }
    void add_color() {
        for (int i = 0; i < 24; ++i) color.push_back(1.2 * uniform() - 0.3);
        p.color_matrix = color.data();
    }
    void add_table() {
        for (int64_t i = 0; i < 256 * p.channels; ++i) table.push_back(static_cast<uint8_t>(generator()));
        p.table = table.data();
    }

    std::vector<uint8_t> run(const KernelTable& kernels) {
        const int64_t size = 2 * p.channels * p.output_height * p.output_width * bytes_of(p.output_dtype);
        std::vector<uint8_t> output(static_cast<size_t>(size + 2 * kGuard), 0xa5);
        p.output = output.data() + kGuard;
        kernels.affine_warp(p, 0, 2 * p.output_height);
        return output;
    }
};

// Floating images and what arrives at the output: both gradients.
std::vector<double> gradients(const KernelTable& kernels, Problem& problem) {
    AffineWarpBackward b{};
    b.warp = problem.p;
    b.warp.images_dtype = b.warp.output_dtype = DType::f32;
    const AffineWarp& p = b.warp;
    const size_t values = static_cast<size_t>(2 * p.channels * p.height * p.width),
                 flows = static_cast<size_t>(2 * p.channels * p.output_height * p.output_width);
    std::vector<float> images(values), grad(flows), found(values, NAN);
    for (size_t i = 0; i < values; ++i) images[i] = problem.images[kGuard + i] / 255.0f;
    for (size_t i = 0; i < flows; ++i) grad[i] = static_cast<float>(i * 7 % 31) - 15;
    std::vector<double> sums(static_cast<size_t>(2 * p.output_height * 9));
    b.warp.images = images.data();
    b.grad = grad.data();
    b.grad_images = found.data();
    std::memcpy(b.grad_images_stride, p.images_stride, sizeof p.images_stride);
    b.grad_matrix = sums.data();
    kernels.affine_warp_backward.images(b, 0, 2 * p.height);
    kernels.affine_warp_backward.matrix(b, 0, 2 * p.output_height);
    sums.insert(sums.end(), found.begin(), found.end());
    return sums;
}

bool same_bits(const std::vector<double>& a, const std::vector<double>& b) {
    for (size_t i = 0; i < a.size(); ++i)
        if (std::memcmp(&a[i], &b[i], sizeof(double)) != 0 && !(std::isnan(a[i]) && std::isnan(b[i]))) return false;
    return true;
}

}  // namespace

int main(int count, char** arguments) {
    KernelTable tables[2] = {};
    scalar::affine_warp(tables[0]);
    neon::affine_warp(tables[1]);
    if (count > 2) {
        const KernelTable& kernels = tables[std::strcmp(arguments[1], "neon") == 0];
        const int variant = count > 3 ? std::atoi(arguments[3]) : 0;
        const DType output = variant % 2 ? DType::f32 : DType::u8;
        Problem problem(variant / 8 ? 1 : 3, 64, 64, 64, 64, output, true, output == DType::u8, 0);
        problem.p.interpolation = static_cast<Interpolation>(variant / 2 % 4 == 0 ? 1 : variant / 2 % 4 == 1 ? 0 : 2);
        for (int i = 0; i < std::atoi(arguments[2]); ++i) problem.run(kernels);
        return 0;
    }
    static constexpr int64_t kSizes[][4] = {{23, 37, 31, 70}, {64, 65, 17, 129}, {9, 16, 16, 16}, {1, 1, 5, 3},
                                            {1, 7, 3, 63},    {6, 1, 8, 64},     {150, 3, 5, 8}};
    int cases = 0, differ = 0;
    for (const int64_t c : {1, 3, 4, 2})
        for (const Interpolation interpolation :
             {Interpolation::nearest, Interpolation::bilinear, Interpolation::bicubic})
            for (const Padding padding : {Padding::constant, Padding::edge, Padding::reflect, Padding::symmetric})
                for (int kind = 0; kind < 4; ++kind)
                    for (const DType output : {DType::u8, DType::f32, DType::f16, DType::bf16}) {
                        const int64_t* size = kSizes[generator() % 7];
                        const uint32_t way = generator();
                        Problem problem(c, size[0], size[1], size[2], size[3], output, way & 1, way & 2, kind);
                        problem.p.interpolation = interpolation;
                        problem.p.padding = padding;
                        problem.p.antialias = way % 7 == 0;
                        if (c == 3 && way % 3 == 0) problem.add_color();
                        if (way % 5 == 0) problem.add_table();
                        const bool same = problem.run(tables[0]) == problem.run(tables[1]);
                        if (!same)
                            std::fprintf(stderr, "c %d interpolation %d padding %d kind %d dtype %d size %d x %d\n",
                                         static_cast<int>(c), static_cast<int>(interpolation),
                                         static_cast<int>(padding), kind, static_cast<int>(output),
                                         static_cast<int>(size[0]), static_cast<int>(size[1]));
                        differ += !same;
                        ++cases;
                        if (output != DType::f32) continue;
                        const bool same_gradients =
                            same_bits(gradients(tables[0], problem), gradients(tables[1], problem));
                        if (!same_gradients)
                            std::fprintf(stderr, "gradients of the above, c %d\n", static_cast<int>(c));
                        differ += !same_gradients;
                        ++cases;
                    }
    for (const int64_t c : {1, 3, 4, 6})
        for (const Interpolation interpolation :
             {Interpolation::nearest, Interpolation::bilinear, Interpolation::bicubic})
            for (const Padding padding : {Padding::constant, Padding::edge, Padding::reflect, Padding::symmetric})
                for (int kind = 0; kind < 4; ++kind)
                    for (const DType output : {DType::u8, DType::f32, DType::f16, DType::bf16}) {
                        static constexpr DType kTypes[] = {DType::f32, DType::f16, DType::bf16};
                        const int64_t* size = kSizes[generator() % 7];
                        const uint32_t way = generator();
                        Problem problem(c, size[0], size[1], size[2], size[3], output, way & 1, way & 2, kind);
                        problem.make_floating(kTypes[way % 3]);
                        problem.p.interpolation = interpolation;
                        problem.p.padding = padding;
                        problem.p.antialias = way % 7 == 0;
                        if (c == 3 && way % 5 == 0) problem.add_color();
                        const bool same = problem.run(tables[0]) == problem.run(tables[1]);
                        if (!same)
                            std::fprintf(stderr, "floating images, c %d interpolation %d padding %d kind %d dtype %d\n",
                                         static_cast<int>(c), static_cast<int>(interpolation),
                                         static_cast<int>(padding), kind, static_cast<int>(output));
                        differ += !same;
                        ++cases;
                    }
    std::printf("%d cases, %d differ\n", cases, differ);
    return differ;
}

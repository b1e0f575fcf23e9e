// affine_warp on CUDA: what a kernel needs of an image beside its pixels. The host never sees the matrices, so that
// nothing waits: they are read on the device, and where a box filter or a gradient needs more than the matrix itself, a
// small kernel prepares it per image. The box filter is a pass of its own over the images that have one.
#pragma once

#include <type_traits>

#include "cuda_sample.h"

namespace imgopt {
namespace {

// --- plans ---------------------------------------------------------------------------------------------------------

// A small float32 or float64 matrix per image, contiguous.
struct MatrixView {
    const void* data;  // or null
    int64_t step;      // from image to image
    int rows;
    bool wide;

    __device__ double at(int64_t image, int i) const {
        const int64_t from = image * step + i;
        return wide ? static_cast<const double*>(data)[from] : static_cast<const float*>(data)[from];
    }
    template <int count, class V>
    __device__ void read(int64_t image, int first, V* to) const {
        if (wide) {
            const double* from = static_cast<const double*>(data) + image * step + first;
#pragma unroll
            for (int i = 0; i < count; ++i) to[i] = static_cast<V>(from[i]);
        } else {
            const float* from = static_cast<const float*>(data) + image * step + first;
#pragma unroll
            for (int i = 0; i < count; ++i) to[i] = static_cast<V>(from[i]);
        }
    }
};

// All nine entries of a matrix that may lack its last row; whether it is affine.
__device__ inline bool read_matrix(const MatrixView& matrix, int64_t image, double (&m)[9]) {
    matrix.read<6>(image, 0, m);
    m[6] = m[7] = 0;
    m[8] = 1;
    if (matrix.rows < 3) return true;
    matrix.read<3>(image, 6, m + 6);
    return is_affine(m);
}

// By the adjugate; every entry NaN where the determinant vanishes or is not finite.
__device__ inline void invert(const double* m, double* to) {
    const double c0 = m[4] * m[8] - m[5] * m[7], c1 = m[5] * m[6] - m[3] * m[8], c2 = m[3] * m[7] - m[4] * m[6];
    const double r = 1 / (m[0] * c0 + m[1] * c1 + m[2] * c2);
    const double adjugate[9] = {c0, m[2] * m[7] - m[1] * m[8], m[1] * m[5] - m[2] * m[4],
                                c1, m[0] * m[8] - m[2] * m[6], m[2] * m[3] - m[0] * m[5],
                                c2, m[1] * m[6] - m[0] * m[7], m[0] * m[4] - m[1] * m[3]};
    for (int i = 0; i < 9; ++i) to[i] = finite(r) ? adjugate[i] * r : r - r;
}

__global__ void plan_images(AffineWarp p, const MatrixView matrix, const MatrixView color, ImagePlan* plans) {
    const int64_t step = int64_t{gridDim.x} * blockDim.x;
    for (int64_t image = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; image < p.batch; image += step) {
        double m[9];
        read_matrix(matrix, image, m);
        AffineWarp own = p;
        own.matrix = m;
        own.matrix_stride = 0;
        ImagePlan plan{};
        plan.map = map_of(own, 0);
        invert(plan.map.m, plan.inverse);
        for (int i = 0; color.data && i < 12; ++i) plan.color[i] = color.at(image, i);
        plans[image] = plan;
    }
}

// --- box filter ----------------------------------------------------------------------------------------------------

__device__ inline int32_t boxes(int64_t side, int32_t box) {
    return static_cast<int32_t>(box == 1 ? side : (static_cast<uint32_t>(side) + box - 1) / box);
}

// Elements of scratch per image: a box takes at least two pixels along one axis.
__host__ inline int64_t boxed_elements(const AffineWarp& p) {
    const int64_t half_width = (p.width + 1) / 2 * p.height, half_height = (p.height + 1) / 2 * p.width;
    return (half_width > half_height ? half_width : half_height) * p.channels;
}

__device__ inline void put_mean(uint64_t sum, int64_t count, uint8_t* to) {
    *to = static_cast<uint8_t>((2 * sum + static_cast<uint64_t>(count)) / (2 * static_cast<uint64_t>(count)));
}
template <class T>
__device__ void put_mean(double sum, int64_t count, T* to) {
    narrow(sum / static_cast<double>(count), to);
}

template <class T>
__device__ Pixels<T> image_pixels(const AffineWarp& p, int64_t image) {
    const uint8_t* table = p.table ? p.table + image * p.table_stride : nullptr;
    return {static_cast<const T*>(p.images) + image * p.images_stride[0],
            p.images_stride[2],
            p.images_stride[3],
            p.images_stride[1],
            static_cast<int32_t>(p.height),
            static_cast<int32_t>(p.width),
            table};
}

// The image behind the box filter, where it has one.
template <class T>
__device__ Pixels<T> sampled_pixels(const AffineWarp& p, const Map& map, const T* boxed, int64_t boxed_stride,
                                    int64_t image) {
    if (map.box_x == 1 && map.box_y == 1) return image_pixels<T>(p, image);
    const int32_t width = boxes(p.width, map.box_x);
    return {
        boxed + image * boxed_stride, width * p.channels, p.channels, 1, boxes(p.height, map.box_y), width, nullptr};
}

// Blocks (along y) of one image (along x, grid-stride).
template <class T>
__global__ void box_filter(const AffineWarp p, const ImagePlan* plans, T* boxed, int64_t boxed_stride) {
    using Sum = std::conditional_t<sizeof(T) == 1, uint64_t, double>;
    for (int64_t image = blockIdx.x; image < p.batch; image += gridDim.x) {
        const int32_t box_x = plans[image].map.box_x, box_y = plans[image].map.box_y;
        if (box_x == 1 && box_y == 1) continue;
        const Pixels<T> s = image_pixels<T>(p, image);
        const int64_t width = boxes(p.width, box_x), count = width * boxes(p.height, box_y) * p.channels;
        const int64_t step = int64_t{gridDim.y} * blockDim.x;
        for (int64_t i = int64_t{blockIdx.y} * blockDim.x + threadIdx.x; i < count; i += step) {
            const int64_t c = i % p.channels, x = i / p.channels % width, y = i / p.channels / width;
            const int64_t y0 = y * box_y, y1 = y0 + box_y < p.height ? y0 + box_y : p.height;
            const int64_t x0 = x * box_x, x1 = x0 + box_x < p.width ? x0 + box_x : p.width;
            Sum sum = 0;
            for (int64_t v = y0; v < y1; ++v)
                for (int64_t u = x0; u < x1; ++u)
                    sum += static_cast<Sum>(
                        value_at(s, v * s.row + u * s.column + c * s.channel, static_cast<int>(c), 0.0));
            put_mean(sum, (y1 - y0) * (x1 - x0), boxed + image * boxed_stride + i);
        }
    }
}

}  // namespace
}  // namespace imgopt

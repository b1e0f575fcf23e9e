// Where the left operand of igemm.h lies: output pixels in blocks, runs of them in an image row, and the pointers to
// their input pixels or kernel rows, through which padding costs nothing in the inner loop.
#pragma once

#include <string.h>

#include "arithmetic.h"

namespace imgopt {
namespace {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
// a / stride, rounded up; a division costs as much as a vector of pointers, and most strides are 1 or 2.
inline int64_t steps_over(int64_t a, int64_t stride) {
    return stride == 1 ? a : stride == 2 ? (a + 1) >> 1 : ceil_div(a, stride);
}
inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

inline int64_t taps_of(const Int8Weight& w) { return w.kernel_h * w.kernel_w; }

// The cut of all output pixels into blocks of nearly equal size, at most `most` pixels and a multiple of `whole`, which
// divides `most`.
struct Blocks {
    int64_t pixels, size, blocks;

    Blocks(const Int8Conv2d& p, int64_t most, int64_t whole = 1)
        : pixels(p.batch * p.out_h * p.out_w),
          size(pixels ? round_up(ceil_div(pixels, ceil_div(pixels, most)), whole) : most),
          blocks(ceil_div(pixels, size)) {}
    int64_t begin(int64_t block) const { return smaller(block * size, pixels); }
};

// Consecutive output pixels [m, m + run) of one row of image n, and of these the ones, [first, last), whose columns
// x0 + i * stride .. of `width` pixels lie inside the image.
struct Run {
    int64_t n, oy, ox, run;

    Run(const Int8Conv2d& p, int64_t m, int64_t end) {
        const int64_t row = m / p.out_w;
        ox = m % p.out_w;
        n = row / p.out_h;
        oy = row % p.out_h;
        run = smaller(p.out_w - ox, end - m);
    }
    void inside(const Int8Conv2d& p, int64_t x0, int64_t width, int64_t& first, int64_t& last) const {
        const int64_t room = p.in_w - width + 1 - x0;
        first = x0 < 0 ? smaller(steps_over(-x0, p.stride_w), run) : 0;
        last = room <= 0 ? 0 : smaller(steps_over(room, p.stride_w), run);
        if (last <= first) first = last = run;
    }
};

// Pointers to the input pixels of output pixels [begin, end), table[tap * row_stride + pixel - begin].
inline void fill_table(const Int8Conv2d& p, int64_t begin, int64_t end, const uint8_t* padding, const uint8_t** table,
                       int64_t row_stride) {
    const int64_t step = p.stride_w * p.input_stride;
    for (int64_t m = begin; m < end;) {
        const Run r(p, m, end);
        const uint8_t** out = table + (m - begin);
        for (int64_t ky = 0; ky < p.weight.kernel_h; ++ky) {
            const int64_t y = r.oy * p.stride_h - p.pad_top + ky * p.dilation_h;
            const bool inside = y >= 0 && y < p.in_h;
            for (int64_t kx = 0; kx < p.weight.kernel_w; ++kx, out += row_stride) {
                const int64_t x0 = r.ox * p.stride_w - p.pad_left + kx * p.dilation_w;
                int64_t first = r.run, last = r.run;
                if (inside) r.inside(p, x0, 1, first, last);
                const uint8_t* base = p.input + ((r.n * p.in_h + y) * p.in_w + x0) * p.input_stride;
                for (int64_t i = 0; i < first; ++i) out[i] = padding;
                for (int64_t i = first; i < last; ++i) out[i] = base + i * step;
                for (int64_t i = last; i < r.run; ++i) out[i] = padding;
            }
        }
        m += r.run;
    }
}

// Copies n bytes in pieces that may overlap; a call of memcpy for a few bytes costs more than the copy.
inline void copy_bytes(uint8_t* out, const uint8_t* in, int64_t n) {
    if (n >= 8) {
        for (int64_t i = 0; i < n - 8; i += 8) memcpy(out + i, in + i, 8);
        memcpy(out + n - 8, in + n - 8, 8);
    } else if (n >= 4) {
        memcpy(out, in, 4);
        memcpy(out + n - 4, in + n - 4, 4);
    } else {
        for (int64_t i = 0; i < n; ++i) out[i] = in[i];
    }
}

// Words hold the flipped byte; bytes stay as they are, for the tile to flip.
inline void append(int8_t* out, const uint8_t* in, int64_t n, const Int8Conv2d&) {
    copy_bytes(reinterpret_cast<uint8_t*>(out), in, n);
}
inline void append(int16_t* out, const uint8_t* in, int64_t n, const Int8Conv2d& p) {
    const uint8_t flip = p.input_flip;
    for (int64_t i = 0; i < n; ++i) out[i] = in[i] ^ flip;
}

// Collects the left operands of a block through the table: `pitch` products per pixel. place(weight, ky, i) is the
// place of product i of kernel row ky, where product `cut` does not follow the one before it.
template <class Product, class Place>
void fill_strip(const Int8Conv2d& p, const uint8_t* const* table, int64_t row_stride, int64_t offset, int64_t pixels,
                int64_t pitch, int64_t cut, Place place, Product* strip) {
    const int64_t channels = p.weight.group_channels, kernel_w = p.weight.kernel_w;
    for (int64_t tap = 0; tap < taps_of(p.weight); ++tap) {
        const int64_t begin = tap % kernel_w * channels, end = begin + channels;
        const int64_t middle = begin < cut && cut < end ? cut : end;
        const auto copy = [&](int64_t from, int64_t to) {
            Product* out = strip + place(p.weight, tap / kernel_w, from);
            for (int64_t m = 0; m < pixels; ++m)
                append(out + m * pitch, table[tap * row_stride + m] + offset + from - begin, to - from, p);
        };
        copy(begin, middle);
        if (middle < end) copy(middle, end);
    }
}

// Copies of input rows stay in L1 beside the weights. 7 x 7 of 224 x 224 pixels takes 1 % longer with half of it.
constexpr int64_t kCopiedBytes = 16384;

// The input rows of a band of output rows of a first layer with their padding, `pitch` bytes apart, so that the place
// of an output pixel's bytes follows from its column. Behind them stand, for every pixel of one output row, the last
// bytes of its kernel rows, if these stand apart: a plane of dwords for four kernel rows, where one that does not exist
// meets weights of zero. No dilation.
struct CopiedRows {
    int64_t kernel_h, stride_h, step, left, inside, pitch, band, end, end_dwords, end_pitch;
    int64_t begin = 0, stop = 0;  // the band: output rows of all images, one after another
    uint8_t* copies = nullptr;    // as `left` bytes of padding begin; the kernel rows of the output row at hand are
    const uint8_t* rows = nullptr;
    uint8_t* ends = nullptr;

    // `row_depth` bytes of a kernel row are read from the copies.
    CopiedRows(const Int8Conv2d& p, int64_t row_depth)
        : kernel_h(p.weight.kernel_h), stride_h(p.stride_h), step(p.stride_w * p.input_stride), end(row_depth) {
        const int64_t kernel_bytes = p.weight.kernel_w * p.input_stride, width = (p.out_w - 1) * step + kernel_bytes;
        left = smaller(p.pad_left * p.input_stride, width);
        inside = smaller(p.in_w * p.input_stride, width - left);
        pitch = round_up(left, 64) + round_up(width - left + 4, 64);
        const int64_t more = kCopiedBytes / pitch - kernel_h;
        band = more < 0 ? 1 : smaller(more / stride_h + 1, p.out_h);
        end_dwords = row_depth < kernel_bytes ? ceil_div(kernel_h, 4) : 0;
        end_pitch = round_up(4 * p.out_w, 64);
    }

    // A reader of ends may read three more kernel rows, and 256 bytes more of a row.
    int64_t copied_bytes() const { return ((band - 1) * stride_h + kernel_h + 3) * pitch + 256; }
    int64_t bytes() const { return copied_bytes() + end_dwords * end_pitch; }

    // Before the first output row; `memory` is aligned to a cache line, and so is what is copied.
    void start(uint8_t padding, uint8_t* memory) {
        memset(memory, padding, static_cast<size_t>(copied_bytes()));
        copies = memory + round_up(left, 64) - left;
        ends = memory + copied_bytes();
    }

    // Goes to output row `row`.
    void find(const Int8Conv2d& p, int64_t row, uint8_t padding) {
        if (row < begin || row >= stop) {
            begin = row;
            stop = row + smaller(band, p.out_h - row % p.out_h);
            copy(p, row / p.out_h, row % p.out_h * stride_h - p.pad_top, padding);
        }
        rows = copies + (row - begin) * stride_h * pitch;
    }

  private:
    // The rows of the band, the first of which is row y of image n.
    void copy(const Int8Conv2d& p, int64_t n, int64_t y, uint8_t padding) const {
        const int64_t count = (stop - begin - 1) * stride_h + kernel_h, row_bytes = p.in_w * p.input_stride;
        uint8_t* out = copies + left;
        for (int64_t i = 0; i < count; ++i, ++y, out += pitch)
            if (y >= 0 && y < p.in_h)
                memcpy(out, p.input + (n * p.in_h + y) * row_bytes, static_cast<size_t>(inside));
            else
                memset(out, padding, static_cast<size_t>(inside));
    }
};

// Input rows as words, flipped, for a block of output pixels: the rows of all images one after another, [begin, end) of
// them. A word that nine taps read is made once, and found through the same table as a byte.
struct WidenedRows {
    int64_t begin, end;

    WidenedRows(const Int8Conv2d& p, int64_t first_pixel, int64_t end_pixel) {
        const int64_t first = first_pixel / p.out_w, last = (end_pixel - 1) / p.out_w;
        const int64_t top = first % p.out_h * p.stride_h - p.pad_top;
        const int64_t bottom = last % p.out_h * p.stride_h - p.pad_top + (p.weight.kernel_h - 1) * p.dilation_h + 1;
        const auto inside = [&](int64_t y) { return y < 0 ? 0 : smaller(y, p.in_h); };
        begin = first / p.out_h * p.in_h + inside(top);
        end = last / p.out_h * p.in_h + inside(bottom);
        if (end < begin) end = begin;
    }

    static int64_t row_words(const Int8Conv2d& p) { return p.in_w * p.weight.groups * p.weight.group_channels; }

    // Widens the rows into `words`, and returns the layer as it reads them.
    Int8Conv2d fill(const Int8Conv2d& p, int16_t* words) const {
        const int64_t channels = p.weight.groups * p.weight.group_channels;
        const bool dense = p.input_stride == channels;
        const int64_t n = dense ? (end - begin) * row_words(p) : channels;
        const int64_t runs = dense ? (end > begin) : (end - begin) * p.in_w;
        const uint8_t* from = p.input + begin * p.in_w * p.input_stride;
        for (int64_t i = 0; i < runs; ++i) append(words + i * channels, from + i * p.input_stride, n, p);
        Int8Conv2d widened = p;
        widened.input_stride = channels * 2;
        widened.input = reinterpret_cast<const uint8_t*>(words) - begin * row_words(p) * 2;
        return widened;
    }
};

// Pointers to the kernel rows of output pixels [begin, end), table[ky * row_stride + pixel - begin]: to the image where
// a row lies inside of it with all its dwords (what follows the row meets weights of zero), otherwise to a copy in the
// strip. Nothing is collected for most pixels, which was half of the time of a first layer before. Words are those of
// WidenedRows, behind which all dwords can be read.
template <class Product>
void fill_rows(const Int8Conv2d& p, int64_t begin, int64_t end, const uint8_t* padding, int64_t row_depth,
               Product* strip, const uint8_t** table, int64_t row_stride) {
    const int64_t kernel_w = p.weight.kernel_w, kernel_h = p.weight.kernel_h, step = p.stride_w * p.input_stride;
    const int64_t input_bytes = p.batch * p.in_h * p.in_w * p.input_stride;
    for (int64_t m = begin; m < end;) {
        const Run r(p, m, end);
        const int64_t x0 = r.ox * p.stride_w - p.pad_left;
        for (int64_t ky = 0; ky < kernel_h; ++ky) {
            const int64_t y = r.oy * p.stride_h - p.pad_top + ky * p.dilation_h;
            const bool inside = y >= 0 && y < p.in_h;
            const int64_t line = (r.n * p.in_h + y) * p.in_w * p.input_stride, room = input_bytes - row_depth - line;
            int64_t first = r.run, last = r.run;
            if (inside) r.inside(p, x0, kernel_w, first, last);
            while (last > first && sizeof(Product) == 1 && x0 * p.input_stride + (last - 1) * step > room) --last;
            const uint8_t** out = table + ky * row_stride + m - begin;
            const uint8_t* base = p.input + line + x0 * p.input_stride;
            for (int64_t i = first; i < last; ++i) out[i] = base + i * step;
            for (int64_t i = first > 0 ? 0 : last; i < r.run; i = i + 1 == first ? last : i + 1) {
                uint8_t* copy = reinterpret_cast<uint8_t*>(strip + ((m - begin + i) * kernel_h + ky) * row_depth);
                out[i] = copy;
                for (int64_t kx = 0; kx < kernel_w; ++kx) {
                    const int64_t x = x0 + i * p.stride_w + kx;
                    const bool real = inside && x >= 0 && x < p.in_w;
                    copy_bytes(copy + kx * p.input_stride, real ? p.input + line + x * p.input_stride : padding,
                               p.input_stride);
                }
            }
        }
        m += r.run;
    }
}

}  // namespace
}  // namespace imgopt

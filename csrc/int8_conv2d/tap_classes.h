// Output pixels of a block, sorted by the taps that reach the image, so that a tile leaves out the taps that meet
// nothing but padding: with 3 x 3 taps 16 % of the products at 7 x 7 pixels, 9 % at 14 x 14. Where the zero point is 0
// a padded tap adds nothing to the sum, and only there may it be left out.
#pragma once

#include "rows.h"

namespace imgopt {
namespace {

constexpr int64_t kMostTaps = 64;  // bits of a mask
constexpr int64_t kMostClasses = 16;
// Of a class: a smaller tile does not keep the multipliers busy, and these pixels do no harm among the others.
constexpr int64_t kLeastPixels = 4;

inline uint64_t low_bits(int64_t count) { return count >= 64 ? ~uint64_t{0} : (uint64_t{1} << count) - 1; }

// The taps of a kernel row, bit kx, that reach an image column for at least one of pixels [first, last) of a run.
inline uint64_t reaching_columns(const Int8Conv2d& p, const Run& r, int64_t first, int64_t last) {
    uint64_t taps = 0;
    for (int64_t kx = 0; kx < p.weight.kernel_w; ++kx) {
        const int64_t offset = kx * p.dilation_w - p.pad_left;
        const int64_t left = (r.ox + first) * p.stride_w + offset, right = (r.ox + last - 1) * p.stride_w + offset;
        if (right >= 0 && left < p.in_w) taps |= uint64_t{1} << kx;
    }
    return taps;
}

inline bool can_skip_taps(const Int8Conv2d& p) {
    const Int8Weight& w = p.weight;
    const int64_t bottom = (p.out_h - 1) * p.stride_h - p.pad_top + (w.kernel_h - 1) * p.dilation_h;
    const int64_t right = (p.out_w - 1) * p.stride_w - p.pad_left + (w.kernel_w - 1) * p.dilation_w;
    const bool padded = p.pad_top > 0 || p.pad_left > 0 || bottom >= p.in_h || right >= p.in_w;
    return padded && p.input_zero_point == 0 && taps_of(w) <= kMostTaps;
}

// For blocks of at most BLOCK pixels; 0 for a kernel that sorts none.
template <int64_t BLOCK>
struct TapClasses {
    static constexpr int64_t kPixels = BLOCK > 0 ? BLOCK : 1;

    struct Class {
        uint64_t mask;
        int64_t pixels, taps;
        uint8_t tap[kMostTaps];
    };
    int64_t count = 1;
    Class classes[kMostClasses];  // the first one: all taps
    int64_t pixel[kPixels];       // the output pixels, class after class
    uint8_t place[kPixels];       // where each of them stood in the block

    // Sorts the output pixels [begin, end): by their rows' taps where a row reaches over an edge, else by columns, if
    // the block has enough rows for that. `count` stays 1 where nothing is gained.
    void sort(const Int8Conv2d& p, int64_t begin, int64_t end) {
        count = 1;
        classes[0].mask = low_bits(taps_of(p.weight));
        classes[0].pixels = 0;
        const bool by_columns = p.out_w * kLeastPixels <= end - begin;
        uint8_t own[kPixels];
        for (int64_t m = begin; m < end;) {
            const Run r(p, m, end);
            uint64_t rows = 0;
            for (int64_t ky = 0; ky < p.weight.kernel_h; ++ky) {
                const int64_t y = r.oy * p.stride_h - p.pad_top + ky * p.dilation_h;
                if (y >= 0 && y < p.in_h) rows |= uint64_t{1} << (ky * p.weight.kernel_w);
            }
            const uint64_t whole = rows * low_bits(p.weight.kernel_w);
            if (whole == classes[0].mask && by_columns)
                mark_columns(p, r, rows, own + (m - begin));
            else
                mark(whole, own + (m - begin), 0, r.run);
            m += r.run;
        }
        if (count > 1) place_pixels(own, begin, end - begin);
    }

    // Brings the table of rows.h into the order of the classes.
    void sort_table(const uint8_t* const* table, int64_t taps, int64_t pixels, int64_t row_stride,
                    const uint8_t** sorted) const {
        for (int64_t tap = 0; tap < taps; ++tap, table += row_stride, sorted += row_stride)
            for (int64_t m = 0; m < pixels; ++m) sorted[m] = table[place[m]];
    }

  private:
    // A run of which all rows of taps reach the image: its middle, and the ends that hang over a side.
    void mark_columns(const Int8Conv2d& p, const Run& r, uint64_t rows, uint8_t* own) {
        int64_t first = 0, last = r.run;
        for (int64_t kx = 0; kx < p.weight.kernel_w; ++kx) {
            int64_t inside_first, inside_last;
            r.inside(p, r.ox * p.stride_w - p.pad_left + kx * p.dilation_w, 1, inside_first, inside_last);
            first = inside_first > first ? inside_first : first;
            last = inside_last < last ? inside_last : last;
        }
        if (last <= first) return mark(rows * reaching_columns(p, r, 0, r.run), own, 0, r.run);
        if (first > 0) mark(rows * reaching_columns(p, r, 0, first), own, 0, first);
        mark(classes[0].mask, own, first, last);
        if (last < r.run) mark(rows * reaching_columns(p, r, last, r.run), own, last, r.run);
    }

    void mark(uint64_t mask, uint8_t* own, int64_t first, int64_t last) {
        int64_t found = 0;
        while (found < count && classes[found].mask != mask) ++found;
        if (found == count) {
            if (count == kMostClasses) {
                found = 0;
            } else {
                classes[count].mask = mask;
                classes[count++].pixels = 0;
            }
        }
        memset(own + first, static_cast<int>(found), static_cast<size_t>(last - first));
        classes[found].pixels += last - first;
    }

    // Small classes join the first one; the pixels of each then follow each other.
    void place_pixels(const uint8_t* own, int64_t begin, int64_t pixels) {
        int64_t next[kMostClasses], at = 0;
        for (int64_t c = 1; c < count; ++c)
            if (classes[c].pixels < kLeastPixels) {
                classes[0].pixels += classes[c].pixels;
                classes[c].pixels = 0;
            }
        if (classes[0].pixels == pixels) {
            count = 1;
            return;
        }
        for (int64_t c = 0; c < count; ++c) {
            next[c] = at;
            at += classes[c].pixels;
            classes[c].taps = 0;
            for (uint64_t left = classes[c].mask; left; left &= left - 1)
                classes[c].tap[classes[c].taps++] = static_cast<uint8_t>(__builtin_ctzll(left));
        }
        for (int64_t m = 0; m < pixels; ++m) {
            const int64_t to = next[classes[own[m]].pixels ? own[m] : 0]++;
            place[to] = static_cast<uint8_t>(m);
            pixel[to] = begin + m;
        }
    }
};

}  // namespace
}  // namespace imgopt

// Channel sums and histograms of uint8 images: what contrast, autocontrast and equalize have to know before they act.
// Integers, so any order of adding gives the same result.
#pragma once

#include "../kernels.h"

namespace imgopt {
namespace {

// --- sums ----------------------------------------------------------------------------------------------------------

// A row of 192 bytes adds to 192 sums of 16 bits, which stay in registers, at the rate of the loads. Every channel has
// its own columns there where the channels divide 192: 1, 2, 3, 4, 6, 8 of them and more.
#if defined(__AVX512BW__)
constexpr int kVectorBytes = 64;
#else
constexpr int kVectorBytes = 32;
#endif
typedef uint16_t Words __attribute__((vector_size(kVectorBytes)));
typedef uint8_t Bytes __attribute__((vector_size(kVectorBytes / 2)));
constexpr int kColumns = 192, kVectors = kColumns / (kVectorBytes / 2);
constexpr int64_t kMostRows = 257;  // 257 · 255 = 2^16 - 1

inline void sum_rows(const uint8_t* from, int64_t rows, int channels, int64_t* sums) {
    Words columns[kVectors] = {};
    for (int64_t row = 0; row < rows; ++row, from += kColumns)
        for (int i = 0; i < kVectors; ++i) {
            Bytes bytes;
            __builtin_memcpy(&bytes, from + i * sizeof bytes, sizeof bytes);
            columns[i] += __builtin_convertvector(bytes, Words);
        }
    // The columns of small images are as much work as their rows: the upper half joins the lower one while both begin
    // with the same channel, a vector at a time.
    uint16_t column[kColumns];
    uint32_t wide[kColumns];
    __builtin_memcpy(column, columns, sizeof column);
    for (int i = 0; i < kColumns; ++i) wide[i] = column[i];
    int left = kColumns;
    for (; left % 2 == 0 && left / 2 % channels == 0; left /= 2)
        for (int i = 0; i < left / 2; ++i) wide[i] += wide[i + left / 2];
    for (int i = 0; i < left; ++i) sums[i % channels] += wide[i];
}

// Sums of the bytes [0, count), channel by channel: byte i belongs to channel i % channels.
inline void sum_bytes(const uint8_t* from, int64_t count, int64_t channels, int64_t* sums) {
    for (int64_t c = 0; c < channels; ++c) sums[c] = 0;
    int64_t i = 0;
    if (kColumns % channels == 0)
        for (int64_t rows; (rows = (count - i) / kColumns) > 0; i += rows * kColumns) {
            rows = rows < kMostRows ? rows : kMostRows;
            sum_rows(from + i, rows, static_cast<int>(channels), sums);
        }
    for (; i < count; i += channels)
        for (int64_t c = 0; c < channels; ++c) sums[c] += from[i + c];
}

inline void channel_sums(const Levels& p, int64_t begin, int64_t end) {
    for (int64_t image = begin; image < end; ++image) {
        const uint8_t* from = p.images + image * p.channels * p.pixels;
        int64_t* sums = p.result + image * p.channels;
        if (p.interleaved)
            sum_bytes(from, p.channels * p.pixels, p.channels, sums);
        else
            for (int64_t c = 0; c < p.channels; ++c) sum_bytes(from + c * p.pixels, p.pixels, 1, sums + c);
    }
}

// --- histograms ----------------------------------------------------------------------------------------------------

// Neighbouring pixels are often alike, and a count that was just written takes as long to read again as eight
// increments: so eight tables, in turn.
constexpr int kTables = 8;

inline void count_levels(const uint8_t* from, int64_t count, int64_t step, int64_t* to) {
    constexpr int64_t kMost = int64_t{1} << 34;  // eight counts of 32 bits
    for (int level = 0; level < 256; ++level) to[level] = 0;
    for (int64_t first = 0; first < count; first += kMost) {
        const int64_t end = count - first < kMost ? count : first + kMost;
        uint32_t tables[kTables][256] = {};
        int64_t i = first;
        for (; i + kTables <= end; i += kTables)
            for (int k = 0; k < kTables; ++k) ++tables[k][from[(i + k) * step]];
        for (; i < end; ++i) ++tables[0][from[i * step]];
        for (int level = 0; level < 256; ++level)
            for (int k = 0; k < kTables; ++k) to[level] += tables[k][level];
    }
}

inline void level_histogram(const Levels& p, int64_t begin, int64_t end) {
    const int64_t step = p.interleaved ? p.channels : 1, channel = p.interleaved ? 1 : p.pixels;
    for (int64_t unit = begin; unit < end; ++unit) {
        const int64_t image = unit / p.channels, c = unit % p.channels;
        const uint8_t* from = p.images + image * p.channels * p.pixels + c * channel;
        count_levels(from, p.pixels, step, p.result + unit * 256);
    }
}

}  // namespace
}  // namespace imgopt

// The image that is sampled where a call has a table or a box filter: written to scratch in the layout of the source,
// row by row, as whole rows are what vectors work on. With AVX-512 the table costs 64 RGB images of 256 x 256 half a
// millisecond, boxes of 2 x 2 a little over one.
#pragma once

#if defined(__AVX512VBMI__)
#include <immintrin.h>
#endif

#include "arithmetic.h"

namespace imgopt {
namespace {

// One image as it is sampled; strides count elements.
template <class T>
struct Source {
    const T* data;
    int64_t row, column, channel;
    int32_t height, width;
};

inline int64_t boxes(int64_t side, int64_t box) { return (side + box - 1) / box; }

// --- rows ----------------------------------------------------------------------------------------------------------

// Planes of rows of elements: an image that is channels_last, or is copied to be, is one plane with the channels of a
// pixel side by side; any other has as many planes as channels.
template <class T>
struct Rows {
    const T* data;
    int64_t planes, plane, row, column;  // strides of the source; column: of a pixel
    int64_t channels, channel;           // side by side
    int64_t count;                       // elements of a row

    Rows(const AffineWarp& p, int64_t image)
        : data(static_cast<const T*>(p.images) + image * p.images_stride[0]),
          plane(p.images_stride[1]),
          row(p.images_stride[2]),
          column(p.images_stride[3]),
          channel(p.images_stride[1]) {
        const bool planar = column == 1;
        planes = planar ? p.channels : 1;
        channels = planar ? 1 : p.channels;
        count = p.width * channels;
    }

    bool has_gaps() const { return column != channels || (channels > 1 && channel != 1); }

    // Row y of a plane without gaps; `room` takes it where the source has some.
    const T* dense(int64_t index, int64_t y, T* room) const {
        const T* from = data + index * plane + y * row;
        if (!has_gaps()) return from;
        for (int64_t x = 0, i = 0; i < count; ++x)
            for (int64_t c = 0; c < channels; ++c) room[i++] = from[x * column + c * channel];
        return room;
    }
};

// --- table ---------------------------------------------------------------------------------------------------------

#if defined(__AVX512VBMI__)
// A table of 256 bytes in four registers.
struct TableRegisters {
    __m512i part[4];

    explicit TableRegisters(const uint8_t* table) {
        for (int i = 0; i < 4; ++i) part[i] = _mm512_loadu_si512(table + 64 * i);
    }
    __m512i operator()(__m512i levels) const {
        const __m512i low = _mm512_permutex2var_epi8(part[0], levels, part[1]);
        const __m512i high = _mm512_permutex2var_epi8(part[2], levels, part[3]);
        return _mm512_mask_mov_epi8(low, _mm512_movepi8_mask(levels), high);
    }
};

// Bit i of [first][c]: byte i of a vector is of channel c, if its byte 0 is of channel `first`.
template <int channels>
struct ChannelMasks {
    uint64_t of[channels][4];

    constexpr ChannelMasks() : of{} {
        for (int first = 0; first < channels; ++first)
            for (int i = 0; i < 64; ++i) of[first][(first + i) % channels] |= uint64_t{1} << i;
    }
};
inline __mmask64 bytes_below(int64_t count) { return count >= 64 ? ~0ull : (1ull << count) - 1; }

inline void look_up_bytes(const uint8_t* table, const uint8_t* from, int64_t count, uint8_t* to) {
    const TableRegisters registers(table);
    for (int64_t i = 0; i < count; i += 64) {
        const __mmask64 some = bytes_below(count - i);
        _mm512_mask_storeu_epi8(to + i, some, registers(_mm512_maskz_loadu_epi8(some, from + i)));
    }
}

// Bytes of up to four channels in turn, each with its table.
template <int channels>
void look_up_pixels(const uint8_t* table, const uint8_t* from, int64_t count, uint8_t* to) {
    static constexpr ChannelMasks<channels> kMasks;
    const TableRegisters first(table), second(table + 256), third(table + (channels > 2 ? 512 : 0)),
        fourth(table + (channels > 3 ? 768 : 0));
    for (int64_t i = 0; i < count; i += 64) {
        const uint64_t* mask = kMasks.of[i % channels];
        const __mmask64 some = bytes_below(count - i);
        const __m512i levels = _mm512_maskz_loadu_epi8(some, from + i);
        __m512i found = _mm512_mask_mov_epi8(first(levels), mask[1], second(levels));
        if constexpr (channels > 2) found = _mm512_mask_mov_epi8(found, mask[2], third(levels));
        if constexpr (channels > 3) found = _mm512_mask_mov_epi8(found, mask[3], fourth(levels));
        _mm512_mask_storeu_epi8(to + i, some, found);
    }
}

#else
// Without a look-up in registers the loads of one byte each are the fastest.
template <int channels>
void look_up_pixels(const uint8_t* table, const uint8_t* from, int64_t count, uint8_t* to) {
    for (int64_t i = 0; i < count; i += channels)
        for (int c = 0; c < channels; ++c) to[i + c] = table[c * 256 + from[i + c]];
}
inline void look_up_bytes(const uint8_t* table, const uint8_t* from, int64_t count, uint8_t* to) {
    look_up_pixels<1>(table, from, count, to);
}
#endif

inline void look_up(const uint8_t* table, int64_t channels, const uint8_t* from, int64_t count, uint8_t* to) {
    switch (channels) {
        case 1: return look_up_bytes(table, from, count, to);
        case 2: return look_up_pixels<2>(table, from, count, to);
        case 3: return look_up_pixels<3>(table, from, count, to);
        case 4: return look_up_pixels<4>(table, from, count, to);
        default:
            for (int64_t i = 0; i < count; i += channels)
                for (int64_t c = 0; c < channels; ++c) to[i + c] = table[c * 256 + from[i + c]];
    }
}

template <class T>
struct Lookup {
    Lookup(const AffineWarp&, int64_t) {}
    const T* operator()(const Rows<T>&, int64_t, const T* from, T*) const { return from; }
};
template <>
struct Lookup<uint8_t> {
    const uint8_t* table;  // of the image, or null

    Lookup(const AffineWarp& p, int64_t image) : table(p.table ? p.table + image * p.table_stride : nullptr) {}
    // The dense row `from` of a plane, behind the table: in `room`, or as it is.
    const uint8_t* operator()(const Rows<uint8_t>& rows, int64_t plane, const uint8_t* from, uint8_t* room) const {
        if (!table) return from;
        look_up(table + plane * 256, rows.channels, from, rows.count, room);
        return room;
    }
};

// --- box filter ----------------------------------------------------------------------------------------------------

// The mean of `count` pixels, rounded to their type. Half up for uint8, of the exact mean: with the quotient's inverse
// M = 2^40 / d rounded up, n M / 2^40 exceeds n / d by less than n / 2^40, which is less than 1 / d as long as n d,
// below 1022 count^2, is below 2^40.
template <class T>
struct BoxMean {
    int64_t count;

    explicit BoxMean(int64_t n) : count(n) {}
    T operator()(double sum) const {
        T mean;
        narrow(sum / count, &mean);
        return mean;
    }
};
template <>
struct BoxMean<uint8_t> {
    uint64_t count, inverse;

    explicit BoxMean(int64_t n) : count(n), inverse(n < (1 << 15) ? (int64_t{1} << 40) / (2 * n) + 1 : 0) {}
    uint8_t operator()(uint64_t sum) const {
        const uint64_t n = 2 * sum + count;
        return static_cast<uint8_t>(inverse ? n * inverse >> 40 : n / (2 * count));
    }
};

inline uint8_t element(uint8_t v) { return v; }
template <class T>
auto element(T v) {
    return widened(v);
}

// The type that a box is added in.
template <class T>
struct BoxSum {
    using Narrow = double;
    using Wide = double;
};
template <>
struct BoxSum<uint8_t> {
    using Narrow = uint32_t;  // of fewer than 2^24 pixels
    using Wide = uint64_t;
};

// Pixels of box `i` of an axis.
inline int64_t box_length(int64_t i, int64_t box, int64_t side) { return (i + 1) * box < side ? box : side - i * box; }

// One row of boxes of `box` columns, all of them whole. The usual numbers are constants, and the loops disappear.
template <int known_box, int known_channels, class T, class Sum>
void store_boxes(const Sum* columns, int64_t count, int64_t box, int64_t channels, const BoxMean<T>& mean, T* to) {
    if (known_box) box = known_box;
    if (known_channels) channels = known_channels;
    for (int64_t x = 0; x < count; ++x, columns += box * channels)
        for (int64_t c = 0; c < channels; ++c) {
            typename BoxSum<T>::Wide sum = 0;
            for (int64_t i = 0; i < box; ++i) sum += columns[i * channels + c];
            *to++ = mean(sum);
        }
}

template <int known_channels, class T, class Sum>
void store_boxes_of(const Sum* columns, int64_t count, int64_t box, int64_t channels, int64_t height, T* to) {
    const BoxMean<T> mean(box * height);
    switch (box) {
        case 2: return store_boxes<2, known_channels>(columns, count, box, channels, mean, to);
        case 3: return store_boxes<3, known_channels>(columns, count, box, channels, mean, to);
        case 4: return store_boxes<4, known_channels>(columns, count, box, channels, mean, to);
        default: return store_boxes<0, known_channels>(columns, count, box, channels, mean, to);
    }
}

template <class T, class Sum>
void store_row(const Sum* columns, int64_t width, int64_t box, int64_t channels, int64_t height, T* to) {
    const int64_t whole = width / box, rest = width % box;
    switch (channels) {
        case 1: store_boxes_of<1>(columns, whole, box, channels, height, to); break;
        case 3: store_boxes_of<3>(columns, whole, box, channels, height, to); break;
        default: store_boxes_of<0>(columns, whole, box, channels, height, to);
    }
    if (!rest) return;
    const int64_t done = whole * channels;
    store_boxes<0, 0>(columns + done * box, 1, rest, channels, BoxMean<T>(rest * height), to + done);
}

template <class Sum, class T>
void box_rows(const AffineWarp& p, const Map& map, const Rows<T>& rows, const Lookup<T>& lookup, T* to, char* room) {
    const int64_t height = boxes(p.height, map.box_y), count = boxes(p.width, map.box_x) * rows.channels;
    Sum* columns = reinterpret_cast<Sum*>(room);
    T* dense = reinterpret_cast<T*>(room + rows.count * int64_t{sizeof(double)});
    for (int64_t plane = 0; plane < rows.planes; ++plane)
        for (int64_t y = 0; y < height; ++y, to += count) {
            const int64_t length = box_length(y, map.box_y, p.height);
            for (int64_t v = 0; v < length; ++v) {
                const T* row = rows.dense(plane, y * map.box_y + v, dense);
                row = lookup(rows, plane, row, dense);
                for (int64_t i = 0; i < rows.count; ++i)
                    columns[i] = (v ? columns[i] : Sum{0}) + static_cast<Sum>(element(row[i]));
            }
            store_row(columns, p.width, map.box_x, rows.channels, length, to);
        }
}

// The table alone; an image without gaps is one row.
template <class T>
void look_up_image(Rows<T> rows, int64_t height, const Lookup<T>& lookup, T* to, char* room) {
    if (!rows.has_gaps() && rows.row == rows.count) {
        rows.count *= height;
        height = 1;
    }
    for (int64_t plane = 0; plane < rows.planes; ++plane)
        for (int64_t y = 0; y < height; ++y, to += rows.count)
            lookup(rows, plane, rows.dense(plane, y, reinterpret_cast<T*>(room)), to);
}

// --- both ----------------------------------------------------------------------------------------------------------

inline bool is_prepared(const AffineWarp& p, const Map& map) { return p.table || map.box_x > 1 || map.box_y > 1; }

// Bytes of scratch that prepared() needs, 0 where it reads the image itself: the result, sums and values of a row.
template <class T>
int64_t prepared_bytes(const AffineWarp& p, const Map& map) {
    if (!is_prepared(p, map)) return 0;
    const int64_t pixels = boxes(p.height, map.box_y) * boxes(p.width, map.box_x), row = p.width * p.channels;
    return (pixels * p.channels * int64_t{sizeof(T)} + 7) / 8 * 8 + row * int64_t{sizeof(double) + sizeof(T)};
}

template <class T>
Source<T> prepared(const AffineWarp& p, const Map& map, int64_t image, void* scratch) {
    const int64_t* stride = p.images_stride;
    const Rows<T> rows(p, image);
    if (!is_prepared(p, map))
        return {
            rows.data, stride[2], stride[3], stride[1], static_cast<int32_t>(p.height), static_cast<int32_t>(p.width)};
    const int64_t height = boxes(p.height, map.box_y), width = boxes(p.width, map.box_x);
    const int64_t bytes = (height * width * p.channels * int64_t{sizeof(T)} + 7) / 8 * 8;
    const Lookup<T> lookup(p, image);
    T* to = static_cast<T*>(scratch);
    char* room = static_cast<char*>(scratch) + bytes;
    if (map.box_y >= 1 << 24) {
        box_rows<typename BoxSum<T>::Wide>(p, map, rows, lookup, to, room);
    } else if (map.box_x > 1 || map.box_y > 1) {
        box_rows<typename BoxSum<T>::Narrow>(p, map, rows, lookup, to, room);
    } else {
        look_up_image(rows, height, lookup, to, room);
    }
    const int64_t channel = rows.planes > 1 ? height * width : 1;
    return {static_cast<T*>(scratch),     width * rows.channels,      rows.channels, channel,
            static_cast<int32_t>(height), static_cast<int32_t>(width)};
}

}  // namespace
}  // namespace imgopt

// Results that no cache keeps go around the caches. An ordinary store first fetches the line that it writes: for 64
// float32 images of 224 x 224 that is as much memory traffic again as the result. A streaming store does not, but wants
// whole lines, so a strip of blocks is put together in the first cache: 3.7 ms become 2.7.
#pragma once

#include <immintrin.h>

#include "arithmetic.h"

namespace imgopt::avx512 {
namespace {

constexpr int kLine = 64;
constexpr int64_t kStreamedBytes = 16 << 20;  // half of a third cache: what reads the result begins where it is gone

// How pixels lie: elements from row to row and from channel to channel. `planar`: channel by channel.
struct Layout {
    int64_t row, channel;
    bool planar;

    explicit Layout(const AffineWarp& p)
        : row(p.output_stride[2]), channel(p.output_stride[1]), planar(p.output_stride[3] == 1 && p.channels > 1) {}
    Layout(int64_t row_step, int64_t channel_step, bool is_planar)
        : row(row_step), channel(channel_step), planar(is_planar) {}
};

// Whether a result of elements T is large, and every row of it whole lines.
template <class T>
bool is_streamed(const AffineWarp& p) {
    constexpr int64_t in_line = kLine / int64_t{sizeof(T)};
    if constexpr (sizeof(T) == 1) return false;  // rows of 224 RGB pixels are no whole lines
    const int64_t* step = p.output_stride;
    const int64_t values = p.batch * p.channels * p.output_height * p.output_width;
    const bool lines = step[0] % in_line == 0 && step[2] % in_line == 0 && p.output_width * step[3] % in_line == 0 &&
                       (step[3] != 1 || step[1] % in_line == 0);
    return lines && reinterpret_cast<uintptr_t>(p.output) % kLine == 0 && values * int64_t{sizeof(T)} >= kStreamedBytes;
}

// A strip of blocks, `rows` rows of up to kBlock pixels.
template <int channels, int rows, class T>
struct Stage {
    alignas(kLine) T data[channels * rows * kBlock];

    static Layout layout(const Layout& output) {
        if (output.planar) return {kBlock, rows * kBlock, true};
        return {channels * kBlock, 1, false};
    }

    // The first `count` rows, `bytes` of each, to where the output has them.
    void stream(const Layout& output, int64_t count, int64_t bytes, T* to) const {
        constexpr int64_t plane_bytes = kBlock * int64_t{sizeof(T)};  // of a whole row: no loop
        const Layout own = layout(output);
        for (int c = 0; c < (output.planar ? channels : 1); ++c)
            for (int64_t row = 0; row < count; ++row) {
                const T* from = data + c * own.channel + row * own.row;
                T* line = to + c * output.channel + row * output.row;
                if (bytes == plane_bytes)
                    stream_lines(from, plane_bytes, line);
                else
                    stream_lines(from, bytes, line);
            }
    }

  private:
    IMGOPT_INLINE static void stream_lines(const T* from, int64_t bytes, T* to) {
        for (int64_t i = 0; i < bytes / int64_t{sizeof(T)}; i += kLine / int64_t{sizeof(T)})
            _mm512_stream_si512(reinterpret_cast<__m512i*>(to + i), _mm512_load_si512(from + i));
    }
};

}  // namespace
}  // namespace imgopt::avx512

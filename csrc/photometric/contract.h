// The contract of the photometric operations.
//
// Hue and sharpness work on values as they are, levels of uint8 or units of [0, 1], in float32; uint8 rounds half to
// even. Output has the input's layout. csrc/photometric/arithmetic.h is this text as code. Hue (HSV, hexcone): with v
// the largest channel, c = v - the smallest, and h in sixths of a turn the place of the colour on the circle
// ((g - b) / c where red is largest, else 2 + (b - r) / c where green is, else 4 + (r - g) / c), red, green and blue
// become v - c clamp(min(k, 4 - k), 0, 1) with k = (h + turn + 5, 3, 1) mod 6.
#pragma once

#include "../dtype.h"

namespace imgopt {

constexpr int64_t kPixelRun = 1 << 13;  // a unit of hue and of lookup

struct Hue {
    DType dtype;  // u8 or f32
    const void* images;
    void* output;
    const float* turn;  // per image, in sixths of a turn, 0 <= turn <= 6
    int64_t pixels;     // per image
    bool interleaved;   // channels_last
};

// Sharpness: x + weight (sum over 3 x 3 - 9 x), clamped to the range of the dtype; the outermost pixels stay. The sum
// is exact for uint8. A channels_last image is one plane whose rows hold width · channels elements, a pixel every
// `step`.
struct Sharpness {
    DType dtype;  // u8 or f32
    const void* images;
    void* output;
    const float* weight;  // per image, (1 - factor) / 13
    int64_t planes;       // per image
    int64_t height;
    int64_t row;
    int64_t step;
};

// Lookup: each level of dense uint8 images replaced by that of its channel's table.
struct Lookup {
    const uint8_t* images;
    uint8_t* output;
    const uint8_t* table;      // [channels][256] for each image
    int64_t table_stride;      // 0: the same for all images
    int64_t channels, pixels;  // per image
    bool interleaved;          // channels_last
};

// Sums of the levels of each channel, and how often each level occurs, of dense uint8 images.
struct Levels {
    const uint8_t* images;
    int64_t channels, pixels;  // per image
    bool interleaved;          // channels_last
    int64_t* result;           // [batch][channels] sums, or [batch][channels][256] counts
};

}  // namespace imgopt

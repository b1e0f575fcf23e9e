"""The text of the C99 files: one runtime of plain loops, and around it what a network fills in."""

from typing import Any

Facts = dict[str, Any]
WIDTH = 20  # numbers per line


def array(kind: str, name: str, values: list[int]) -> str:
    numbers = values or [0]
    lines = [", ".join(map(str, numbers[i : i + WIDTH])) for i in range(0, len(numbers), WIDTH)]
    return f"const {kind} {name}[{len(numbers)}] = {{\n    " + ",\n    ".join(lines) + "\n};\n"


def header(f: Facts, pixels: bool) -> str:
    more = ""
    if pixels:
        more = f"""
/* Raw pixels, HWC, to the input above: normalization and quantization in one table. `input` may be `pixels`. */
void {f["name"]}_prepare(const uint8_t pixels[{f["NAME"]}_INPUT_SIZE], uint8_t input[{f["NAME"]}_INPUT_SIZE]);
"""
    return f"""/* A classifier in integers and shifts, written by imgopt_fast. C99, no allocation, no floating point.
   Not reentrant: all activations are in one static arena. */
#ifndef {f["NAME"]}_H
#define {f["NAME"]}_H

#include <stdint.h>

/* Input: uint8 in HWC order; real value = (input - {f["NAME"]}_INPUT_ZERO_POINT) * 2^-{f["NAME"]}_INPUT_EXPONENT. */
#define {f["NAME"]}_HEIGHT {f["height"]}
#define {f["NAME"]}_WIDTH {f["width"]}
#define {f["NAME"]}_CHANNELS {f["channels"]}
#define {f["NAME"]}_INPUT_SIZE ({f["height"]} * {f["width"]} * {f["channels"]})
#define {f["NAME"]}_INPUT_EXPONENT {f["input_exponent"]}
#define {f["NAME"]}_INPUT_ZERO_POINT {f["input_zero_point"]}

/* Output: int32; real value = output * 2^-{f["NAME"]}_OUTPUT_EXPONENT. */
#define {f["NAME"]}_OUTPUTS {f["outputs"]}
#define {f["NAME"]}_OUTPUT_EXPONENT {f["output_exponent"]}

/* Memory in bytes: static, for activations; and constant, for weights and tables. */
#define {f["NAME"]}_ARENA_SIZE {f["arena"]}
#define {f["NAME"]}_CONSTANTS_SIZE {f["constants"]}

/* The outputs for one image. */
void {f["name"]}_run(const uint8_t input[{f["NAME"]}_INPUT_SIZE], int32_t output[{f["NAME"]}_OUTPUTS]);

/* The index of the largest output; the first of equals. */
int {f["name"]}_best(const int32_t output[{f["NAME"]}_OUTPUTS]);
{more}
#endif
"""


RUNTIME = """
/* Negative numbers must shift right arithmetically. */
typedef char arithmetic_shift_needed[(-3 >> 1) == -2 ? 1 : -1];

struct convolution {
    int32_t in_height, in_width, in_channels, height, width, channels;
    int32_t kernel_height, kernel_width, stride_y, stride_x, top, left, dilation_y, dilation_x, groups;
    int32_t in_zero, zero, least, most, residual_zero;
    const uint8_t *gaps;    /* of a compressed weight: to the entry's tap from that of the entry before */
    const int32_t *spans;   /* of a compressed weight: the first entry of every channel */
    const int8_t *weight;   /* [channel][tap][input channel], or the entries' values */
    const int32_t *offset;  /* bias - in_zero * sum of the weights */
    const int8_t *shift;    /* [channel][4]: right, sum left, residual left, sum right */
};

static int32_t shift_left(int32_t value, int bits)
{
    return (int32_t)((uint32_t)value << bits);
}

/* value * 2^-right, half up; a negative `right` shifts left, values that saturate anyway. */
static int32_t round_shift(int32_t value, int right)
{
    if (right > 0) {
        return (value >> right) + ((value >> (right - 1)) & 1);
    }
    value = value > 512 ? 512 : value < -512 ? -512 : value;
    return shift_left(value, right < -20 ? 20 : -right);
}

static uint8_t saturate(int32_t value, int32_t least, int32_t most)
{
    return (uint8_t)(value < least ? least : value > most ? most : value);
}

/* The taps that one output pixel sees, side by side; padded ones are the zero point. */
static const uint8_t *gather(const struct convolution *c, const uint8_t *input, int32_t y, int32_t x)
{
    const int32_t first_y = y * c->stride_y - c->top, first_x = x * c->stride_x - c->left;
    uint8_t *to = scratch;
    int32_t ky, kx, i;
    if (c->kernel_height == 1 && c->kernel_width == 1 && c->top == 0 && c->left == 0 && first_y < c->in_height &&
        first_x < c->in_width) {
        return input + (first_y * c->in_width + first_x) * c->in_channels;
    }
    for (ky = 0; ky < c->kernel_height; ky++) {
        for (kx = 0; kx < c->kernel_width; kx++) {
            const int32_t at_y = first_y + ky * c->dilation_y, at_x = first_x + kx * c->dilation_x;
            const int inside = at_y >= 0 && at_y < c->in_height && at_x >= 0 && at_x < c->in_width;
            const uint8_t *from = inside ? input + (at_y * c->in_width + at_x) * c->in_channels : input;
            for (i = 0; i < c->in_channels; i++) {
                *to++ = inside ? from[i] : (uint8_t)c->in_zero;
            }
        }
    }
    return scratch;
}

static int32_t product(const struct convolution *c, const uint8_t *taps, int32_t channel)
{
    const int32_t count = c->in_channels / c->groups, windows = c->kernel_height * c->kernel_width;
    const uint8_t *group = taps + channel / (c->channels / c->groups) * count;
    int32_t sum = c->offset[channel], i, j;
    if (c->gaps) {
        for (i = c->spans[channel]; i < c->spans[channel + 1]; i++) {
            group += c->gaps[i];
            sum += *group * c->weight[i];
        }
    } else {
        const int8_t *weight = c->weight + channel * windows * count;
        for (i = 0; i < windows; i++, group += c->in_channels, weight += count) {
            for (j = 0; j < count; j++) {
                sum += group[j] * weight[j];
            }
        }
    }
    return sum;
}

/* Into `output`, or as sums into `wide`, where that is given. */
static void convolve(const struct convolution *c, const uint8_t *input, const uint8_t *residual, uint8_t *output,
                     int32_t *wide)
{
    int32_t y, x, channel, at = 0;
    for (y = 0; y < c->height; y++) {
        for (x = 0; x < c->width; x++) {
            const uint8_t *taps = gather(c, input, y, x);
            for (channel = 0; channel < c->channels; channel++, at++) {
                const int8_t *shift = c->shift + 4 * channel;
                int32_t sum = shift_left(product(c, taps, channel) >> shift[3], shift[1]);
                if (wide) {
                    wide[at] = sum;
                    continue;
                }
                if (residual) {
                    sum += shift_left(residual[at] - c->residual_zero, shift[2]);
                }
                output[at] = saturate(round_shift(sum, shift[0]) + c->zero, c->least, c->most);
            }
        }
    }
}
"""

ADD = """
static void add(const uint8_t *a, const uint8_t *b, uint8_t *output, int32_t count, int32_t zero_a, int32_t zero_b,
                int left_a, int left_b, int right, int32_t zero, int32_t least, int32_t most)
{
    int32_t i;
    for (i = 0; i < count; i++) {
        const int32_t sum = shift_left(a[i] - zero_a, left_a) + shift_left(b[i] - zero_b, left_b);
        output[i] = saturate(round_shift(sum, right) + zero, least, most);
    }
}
"""

COPY_CHANNELS = """
/* Into the channels from `first` on, at another scale. */
static void copy_channels(const uint8_t *input, uint8_t *output, int32_t pixels, int32_t count, int32_t channels,
                          int32_t first, int32_t in_zero, int right, int32_t zero)
{
    int32_t i, c;
    for (i = 0; i < pixels; i++) {
        for (c = 0; c < count; c++) {
            const int32_t step = input[i * count + c] - in_zero;
            output[i * channels + first + c] = saturate(round_shift(step, right) + zero, 0, 255);
        }
    }
}
"""

MAX_POOL = """
static void max_pool(const uint8_t *input, uint8_t *output, int32_t in_height, int32_t in_width, int32_t channels,
                     int32_t height, int32_t width, int32_t kernel_height, int32_t kernel_width, int32_t stride_y,
                     int32_t stride_x, int32_t top, int32_t left)
{
    int32_t y, x, c, ky, kx;
    for (y = 0; y < height; y++) {
        for (x = 0; x < width; x++) {
            for (c = 0; c < channels; c++) {
                uint8_t best = 0;
                for (ky = 0; ky < kernel_height; ky++) {
                    for (kx = 0; kx < kernel_width; kx++) {
                        const int32_t at_y = y * stride_y - top + ky, at_x = x * stride_x - left + kx;
                        if (at_y >= 0 && at_y < in_height && at_x >= 0 && at_x < in_width) {
                            const uint8_t value = input[(at_y * in_width + at_x) * channels + c];
                            best = value > best ? value : best;
                        }
                    }
                }
                output[(y * width + x) * channels + c] = best;
            }
        }
    }
}
"""

AVERAGE_POOL = """
/* The mean of a window, half up: floor((2 * sum + count) / (2 * count)); padded pixels count as zero. */
static void average_pool(const uint8_t *input, uint8_t *output, int32_t in_height, int32_t in_width, int32_t channels,
                         int32_t height, int32_t width, int32_t kernel_height, int32_t kernel_width, int32_t stride_y,
                         int32_t stride_x, int32_t top, int32_t left, int32_t in_zero, int up, int down, int32_t zero)
{
    const int32_t count = shift_left(kernel_height * kernel_width, down);
    int32_t y, x, c, ky, kx;
    for (y = 0; y < height; y++) {
        for (x = 0; x < width; x++) {
            for (c = 0; c < channels; c++) {
                int32_t sum = 0, step;
                for (ky = 0; ky < kernel_height; ky++) {
                    for (kx = 0; kx < kernel_width; kx++) {
                        const int32_t at_y = y * stride_y - top + ky, at_x = x * stride_x - left + kx;
                        if (at_y >= 0 && at_y < in_height && at_x >= 0 && at_x < in_width) {
                            sum += input[(at_y * in_width + at_x) * channels + c] - in_zero;
                        }
                    }
                }
                sum = 2 * shift_left(sum, up) + count;
                step = sum / (2 * count) - (sum % (2 * count) < 0);
                step = step > 255 ? 255 : step < -255 ? -255 : step;
                output[(y * width + x) * channels + c] = saturate(step + zero, 0, 255);
            }
        }
    }
}
"""

WIDEN = """
static void widen(const uint8_t *input, int32_t *output, int32_t count, int32_t zero)
{
    int32_t i;
    for (i = 0; i < count; i++) {
        output[i] = input[i] - zero;
    }
}
"""

PARTS = {"add(": ADD, "copy_channels(": COPY_CHANNELS, "max_pool(": MAX_POOL, "average_pool(": AVERAGE_POOL,
         "widen(": WIDEN}  # fmt: skip


def program(f: Facts, calls: list[str], layers: list[str], pixels: bool) -> str:
    used = [text for call, text in PARTS.items() if any(line.startswith(call) for line in calls)]
    prepare = ""
    if pixels:
        prepare = f"""
void {f["name"]}_prepare(const uint8_t pixels[{f["NAME"]}_INPUT_SIZE], uint8_t input[{f["NAME"]}_INPUT_SIZE])
{{
    int32_t i;
    for (i = 0; i < {f["NAME"]}_INPUT_SIZE; i++) {{
        input[i] = {f["name"]}_pixels[i % {f["NAME"]}_CHANNELS * 256 + pixels[i]];
    }}
}}
"""
    body = "\n    ".join(calls)
    return f"""#include "model.h"
#include "weights.h"

#include <string.h>

static uint8_t arena[{f["NAME"]}_ARENA_SIZE];
static uint8_t *const scratch = arena + {f["scratch"]};
{RUNTIME}{"".join(used)}
{"".join("static " + layer for layer in layers)}
void {f["name"]}_run(const uint8_t input[{f["NAME"]}_INPUT_SIZE], int32_t output[{f["NAME"]}_OUTPUTS])
{{
    memcpy(arena + {f["input_at"]}, input, {f["NAME"]}_INPUT_SIZE);
    {body}
}}

int {f["name"]}_best(const int32_t output[{f["NAME"]}_OUTPUTS])
{{
    int i, best = 0;
    for (i = 1; i < {f["NAME"]}_OUTPUTS; i++) {{
        best = output[i] > output[best] ? i : best;
    }}
    return best;
}}
{prepare}"""


def weights(f: Facts, arrays: list[str]) -> str:
    return '#include "weights.h"\n\n' + "\n".join(arrays)


def declarations(f: Facts, arrays: list[str]) -> str:
    lines = [f"extern {text[: text.index(' = ')]};" for text in arrays]
    name = f"{f['NAME']}_WEIGHTS_H"
    return f"#ifndef {name}\n#define {name}\n\n#include <stdint.h>\n\n" + "\n".join(lines) + "\n\n#endif\n"


def golden(f: Facts, inputs: list[int], outputs: list[int]) -> str:
    return (
        f"/* Images as {f['name']}_run takes them, and what it gives. */\n#include <stdint.h>\n\n"
        f"#define GOLDEN {f['golden']}\n\nstatic " + array("uint8_t", "golden_input", inputs) + "\nstatic "
        + array("int32_t", "golden_output", outputs)
    )  # fmt: skip


def main(f: Facts) -> str:
    return f"""/* Without arguments: checks the golden vectors.
   With "-": images from stdin, outputs to stdout (int32 of this machine), microseconds of processor time to stderr. */
#include "model.h"
#include "golden.h"

#include <stdio.h>
#include <time.h>

static int check(void)
{{
    int32_t output[{f["NAME"]}_OUTPUTS];
    int image, i, wrong = 0;
    for (image = 0; image < GOLDEN; image++) {{
        {f["name"]}_run(golden_input + image * {f["NAME"]}_INPUT_SIZE, output);
        for (i = 0; i < {f["NAME"]}_OUTPUTS; i++) {{
            wrong += output[i] != golden_output[image * {f["NAME"]}_OUTPUTS + i];
        }}
    }}
    printf("%d images, %d outputs differ from the golden ones\\n", GOLDEN, wrong);
    return wrong != 0;
}}

int main(int count, char **arguments)
{{
    static uint8_t input[{f["NAME"]}_INPUT_SIZE];
    int32_t output[{f["NAME"]}_OUTPUTS];
    clock_t spent = 0;
    if (count < 2 || arguments[1][0] != '-') {{
        return check();
    }}
    while (fread(input, 1, sizeof input, stdin) == sizeof input) {{
        const clock_t begin = clock();
        {f["name"]}_run(input, output);
        spent += clock() - begin;
        fwrite(output, sizeof output[0], {f["NAME"]}_OUTPUTS, stdout);
    }}
    fprintf(stderr, "%ld\\n", (long)(spent / (CLOCKS_PER_SEC / 1000000)));
    return 0;
}}
"""

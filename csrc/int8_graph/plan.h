// A plan of int8_graph as the runner sees it; src/imgopt_fast/ops/int8_graph/plan.py states its format.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace imgopt {

enum class Opcode : int64_t { quantize, conv, add, max_pool, avg_pool, concat, flatten, dequantize };

enum class ValueType : int64_t { u8, i8, f32 };

// One value: what the plan says, then what this run makes of it.
struct Value {
    int64_t rank, channels;  // channels -1: known when it runs
    ValueType type;
    int64_t zero_point;

    int64_t n = 0, h = 0, w = 0;
    int64_t last_use = -1;  // step; outputs live for ever
    int64_t arena_at = -1;  // inputs and outputs have memory of their own
    bool whole = false;     // the arena holds it for all images, not for one group
    void* data = nullptr;   // (n, h, w, channels)

    bool is_float() const { return type == ValueType::f32; }
    int64_t pixels() const { return n * h * w; }
    int64_t image_bytes() const { return h * w * channels * (is_float() ? 4 : 1); }
    int64_t bytes() const { return n * image_bytes(); }
    uint8_t flip() const { return type == ValueType::i8 ? 0x80 : 0; }
    uint8_t byte_zero_point() const { return static_cast<uint8_t>(zero_point + flip()); }
};

struct Step {
    Opcode opcode;
    int64_t output;
    const int64_t* inputs;
    int64_t input_count;
    const int64_t* parameters;
    int64_t parameter_count;
};

// Consecutive steps that run together on `group` images at a time, group after group.
struct Stage {
    int64_t begin, end, group;
};

struct Plan {
    bool shift;
    std::vector<int64_t> inputs, outputs;
    std::vector<Value> values;
    std::vector<Step> steps;  // points into the words it was read from
};

// Each returns an empty text, or what is wrong. They check everything that memory safety needs, because a plan is data
// that anyone may have written.
std::string read_plan(const int64_t* words, int64_t count, Plan& plan);

bool is_input(const Plan& plan, int64_t value);

// Fills n, h, w and channels of every value from those of the inputs.
std::string resolve_sizes(Plan& plan);

// Cuts the steps into stages for `batch` images, so that the values of a group take about `group_bytes` at any time and
// a step finds in the caches what the one before it wrote. Layers with large images, at the front of a network, go by
// few of them; those behind, whose weights are large, by many, which read the weights less often.
std::vector<Stage> cut_stages(const Plan& plan, int64_t batch, int64_t group_bytes);

// Places every value that is neither input nor output in one arena, so that values that live at the same time do not
// overlap; returns its size in bytes. `overwrite`: the result of a convolution takes the place of its residual, if that
// is not needed further: half the memory in the widest part of a residual network, and lines that are in L1 already.
int64_t lay_out_arena(Plan& plan, const std::vector<Stage>& stages, bool overwrite);

}  // namespace imgopt

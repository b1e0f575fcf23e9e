// Reads a plan, resolves its sizes for this run, and lays out the arena. All of it takes a few microseconds for a
// network of sixty steps, so nothing is cached between calls.
#include "plan.h"

#include <algorithm>

namespace imgopt {
namespace {

constexpr int64_t kMagic = 0x38544E49, kVersion = 1;
constexpr int64_t kHeaderWords = 8, kValueWords = 4, kStepWords = 4;
constexpr int64_t kAlignment = 64;  // bytes, of every value in the arena
constexpr int64_t kForever = INT64_MAX;
constexpr int64_t kGrowth = 2;  // a stage ends where so many times as many images would fit
// Bounds no real network reaches; with them no product of sizes overflows.
constexpr int64_t kMaxCount = int64_t{1} << 24, kMaxBytes = int64_t{1} << 36;

// Least number of parameters, and the numbers of inputs allowed.
struct Shape {
    int64_t parameters, least_inputs, most_inputs;
};
constexpr Shape kShapes[] = {{3, 1, 1},  {21, 1, 2},        {7, 2, 2}, {8, 1, 1},
                             {13, 1, 1}, {2, 1, kMaxCount}, {0, 1, 1}, {1, 1, 1}};

bool read_values(const int64_t* words, int64_t count, std::vector<Value>& values) {
    for (int64_t i = 0; i < count; ++i, words += kValueWords) {
        Value v{};
        v.rank = words[0];
        v.channels = words[1];
        v.type = static_cast<ValueType>(words[2]);
        v.zero_point = words[3];
        const bool known = (v.rank == 2 || v.rank == 4) && words[2] >= 0 && words[2] <= 2;
        if (!known || v.channels < -1 || v.channels == 0 || v.channels > kMaxCount) return false;
        values.push_back(v);
    }
    return true;
}

bool in_range(int64_t value, int64_t low, int64_t high) { return value >= low && value <= high; }

bool pooled(const int64_t* p, int64_t in, int64_t axis, int64_t& out) {
    const int64_t kernel = p[axis], stride = p[2 + axis], before = p[4 + 2 * axis], after = p[5 + 2 * axis];
    if (!in_range(kernel, 1, kMaxCount) || !in_range(stride, 1, kMaxCount) || !in_range(before, 0, kernel - 1) ||
        !in_range(after, 0, kernel - 1))
        return false;
    out = (in + before + after - kernel) / stride + 1;
    return in > 0 && in + before + after >= kernel;
}

bool convolved(const int64_t* p, int64_t in, int64_t axis, int64_t& out) {
    const int64_t kernel = p[2 + axis], stride = p[4 + axis], before = p[6 + 2 * axis], after = p[7 + 2 * axis];
    const int64_t dilation = p[10 + axis];
    if (!in_range(kernel, 1, kMaxCount) || !in_range(stride, 1, kMaxCount) || !in_range(before, 0, kMaxCount) ||
        !in_range(after, 0, kMaxCount) || !in_range(dilation, 1, kMaxCount))
        return false;
    const int64_t window = dilation * (kernel - 1) + 1;
    out = (in + before + after - window) / stride + 1;
    return in + before + after >= window;
}

bool same_size(const Value& a, const Value& b) { return a.n == b.n && a.h == b.h && a.w == b.w; }

const char* const kTooSmall = "inputs: the image is too small for the network";

std::string resolve_conv(const Plan& plan, const Step& s, const Value& in, Value& out) {
    const int64_t* p = s.parameters;
    const int64_t channels = p[0], group_channels = p[1], groups = p[12];
    if (!in_range(channels, 1, kMaxCount) || !in_range(group_channels, 1, kMaxCount) ||
        !in_range(groups, 1, kMaxCount) || channels % groups || out.channels != channels)
        return "plan: broken geometry of a convolution";
    if (in.channels != group_channels * groups)
        return "inputs: " + std::to_string(in.channels) + " channels where a layer takes " +
               std::to_string(group_channels * groups) + ": the image has another size than the network was made for";
    if (!convolved(p, in.h, 0, out.h) || !convolved(p, in.w, 1, out.w)) return kTooSmall;
    if (s.input_count == 2) {
        const Value& residual = plan.values[s.inputs[1]];
        if (!same_size(residual, out) || residual.channels != channels || residual.is_float())
            return "plan: a residual has another shape than the output";
    }
    return "";
}

std::string resolve_step(Plan& plan, const Step& s) {
    const Value& in = plan.values[s.inputs[0]];
    Value& out = plan.values[s.output];
    const int64_t channels = out.channels;
    out.n = in.n;
    out.h = in.h;
    out.w = in.w;
    const bool reads_float = s.opcode == Opcode::quantize;
    const bool may_write_float = s.opcode == Opcode::conv;
    const bool writes_float = s.opcode == Opcode::dequantize;
    if (in.is_float() != reads_float || (!may_write_float && out.is_float() != writes_float))
        return "plan: a step has operands of the wrong dtype";
    switch (s.opcode) {
        case Opcode::conv: return resolve_conv(plan, s, in, out);
        case Opcode::add: {
            const Value& b = plan.values[s.inputs[1]];
            if (!same_size(in, b) || in.channels != b.channels || b.is_float())
                return "plan: the terms of a sum differ";
            break;
        }
        case Opcode::max_pool:
            if (out.type != in.type || out.zero_point != in.zero_point) return "plan: a maximum cannot requantize";
            [[fallthrough]];
        case Opcode::avg_pool:
            if (s.opcode == Opcode::avg_pool && s.parameters[0] == 0) {
                out.h = out.w = 1;
                if (in.h == 0 || in.w == 0) return kTooSmall;
            } else if (!pooled(s.parameters, in.h, 0, out.h) || !pooled(s.parameters, in.w, 1, out.w))
                return kTooSmall;
            break;
        case Opcode::concat: {
            int64_t sum = 0;
            for (int64_t i = 0; i < s.input_count; ++i) {
                const Value& v = plan.values[s.inputs[i]];
                if (!same_size(v, out) || v.is_float()) return "inputs: the parts of a concatenation differ in size";
                sum += v.channels;
            }
            out.channels = sum;
            return channels == -1 || sum == channels ? "" : "plan: a concatenation has other channels than planned";
        }
        case Opcode::flatten:
            out.channels = in.channels * in.h * in.w;
            out.h = out.w = 1;
            if (out.type != in.type) return "plan: flatten cannot requantize";
            return channels == -1 || out.channels == channels ? "" : "plan: flatten has other channels than planned";
        default: break;
    }
    out.channels = in.channels;
    return channels == -1 || out.channels == channels ? "" : "plan: a step has other channels than planned";
}

// Whether the output of step `i` may lie where its residual does, which nothing reads any more.
bool takes_place_of_residual(const Plan& plan, int64_t i) {
    const Step& step = plan.steps[i];
    const Value& out = plan.values[step.output];
    if (step.opcode != Opcode::conv || step.input_count != 2 || out.is_float() || out.last_use == kForever)
        return false;
    const Value& residual = plan.values[step.inputs[1]];
    return residual.last_use == i && step.inputs[0] != step.inputs[1] && !is_input(plan, step.inputs[1]);
}

}  // namespace

std::string read_plan(const int64_t* words, int64_t count, Plan& plan) {
    const std::string broken = "plan: not one that Int8GraphBuilder.build wrote";
    if (count < kHeaderWords || words[0] != kMagic || words[1] != kVersion) return broken;
    const int64_t inputs = words[2], values = words[3], outputs = words[4], steps = words[5];
    for (int64_t i = 2; i < 6; ++i)
        if (!in_range(words[i], 0, count)) return broken;
    plan.shift = words[6] != 0;
    int64_t at = kHeaderWords;
    if (at + inputs + kValueWords * values + outputs > count) return broken;
    plan.inputs.assign(words + at, words + at + inputs);
    at += inputs;
    plan.values.reserve(static_cast<size_t>(values));
    if (!read_values(words + at, values, plan.values)) return broken;
    at += kValueWords * values;
    plan.outputs.assign(words + at, words + at + outputs);
    at += outputs;
    // Every value is written once, before it is read, by an input or a step.
    std::vector<bool> written(static_cast<size_t>(values));
    const auto is_new = [&](int64_t v) { return in_range(v, 0, values - 1) && !written[v]; };
    const auto is_there = [&](int64_t v) { return in_range(v, 0, values - 1) && written[v]; };
    for (int64_t v : plan.inputs) {
        if (!is_new(v) || plan.values[v].channels < 1) return broken;
        written[v] = true;
    }
    for (int64_t i = 0; i < steps; ++i) {
        if (at + kStepWords > count) return broken;
        const int64_t opcode = words[at], length = words[at + 1], output = words[at + 2], terms = words[at + 3];
        if (!in_range(opcode, 0, 7) || !in_range(length, kStepWords, count - at)) return broken;
        const Shape& shape = kShapes[opcode];
        if (!in_range(terms, shape.least_inputs, std::min(shape.most_inputs, length - kStepWords))) return broken;
        const int64_t extra = opcode == static_cast<int64_t>(Opcode::concat) ? 2 * terms : 0;
        const int64_t* read = words + at + kStepWords;
        if (length < kStepWords + terms + shape.parameters + extra || !is_new(output)) return broken;
        for (int64_t t = 0; t < terms; ++t) {
            if (!is_there(read[t])) return broken;
            plan.values[read[t]].last_use = i;
        }
        written[output] = true;
        plan.steps.push_back(
            {static_cast<Opcode>(opcode), output, read, terms, read + terms, length - kStepWords - terms});
        at += length;
    }
    for (int64_t v : plan.outputs) {
        if (!is_there(v)) return broken;
        plan.values[v].last_use = kForever;
    }
    return "";
}

bool is_input(const Plan& plan, int64_t value) {
    return std::find(plan.inputs.begin(), plan.inputs.end(), value) != plan.inputs.end();
}

std::string resolve_sizes(Plan& plan) {
    for (const Step& step : plan.steps) {
        const std::string error = resolve_step(plan, step);
        if (!error.empty()) return error;
        const Value& out = plan.values[step.output];
        if (out.rank == 2 && (out.h != 1 || out.w != 1)) return "plan: a value has the wrong rank";
        if (static_cast<double>(out.pixels()) * static_cast<double>(out.channels) > static_cast<double>(kMaxBytes))
            return "inputs: too large";
    }
    return "";
}

std::vector<Stage> cut_stages(const Plan& plan, int64_t batch, int64_t group_bytes) {
    const auto steps = static_cast<int64_t>(plan.steps.size());
    // Bytes of an image's values in the arena while a step runs; then the most of this step and all behind it.
    std::vector<int64_t> live(plan.steps.size() + 1);
    for (int64_t i = 0; i < steps; ++i) {
        const Step& step = plan.steps[i];
        const Value& out = plan.values[step.output];
        if (out.last_use == kForever) continue;
        live[i] += out.image_bytes();
        live[std::max(out.last_use, i) + 1] -= out.image_bytes();
        if (takes_place_of_residual(plan, i)) live[i] -= out.image_bytes(), live[i + 1] += out.image_bytes();
    }
    for (int64_t i = 1; i < steps; ++i) live[i] += live[i - 1];
    for (int64_t i = steps - 2; i >= 0; --i) live[i] = std::max(live[i], live[i + 1]);

    const auto ceil_div = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
    // Groups of nearly equal size.
    const auto group_at = [&](int64_t i) {
        return ceil_div(batch, std::clamp<int64_t>(ceil_div(batch * live[i], group_bytes), 1, batch));
    };
    std::vector<Stage> stages;
    for (int64_t i = 0; i < steps;) {
        const int64_t group = group_at(i);
        int64_t end = i + 1;
        while (end < steps && group_at(end) < kGrowth * group) ++end;
        stages.push_back({i, end, group});
        i = end;
    }
    return stages;
}

int64_t lay_out_arena(Plan& plan, const std::vector<Stage>& stages, bool overwrite) {
    struct Block {
        int64_t at, end, until;  // until: the last step that needs it
    };
    std::vector<Block> live;  // in order of `at`
    int64_t size = 0;
    const auto place = [&](int64_t step, int64_t bytes, int64_t until) {
        Value& value = plan.values[plan.steps[step].output];
        if (overwrite && takes_place_of_residual(plan, step)) {
            const Value& residual = plan.values[plan.steps[step].inputs[1]];
            if (residual.whole || !value.whole) {
                value.arena_at = residual.arena_at;
                value.whole = residual.whole;
                for (Block& b : live)
                    if (b.at == value.arena_at) b.until = std::max(b.until, until);
                return;
            }
        }
        // The first gap that is large enough.
        bytes = (bytes + kAlignment - 1) / kAlignment * kAlignment;
        int64_t at = 0;
        auto next = live.begin();
        for (; next != live.end() && next->at - at < bytes; ++next) at = next->end;
        live.insert(next, {at, at + bytes, until});
        value.arena_at = at;
        size = std::max(size, at + bytes);
    };
    for (const Stage& stage : stages) {
        // A value that a later stage reads is kept for all groups, from the first step of this stage to the last of
        // that.
        std::erase_if(live, [&](const Block& b) { return b.until < stage.begin; });
        for (int64_t i = stage.begin; i < stage.end; ++i) {
            Value& value = plan.values[plan.steps[i].output];
            value.whole = value.last_use >= stage.end && value.last_use != kForever;
            if (!value.whole) continue;
            auto last = stages.begin();
            while (last->end <= value.last_use) ++last;
            place(i, value.bytes(), last->end - 1);
        }
        for (int64_t i = stage.begin; i < stage.end; ++i) {
            const Value& value = plan.values[plan.steps[i].output];
            std::erase_if(live, [&](const Block& b) { return b.until < i; });
            if (!value.whole && value.last_use != kForever)
                place(i, std::min(stage.group, value.n) * value.image_bytes(), std::max(value.last_use, i));
        }
    }
    return size;
}

}  // namespace imgopt

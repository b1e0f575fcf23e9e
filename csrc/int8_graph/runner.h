// int8_graph's runner, on any device: reads a plan, resolves its sizes, places its values, and turns every step into
// the parameters of a kernel. What a device does with them is its own:
//
//   bool holds(const Tensor&)                     whether the tensor lies where the kernels read
//   uint8_t* arena(int64_t bytes)                 64-byte aligned, valid until the call ends
//   void conv(Int8Conv2d, weight, packed, rest)   the canonical weight, and the program's packed bytes from its place
//   on void quantize(p), add(p, pixels), pool(p), dequantize(p, pixels), flatten(from, to, batch, area, channels) void
//   copy(to, from, bytes)
//   int64_t group_bytes()                         optional: images run in groups whose values take about so many, and a
//                                                 convolution may write over its residual
#pragma once

#include <algorithm>
#include <cstring>

#include "../int8_conv2d/layer.h"
#include "../torch_stable.h"
#include "plan.h"

namespace imgopt {
namespace {

using torch::headeronly::MemoryFormat;

inline float float_of(int64_t bits) {
    const auto word = static_cast<uint32_t>(bits);
    float value;
    std::memcpy(&value, &word, 4);
    return value;
}

inline double double_of(int64_t bits) {
    double value;
    std::memcpy(&value, &bits, 8);
    return value;
}

// The blobs of a program, with bounds.
struct Blob {
    const uint8_t* data;
    int64_t bytes;

    const uint8_t* at(int64_t offset, int64_t count) const {
        STD_TORCH_CHECK(offset >= 0 && offset % 4 == 0 && count >= 0 && offset <= bytes - count,
                        "constants: shorter than the plan says");
        return data + offset;
    }
};

template <class Device>
Blob blob_of(const Device& device, const Tensor& t, const char* name) {
    STD_TORCH_CHECK(device.holds(t) && t.scalar_type() == ScalarType::Byte && t.is_contiguous(), name,
                    ": expected contiguous bytes on the inputs' device");
    return {static_cast<const uint8_t*>(t.const_data_ptr()), t.numel()};
}

inline Int8Format format_of(const Value& v, int64_t low, int64_t high) {
    // Out of range only in a plan that no builder wrote; it must still not write nonsense.
    const float bottom = -static_cast<float>(v.byte_zero_point()), top = bottom + 255.0f;
    const auto clip = [&](float x) { return x > bottom ? (x < top ? x : top) : bottom; };
    return {v.flip(), v.byte_zero_point(), clip(float_of(low)), clip(float_of(high))};
}

template <class Device>
class Runner {
  public:
    Runner(Device& device, Plan& plan, const std::vector<Tensor>& inputs, Blob constants, Blob packed)
        : device_(device), plan_(plan), inputs_(inputs), constants_(constants), packed_(packed) {}

    void run(int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            const Step& step = plan_.steps[i];
            const Value& in = value(step, 0);
            Value& out = plan_.values[step.output];
            if (out.bytes() == 0) continue;
            switch (step.opcode) {
                case Opcode::conv: conv(step, in, out); break;
                case Opcode::quantize: quantize(step, in, out); break;
                case Opcode::add: add(step, in, out); break;
                case Opcode::max_pool: pool(step, in, out, false); break;
                case Opcode::avg_pool: pool(step, in, out, true); break;
                case Opcode::concat: concat(step, out); break;
                case Opcode::flatten: flatten(in, out); break;
                case Opcode::dequantize: dequantize(step, in, out); break;
            }
        }
    }

  private:
    const Value& value(const Step& step, int64_t i) const { return plan_.values[step.inputs[i]]; }

    void conv(const Step& step, const Value& in, Value& out) {
        const int64_t* p = step.parameters;
        Int8Conv2d c{};
        c.weight = {p[0], p[1], p[12], p[2], p[3]};
        c.stride_h = p[4];
        c.stride_w = p[5];
        c.pad_top = p[6];
        c.pad_left = p[8];
        c.dilation_h = p[10];
        c.dilation_w = p[11];
        c.input = static_cast<const uint8_t*>(in.data);
        c.batch = in.n;
        c.in_h = in.h;
        c.in_w = in.w;
        c.input_stride = in.channels;
        c.input_flip = in.flip();
        c.input_zero_point = in.byte_zero_point();
        const int64_t channel_bytes = (c.weight.out_channels + kChannelSlack) * 4;
        c.offset = reinterpret_cast<const int32_t*>(constants_.at(p[16], channel_bytes));
        const uint8_t* multiplier = constants_.at(p[17], channel_bytes);
        c.float_output = out.is_float();
        c.multiplier = reinterpret_cast<const float*>(multiplier);
        c.shift = plan_.shift && !c.float_output ? reinterpret_cast<const Int8Shift*>(multiplier) : nullptr;
        c.low = float_of(p[18]);
        c.high = float_of(p[19]);
        c.output = out.data;
        c.out_h = out.h;
        c.out_w = out.w;
        c.output_stride = out.channels;
        if (!c.float_output) {
            const Int8Format format = format_of(out, p[18], p[19]);
            c.low = format.low;
            c.high = format.high;
            c.output_flip = format.flip;
            c.output_zero_point = format.zero_point;
        }
        if (step.input_count == 2) {
            const Value& residual = value(step, 1);
            c.residual = static_cast<const uint8_t*>(residual.data);
            c.residual_stride = residual.channels;
            c.residual_flip = residual.flip();
            c.residual_zero_point = residual.byte_zero_point();
            c.residual_multiplier = float_of(p[20]);
        }
        const int64_t count = c.weight.out_channels * c.weight.group_channels * c.weight.kernel_h * c.weight.kernel_w;
        const int8_t* weight = reinterpret_cast<const int8_t*>(constants_.at(p[13], count));
        const bool packed = p[14] >= 0 && p[14] < packed_.bytes;
        device_.conv(c, weight, packed ? packed_.data + p[14] : nullptr, packed ? packed_.bytes - p[14] : 0);
    }

    // From the caller's tensor, in whatever memory format it is.
    void quantize(const Step& step, const Value& in, Value& out) {
        size_t source = 0;
        while (source < plan_.inputs.size() && plan_.inputs[source] != step.inputs[0]) ++source;
        STD_TORCH_CHECK(source < plan_.inputs.size(), "plan: only inputs can be quantized");
        const Tensor& input = inputs_[source];
        Int8Quantize q{};
        q.input = static_cast<const float*>(in.data);
        q.batch = in.n;
        q.channels = in.channels;
        q.height = in.h;
        q.width = in.w;
        q.stride_n = input.stride(0);
        q.stride_c = input.stride(1);
        q.stride_h = in.rank == 4 ? input.stride(2) : 0;
        q.stride_w = in.rank == 4 ? input.stride(3) : 0;
        q.inverse_scale = float_of(step.parameters[0]);
        q.format = format_of(out, step.parameters[1], step.parameters[2]);
        q.output = static_cast<uint8_t*>(out.data);
        q.output_stride = out.channels;
        device_.quantize(q);
    }

    void add(const Step& step, const Value& in, Value& out) {
        const int64_t* p = step.parameters;
        const Value& b = value(step, 1);
        Int8Add a{};
        set_first(a, in, float_of(p[0]), out);
        a.b = static_cast<const uint8_t*>(b.data);
        a.b_stride = b.channels;
        a.b_flip = b.flip();
        a.b_zero_point = b.byte_zero_point();
        a.b_multiplier = float_of(p[1]);
        a.a_left = shift_between(p[2], 0, 51);
        a.b_left = shift_between(p[3], 0, 51);
        a.right = shift_between(p[4], -31, 62);
        a.format = format_of(out, p[5], p[6]);
        device_.add(a, out.pixels());
    }

    void concat(const Step& step, Value& out) {
        const int64_t* p = step.parameters;
        uint8_t* data = static_cast<uint8_t*>(out.data);
        for (int64_t i = 0; i < step.input_count; ++i) {
            const Value& in = value(step, i);
            Int8Add a{};
            set_first(a, in, float_of(p[2 + 2 * i]), out);
            a.right = shift_between(p[3 + 2 * i], -31, 62);
            a.format = format_of(out, p[0], p[1]);
            a.output = data;
            device_.add(a, out.pixels());
            data += in.channels;
        }
    }

    void set_first(Int8Add& a, const Value& in, float multiplier, Value& out) const {
        a.a = static_cast<const uint8_t*>(in.data);
        a.channels = in.channels;
        a.a_stride = in.channels;
        a.a_flip = in.flip();
        a.a_zero_point = in.byte_zero_point();
        a.a_multiplier = multiplier;
        a.shifted = plan_.shift;
        a.output = static_cast<uint8_t*>(out.data);
        a.output_stride = out.channels;
    }

    void pool(const Step& step, const Value& in, Value& out, bool average) {
        const int64_t* p = step.parameters;
        const bool whole = average && p[0] == 0;
        Int8Pool q{};
        q.input = static_cast<const uint8_t*>(in.data);
        q.batch = in.n;
        q.in_h = in.h;
        q.in_w = in.w;
        q.channels = in.channels;
        q.input_stride = in.channels;
        q.kernel_h = whole ? in.h : p[0];
        q.kernel_w = whole ? in.w : p[1];
        q.stride_h = p[2];
        q.stride_w = p[3];
        q.pad_top = whole ? 0 : p[4];
        q.pad_left = whole ? 0 : p[6];
        q.input_flip = in.flip();
        q.input_zero_point = in.byte_zero_point();
        q.average = average;
        if (average) {
            q.count_padding = p[8] != 0;
            q.shifted = plan_.shift;
            q.ratio = double_of(p[9]);
            q.right = shift_between(p[10], -20, 20);
            q.format = format_of(out, p[11], p[12]);
        }
        q.output = static_cast<uint8_t*>(out.data);
        q.out_h = out.h;
        q.out_w = out.w;
        q.output_stride = out.channels;
        device_.pool(q);
    }

    void dequantize(const Step& step, const Value& in, Value& out) {
        const Int8Dequantize d{static_cast<const uint8_t*>(in.data),
                               in.channels,
                               in.channels,
                               in.flip(),
                               in.byte_zero_point(),
                               float_of(step.parameters[0]),
                               static_cast<float*>(out.data),
                               out.channels};
        device_.dequantize(d, out.pixels());
    }

    // (h, w, c) to (c, h, w), the order of torch.flatten; a copy where the image is one pixel.
    void flatten(const Value& in, Value& out) {
        const auto* from = static_cast<const uint8_t*>(in.data);
        if (in.h * in.w == 1)
            device_.copy(out.data, from, in.bytes());
        else
            device_.flatten(from, static_cast<uint8_t*>(out.data), in.n, in.h * in.w, in.channels);
    }

    static int32_t shift_between(int64_t value, int64_t low, int64_t high) {
        return static_cast<int32_t>(value < low ? low : value > high ? high : value);
    }

    Device& device_;
    Plan& plan_;
    const std::vector<Tensor>& inputs_;
    Blob constants_, packed_;
};

inline ScalarType scalar_type(const Value& v) {
    return v.is_float() ? ScalarType::Float : v.type == ValueType::i8 ? ScalarType::Char : ScalarType::Byte;
}

// Sizes of an input; quantized images are brought to channels_last, float ones are read as they lie.
template <class Device>
Tensor take_input(const Device& device, const Tensor& given, Value& v) {
    STD_TORCH_CHECK(device.holds(given) && given.scalar_type() == scalar_type(v) && given.dim() == v.rank &&
                        given.size(1) == v.channels,
                    "inputs: not the dtype, rank or channels that the program declares");
    v.n = given.size(0);
    v.h = v.rank == 4 ? given.size(2) : 1;
    v.w = v.rank == 4 ? given.size(3) : 1;
    Tensor t = v.is_float()  ? given
               : v.rank == 4 ? torch::stable::contiguous(given, MemoryFormat::ChannelsLast)
                             : torch::stable::contiguous(given);
    v.data = const_cast<void*>(t.const_data_ptr());
    return t;
}

// The number of images, if all inputs have the same; otherwise -1.
inline int64_t batch_of(const Plan& plan) {
    int64_t batch = -1;
    for (int64_t input : plan.inputs) {
        const int64_t n = plan.values[input].n;
        if (batch >= 0 && n != batch) return -1;  // inputs that never meet
        batch = n;
    }
    return batch;
}

// Where the images of an input or output lie: the bytes of all of them, and from one to the next.
struct Images {
    int64_t value;
    uint8_t* data;
    int64_t bytes, step;
};

inline Images images_of(const Plan& plan, int64_t value) {
    const Value& v = plan.values[value];
    return {value, static_cast<uint8_t*>(v.data), v.bytes(), v.n > 0 ? v.bytes() / v.n : 0};
}

template <class Device>
std::vector<Tensor> run_graph(Device& device, std::vector<Tensor> inputs, const Tensor& plan_words,
                              const Tensor& constants, const Tensor& packed) {
    STD_TORCH_CHECK(plan_words.is_cpu() && plan_words.scalar_type() == ScalarType::Long && plan_words.dim() == 1 &&
                        (plan_words.numel() <= 1 || plan_words.stride(0) == 1),
                    "plan: expected a contiguous int64 tensor on the CPU");
    Plan plan;
    std::string error = read_plan(static_cast<const int64_t*>(plan_words.const_data_ptr()), plan_words.numel(), plan);
    STD_TORCH_CHECK(error.empty(), error);
    STD_TORCH_CHECK(inputs.size() == plan.inputs.size(), "inputs: expected ", plan.inputs.size(), " tensors");
    for (size_t i = 0; i < inputs.size(); ++i) inputs[i] = take_input(device, inputs[i], plan.values[plan.inputs[i]]);
    error = resolve_sizes(plan);
    STD_TORCH_CHECK(error.empty(), error);

    std::vector<Images> outside;
    for (size_t i = 0; i < inputs.size(); ++i) {
        outside.push_back(images_of(plan, plan.inputs[i]));
        if (plan.values[plan.inputs[i]].is_float()) outside.back().step = inputs[i].stride(0) * 4;
    }
    // An output has a tensor of its own from the start; one that is an input, or asked for twice, is copied at the end.
    std::vector<Tensor> results(plan.outputs.size());
    for (size_t i = 0; i < results.size(); ++i) {
        Value& v = plan.values[plan.outputs[i]];
        STD_TORCH_CHECK(!(v.is_float() && is_input(plan, plan.outputs[i])), "plan: a float input cannot be an output");
        results[i] = v.rank == 4
                         ? torch::stable::empty({v.n, v.channels, v.h, v.w}, scalar_type(v), std::nullopt,
                                                constants.device(), std::nullopt, MemoryFormat::ChannelsLast)
                         : torch::stable::empty({v.n, v.channels}, scalar_type(v), std::nullopt, constants.device());
        if (v.data) continue;
        v.data = results[i].mutable_data_ptr();
        outside.push_back(images_of(plan, plan.outputs[i]));
    }

    Runner<Device> runner(device, plan, inputs, blob_of(device, constants, "constants"),
                          blob_of(device, packed, "packed"));
    const int64_t batch = batch_of(plan);
    constexpr bool kGroups = requires { device.group_bytes(); };
    std::vector<Stage> stages{{0, static_cast<int64_t>(plan.steps.size()), INT64_MAX}};
    if constexpr (kGroups)
        if (batch > 1) stages = cut_stages(plan, batch, device.group_bytes());
    uint8_t* memory = device.arena(lay_out_arena(plan, stages, kGroups));
    for (const Stage& stage : stages) {
        int64_t first = 0;
        do {
            for (Value& v : plan.values) {
                if (batch >= 0) v.n = std::min(stage.group, batch - first);
                if (v.arena_at >= 0) v.data = memory + v.arena_at + (v.whole ? first * v.image_bytes() : 0);
            }
            for (const Images& images : outside) plan.values[images.value].data = images.data + first * images.step;
            runner.run(stage.begin, stage.end);
            first += stage.group;
        } while (first < batch);
    }
    for (size_t i = 0; i < results.size(); ++i) {
        void* own = results[i].mutable_data_ptr();
        for (const Images& images : outside)
            if (images.value == plan.outputs[i] && images.data != own && images.bytes > 0)
                device.copy(own, images.data, images.bytes);
    }
    return results;
}

}  // namespace
}  // namespace imgopt

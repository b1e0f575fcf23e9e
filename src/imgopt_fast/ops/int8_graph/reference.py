"""int8_graph in plain torch, on any device: a plan interpreted step by step, with the arithmetic of int8_conv2d."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from imgopt_fast.ops.int8_conv2d import reference as arithmetic
from imgopt_fast.ops.int8_graph import plan as fmt


def int8_graph(
    inputs: list[Tensor], plan: Tensor, constants: Tensor, packed: Tensor, outputs: list[int]
) -> list[Tensor]:
    """Implements the schema of `int8_graph`; `packed` is not looked at."""
    return interpret(fmt.decode(plan), inputs, constants, arithmetic.convolve)


def interpret(
    graph: fmt.Plan, inputs: list[Tensor], constants: Tensor, convolve: Callable[..., Tensor]
) -> list[Tensor]:
    """Run every step; `convolve` gives the exact sums of a convolution, as in int8_conv2d/reference.py."""
    values: dict[int, Tensor] = dict(zip(graph.inputs, inputs, strict=True))
    for step in graph.steps:
        given = [values[i] for i in step.inputs]
        if step.opcode == fmt.CONV:
            values[step.output] = _convolve(graph, step, given, constants, convolve)
        else:
            values[step.output] = _STEPS[step.opcode](graph, step, given)
    return [_owned(values[i]) for i in graph.outputs]


def _convolve(
    graph: fmt.Plan, step: fmt.Step, given: list[Tensor], constants: Tensor, convolve: Callable[..., Tensor]
) -> Tensor:
    p = step.parameters
    channels = p["out_channels"]
    zero_point = graph.values[step.inputs[0]][3]
    bias = fmt.channel_array(constants, p["bias_at"], channels, torch.int32)
    x = given[0] if given[0].dim() == 4 else given[0][:, :, None, None]
    sides = [p["top"], p["bottom"], p["left"], p["right"]]
    sums = convolve(
        x,
        fmt.conv_weight(constants, p),
        bias,
        zero_point,
        [p["stride_h"], p["stride_w"]],
        sides,
        [p["dilation_h"], p["dilation_w"]],
        p["groups"],
    )
    residual = None
    if len(given) == 2:
        residual = _difference(graph, step, given, 1).view(sums.shape)
    _, _, dtype, _ = graph.values[step.output]
    if graph.shift and dtype != torch.float32:
        shifts = fmt.channel_array(constants, p["multiplier_at"], channels, torch.int32).view(torch.int8)
        right, sum_left, residual_left = shifts.view(channels, 4).long()[:, :3].unbind(1)
        total = sums.long() << sum_left.view(1, -1, 1, 1)
        if residual is not None:
            total = total + (residual.long() << residual_left.view(1, -1, 1, 1))
        out = _requantize_shift(graph, step, total, right.view(1, -1, 1, 1))
    else:
        factor = fmt.channel_array(constants, p["multiplier_at"], channels, torch.float32)
        y = sums.to(torch.float32) * factor.view(1, -1, 1, 1)
        out = _requantize(graph, step, arithmetic.add_scaled(y, residual, fmt.float_of(p["residual_multiplier"])))
    return out if given[0].dim() == 4 else out.flatten(1)


def _quantize(graph: fmt.Plan, step: fmt.Step, given: list[Tensor]) -> Tensor:
    y = given[0].to(torch.float32) * fmt.float_of(step.parameters["inverse_scale"])
    return _requantize(graph, step, y.nan_to_num(-math.inf))


def _add(graph: fmt.Plan, step: fmt.Step, given: list[Tensor]) -> Tensor:
    p = step.parameters
    a, b = (_difference(graph, step, given, i) for i in (0, 1))
    if graph.shift:
        return _requantize_shift(
            graph, step, (a.long() << p["left_shift_a"]) + (b.long() << p["left_shift_b"]), p["right_shift"]
        )
    y = a.to(torch.float32) * fmt.float_of(p["multiplier_a"])
    return _requantize(graph, step, y + b.to(torch.float32) * fmt.float_of(p["multiplier_b"]))


def _max_pool(graph: fmt.Plan, step: fmt.Step, given: list[Tensor]) -> Tensor:
    p = step.parameters
    padded = F.pad(given[0].double(), (p["left"], p["right"], p["top"], p["bottom"]), value=-math.inf)
    window, stride = (p["kernel_h"], p["kernel_w"]), (p["stride_h"], p["stride_w"])
    return F.max_pool2d(padded, window, stride).to(given[0].dtype)


def _avg_pool(graph: fmt.Plan, step: fmt.Step, given: list[Tensor]) -> Tensor:
    p = step.parameters
    x = _difference(graph, step, given, 0).double()
    sides = (p["left"], p["right"], p["top"], p["bottom"])
    window = (p["kernel_h"], p["kernel_w"]) if p["kernel_h"] else (x.shape[2], x.shape[3])
    stride = (p["stride_h"], p["stride_w"])
    area = window[0] * window[1]
    sums = _window_sums(F.pad(x, sides), window, stride)
    count = torch.full_like(sums[:1, :1], area)
    if not p["count_padding"]:
        count = _window_sums(F.pad(torch.ones_like(x[:1, :1]), sides), window, stride)
    if graph.shift:
        up, down = max(0, -p["right_shift"]), max(0, p["right_shift"])
        total, divisor = sums.long() << up, count.long() << down
        steps = torch.div(2 * total + divisor, 2 * divisor, rounding_mode="floor")
        return _saturate(graph, step, steps)
    factor = (fmt.double_of(p["ratio"]) / count).to(torch.float32)
    return _requantize(graph, step, sums.to(torch.float32) * factor)


def _concat(graph: fmt.Plan, step: fmt.Step, given: list[Tensor]) -> Tensor:
    parts = []
    for i in range(len(given)):
        x = _difference(graph, step, given, i)
        factor, right = step.extra[2 * i : 2 * i + 2]
        if graph.shift:
            parts.append(_requantize_shift(graph, step, x.long(), right))
        else:
            parts.append(_requantize(graph, step, x.to(torch.float32) * fmt.float_of(factor)))
    return torch.cat(parts, 1)


def _flatten(graph: fmt.Plan, step: fmt.Step, given: list[Tensor]) -> Tensor:
    return given[0].flatten(1)


def _dequantize(graph: fmt.Plan, step: fmt.Step, given: list[Tensor]) -> Tensor:
    return _difference(graph, step, given, 0).to(torch.float32) * fmt.float_of(step.parameters["scale"])


_STEPS = {
    fmt.QUANTIZE: _quantize,
    fmt.ADD: _add,
    fmt.MAX_POOL: _max_pool,
    fmt.AVG_POOL: _avg_pool,
    fmt.CONCAT: _concat,
    fmt.FLATTEN: _flatten,
    fmt.DEQUANTIZE: _dequantize,
}


def _window_sums(x: Tensor, window: tuple[int, int], stride: tuple[int, int]) -> Tensor:
    """Exact: integers in float64, and a divisor of one."""
    return F.avg_pool2d(x, window, stride, divisor_override=1)


def _difference(graph: fmt.Plan, step: fmt.Step, given: list[Tensor], i: int) -> Tensor:
    return given[i].to(torch.int32) - graph.values[step.inputs[i]][3]


def _requantize(graph: fmt.Plan, step: fmt.Step, y: Tensor) -> Tensor:
    """Clamp, and unless the output is float32 round, add the zero point, and narrow."""
    _, _, dtype, zero_point = graph.values[step.output]
    y = y.clamp(fmt.float_of(step.parameters["low"]), fmt.float_of(step.parameters["high"]))
    return y if dtype == torch.float32 else (torch.round(y) + zero_point).to(dtype)


def _requantize_shift(graph: fmt.Plan, step: fmt.Step, total: Tensor, right: Tensor | int) -> Tensor:
    return _saturate(graph, step, arithmetic.shift_right(total, torch.as_tensor(right, device=total.device)))


def _saturate(graph: fmt.Plan, step: fmt.Step, steps: Tensor) -> Tensor:
    _, _, dtype, zero_point = graph.values[step.output]
    low, high = (round(fmt.float_of(step.parameters[name])) for name in ("low", "high"))
    return (steps.clamp(low, high) + zero_point).to(dtype)


def _owned(value: Tensor) -> Tensor:
    """A tensor of its own, images in channels_last memory."""
    layout = torch.channels_last if value.dim() == 4 else torch.contiguous_format
    return torch.empty(value.shape, dtype=value.dtype, device=value.device, memory_format=layout).copy_(value)

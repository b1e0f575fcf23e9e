"""A connected int8 part of a network, run by one call.

The segment is a list of steps over numbered values. Layers are child modules with plain buffers; the other values that
have a scale of their own keep it in buffers named after their step. From these the program of `int8_graph` is built,
again after anything that changes the buffers; it is never part of the state.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from imgopt_fast.nn.int8 import Requantize
from imgopt_fast.ops.int8_graph import Int8GraphBuilder, Int8Program, int8_graph, repack


class Step(NamedTuple):
    """One instruction; its result is the value of its own position in the list.

    kind: quantize, input, conv2d, linear, add, concat, rescale, max_pool2d, avg_pool2d, global_avg_pool2d, flatten or
    dequantize. inputs: positions of the values it reads. residual: position of the value added before the clamp.
    """

    kind: str
    name: str
    inputs: tuple[int, ...]
    residual: int | None
    attributes: dict[str, Any]

    @property
    def sources(self) -> tuple[int, ...]:
        """Everything that it reads, the residual last."""
        return self.inputs if self.residual is None else (*self.inputs, self.residual)


class Int8Segment(nn.Module):
    """Runs `steps` on its inputs, float ones for "quantize" steps and uint8 ones for "input" steps, in their order.

    Returns the values `outputs` as a tuple: float32 behind a dequantize step or a linear layer without output scale,
    uint8 otherwise.
    """

    def __init__(
        self,
        steps: list[Step],
        outputs: list[int],
        layers: dict[str, nn.Module],
        scales: Mapping[str, tuple[float, int]],
        requantize: Requantize = "float",
    ) -> None:
        super().__init__()
        self.steps = steps
        self.outputs = outputs
        self.requantize: Requantize = requantize
        for name, layer in layers.items():
            self.add_module(name, layer)
        for name, (scale, zero_point) in scales.items():
            self.register_buffer(f"{name}_scale", torch.tensor(scale, dtype=torch.float32))
            self.register_buffer(f"{name}_zero_point", torch.tensor(zero_point, dtype=torch.int32))
        self.training = False
        self._program: Int8Program | None = None
        self.register_load_state_dict_post_hook(_rebuild)  # type: ignore[no-untyped-call]
        self.rebuild()

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        if self._program is None:
            self.rebuild()
        assert self._program is not None
        return tuple(int8_graph(list(inputs), self._program))

    def rebuild(self) -> None:
        """Build the program from the buffers. Raises ValueError, naming the step, when one of them is out of range."""
        if any(buffer.is_meta for buffer in self.buffers()):
            return
        builder = Int8GraphBuilder(requantize=self.requantize)
        values: dict[int, int] = {}
        for position, step in enumerate(self.steps):
            try:
                values[position] = self._add(builder, step, values)
            except ValueError as refusal:
                raise ValueError(f"{step.name} ({step.kind}): {refusal}; `exclude` keeps the layer float") from refusal
        program = builder.build([values[position] for position in self.outputs])
        device = next(self.buffers()).device
        program = program._replace(constants=program.constants.to(device), packed=program.packed.to(device))
        self._program = repack(program) if device.type == "cuda" else program

    def run_stepwise(self, inputs: Sequence[Tensor], run: Callable[[Step, Callable[[], Tensor], int], Tensor]) -> None:
        """Compute the steps one by one: `run` is given each step, a function that computes it, and the bytes of the
        values that the segment holds meanwhile; it calls the function and returns its result.

        The values are those of `forward`, bit for bit; what fusing them into one call saves is lost. For profiling.
        """
        given = iter(inputs)
        tensors: dict[int, Tensor] = {}
        last_reader = {source: position for position, step in enumerate(self.steps) for source in step.sources}
        for position, step in enumerate(self.steps):
            for source in [held for held in tensors if last_reader.get(held, position) < position]:
                if source not in self.outputs:
                    del tensors[source]
            if step.kind == "input":
                tensors[position] = next(given)
                continue
            builder = Int8GraphBuilder(requantize=self.requantize)
            values: dict[int, int] = {}
            for source in step.sources:
                scale, zero_point = self._quantization(source)
                tensor = tensors[source]
                values[source] = builder.input(
                    channels=tensor.shape[1], rank=tensor.ndim, scale=scale, zero_point=zero_point, dtype=tensor.dtype
                )
            program = builder.build([self._add(builder, step, values)])
            arguments = [next(given)] if step.kind == "quantize" else [tensors[source] for source in values]
            held = sum(tensor.nbytes for tensor in tensors.values())
            tensors[position] = run(step, partial(_first, arguments, program), held)

    def _quantization(self, position: int) -> tuple[float, int]:
        """Scale and zero point of a value."""
        step = self.steps[position]
        if step.kind in ("max_pool2d", "flatten"):
            return self._quantization(step.inputs[0])
        if step.kind in ("conv2d", "linear"):
            layer: Any = self.get_submodule(step.name)
            return layer.output_scale.item(), int(layer.output_zero_point)
        return self.get_buffer(f"{step.name}_scale").item(), int(self.get_buffer(f"{step.name}_zero_point"))

    def _add(self, builder: Int8GraphBuilder, step: Step, values: Mapping[int, int]) -> int:
        """Hand one step to the builder; returns the builder's id of its value."""
        inputs: list[Any] = [values[position] for position in step.inputs]
        arguments = dict(step.attributes)
        if step.kind in ("conv2d", "linear"):
            arguments |= self._layer_arguments(step)
            if step.residual is not None:
                arguments["residual"] = values[step.residual]
        elif step.kind not in ("max_pool2d", "flatten", "dequantize"):
            prefix = "" if step.kind in ("quantize", "input") else "output_"
            scale, zero_point = self._quantization(self.steps.index(step))
            arguments |= {f"{prefix}scale": scale, f"{prefix}zero_point": zero_point}
        if step.kind in ("concat", "rescale"):  # a clamp that stands alone: the ends of its range saturate
            return builder.concat(inputs, **arguments)
        method: Callable[..., int] = getattr(builder, step.kind)
        return method(*inputs, **arguments)

    def _layer_arguments(self, step: Step) -> dict[str, Any]:
        layer: Any = self.get_submodule(step.name)
        arguments = {
            "weight": layer.weight_int8,
            "weight_scale": layer.weight_scale,
            "bias": layer.bias,
            "output_scale": None if layer.output_scale is None else layer.output_scale.item(),
            "output_zero_point": int(layer.output_zero_point),
            "output_min": layer.output_min,
            "output_max": layer.output_max,
        }
        if step.kind == "conv2d":
            arguments |= {name: getattr(layer, name) for name in ("stride", "padding", "dilation", "groups")}
        return arguments

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.rebuild()
        return self

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_program": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.rebuild()


def _first(inputs: list[Tensor], program: Int8Program) -> Tensor:
    return int8_graph(inputs, program)[0]


def _rebuild(segment: Int8Segment, incompatible_keys: Any) -> None:
    segment.rebuild()

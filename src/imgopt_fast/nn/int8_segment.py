"""A connected int8 part of a network, run by one call.

The segment is a list of steps over numbered values. Layers are child modules with plain buffers; the other values that
have a scale of their own keep it in buffers named after their step. From these the program of `int8_graph` is built,
again after anything that changes the buffers; it is never part of the state. Pruned layers that are faster without
their zeros cut the list: what lies between them then runs as programs of its own.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from imgopt_fast.nn.int8 import Float32Buffers, Requantize
from imgopt_fast.nn.int8_sparse import FEWEST_IMAGES, SparseLayer, describe_zeros, sparse_layer
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


class Int8Segment(Float32Buffers):
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
        self._sparse: dict[int, SparseLayer] = {}
        self._programs: dict[int, Int8Program] = {}
        self.register_load_state_dict_post_hook(_rebuild)  # type: ignore[no-untyped-call]
        self.rebuild()

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        if self._program is None:
            self.rebuild()
        assert self._program is not None
        if self._sparse and not torch.compiler.is_compiling() and len(inputs[0]) >= FEWEST_IMAGES:
            return self._run_around_sparse(inputs)
        return tuple(int8_graph(list(inputs), self._program))

    def zeros(self) -> dict[str, str]:
        """By the name of each pruned layer, how many of its weights are zero and whether they are skipped."""
        layers = {
            step.name: describe_zeros(step, self.get_submodule(step.name), sparse=position in self._sparse)
            for position, step in enumerate(self.steps)
            if step.kind in ("conv2d", "linear")
        }
        return {name: text for name, text in layers.items() if text}

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
        self._program = self._placed(builder.build([values[position] for position in self.outputs]))
        self._programs = {}  # of the runs between sparse layers, on first use
        self._sparse = {}
        for position, step in enumerate(self.steps):
            if step.kind in ("conv2d", "linear"):
                found = sparse_layer(step, self.get_submodule(step.name), self.requantize)
                self._sparse |= {} if found is None else {position: found}

    def _run_around_sparse(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """`forward` with the layers of `_sparse` by themselves and the steps between them as one program each."""
        declared = [position for position, step in enumerate(self.steps) if step.kind in ("quantize", "input")]
        given = dict(zip(declared, inputs, strict=True))
        tensors: dict[int, Tensor] = {}
        for run in self._runs():
            if run[0] in self._sparse:
                tensors[run[0]] = self._sparse[run[0]](tensors[self.steps[run[0]].inputs[0]])
                continue
            read = dict.fromkeys(source for at in run for source in self.steps[at].sources if source not in run)
            outside = [step.sources for at, step in enumerate(self.steps) if at not in run]
            wanted = [at for at in run if at in self.outputs or any(at in sources for sources in outside)]
            if run[0] not in self._programs:
                builder = Int8GraphBuilder(requantize=self.requantize)
                values = {source: self._declare(builder, source, tensors[source]) for source in read}
                for at in run:
                    values[at] = self._add(builder, self.steps[at], values)
                self._programs[run[0]] = self._placed(builder.build([values[at] for at in wanted]))
            arguments = [tensors[source] for source in read] + [given[at] for at in run if at in given]
            tensors |= zip(wanted, int8_graph(arguments, self._programs[run[0]]), strict=True)
        return tuple(tensors[position] for position in self.outputs)

    def _runs(self) -> list[list[int]]:
        """The positions in order, cut before and behind every sparse layer."""
        runs: list[list[int]] = [[]]
        for position in range(len(self.steps)):
            if position in self._sparse:
                runs += [[position], []]
            else:
                runs[-1].append(position)
        return [run for run in runs if run]

    def _declare(self, builder: Int8GraphBuilder, position: int, tensor: Tensor) -> int:
        """Make the value of a step, as it was computed, an input of another program."""
        scale, zero_point = self.quantization(position)
        return builder.input(
            channels=tensor.shape[1], rank=tensor.ndim, scale=scale, zero_point=zero_point, dtype=tensor.dtype
        )

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
            values = {source: self._declare(builder, source, tensors[source]) for source in dict.fromkeys(step.sources)}
            program = self._placed(builder.build([self._add(builder, step, values)]))
            arguments = [next(given)] if step.kind == "quantize" else [tensors[source] for source in values]
            held = sum(tensor.nbytes for tensor in tensors.values())
            tensors[position] = run(step, partial(_first, arguments, program), held)

    def quantization(self, position: int) -> tuple[float, int]:
        """Scale and zero point of the value of step `position`, which is quantized."""
        step = self.steps[position]
        if step.kind in ("max_pool2d", "flatten"):
            return self.quantization(step.inputs[0])
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
            scale, zero_point = self.quantization(self.steps.index(step))
            arguments |= {f"{prefix}scale": scale, f"{prefix}zero_point": zero_point}
        if step.kind in ("concat", "rescale"):  # a clamp that stands alone: the ends of its range saturate
            return builder.concat(inputs, **arguments)
        method: Callable[..., int] = getattr(builder, step.kind)
        return method(*inputs, **arguments)

    def _placed(self, program: Int8Program) -> Int8Program:
        """`program`, which is built on the CPU, where the buffers are."""
        device = next(self.buffers()).device
        if device.type == "cpu":
            return program
        return repack(program._replace(constants=program.constants.to(device), packed=program.packed.to(device)))

    def _layer_arguments(self, step: Step) -> dict[str, Any]:
        layer: Any = self.get_submodule(step.name)
        arguments = {
            "weight": layer.weight_int8.cpu(),
            "weight_scale": layer.weight_scale.cpu(),
            "bias": None if layer.bias is None else layer.bias.cpu(),
            "output_scale": None if layer.output_scale is None else layer.output_scale.item(),
            "output_zero_point": int(layer.output_zero_point),
            "output_min": layer.output_min,
            "output_max": layer.output_max,
        }
        if step.kind == "conv2d":
            arguments |= {name: getattr(layer, name) for name in ("stride", "padding", "dilation", "groups")}
        return arguments

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        self.rebuild()
        return self

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_program": None, "_sparse": {}, "_programs": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.rebuild()


def _first(inputs: list[Tensor], program: Int8Program) -> Tensor:
    return int8_graph(inputs, program)[0]


def _rebuild(segment: Int8Segment, incompatible_keys: Any) -> None:
    segment.rebuild()

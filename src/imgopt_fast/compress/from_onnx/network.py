"""The module that an imported ONNX model becomes."""

from typing import Any

from torch import Tensor, int32, nn

from imgopt_fast.ops.int8_graph import Int8Program, int8_graph, repack


class OnnxNetwork(nn.Module):
    """A quantized ONNX model as one program of `int8_graph`. Inference only; made by `from_onnx`.

    Takes and gives tensors as the model does, in its order: float32, uint8 or int8 (N, C, H, W) or (N, C).
    """

    plan: Tensor
    constants: Tensor

    def __init__(self, program: Int8Program, stacked: int, integers: tuple[bool, ...]) -> None:
        super().__init__()
        self.register_buffer("plan", program.plan)
        self.register_buffer("constants", program.constants)
        self._program = program
        self._stacked = stacked  # of a product of stacks of matrices: how many
        self._integers = integers  # which outputs are int32
        self.eval()

    def forward(self, *inputs: Tensor) -> Any:
        if self._stacked:
            inputs = tuple(x.transpose(0, 1).reshape(x.shape[1], -1) for x in inputs)
        program = self._program._replace(plan=self.plan, constants=self.constants)
        results = int8_graph(list(inputs), program)
        if self._stacked:
            results = [y.view(len(y), self._stacked, -1).transpose(0, 1) for y in results]
        found = [y.to(int32) if exact else y for y, exact in zip(results, self._integers, strict=True)]
        return found[0] if len(found) == 1 else tuple(found)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._program = repack(self._program)

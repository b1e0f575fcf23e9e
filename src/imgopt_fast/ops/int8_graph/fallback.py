"""The Numba twin of int8_graph: the reference interpreter, with the convolutions done by the twin of int8_conv2d.

The other steps are bound by memory in plain torch already.
"""

from torch import Tensor

from imgopt_fast.ops.int8_conv2d import fallback as twin
from imgopt_fast.ops.int8_graph import plan as fmt
from imgopt_fast.ops.int8_graph import reference


def int8_graph(
    inputs: list[Tensor], plan: Tensor, constants: Tensor, packed: Tensor, outputs: list[int]
) -> list[Tensor]:
    """Implements the schema of `int8_graph` on the CPU; `packed` is not looked at."""
    return reference.interpret(fmt.decode(plan), inputs, constants, twin.convolve)

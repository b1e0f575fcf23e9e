"""int8_masked_matmul against the dense int8 kernel on the same weights with their zeros, and against float32."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch.nn import functional as F

from imgopt_fast.benchmarks.case import Agreement, Case, Runner, Work
from imgopt_fast.benchmarks.masks import random_mask
from imgopt_fast.ops.int8_conv2d import int8_conv2d, pack_int8_weight
from imgopt_fast.ops.masked_matmul import int8_masked_matmul, pack_int8_masked_weight


@dataclass(eq=False)
class Int8MatmulCase(Case):
    """A pruned int8 linear of 1024 outputs, against the dense int8 kernel on the weight with zeros.

    `compress.quantize` takes the faster of the two (nn/int8_sparse.py): the dense one for 90 % of 1024 inputs.
    """

    subject: ClassVar[str] = "masked_matmul"
    reference: ClassVar[str] = "ours, dense int8"
    sparsity: float
    inputs: int
    batch: int = 256
    quick: bool = False

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"int8 {self.sparsity:.0%} 1024x{self.inputs} batch {self.batch}"

    @cached_property
    def input(self) -> torch.Tensor:
        return torch.randint(0, 256, (self.batch, self.inputs), generator=torch.Generator().manual_seed(1)).byte()

    @cached_property
    def mask(self) -> torch.Tensor:
        return random_mask(1024, self.inputs, self.sparsity)

    @cached_property
    def weight(self) -> torch.Tensor:
        generator = torch.Generator().manual_seed(2)
        return torch.randint(-127, 128, self.mask.shape, generator=generator, dtype=torch.int8) * self.mask

    def ours(self) -> Runner:
        x, packed = self.input, pack_int8_masked_weight(self.weight, self.mask, 0.01, input_scale=0.02)
        return Runner(lambda: int8_masked_matmul(x, packed, output_scale=1.0))

    def peers(self) -> Mapping[str, Callable[[], Runner]]:
        return {self.reference: self.with_dense, "torch float32": self.with_linear}

    def with_dense(self) -> Runner:
        x, packed = (
            self.input[:, :, None, None],
            pack_int8_weight(self.weight[:, :, None, None], 0.01, input_scale=0.02),
        )
        return Runner(lambda: int8_conv2d(x, packed, output_scale=1.0), result=lambda y: y[:, :, 0, 0])

    def with_linear(self) -> Runner:
        """What the network took before it was quantized; its result is what rounds to ours."""
        x, weight = self.input.float(), self.weight.float()
        return Runner(
            lambda: F.linear(x, weight), Agreement(1.0), lambda y: (y * 2e-4).round().clamp(0, 255)
        )  # fmt: skip

    def work(self) -> Work:
        kept = int(self.mask.sum())
        return Work(
            int8_ops=2.0 * kept * self.batch, bytes_read=float(kept + self.batch * self.inputs),
            bytes_written=1024.0 * self.batch,
        )  # fmt: skip


CASES: list[Case] = [Int8MatmulCase(sparsity, inputs) for sparsity in (0.9, 0.95) for inputs in (1024, 2048)]

"""SGD for pruned networks: the step of a masked weight touches its kept entries only.

    optimizer = MaskedSGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4, model=model)

Where torch's SGD lets momentum and weight decay bring a pruned weight back, and reads and writes all of it to move a
tenth, this one keeps the velocity of the kept entries alone and updates weight and velocity in one pass, which also
writes the weight in the order of the products to come. Its
state_dict is that of torch.optim.SGD, so that a training may change from one to the other.
"""

from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.sgd import sgd

from imgopt_fast.nn import MaskedConv2d, MaskedLinear
from imgopt_fast.nn.masked import Seen
from imgopt_fast.ops.masked_matmul import MaskLayout
from imgopt_fast.ops.masked_sgd import KeptBits, Ordered, kept_bits, masked_sgd
from imgopt_fast.ops.masked_sgd.reference import kept_positions

VELOCITY, DENSE = "velocity", "momentum_buffer"  # of the kept entries; of all, which is torch's own name


class MaskedSGD(Optimizer):
    """torch.optim.SGD over the parameters `params`; the masked layers of `model` say which weights exist.

    Masks are looked up in every step, so layers may be masked before or after: a weight that is pruned loses its
    velocity, one that is regrown starts from zero. Parameters without a mask move as in torch.optim.SGD.

    Args:
        params, lr, momentum, dampening, weight_decay, nesterov: as for torch.optim.SGD.
        model: what holds the MaskedLinear and MaskedConv2d layers.

    Raises ValueError for rates outside of torch's ranges.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        model: nn.Module,
    ) -> None:
        for name, value in (("lr", lr), ("momentum", momentum), ("weight_decay", weight_decay)):
            if value < 0:
                raise ValueError(f"{name}: expected a number of at least 0, got {value}")
        if nesterov and (momentum <= 0 or dampening != 0):
            raise ValueError(f"nesterov: expected momentum and no dampening, got {momentum} and {dampening}")
        defaults = {
            "lr": lr, "momentum": momentum, "dampening": dampening, "weight_decay": weight_decay, "nesterov": nesterov,
        }  # fmt: skip
        super().__init__(params, defaults)
        self.model = model
        self._kept: dict[Tensor, tuple[KeptBits, Seen | None]] = {}  # of the mask that was seen
        self._orders: dict[Tensor, tuple[MaskLayout, tuple[Ordered | None, Ordered | None]]] = {}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step from the gradients that are there; `closure` as in torch.optim."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        layers = {m.weight: m for m in self.model.modules() if isinstance(m, MaskedLinear | MaskedConv2d)}
        for group in self.param_groups:
            moved = [p for p in group["params"] if p.grad is not None]
            self._step_dense([p for p in moved if p not in layers], group)
            for weight in moved:
                if weight in layers:
                    self._step_masked(weight, layers[weight], group)
        return loss

    def state_dict(self) -> dict[str, Any]:
        """That of torch.optim.SGD: velocities are spread to the weight's shape."""
        state = super().state_dict()
        parameters = chain.from_iterable(group["params"] for group in self.param_groups)
        dense = {
            index: {DENSE: self._spread(p)} for index, p in enumerate(parameters) if VELOCITY in self.state.get(p, {})
        }
        state["state"] = state["state"] | dense
        return state

    def __getstate__(self) -> dict[str, Any]:
        kept = {weight: (bits, None) for weight, (bits, _) in self._kept.items()}
        return super().__getstate__() | {"model": self.model, "_kept": kept, "_orders": {}}

    def _step_dense(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        buffers = [self.state[p].get(DENSE) for p in parameters]
        grads = cast(list[Tensor], [p.grad for p in parameters])
        sgd(
            parameters, grads, buffers, lr=group["lr"], momentum=group["momentum"], dampening=group["dampening"],
            weight_decay=group["weight_decay"], nesterov=group["nesterov"], maximize=False,
        )  # fmt: skip
        if group["momentum"] != 0:
            for parameter, buffer in zip(parameters, buffers, strict=True):
                self.state[parameter][DENSE] = buffer

    def _step_masked(self, weight: Tensor, layer: MaskedLinear | MaskedConv2d, group: dict[str, Any]) -> None:
        kept, state = self._follow(weight, layer.weight_mask), self.state[weight]
        forward, transposed = self._ordered(weight, layer, kept)
        moves = group["momentum"] != 0
        first = moves and VELOCITY not in state
        if first:
            state[VELOCITY] = weight.new_empty(kept.kept)
        assert weight.grad is not None
        masked_sgd(
            _flat(weight, weight), state[VELOCITY] if moves else None, _flat(weight.grad, weight), kept,
            rate=group["lr"], momentum=group["momentum"], dampening=group["dampening"],
            weight_decay=group["weight_decay"], first=first, nesterov=group["nesterov"], forward=forward,
            transposed=transposed,
        )  # fmt: skip
        if forward is not None:
            layer.keep_ordered()

    def _ordered(
        self, weight: Tensor, layer: MaskedLinear | MaskedConv2d, kept: KeptBits
    ) -> tuple[Ordered | None, Ordered | None]:
        """The orders in which the layer's products read the weight, with the places of the kept entries."""
        layout = layer.ordered()
        if layout is None:
            self._orders.pop(weight, None)
            return None, None
        known = self._orders.get(weight)
        if known is None or known[0] is not layout:
            at = kept_positions(kept.bits)
            forward = _order(layout.values, layout.source, weight, at)
            transposed = _order(layout.transposed_values, layout.transposed_source, weight, at)
            self._orders[weight] = known = (layout, (forward, transposed))
        return known[1]

    def _follow(self, weight: Tensor, mask: Tensor) -> KeptBits:
        """The bits of the present mask; a velocity of an earlier one, or of a loaded state, is brought to it."""
        known = self._kept.get(weight)
        if known is None or known[1] is None or not known[1].are(mask):
            state, bits = self.state[weight], kept_bits(_flat(mask, weight))
            dense = self._spread(weight) if VELOCITY in state else state.get(DENSE)
            self._kept[weight] = known = (bits, Seen(mask))
            if dense is not None:
                state[VELOCITY] = _flat(dense, weight)[kept_positions(bits.bits)]
        elif DENSE in self.state[weight]:
            dense = self.state[weight][DENSE]
            self.state[weight][VELOCITY] = _flat(dense, weight)[kept_positions(known[0].bits)]
        self.state[weight].pop(DENSE, None)
        return known[0]

    def _spread(self, weight: Tensor) -> Tensor:
        """The velocity in the shape of the weight, zero where nothing is kept."""
        dense = torch.zeros_like(weight, requires_grad=False)
        _flat(dense, weight)[kept_positions(self._kept[weight][0].bits)] = self.state[weight][VELOCITY]
        return dense


def _order(values: Tensor | None, source: Tensor, weight: Tensor, kept: Tensor) -> Ordered | None:
    """`values`, of the entries `source` of the weight, -1 for none, with the places of its `kept` entries in memory."""
    if values is None:
        return None
    real = (source >= 0).nonzero()[:, 0]
    places = torch.zeros(weight.numel(), dtype=torch.int32)
    places[source[real].long()] = real.int()
    return Ordered(values, _flat(places.view(weight.shape), weight)[kept])


def _flat(tensor: Tensor, like: Tensor) -> Tensor:
    """The entries of `tensor` in the order in which `like`, dense, has its own in memory; a view where they agree."""
    if like.is_contiguous():
        return tensor.contiguous().view(-1)
    return tensor.permute(0, 2, 3, 1).contiguous().view(-1)  # channels_last

"""Calls of int8_conv2d that were made before, beside the packed weight that they belong to.

Checking fifteen arguments, handing them over and working out the numbers of every channel took 6 µs, as long as the
arithmetic of a small layer; looking up what came of it the last time takes a tenth of that. Both faces of the operation
use it, with tensors or with arrays, so nothing here knows either.
"""

import weakref
from typing import Any, Generic, NamedTuple, TypeVar

Prepared = TypeVar("Prepared")
MOST_CALLS = 16  # of one weight; whoever makes more different ones changes a scale every time


class _Layer(NamedTuple, Generic[Prepared]):
    rest: tuple[Any, ...]  # the fields of the packed weight beside `packed`
    calls: dict[tuple[Any, ...], Prepared]
    alive: "weakref.ref[Any]"  # of `packed`: forgets the layer when it dies


class PreparedCalls(Generic[Prepared]):
    """Maps a packed weight, by identity, and the other arguments of a call to what was prepared for it.

    A packed weight is a NamedTuple that nobody writes to; two that share the field `packed` displace each other.
    """

    def __init__(self) -> None:
        self._layers: dict[int, _Layer[Prepared]] = {}

    def find(self, weight: Any, key: tuple[Any, ...]) -> Prepared | None:
        """What `remember` was given, or None."""
        layer = self._layers.get(id(weight.packed))
        if layer is None or not _same(layer.rest, weight):
            return None
        try:
            return layer.calls.get(key)
        except TypeError:  # a list among the arguments
            return None

    def remember(self, weight: Any, key: tuple[Any, ...], prepared: Prepared) -> None:
        """Keep `prepared` for as long as `weight.packed` lives."""
        try:
            hash(key)
        except TypeError:
            return
        number, layers = id(weight.packed), self._layers
        layer = layers.get(number)
        if layer is None or not _same(layer.rest, weight):
            alive = weakref.ref(weight.packed, lambda _: layers.pop(number, None))
            layer = layers[number] = _Layer(_rest(weight), {}, alive)
        elif len(layer.calls) >= MOST_CALLS:
            layer.calls.clear()
        layer.calls[key] = prepared


def _rest(weight: Any) -> tuple[Any, ...]:
    return (weight.weight, weight.bias, weight.weight_scale, *weight[4:])


def _same(rest: tuple[Any, ...], weight: Any) -> bool:
    canonical, bias, scale, _, *numbers = weight
    return rest[0] is canonical and rest[1] is bias and rest[2] is scale and rest[3:] == tuple(numbers)

"""What the parts of a quantized network are called: as their modules in a report, as attributes in its state."""

from torch import nn

from imgopt_fast.nn import Int8Segment

# What a segment, and the nn.ModuleDict of a simulation, call things of their own; a layer may be called `values`.
OWN = {*dir(nn.ModuleDict()), *dir(Int8Segment), "steps", "outputs", "requantize"}


def key(name: str) -> str:
    """A layer's name as an attribute of its segment."""
    flat = name.replace(".", "_")
    return f"{flat}_" if flat in OWN else flat


def unique(name: str, taken: set[str]) -> str:
    """`name`, or with _2, _3 and so on behind it, such that its key is not in `taken`, which it joins."""
    found, count = name, 1
    while key(found) in taken:
        count += 1
        found = f"{name}_{count}"
    taken.add(key(found))
    return found

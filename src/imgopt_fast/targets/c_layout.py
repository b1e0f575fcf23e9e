"""Where every activation lies in the arena: first fit, biggest first, lifetimes that overlap never share bytes."""

from imgopt_fast.targets.network import Network

ALIGNMENT = 16


def place(network: Network, sizes: dict[int, int]) -> tuple[dict[int, int], int]:
    """(offset of every value in `sizes`, bytes in all). A flattened value is where its image is."""
    homes = {value: value for value in sizes}
    for layer in network.layers:
        if layer.kind == "flatten":
            homes[layer.output] = homes[layer.inputs[0]]
    begin: dict[int, int] = {}
    end: dict[int, int] = {}
    for time, layer in enumerate(network.layers):
        for value in (layer.output, *layer.inputs, *([] if layer.residual is None else [layer.residual])):
            if value in homes:
                home = homes[value]
                begin.setdefault(home, time)
                end[home] = time
    placed: dict[int, int] = {}
    for home in sorted(begin, key=lambda value: -sizes[value]):
        taken = sorted(
            (placed[other], placed[other] + sizes[other])
            for other in placed
            if begin[other] <= end[home] and begin[home] <= end[other]
        )
        at = 0
        for low, high in taken:
            if at + sizes[home] <= low:
                break
            at = max(at, -(-high // ALIGNMENT) * ALIGNMENT)
        placed[home] = at
    total = max(placed[home] + sizes[home] for home in placed)
    return {value: placed[homes[value]] for value in sizes}, -(-total // ALIGNMENT) * ALIGNMENT

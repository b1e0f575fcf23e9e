"""The photometric passes in plain torch, in the widest type: on any device, differentiable, the tests' oracle."""

import torch


def adjust_hue(images: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """The operation `imgopt_fast::adjust_hue`; see `adjust_hue` in this package for the arguments."""
    unit = _wide(images)
    r, g, b = unit.unbind(1)
    value, low = unit.amax(1), unit.amin(1)
    chroma = value - low
    divisor = torch.where(chroma > 0, chroma, 1.0)
    other = torch.where(value == g, 2 + (b - r) / divisor, 4 + (r - g) / divisor)
    hue = torch.where(value == r, (g - b) / divisor, other) + 6 * shift.to(unit.dtype)[:, None, None]
    channels = []
    for offset in (5, 3, 1):
        k = torch.remainder(hue + offset, 6)
        channels.append(value - chroma * torch.minimum(k, 4 - k).clamp(0, 1))
    return _narrow(torch.stack(channels, dim=1), images)


def adjust_sharpness(images: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """The operation `imgopt_fast::adjust_sharpness`; see `adjust_sharpness` in this package for the arguments."""
    unit = _wide(images)
    result = unit.clone()
    if min(images.shape[2:]) >= 3:
        columns = unit[..., :-2] + unit[..., 1:-1] + unit[..., 2:]
        total = columns[..., :-2, :] + columns[..., 1:-1, :] + columns[..., 2:, :]
        middle = unit[..., 1:-1, 1:-1]
        weight = (1 - factor.to(unit.dtype)).view(-1, 1, 1, 1)
        most = 255.0 if images.dtype == torch.uint8 else 1.0
        result[..., 1:-1, 1:-1] = (middle + weight * ((total + 4 * middle) / 13 - middle)).clamp(0.0, most)
    return _narrow(result, images)


def apply_table(images: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """The operation `imgopt_fast::apply_table`."""
    found = table.expand(len(images), -1, -1).gather(2, images.flatten(2).long()).view(images.shape)
    return _narrow(found, images)


def channel_sums(images: torch.Tensor) -> torch.Tensor:
    """The operation `imgopt_fast::channel_sums`."""
    return images.sum(dim=(2, 3), dtype=torch.int64)


def level_histogram(images: torch.Tensor) -> torch.Tensor:
    """The operation `imgopt_fast::level_histogram`."""
    levels = images.flatten(2).long()
    counts = torch.zeros((*images.shape[:2], 256), dtype=torch.int64, device=images.device)
    return counts.scatter_add_(2, levels, torch.ones_like(levels))


def _wide(images: torch.Tensor) -> torch.Tensor:
    """Levels or units as they are: both operations scale with their input."""
    return images.to(torch.float32 if images.device.type == "mps" else torch.float64)


def _narrow(values: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    values = values.round() if images.dtype == torch.uint8 and values.is_floating_point() else values
    interleaved = images.shape[1] > 1 and images.stride(1) == 1
    layout = torch.channels_last if interleaved else torch.contiguous_format
    return values.to(images.dtype).contiguous(memory_format=layout)

"""A small vision transformer in its simplest form: fixed sine positions, mean pooling (Beyer et al. 2022).

Positions are computed from the grid of patches, so that one network takes images of any size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PATCH = 4  # pixels, for images of 28 to 96: 64 tokens of a 32x32 image
WIDTH, DEPTH, HEADS, EXPANSION = 192, 6, 3, 2
SLOWEST = 10_000.0  # wavelength of the slowest sine, in patches and units of 2π


class Block(nn.Module):
    """Attention between the tokens, then two linear layers for each; both on normalized input, beside the identity."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, EXPANSION * width), nn.Linear(EXPANSION * width, width)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        heads = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2])
        x = x + self.out(heads.transpose(1, 2).flatten(2))
        y: Tensor = self.down(F.gelu(self.up(self.norm2(x))))
        return x + y


class VisionTransformer(nn.Module):
    def __init__(self, num_classes: int, in_channels: int = 3) -> None:
        super().__init__()
        self.patches = nn.Conv2d(in_channels, WIDTH, PATCH, PATCH)
        self.blocks = nn.Sequential(*(Block(WIDTH, HEADS) for _ in range(DEPTH)))
        self.norm = nn.LayerNorm(WIDTH)
        self.fc = nn.Linear(WIDTH, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x)
        x = (x + positions(x)).flatten(2).transpose(1, 2)
        logits: Tensor = self.fc(self.norm(self.blocks(x)).mean(1))
        return logits


@torch.fx.wrap
def positions(like: Tensor) -> Tensor:
    """(C, H, W) sines and cosines of the row and of the column, of the channels, size and dtype of `like`."""
    channels, height, width = like.shape[1:]
    rates = SLOWEST ** -torch.linspace(0, 1, channels // 4, device=like.device)
    rows = torch.arange(height, device=like.device)[:, None] * rates
    columns = torch.arange(width, device=like.device)[:, None] * rates
    vertical = torch.cat([rows.sin(), rows.cos()], 1).T[:, :, None].expand(-1, -1, width)
    horizontal = torch.cat([columns.sin(), columns.cos()], 1).T[:, None].expand(-1, height, -1)
    return torch.cat([vertical, horizontal]).to(like.dtype)


def vit(num_classes: int, in_channels: int = 3) -> VisionTransformer:
    """Six blocks of width 192 on patches of 4x4 pixels, for images of 28 to 96 pixels: 1.8 million parameters."""
    return VisionTransformer(num_classes, in_channels)

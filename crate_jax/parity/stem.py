"""Images to patches in plain PyTorch: cut, or by the convolutions of ToST and CBSA's frame."""

import itertools

from torch import Tensor, nn

from crate_jax.models.stem import stage_widths


class Patches(nn.Module):
    """Images (B, c, H, W) to patches (B, N, h·w·c), each flattened as (row, column, channel)."""

    def __init__(self, patch_size: tuple[int, int]):
        super().__init__()
        self.patch_size = patch_size

    def forward(self, images: Tensor) -> Tensor:
        """Cut row by row."""
        B, c, H, W = images.shape
        h, w = self.patch_size
        grid = images.reshape(B, c, H // h, h, W // w, w).permute(0, 2, 4, 3, 5, 1)
        return grid.reshape(B, (H // h) * (W // w), h * w * c)


def stage(before: int, channels: int) -> nn.Sequential:
    """A 3 x 3 convolution of stride two without a bias, and a BatchNorm."""
    convolution = nn.Conv2d(before, channels, 3, stride=2, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(channels))


class Stem(nn.Module):
    """Images (B, c, H, W) to patches (B, P, d): stages that halve both sides, a GELU between two.

    In evaluation mode a BatchNorm takes its running statistics, in training mode those of the
    batch. Source: XCiT's patch embedding, which arXiv 2412.17810 and arXiv 2509.16875 take. The
    official code of the former has SyncBatchNorm, which on one device is a BatchNorm.

    Args:
        in_channels: c.
        width: d; the channels double up to it.
        patch_size: (height, width) in pixels, both the same power of two.
    """

    def __init__(self, in_channels: int, width: int, patch_size: tuple[int, int]):
        super().__init__()
        widths = [in_channels, *stage_widths(patch_size, width)]
        modules: list[nn.Module] = []
        for before, channels in itertools.pairwise(widths):
            modules += [nn.GELU()] * bool(modules) + [stage(before, channels)]
        self.proj = nn.Sequential(*modules)

    def forward(self, images: Tensor) -> Tensor:
        """Patches row by row."""
        return self.proj(images).flatten(2).transpose(1, 2)

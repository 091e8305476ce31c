"""Hyper-SET in plain PyTorch, with the official state-dict names and shapes."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crate_jax.models.classifier import pair
from crate_jax.models.hyper_set import HyperSet
from crate_jax.parity.twin import Twin

CODES = 512  # numbers that tell the depth


class Attention(nn.Module):
    """(A v) W with w = X Wᵀ, where A is softmax over the keys plus softmax over the queries.

    ``qkv.weight`` (K·p, d) is W; q, k and v are w through an RMSNorm each.
    """

    def __init__(self, width: int, num_heads: int, head_dim: int):
        super().__init__()
        self.num_heads, self.head_dim = num_heads, head_dim
        self.qkv = nn.Linear(width, num_heads * head_dim, bias=False)
        self.ln1_1, self.ln1_2, self.ln1_3 = (nn.RMSNorm(head_dim) for _ in range(3))

    def forward(self, X: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (B, N, d) to their update (B, N, d), and A (B, K, N, N)."""
        w_BxKxNxp = self.qkv(X).unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
        scores = self.ln1_1(w_BxKxNxp) @ self.ln1_2(w_BxKxNxp).transpose(-1, -2)
        scores = scores * self.head_dim**-0.5
        A_BxKxNxN = scores.softmax(dim=-1) + scores.softmax(dim=-2)
        O_BxNxKxp = (A_BxKxNxN @ self.ln1_3(w_BxKxNxp)).transpose(1, 2)
        return O_BxNxKxp.flatten(2) @ self.qkv.weight, A_BxKxNxN


class Block(nn.Module):
    """X ← X − α ∘ attention(X), then X ← X + β ∘ GELU(RMSNorm(X Wᵀ)) W."""

    def __init__(self, width: int, num_heads: int, head_dim: int, hidden: int):
        super().__init__()
        self.mlp = nn.Linear(width, hidden, bias=False)
        self.attn = Attention(width, num_heads, head_dim)
        self.ln2 = nn.RMSNorm(hidden)

    def forward(self, X: Tensor, steps: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Tokens (B, N, d) and α, β side by side (B, N, 2d) to tokens, and the taps."""
        alpha, beta = steps.chunk(2, dim=-1)
        update, attention = self.attn(X)
        half = X - alpha * update
        mlp = F.gelu(self.ln2(self.mlp(half))) @ self.mlp.weight
        out = half + beta * mlp
        seen = {"attention": attention, "bisoftmax": update, "z_half": half}
        return out, seen | {"tied_mlp": mlp, "out": out}


class TorchHyperSet(Twin):
    """Hyper-SET, in PyTorch.

    Computes what `crate_jax.models.hyper_set.HyperSet` computes, and has the official code's names.
    Parameters start as there, in distribution.
    Source: arXiv 2502.11646.

    Args:
        model: whose sizes it takes.
    """

    TAPS = ("attention", "bisoftmax", "z_half", "tied_mlp", "out")

    def __init__(self, model: HyperSet):
        super().__init__()
        d, (h, w) = model.width, pair(model.patch_size)
        self.depth, self.patch_size, self.grid = model.depth, (h, w), model.grid
        pixels = h * w * model.in_channels
        self.emb = nn.Sequential(nn.LayerNorm(pixels), nn.Linear(pixels, d), nn.LayerNorm(d))
        self.cls_token = nn.Parameter(torch.randn(1, 1, d))
        hidden = model.mlp_ratio * d
        self.enc = nn.ModuleList([Block(d, model.num_heads, model.subspace_dim, hidden)])
        # A part without parameters keeps its place in the official names.
        code = [nn.Identity(), nn.Linear(CODES, d), nn.RMSNorm(d), nn.GELU()]
        code += [nn.RMSNorm(d), nn.Linear(d, d), nn.RMSNorm(d)]
        steps = nn.Sequential(nn.GELU(), nn.Linear(d, 2 * d))
        self.time_mlp = nn.ModuleList([nn.Sequential(*code), steps])
        for module in self.time_mlp.modules():
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.weight)
                nn.init.zeros_(module.bias)
        self.ln_inp = nn.RMSNorm(d)
        self.fc = nn.Sequential(nn.LayerNorm(d), nn.Linear(d, model.num_classes))

    def embed(self, images: Tensor) -> Tensor:
        """Images (B, c, H, W) to the tokens (B, N, d) that enter the first layer."""
        (rows, columns), (h, w) = self.grid, self.patch_size
        patches = images.unflatten(3, (columns, w)).unflatten(2, (rows, h))
        X = self.emb(patches.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2))
        X = torch.cat([self.cls_token.expand(len(X), -1, -1), X], dim=1)
        N, d = X.shape[1:]
        angles = torch.arange(N)[:, None] * 1e4 ** (-torch.arange(0, d, 2).double() / d)
        positions = torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)[:, :d]
        return X + positions.to(X)

    def trace(self, images: Tensor, taps: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits (B, Y), and the taps; see `Twin.trace`."""
        self.check_taps(taps)
        X = self.embed(images)
        kept: dict[str, list[Tensor]] = {name: [] for name in taps}
        half = CODES // 2
        frequencies = 1e4 ** (-torch.arange(half).double() / (half - 1))
        angles = torch.arange(1, self.depth + 1)[:, None] * frequencies
        codes = self.time_mlp[0](torch.cat([angles.sin(), angles.cos()], dim=-1).to(X))
        for code in codes:
            X, seen = self.enc[0](X, self.time_mlp[1](code + self.ln_inp(X)))
            for name in taps:
                kept[name].append(seen[name])
        return self.fc(X[:, 0]), {name: torch.stack(values) for name, values in kept.items()}

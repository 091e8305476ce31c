"""The frame of CBSA in plain PyTorch, with CBSA, TSSA or MSSA, and the official state-dict names.

It is CRATE's, with a convolutional stem in the place of cut patches.
"""

import functools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crate_jax.models.classifier import pair
from crate_jax.models.crate import Crate
from crate_jax.parity import crate
from crate_jax.parity.crate import ISTA, Frame, Transformer, check_official, crate_twin
from crate_jax.parity.stem import Stem
from crate_jax.parity.tssa import TSSA
from crate_jax.parity.twin import Twin


class CBSA(nn.Module):
    """W_out [O_1; …; O_K] + b_out, by attention among representatives of the tokens.

    With W_k = U_kᵀ Z and R_k the means of W_k over the cells of the grid of tokens:

        A_k = softmax(p^{-1/2} R_k W_kᵀ),  R_k ← R_k + s_r A_k W_k
        O_k = s_x A_kᵀ softmax(p^{-1/2} R_k R_kᵀ) R_k

    The first P tokens fill the grid of P patches, the class token among them. ``proj.weight``
    (K·p, d) holds the bases U_kᵀ below each other, ``step_rep`` and ``step_x`` (K, 1, 1) are s_r
    and s_x. Source: arXiv 2509.16875, and its code for the grid.

    Args:
        width: d.
        num_heads: K.
        head_dim: p.
        grid: (rows, columns) of the patches.
        cells: (rows, columns) of the representatives.
    """

    TAPS = ("subspace_tokens", "contraction")

    def __init__(
        self,
        width: int,
        num_heads: int,
        head_dim: int,
        grid: tuple[int, int],
        cells: tuple[int, int],
    ):
        super().__init__()
        self.num_heads, self.head_dim, self.grid, self.cells = num_heads, head_dim, grid, cells
        self.step_x = nn.Parameter(torch.randn(num_heads, 1, 1))
        self.step_rep = nn.Parameter(torch.randn(num_heads, 1, 1))
        self.proj = nn.Linear(width, num_heads * head_dim, bias=False)
        self.to_out = nn.Linear(num_heads * head_dim, width)

    def forward(self, Z: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Normalised tokens (B, N, d) to their update (B, N, d), and two taps."""
        heads = (self.num_heads, self.head_dim)
        W_BxNxKp = self.proj(Z)
        planes = W_BxNxKp[:, : math.prod(self.grid)].transpose(1, 2).unflatten(2, self.grid)
        means = F.adaptive_avg_pool2d(planes, self.cells).flatten(2)
        R_BxKxmxp = means.unflatten(1, heads).transpose(2, 3)
        W_BxNxKxp = W_BxNxKp.unflatten(-1, heads)
        W_BxKxNxp, scale = W_BxNxKxp.transpose(1, 2), self.head_dim**-0.5
        A_BxKxmxN = (R_BxKxmxp @ W_BxKxNxp.transpose(2, 3) * scale).softmax(dim=-1)
        R_BxKxmxp = R_BxKxmxp + self.step_rep * (A_BxKxmxN @ W_BxKxNxp)
        among = (R_BxKxmxp @ R_BxKxmxp.transpose(2, 3) * scale).softmax(dim=-1)
        O_BxKxNxp = self.step_x * (A_BxKxmxN.transpose(2, 3) @ (among @ R_BxKxmxp))
        update = self.to_out(O_BxKxNxp.transpose(1, 2).flatten(2))
        return update, {"subspace_tokens": W_BxNxKxp, "contraction": A_BxKxmxN}


class MSSA(crate.MSSA):
    """CRATE's MSSA, whose output projection has another name here."""

    def __init__(self, width: int, num_heads: int, head_dim: int):
        super().__init__(width, num_heads, head_dim)
        if isinstance(self.to_out, nn.Sequential):
            self.to_out = self.to_out[0]


def _attention(model: Crate) -> tuple[Callable[[], nn.Module], tuple[str, ...]]:
    """Compute the attention of the model, and its taps."""
    sizes = (model.width, model.num_heads, model.subspace_dim)
    if model.attention == "mssa":
        return functools.partial(MSSA, *sizes), MSSA.TAPS
    if model.attention == "cbsa":
        cells = pair(model.representatives)
        return functools.partial(CBSA, *sizes, model.grid, cells), CBSA.TAPS
    inner = sizes[1] * sizes[2]
    return lambda: TSSA(*sizes, bias=False, to_out=nn.Linear(inner, model.width)), TSSA.TAPS


class TorchCbsaFrame(Frame):
    """The classifier of CBSA with CBSA, TSSA or MSSA, in PyTorch.

    Computes what `crate_jax.Crate` with ``stem="convolutions"`` computes; loads an official
    checkpoint by ``load_state_dict``. Parameters start as the official code's do.
    Source: arXiv 2509.16875.
    Differs from official: written from the equations; only names and shapes are shared.

    Args:
        model: ours, whose sizes and constants it has.

    Raises:
        ValueError: an operator or a switch of the model is not in the official code.
    """

    def __init__(self, model: Crate):
        check_official(model, ("mssa", "tssa", "cbsa"))
        attention, taps = _attention(model)
        super().__init__(
            model.num_patches,
            model.width,
            model.num_classes,
            model.pool,
            Stem(model.in_channels, model.width, pair(model.patch_size)),
            Transformer(
                model.depth,
                model.width,
                attention,
                functools.partial(ISTA, model.width, model.eta, model.lmbda),
                model.attention,
            ),
        )
        self.TAPS = (*taps, model.attention, "z_half", "ista")


def twin_by_stem(model: Crate) -> Twin:
    """The twin of a CRATE: of CRATE's code for patches, of CBSA's for convolutions.

    Raises:
        ValueError: an operator or a switch of the model is in neither.
    """
    return TorchCbsaFrame(model) if model.stem == "convolutions" else crate_twin(model)

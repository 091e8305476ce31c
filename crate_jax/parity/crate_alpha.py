"""CRATE-α in plain PyTorch, from the equations, with the official state-dict names and shapes."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crate_jax.models.classifier import pair
from crate_jax.models.crate_alpha import CrateAlpha
from crate_jax.parity import crate
from crate_jax.parity.twin import Twin


class MSSA(crate.MSSA):
    """CRATE's MSSA without the bias."""

    def __init__(self, width: int, num_heads: int, head_dim: int):
        super().__init__(width, num_heads, head_dim)
        nn.init.normal_(self.qkv.weight, std=0.02)
        if isinstance(self.to_out, nn.Sequential):
            projection = nn.Linear(num_heads * head_dim, width, bias=False)
            nn.init.normal_(projection.weight, std=0.02)
            self.to_out = nn.Sequential(projection)


def odl(Y: Tensor, D: Tensor, D1: Tensor, eta: float, lmbda: float) -> tuple[Tensor, Tensor]:
    """D₁ A² and A², as `ODL` has them, of tokens (B, N, d) and dictionaries (d, m)."""
    A = F.relu(eta * (Y @ D) - eta * lmbda)
    A = F.relu(A - eta * ((A @ D.t() - Y) @ D) - eta * lmbda)
    return A @ D1.t(), A


class ODL(nn.Module):
    """A¹ = ReLU(η DᵀY − η λ), A² = ReLU(A¹ − η Dᵀ(D A¹ − Y) − η λ), and D₁ A².

    Without ``decoupled`` the code is read with D. Source: arXiv 2405.20299. With tokens as rows DᵀY
    is ``Y @ D``.
    """

    def __init__(self, width: int, atoms: int, eta: float, lmbda: float, decoupled: bool):
        super().__init__()
        self.eta, self.lmbda = eta, lmbda
        self.D = nn.Parameter(torch.empty(width, atoms))
        self.D1 = nn.Parameter(torch.empty(width, atoms)) if decoupled else None
        for dictionary in self.parameters():
            # PyTorch takes the columns for the inputs, of which there are as many as atoms.
            nn.init.kaiming_uniform_(dictionary, mode="fan_out")

    def forward(self, Y: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised tokens (B, N, d) to tokens (B, N, d), before the residual, and the code."""
        D1 = self.D if self.D1 is None else self.D1
        return odl(Y, self.D, D1, self.eta, self.lmbda)


class PreNorm(nn.Module):
    """A step applied to normalised tokens; `norm` and `fn` are the official names."""

    def __init__(self, width: int, fn: nn.Module):
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=CrateAlpha.EPSILON)
        self.fn = fn

    def forward(self, Z: Tensor):
        """Apply the step to LN(Z)."""
        return self.fn(self.norm(Z))


class Transformer(nn.Module):
    """L layers: Z^{l+1/2} = Z^l + MSSA(LN(Z^l)), Z^{l+1} = [Z^{l+1/2} +] ODL(LN(Z^{l+1/2}))."""

    def __init__(self, depth: int, mssa_args: tuple, odl_args: tuple, residual: bool):
        super().__init__()
        width = mssa_args[0]
        self.residual = residual
        self.layers = nn.ModuleList(
            nn.ModuleList([PreNorm(width, MSSA(*mssa_args)), PreNorm(width, ODL(*odl_args))])
            for _ in range(depth)
        )

    def forward(self, Z: Tensor, taps: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
        """Tokens (B, N, d) to tokens (B, N, d), and the taps, layers on axis 0."""
        kept: dict[str, list[Tensor]] = {name: [] for name in taps}
        for mssa, odl in self.layers:  # type: ignore
            update, seen = mssa(Z)
            half = Z + update
            read, code = odl(half)
            Z = half + read if self.residual else read
            seen |= {"mssa": update, "z_half": half, "code": code, "odl": read, "out": Z}
            for name in taps:
                kept[name].append(seen[name])
        return Z, {name: torch.stack(values) for name, values in kept.items()}


class TorchCrateAlpha(Twin):
    """The CRATE-α image classifier, in PyTorch.

    Computes what `crate_jax.CrateAlpha` computes; loads an official checkpoint by
    ``load_state_dict``. Parameters start as the official code's do. There is no dropout and no
    stochastic depth: the official recipes use none. No tap is zero below a threshold: the sparse
    code stays within its step.
    Source: arXiv 2405.20299.
    Differs from official: written from the equations; only names and shapes are shared. Every
        LayerNorm has ε = 1e-6, as in the official JAX code; the head's is 1e-5 in the PyTorch port.

    Args:
        model: ours, whose sizes and constants it has.

    Raises:
        ValueError: the model has ISTA's square dictionary or LayerScale, for which there is no
            official name.
    """

    TAPS = ("subspace_tokens", "attention", "mssa", "z_half", "code", "odl", "out")

    def __init__(self, model: CrateAlpha):
        super().__init__()
        if model.nonlinearity != "odl" or model.layer_scale is not None:
            raise ValueError(
                "model must have nonlinearity odl and no layer_scale to have a PyTorch twin; got "
                f"{model.nonlinearity} and {model.layer_scale}. Official files name neither."
            )
        d, c = model.width, model.in_channels
        patch = pair(model.patch_size)
        self.conv1 = nn.Conv2d(c, d, patch, stride=patch)
        self.cls_token = nn.Parameter(1e-6 * torch.randn(1, 1, d))
        self.pos_embedding = nn.Parameter(0.02 * torch.randn(1, model.num_tokens, d))
        self.transformer = Transformer(
            model.depth,
            (d, model.num_heads, model.subspace_dim),
            (d, model.overcompleteness * d, model.eta, model.lmbda, model.decoupled),
            model.residual,
        )
        head = nn.Linear(d, model.num_classes)
        self.mlp_head = nn.Sequential(nn.LayerNorm(d, eps=CrateAlpha.EPSILON), head)
        nn.init.kaiming_uniform_(self.conv1.weight)
        nn.init.zeros_(self.conv1.bias)  # type: ignore[arg-type]
        nn.init.normal_(head.weight, std=0.02)
        nn.init.zeros_(head.bias)

    def embed(self, images: Tensor) -> Tensor:
        """Images (B, c, H, W) to the tokens (B, N, d) that enter the first layer."""
        Z = self.conv1(images).flatten(2).transpose(1, 2)
        cls_token = self.cls_token.expand(Z.shape[0], -1, -1)
        return torch.cat([cls_token, Z], dim=1) + self.pos_embedding

    def trace(self, images: Tensor, taps: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits (B, Y), and the taps; see `Twin.trace`."""
        self.check_taps(taps)
        Z, seen = self.transformer(self.embed(images), taps)
        return self.mlp_head(Z[:, 0]), seen

"""CRATE-LM in plain PyTorch, from the equations, with the official state-dict names."""

import torch
from torch import Tensor, nn

from crate_jax.models.crate_causal import CrateLM
from crate_jax.parity.crate_alpha import odl
from crate_jax.parity.text import EPSILON, GPT, CausalMSSA


class TiedODL(nn.Module):
    """The `ODL` of CRATE-α with one dictionary for both of its ends.

    ``weight`` (m, d) is Dᵀ: an atom is a row. Source: arXiv 2410.16443.
    """

    def __init__(self, width: int, atoms: int, eta: float, lmbda: float):
        super().__init__()
        self.eta, self.lmbda = eta, lmbda
        self.weight = nn.Parameter(torch.empty(atoms, width))
        nn.init.kaiming_uniform_(self.weight)

    def forward(self, Y: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised tokens (B, N, d) to tokens (B, N, d), and the code (B, N, m)."""
        D = self.weight.t()
        return odl(Y, D, D, self.eta, self.lmbda)


class Block(nn.Module):
    """Z^{l+1/2} = Z^l + MSSA(LN(Z^l)), then Z^{l+1} = ODL(LN(Z^{l+1/2})), with causal MSSA."""

    def __init__(self, model: CrateLM):
        super().__init__()
        d = model.width
        self.prenorm_1 = nn.LayerNorm(d, eps=EPSILON)
        self.attn = CausalMSSA(model, stored=False)
        self.prenorm_2 = nn.LayerNorm(d, eps=EPSILON)
        self.ista = TiedODL(d, model.overcompleteness * d, model.eta, model.lmbda)

    def forward(self, Z: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Tokens (B, N, d) to tokens (B, N, d), and the taps."""
        update, seen = self.attn(self.prenorm_1(Z))
        half = Z + update
        out, code = self.ista(self.prenorm_2(half))
        return out, seen | {"mssa": update, "z_half": half, "code": code, "odl": out}


class TorchCrateLM(GPT):
    """CRATE-LM, in PyTorch.

    Computes what `crate_jax.CrateLM` computes; loads an official checkpoint's state dict. There is
    no dropout. The code of the second step tells where thresholds fell; that of the first stays
    within its step. Source: arXiv 2410.16443 and its code.
    Differs from official: written from the equations; only names and shapes are shared.

    Args:
        model: ours, whose sizes and constants it has.
    """

    TAPS = ("subspace_tokens", "attention", "mssa", "z_half", "code", "odl")
    THRESHOLDED = "code"

    def __init__(self, model: CrateLM):
        norm = nn.LayerNorm(model.width, eps=EPSILON)
        super().__init__(model, [Block(model) for _ in range(model.depth)], norm)

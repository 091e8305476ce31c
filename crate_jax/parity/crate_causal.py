"""Causal CRATE in plain PyTorch, from the equations, with the official state-dict names."""

from torch import Tensor, nn

from crate_jax.models.crate_causal import CrateCausal
from crate_jax.parity.crate import ISTA
from crate_jax.parity.text import EPSILON, GPT, CausalMSSA


class Block(nn.Module):
    """Z^{l+1/2} = Z^l + MSSA(LN(Z^l)), then Z^{l+1} = ISTA(LN(Z^{l+1/2})), with causal MSSA."""

    def __init__(self, model: CrateCausal):
        super().__init__()
        self.prenorm_1 = nn.LayerNorm(model.width, eps=EPSILON)
        self.attn = CausalMSSA(model, stored=True)
        self.prenorm_2 = nn.LayerNorm(model.width, eps=EPSILON)
        self.ista = ISTA(model.width, model.eta, model.lmbda)

    def forward(self, Z: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Tokens (B, N, d) to tokens (B, N, d), and the taps."""
        update, seen = self.attn(self.prenorm_1(Z))
        half = Z + update
        out = self.ista(self.prenorm_2(half))
        return out, seen | {"mssa": update, "z_half": half, "ista": out}


class TorchCrateCausal(GPT):
    """Causal CRATE, in PyTorch.

    Computes what `crate_jax.CrateCausal` computes; loads an official checkpoint's state dict. There
    is no dropout. Source: arXiv 2311.13110, and pull request 13 of its code.
    Differs from official: written from the equations; only names, shapes and order of the ISTA
    products are shared.

    Args:
        model: ours, whose sizes and constants it has.
    """

    TAPS = ("subspace_tokens", "attention", "mssa", "z_half", "ista")
    THRESHOLDED = "ista"

    def __init__(self, model: CrateCausal):
        super().__init__(model, [Block(model) for _ in range(model.depth)])

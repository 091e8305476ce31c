"""ToST for text in plain PyTorch, from the equations, with the official state-dict names."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crate_jax.models.tost_lm import TostLM
from crate_jax.parity.text import EPSILON, GPT


class CausalTSSA(nn.Module):
    """W_out [−Π_k V_k / (1 + s_k)]_k + b_out, where all sums over the tokens are running sums.

    V_k = U_kᵀ Y + b_k. Π_nk is the softmax over the subspaces k of τ_k Σ_p (V²_nkp / q_nkp + b_nk)
    with q_nkp = Σ_{m≤n} V²_mkp, and s_nkp = Σ_{m≤n} Π_mk V²_mkp / (Σ_{m≤n} Π_mk + 1e-8); q is at
    least 1e-12. ``c_attn`` (K·p, d) holds U_kᵀ and b_k below each other, ``temp`` (K, 1) is τ and
    ``denom_bias`` (K, T, 1) is b. Source: arXiv 2412.17810 and its code for language.
    """

    def __init__(self, model: TostLM):
        super().__init__()
        self.num_heads, self.head_dim = K, p = model.num_heads, model.subspace_dim
        self.c_attn = nn.Linear(model.width, K * p, bias=model.bias)
        self.c_proj = nn.Linear(K * p, model.width, bias=model.bias)
        self.temp = nn.Parameter(torch.ones(K, 1))
        self.denom_bias = nn.Parameter(torch.zeros(K, model.context_length, 1))

    def forward(self, Y: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Normalised tokens (B, N, d) to their update (B, N, d), and two taps."""
        V_BxNxKxp = self.c_attn(Y).unflatten(-1, (self.num_heads, self.head_dim))
        V_BxKxNxp = V_BxNxKxp.transpose(1, 2)
        squares = V_BxKxNxp.square()
        share = squares / squares.cumsum(dim=2).clamp(min=1e-12) + self.denom_bias[:, : Y.shape[1]]
        Pi_BxKxN = (self.temp * share.sum(dim=-1)).softmax(dim=1)
        Pi_BxKxNx1 = Pi_BxKxN[..., None]
        s = (Pi_BxKxNx1 * squares).cumsum(dim=2) / (Pi_BxKxNx1.cumsum(dim=2) + 1e-8)
        O_BxKxNxp = -Pi_BxKxNx1 * V_BxKxNxp / (1 + s)
        update = self.c_proj(O_BxKxNxp.transpose(1, 2).flatten(2))
        return update, {"subspace_tokens": V_BxNxKxp, "membership": Pi_BxKxN}


class MLP(nn.Module):
    """W_out GELU(W_in y + b_in) + b_out, with the exact GELU."""

    def __init__(self, width: int, hidden: int, bias: bool):
        super().__init__()
        self.c_fc = nn.Linear(width, hidden, bias=bias)
        self.c_proj = nn.Linear(hidden, width, bias=bias)

    def forward(self, Y: Tensor) -> Tensor:
        """Normalised tokens (B, N, d) to their update (B, N, d)."""
        return self.c_proj(F.gelu(self.c_fc(Y)))


class Block(nn.Module):
    """Z ← Z + γ₁ ∘ TSSA(LN(Z)), then Z ← Z + γ₂ ∘ MLP(LN(Z)), with causal TSSA."""

    def __init__(self, model: TostLM):
        super().__init__()
        d = model.width
        self.ln_1 = nn.LayerNorm(d, eps=EPSILON, bias=model.bias)
        self.attn = CausalTSSA(model)
        self.ln_2 = nn.LayerNorm(d, eps=EPSILON, bias=model.bias)
        self.mlp = MLP(d, model.mlp_ratio * d, model.bias)
        self.gamma1 = nn.Parameter(torch.full((d,), float(model.layer_scale)))
        self.gamma2 = nn.Parameter(torch.full((d,), float(model.layer_scale)))

    def forward(self, Z: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Tokens (B, N, d) to tokens (B, N, d), and the taps."""
        update, seen = self.attn(self.ln_1(Z))
        half = Z + self.gamma1 * update
        mlp = self.mlp(self.ln_2(half))
        out = half + self.gamma2 * mlp
        return out, seen | {"tssa": update, "z_half": half, "mlp": mlp, "out": out}


class TorchTostLM(GPT):
    """ToST for text, in PyTorch.

    Computes what `crate_jax.TostLM` computes; loads an official checkpoint's state dict. There is
    no dropout. Source: arXiv 2412.17810 and its code.
    Differs from official: written from the equations; only names and shapes are shared.

    Args:
        model: ours, whose sizes it has.
    """

    TAPS = ("subspace_tokens", "membership", "tssa", "z_half", "mlp", "out")

    def __init__(self, model: TostLM):
        norm = nn.LayerNorm(model.width, eps=EPSILON, bias=model.bias)
        super().__init__(model, [Block(model) for _ in range(model.depth)], norm)

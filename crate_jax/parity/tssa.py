"""TSSA in plain PyTorch, which ToST and the frame of CBSA share."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class TSSA(nn.Module):
    """W_out [O_1; …; O_K] + b_out, with O_k = −Π_k W_k / (1 + s_k) and W_k = U_kᵀ Z [+ b_k].

    Every column of W_k, of unit length over the tokens, gives Π_nk, the softmax over the subspaces
    of τ_k Σ_p Ŵ²_nkp. s_kp = Σ_n Π_nk W²_nkp / (Σ_n Π_nk + 1e-8). ``qkv.weight`` (K·p, d) holds the
    bases U_kᵀ below each other, ``temp`` (K, 1) is τ.
    Source: arXiv 2412.17810.

    Args:
        width: d.
        num_heads: K.
        head_dim: p.
        bias: whether the subspace tokens have one.
        to_out: W_out and b_out, under the name that they have in the official code.
    """

    TAPS = ("subspace_tokens", "membership")

    def __init__(self, width: int, num_heads: int, head_dim: int, bias: bool, to_out: nn.Module):
        super().__init__()
        self.num_heads, self.head_dim = num_heads, head_dim
        self.qkv = nn.Linear(width, num_heads * head_dim, bias=bias)
        self.temp = nn.Parameter(torch.ones(num_heads, 1))
        self.to_out = to_out

    def forward(self, Z: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Normalised tokens (B, N, d) to their update (B, N, d), and two taps."""
        W_BxNxKxp = self.qkv(Z).unflatten(-1, (self.num_heads, self.head_dim))
        W_BxKxNxp = W_BxNxKxp.transpose(1, 2)
        shares_BxKxN = F.normalize(W_BxKxNxp, dim=2).square().sum(dim=-1)
        Pi_BxKxN = (self.temp * shares_BxKxN).softmax(dim=1)
        Pi_BxKxNx1 = Pi_BxKxN[..., None]
        share_BxKxNx1 = Pi_BxKxNx1 / (Pi_BxKxNx1.sum(dim=2, keepdim=True) + 1e-8)
        s_BxKx1xp = (share_BxKxNx1 * W_BxKxNxp.square()).sum(dim=2, keepdim=True)
        O_BxKxNxp = -Pi_BxKxNx1 * W_BxKxNxp / (1 + s_BxKx1xp)
        update = self.to_out(O_BxKxNxp.transpose(1, 2).flatten(2))
        return update, {"subspace_tokens": W_BxNxKxp, "membership": Pi_BxKxN}

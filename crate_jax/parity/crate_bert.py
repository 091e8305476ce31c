"""CRATE-BERT in plain PyTorch, from the equations, with the names of transformers' proposal."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crate_jax.models.crate_bert import CrateBert
from crate_jax.parity.crate import ISTA, ssa
from crate_jax.parity.text import DEVIATION, EPSILON, TextTwin, projection
from crate_jax.parity.twin import through


class Embeddings(nn.Module):
    """LN(token + position + type); positions count from pad + 1, and padding has the place pad."""

    def __init__(self, model: CrateBert):
        super().__init__()
        d, self.pad_token = model.width, model.pad_token
        self.word_embeddings = nn.Embedding(model.vocab_size, d)
        self.position_embeddings = nn.Embedding(model.context_length + model.pad_token + 1, d)
        self.token_type_embeddings = nn.Embedding(1, d)
        self.LayerNorm = nn.LayerNorm(d, eps=EPSILON)

    def forward(self, tokens: Tensor) -> Tensor:
        """Token ids (B, N) to tokens (B, N, d)."""
        real = (tokens != self.pad_token).long()
        places = torch.where(real > 0, real.cumsum(dim=1), 0) + self.pad_token
        Z = self.word_embeddings(tokens) + self.position_embeddings(places)
        return self.LayerNorm(Z + self.token_type_embeddings.weight[0])


class MSSA(nn.Module):
    """CRATE's up to W_out, of normalised tokens: ``qkv.weight`` (K·p, d) holds the U_kᵀ."""

    def __init__(self, model: CrateBert):
        super().__init__()
        self.num_heads, self.head_dim = model.num_heads, model.subspace_dim
        self.prenorm = nn.LayerNorm(model.width, eps=EPSILON)
        self.qkv = nn.Linear(model.width, self.num_heads * self.head_dim, bias=False)

    def forward(self, Z: Tensor, mask: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Tokens (B, N, d) and who sees whom to (B, N, K·p), and two taps."""
        W_BxNxKxp = self.qkv(self.prenorm(Z)).unflatten(-1, (self.num_heads, self.head_dim))
        return ssa(W_BxNxKxp, mask)


class NormedISTA(ISTA):
    """CRATE's ISTA, of normalised tokens."""

    def __init__(self, width: int, eta: float, lmbda: float):
        super().__init__(width, eta, lmbda)
        self.prenorm = nn.LayerNorm(width, eps=EPSILON)

    def forward(self, Y: Tensor) -> Tensor:
        """Tokens (B, N, d) to sparse tokens (B, N, d)."""
        return super().forward(self.prenorm(Y))


class Layer(nn.Module):
    """Z^{l+1/2} = Z^l + MSSA(LN(Z^l)), then Z^{l+1} = ISTA(LN(Z^{l+1/2})); W_out has no bias."""

    def __init__(self, model: CrateBert):
        super().__init__()
        W_out = projection(model.num_heads, model.subspace_dim, model.width, bias=False)
        attention = {"self": MSSA(model), "output": nn.ModuleDict({"dense": W_out})}
        self.attention = nn.ModuleDict(attention)
        self.output = NormedISTA(model.width, model.eta, model.lmbda)

    def forward(self, Z: Tensor, mask: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Tokens (B, N, d) and who sees whom to tokens (B, N, d), and the taps."""
        O_BxNxKp, seen = self.attention["self"](Z, mask)
        update = self.attention["output"]["dense"](O_BxNxKp)  # type: ignore[index,operator]
        half = Z + update
        out = self.output(half)
        return out, seen | {"mssa": update, "z_half": half, "ista": out}


class Head(nn.Module):
    """E LN(GELU(Z W + b)) + b_V, where ``decoder.weight`` is E; b_V lies there under two names."""

    def __init__(self, width: int, vocab_size: int):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(vocab_size))
        self.dense = nn.Linear(width, width)
        self.layer_norm = nn.LayerNorm(width, eps=EPSILON)
        self.decoder = nn.Linear(width, vocab_size)
        self.decoder.bias = self.bias

    def forward(self, Z: Tensor) -> Tensor:
        """Tokens (B, N, d) to logits (B, N, V)."""
        return self.decoder(self.layer_norm(F.gelu(self.dense(Z))))


class TorchCrateBert(TextTwin):
    """CRATE-BERT, in PyTorch.

    Computes what `crate_jax.CrateBert` computes. Parameters start as RoBERTa's and CRATE's do, in
    distribution. There is no dropout. Source: arXiv 2311.13110; names, embedding and head are those
    of transformers' pull request 27759.
    Differs from official: written from the equations; padding is told by its token, sees itself,
    and its row of the table has a gradient.

    Args:
        model: ours, whose sizes and constants it has.
    """

    TAPS = ("subspace_tokens", "attention", "mssa", "z_half", "ista")
    THRESHOLDED = "ista"

    def __init__(self, model: CrateBert):
        super().__init__()
        layers = nn.ModuleList(Layer(model) for _ in range(model.depth))
        encoder = nn.ModuleDict({"layer": layers})
        self.crate = nn.ModuleDict({"embeddings": Embeddings(model), "encoder": encoder})
        self.lm_head = Head(model.width, model.vocab_size)
        self.pad_token = model.pad_token
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=DEVIATION)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        if model.tied:
            self.lm_head.decoder.weight = self.crate["embeddings"].word_embeddings.weight  # type: ignore[union-attr,assignment]

    def embed(self, tokens: Tensor) -> Tensor:  # type: ignore[override]
        """Token ids (B, N) to the tokens (B, N, d) that enter the first layer."""
        return self.crate["embeddings"](tokens)

    def trace(  # type: ignore[override]
        self, tokens: Tensor, taps: Sequence[str]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits (B, N, V), and the taps; see `Twin.trace`."""
        self.check_taps(taps)
        itself = torch.eye(tokens.shape[1], dtype=torch.bool, device=tokens.device)
        mask_Bx1xNxN = (tokens != self.pad_token)[:, None, None] | itself
        layers: Any = self.crate["encoder"]["layer"]  # type: ignore[index]
        Z, seen = through(layers, self.embed(tokens), taps, mask_Bx1xNxN)
        return self.lm_head(Z), seen

"""Shared parts of the models of text in PyTorch: nanoGPT's skeleton, and causal MSSA."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crate_jax.models.language import LanguageModel
from crate_jax.parity.crate import ssa
from crate_jax.parity.twin import Twin, through

EPSILON = 1e-5  # of every LayerNorm
DEVIATION = 0.02  # of the parameters at their start


class TextTwin(Twin):
    """A twin that takes token ids (B, N) and returns logits of a token for each place (B, N, V)."""

    EXAMPLES = "texts"

    def inputs(self, examples: np.ndarray) -> Tensor:
        """Token ids (B, N)."""
        return torch.tensor(examples).long()

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy in nats a token, of logits (B, N, V) and tokens (B, N)."""
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def projection(num_heads: int, head_dim: int, width: int, bias: bool) -> nn.Module:
    """W_out [+ b_out]; the identity where one subspace fills the space (K = 1, p = d)."""
    if (num_heads, head_dim) == (1, width):
        return nn.Identity()
    return nn.Linear(num_heads * head_dim, width, bias=bias)


class CausalMSSA(nn.Module):
    """CRATE's MSSA in which a token sees itself and the tokens before it.

    ``c_attn.weight`` (K·p, d) holds the bases U_kᵀ below each other, ``c_proj`` is W_out and b_out.
    Source: arXiv 2311.13110.

    Args:
        model: ours.
        stored: whether the state dict holds the mask too, as ``bias`` (1, 1, T, T), as official
            files of causal CRATE do.
    """

    def __init__(self, model: Any, stored: bool):
        super().__init__()
        self.num_heads, self.head_dim = model.num_heads, model.subspace_dim
        self.c_attn = nn.Linear(model.width, self.num_heads * self.head_dim, bias=False)
        self.c_proj = projection(self.num_heads, self.head_dim, model.width, bias=True)
        T = model.context_length
        self.register_buffer("bias", torch.ones(1, 1, T, T).tril(), persistent=stored)

    def forward(self, Y: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Normalised tokens (B, N, d) to their update (B, N, d), and two taps."""
        N = Y.shape[1]
        W_BxNxKxp = self.c_attn(Y).unflatten(-1, (self.num_heads, self.head_dim))
        O_BxNxKp, seen = ssa(W_BxNxKxp, self.bias[..., :N, :N] > 0)  # type: ignore[index]
        return self.c_proj(O_BxNxKp), seen


class GPT(TextTwin):
    """Tables of tokens and positions, blocks, a LayerNorm or none, and the products with a table.

    The names are nanoGPT's: ``transformer.wte``, ``.wpe``, ``.h``, ``.ln_f`` and ``lm_head``.
    Parameters start as there: from N(0, 0.02²), in W_out and its like from N(0, 0.02²/(2L)), and
    biases at zero; what a block has besides linear maps starts by itself.

    Args:
        model: ours, whose sizes it has.
        blocks: one a layer, from tokens to tokens and taps.
        head_norm: before the head; None: there is none.
    """

    def __init__(
        self, model: LanguageModel, blocks: Iterable[nn.Module], head_norm: nn.Module | None = None
    ):
        super().__init__()
        V, T, d = model.vocab_size, model.context_length, model.width
        parts = {"wte": nn.Embedding(V, d), "wpe": nn.Embedding(T, d), "h": nn.ModuleList(blocks)}
        if head_norm is not None:
            parts["ln_f"] = head_norm
        self.transformer = nn.ModuleDict(parts)
        self.lm_head = nn.Linear(d, V, bias=False)
        if model.tied:
            self.lm_head.weight = parts["wte"].weight  # type: ignore[assignment]
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                last = name.endswith("c_proj")
                std = DEVIATION * (2 * model.depth) ** -0.5 if last else DEVIATION
                nn.init.normal_(module.weight, std=std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def embed(self, tokens: Tensor) -> Tensor:  # type: ignore[override]
        """Token ids (B, N) to the tokens (B, N, d) that enter the first layer."""
        places = torch.arange(tokens.shape[1], device=tokens.device)
        return self.transformer["wte"](tokens) + self.transformer["wpe"](places)

    def trace(  # type: ignore[override]
        self, tokens: Tensor, taps: Sequence[str]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits (B, N, V), and the taps; see `Twin.trace`."""
        self.check_taps(taps)
        Z, seen = through(self.transformer["h"], self.embed(tokens), taps)  # type: ignore[arg-type]
        if "ln_f" in self.transformer:
            Z = self.transformer["ln_f"](Z)
        return self.lm_head(Z), seen

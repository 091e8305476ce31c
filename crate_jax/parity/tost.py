"""ToST in plain PyTorch, from the equations, with the official state-dict names and shapes."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from crate_jax.models.classifier import pair
from crate_jax.models.tost import ToST
from crate_jax.parity import vit
from crate_jax.parity.stem import Stem
from crate_jax.parity.tssa import TSSA
from crate_jax.parity.twin import Twin, through

BANDS = 32  # waves a side, of the positions


def waves(n: int) -> Tensor:
    """`BANDS` waves (n, `BANDS`) at n places along a side, float64.

    At place i from 1 to n the angle is 2π i/n. Waves 2j and 2j + 1 are sine and cosine of the angle
    over 10⁴ to the power of 2j/`BANDS`.
    """
    angles = 2 * torch.pi * torch.arange(1, n + 1, dtype=torch.float64) / (n + 1e-6)
    rates = 1e4 ** (-torch.arange(0, BANDS, 2, dtype=torch.float64) / BANDS)
    phases = angles[:, None] * rates
    return torch.stack([phases.sin(), phases.cos()], dim=-1).flatten(1)


class Positions(nn.Module):
    """A learned linear map of where the cells of a grid are, as `waves` of their row and column."""

    def __init__(self, width: int, grid: tuple[int, int]):
        super().__init__()
        self.grid = grid
        self.token_projection = nn.Conv2d(2 * BANDS, width, 1)

    def forward(self) -> Tensor:
        """Positions (1, P, d), row by row."""
        (rows, columns), weight = self.grid, self.token_projection.weight
        of_rows = waves(rows)[:, None].expand(rows, columns, BANDS)
        of_columns = waves(columns)[None].expand(rows, columns, BANDS)
        both = torch.cat([of_rows, of_columns], dim=-1).permute(2, 0, 1)[None]
        return self.token_projection(both.to(weight)).flatten(2).transpose(1, 2)


class Halves(nn.Module):
    """Shared parts of both kinds of block: attention and MLP, each with a LayerNorm and γ (d,)."""

    def __init__(self, model: ToST, attention: nn.Module):
        super().__init__()
        d = model.width
        self.gamma1, self.gamma2 = (
            nn.Parameter(torch.full((d,), float(model.layer_scale))) for _ in range(2)
        )
        self.norm1, self.norm2 = (nn.LayerNorm(d, eps=vit.EPSILON) for _ in range(2))
        self.attn = attention
        self.mlp = vit.Mlp(d, model.mlp_ratio * d)


class Block(Halves):
    """Z ← Z + γ₁ TSSA(LN(Z)), then Z ← Z + γ₂ MLP(LN(Z))."""

    def __init__(self, model: ToST):
        d, K, p = model.width, model.num_heads, model.subspace_dim
        to_out = nn.Sequential(nn.Linear(K * p, d))
        super().__init__(model, TSSA(d, K, p, bias=True, to_out=to_out))

    def forward(self, Z: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Tokens (B, N, d) to tokens (B, N, d), and the taps."""
        update, seen = self.attn(self.norm1(Z))
        half = Z + self.gamma1 * update
        mlp = self.mlp(self.norm2(half))
        out = half + self.gamma2 * mlp
        return out, seen | {"tssa": update, "z_half": half, "mlp": mlp, "out": out}


class ClassAttention(vit.Attention):
    """The row of the class token of multi-head self-attention, whose parameters it has."""

    def forward(self, Y: Tensor) -> Tensor:  # type: ignore[override]
        """Normalised tokens (B, N, d), the class token first, to its update (B, 1, d)."""
        qkv_BxNx3xKxp = self.qkv(Y).unflatten(-1, (3, self.num_heads, self.head_dim))
        q_BxKxNxp, k_BxKxNxp, v_BxKxNxp = qkv_BxNx3xKxp.permute(2, 0, 3, 1, 4)
        scores_BxKx1xN = q_BxKxNxp[:, :, :1] @ k_BxKxNxp.transpose(2, 3) * self.head_dim**-0.5
        O_BxKx1xp = scores_BxKx1xN.softmax(dim=-1) @ v_BxKxNxp
        return self.proj(O_BxKx1xp.transpose(1, 2).flatten(2))


class ClassBlock(Halves):
    """A block of class attention, of the class token z and the other tokens X.

    With Y = LN [z; X]:

        z ← z + γ₁ attention(Y),  X ← X + γ₁ Y without its first row
        z, X ← LN [z; X]; without ``tokens_norm`` z ← LN z alone
        z ← z + γ₂ MLP(z),  X ← 2 X

    Source: CaiT, arXiv 2103.17239, in the form of XCiT, which arXiv 2412.17810 takes.
    """

    def __init__(self, model: ToST):
        super().__init__(model, ClassAttention(model.width, model.num_heads, model.subspace_dim))
        self.tokens_norm = model.tokens_norm

    def forward(self, Z: Tensor) -> Tensor:
        """Tokens (B, N, d), the class token first, to tokens (B, N, d)."""
        Y = self.norm1(Z)
        Z = Z + self.gamma1 * torch.cat([self.attn(Y), Y[:, 1:]], dim=1)
        if self.tokens_norm:
            z, X = self.norm2(Z).tensor_split([1], dim=1)
        else:
            z, X = self.norm2(Z[:, :1]), Z[:, 1:]
        return torch.cat([z + self.gamma2 * self.mlp(z), 2 * X], dim=1)


class TorchToST(Twin):
    """The ToST image classifier, in PyTorch.

    Computes what `crate_jax.ToST` computes; loads an official checkpoint by ``load_state_dict``.
    Parameters start as the official code's do, in distribution. There is no stochastic depth.
    Source: arXiv 2412.17810.
    Differs from official: written from the equations; only names and shapes are shared. In training
        mode too a call returns its logits once.

    Args:
        model: ours, whose sizes and constants it has.

    Raises:
        ValueError: the model has another attention than TSSA.
    """

    TAPS = (*TSSA.TAPS, "tssa", "z_half", "mlp", "out")

    def __init__(self, model: ToST):
        super().__init__()
        if model.attention != "tssa":
            raise ValueError(
                f"model.attention must be tssa for a PyTorch twin; got {model.attention}. ToST's "
                "official code has nothing else."
            )
        d = model.width
        self.cls_token = nn.Parameter(torch.zeros(1, 1, d))
        self.patch_embed = Stem(model.in_channels, d, pair(model.patch_size))
        self.pos_embeder = Positions(d, model.grid)
        self.blocks = nn.ModuleList(Block(model) for _ in range(model.depth))
        self.cls_attn_blocks = nn.ModuleList(ClassBlock(model) for _ in range(model.class_layers))
        self.norm = nn.LayerNorm(d, eps=vit.EPSILON)
        self.head = nn.Linear(d, model.num_classes)
        nn.init.normal_(self.cls_token, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def embed(self, images: Tensor) -> Tensor:
        """Images (B, c, H, W) to the patches (B, P, d) that enter the first layer."""
        return self.patch_embed(images) + self.pos_embeder()

    def trace(self, images: Tensor, taps: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits (B, Y), and the taps; see `Twin.trace`."""
        self.check_taps(taps)
        Z, kept = through(self.blocks, self.embed(images), taps)  # type: ignore[arg-type]
        Z = torch.cat([self.cls_token.expand(len(Z), -1, -1), Z], dim=1)
        for block in self.cls_attn_blocks:
            Z = block(Z)
        logits = self.head(self.norm(Z[:, 0]))
        return logits, kept

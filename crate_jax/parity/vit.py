"""ViT in plain PyTorch, with timm's state-dict names and shapes."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crate_jax.models.classifier import pair
from crate_jax.models.vit import ViT
from crate_jax.parity.twin import Twin, through

EPSILON = 1e-6  # of every LayerNorm


class PatchEmbed(nn.Module):
    """Images (B, c, H, W) to tokens (B, P, d), by a convolution of stride h, w."""

    def __init__(self, in_channels: int, width: int, patch_size: tuple[int, int]):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, width, patch_size, stride=patch_size)

    def forward(self, images: Tensor) -> Tensor:
        """Patches row by row."""
        return self.proj(images).flatten(2).transpose(1, 2)


class Attention(nn.Module):
    """W_out [softmax(p^{-1/2} q_k k_kᵀ) v_k]_k + b_out.

    ``qkv.weight`` (3·K·p, d) holds the maps to queries, keys and values below each other, head
    after head in each.
    """

    def __init__(self, width: int, num_heads: int, head_dim: int):
        super().__init__()
        self.num_heads, self.head_dim = num_heads, head_dim
        self.qkv = nn.Linear(width, 3 * num_heads * head_dim)
        self.proj = nn.Linear(num_heads * head_dim, width)

    def forward(self, Y: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised tokens (B, N, d) to their update (B, N, d), and the attention (B, K, N, N)."""
        qkv_BxNx3xKxp = self.qkv(Y).unflatten(-1, (3, self.num_heads, self.head_dim))
        q_BxKxNxp, k_BxKxNxp, v_BxKxNxp = qkv_BxNx3xKxp.permute(2, 0, 3, 1, 4)
        scores = q_BxKxNxp @ k_BxKxNxp.transpose(-1, -2) * self.head_dim**-0.5
        A_BxKxNxN = scores.softmax(dim=-1)
        O_BxNxKxp = (A_BxKxNxN @ v_BxKxNxp).transpose(1, 2)
        return self.proj(O_BxNxKxp.flatten(2)), A_BxKxNxN


class Mlp(nn.Module):
    """W_out GELU(W_in y + b_in) + b_out, with the exact GELU."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, Y: Tensor) -> Tensor:
        """Normalised tokens (B, N, d) to their update (B, N, d)."""
        return self.fc2(F.gelu(self.fc1(Y)))


class Block(nn.Module):
    """Z ← Z + attention(LN(Z)), then Z ← Z + MLP(LN(Z))."""

    def __init__(self, width: int, num_heads: int, head_dim: int, hidden: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=EPSILON)
        self.attn = Attention(width, num_heads, head_dim)
        self.norm2 = nn.LayerNorm(width, eps=EPSILON)
        self.mlp = Mlp(width, hidden)

    def forward(self, Z: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Tokens (B, N, d) to tokens (B, N, d), and the taps."""
        mhsa, attention = self.attn(self.norm1(Z))
        half = Z + mhsa
        mlp = self.mlp(self.norm2(half))
        out = half + mlp
        return out, {"attention": attention, "mhsa": mhsa, "z_half": half, "mlp": mlp, "out": out}


class TorchViT(Twin):
    """The ViT, in PyTorch.

    Computes what `crate_jax.ViT` computes; loads a checkpoint of timm's by ``load_state_dict``.
    Parameters start as timm's do, in distribution. There is no dropout.
    Source: arXiv 2010.11929.

    Args:
        image_size: (height, width) in pixels.
        patch_size: (height, width) in pixels; divides image_size.
        num_classes: Y, the number of logits.
        width: d, the length of a token.
        depth: L, the number of layers.
        num_heads: K.
        head_dim: p.
        hidden: units of the MLP.
        pool: "cls", the class token; "patches", the mean of the others; "patches_twice", that mean
            through the same LayerNorm twice.
        in_channels: channels of the images.
    """

    TAPS = ("attention", "mhsa", "z_half", "mlp", "out")

    def __init__(
        self,
        image_size: tuple[int, int],
        patch_size: tuple[int, int],
        num_classes: int,
        width: int,
        depth: int,
        num_heads: int,
        head_dim: int,
        hidden: int,
        pool: str = "cls",
        in_channels: int = 3,
    ):
        super().__init__()
        (H, W), (h, w) = image_size, patch_size
        self.pool = pool
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        self.pos_embed = nn.Parameter(torch.empty(1, (H // h) * (W // w) + 1, width))
        self.patch_embed = PatchEmbed(in_channels, width, patch_size)
        self.blocks = nn.ModuleList(Block(width, num_heads, head_dim, hidden) for _ in range(depth))
        # timm's names: the norm is called after what it normalises.
        norm, none = nn.LayerNorm(width, eps=EPSILON), nn.Identity()
        self.norm, self.fc_norm = (norm, none) if pool == "cls" else (none, norm)
        self.head = nn.Linear(width, num_classes)
        self._start()

    def _start(self) -> None:
        """N(0, 0.02²) for linear maps and positions, biases at zero; the convolution stays."""
        nn.init.normal_(self.cls_token, std=1e-6)
        nn.init.normal_(self.pos_embed, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def embed(self, images: Tensor) -> Tensor:
        """Images (B, c, H, W) to the tokens (B, N, d) that enter the first layer."""
        Z = self.patch_embed(images)
        return torch.cat([self.cls_token.expand(len(Z), -1, -1), Z], dim=1) + self.pos_embed

    def trace(self, images: Tensor, taps: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits (B, Y), and the taps; see `Twin.trace`."""
        self.check_taps(taps)
        Z, kept = through(self.blocks, self.embed(images), taps)  # type: ignore[arg-type]
        Z = self.norm(Z)
        pooled = self.fc_norm(Z[:, 0] if self.pool == "cls" else Z[:, 1:].mean(dim=1))
        if self.pool == "patches_twice":
            pooled = self.fc_norm(pooled)
        return self.head(pooled), kept


def vit_twin(model: ViT) -> TorchViT:
    """The twin of a ViT, of the same sizes.

    Raises:
        ValueError: the model has registers or LayerScale, which timm's ViT of that name has not.
    """
    if model.registers or model.layer_scale is not None:
        raise ValueError(
            "model must have no registers and no layer_scale to have a PyTorch twin; got "
            f"{model.registers} and {model.layer_scale}. The twin is timm's plain ViT."
        )
    return TorchViT(
        image_size=pair(model.image_size),
        patch_size=pair(model.patch_size),
        num_classes=model.num_classes,
        width=model.width,
        depth=model.depth,
        num_heads=model.num_heads,
        head_dim=model.subspace_dim,
        hidden=model.mlp_ratio * model.width,
        pool=model.pool,
        in_channels=model.in_channels,
    )

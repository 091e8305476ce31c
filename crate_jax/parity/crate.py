"""CRATE in plain PyTorch, from the equations, with the official state-dict names and shapes."""

import functools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crate_jax.models.classifier import pair
from crate_jax.models.crate import Crate
from crate_jax.parity.stem import Patches
from crate_jax.parity.twin import Twin

Size = int | Sequence[int]


def ssa(W_BxNxKxp: Tensor, mask: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    """SSA_k = softmax(p^{-1/2} W_k W_kᵀ) W_k side by side, (B, N, K·p), and two taps.

    Args:
        W_BxNxKxp: tokens in K subspaces.
        mask: True where token n may see token m; it broadcasts to (B, K, N, N).
    """
    W_BxKxNxp = W_BxNxKxp.transpose(1, 2)
    scores = W_BxKxNxp @ W_BxKxNxp.transpose(-1, -2) * W_BxNxKxp.shape[-1] ** -0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    A_BxKxNxN = scores.softmax(dim=-1)
    O_BxNxKxp = (A_BxKxNxN @ W_BxKxNxp).transpose(1, 2)
    return O_BxNxKxp.flatten(2), {"subspace_tokens": W_BxNxKxp, "attention": A_BxKxNxN}


class MSSA(nn.Module):
    """W_out [SSA_1; …; SSA_K] + b_out with SSA_k = softmax(p^{-1/2} W_k W_kᵀ) W_k, W_k = U_kᵀ Z.

    ``qkv.weight`` (K·p, d) holds the bases U_kᵀ below each other. Without an output projection when
    one subspace fills the space (K = 1, p = d). Source: arXiv 2306.01129, equations 11 and 12.
    """

    TAPS = ("subspace_tokens", "attention")

    def __init__(self, width: int, num_heads: int, head_dim: int):
        super().__init__()
        self.num_heads, self.head_dim = num_heads, head_dim
        self.qkv = nn.Linear(width, num_heads * head_dim, bias=False)
        full = (num_heads, head_dim) == (1, width)
        projection = nn.Linear(num_heads * head_dim, width)
        self.to_out = nn.Identity() if full else nn.Sequential(projection)

    def forward(self, Z: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Normalised tokens (B, N, d) to their update (B, N, d), and two taps."""
        W_BxNxKxp = self.qkv(Z).unflatten(-1, (self.num_heads, self.head_dim))
        O_BxNxKp, seen = ssa(W_BxNxKxp)
        return self.to_out(O_BxNxKp), seen


class ISTA(nn.Module):
    """ReLU(Y + η (DᵀY − DᵀD Y) − η λ), in three products as the official code takes them.

    Source: arXiv 2306.01129, equation 17. With tokens as rows D Y is ``Y @ D.T``.
    """

    def __init__(self, width: int, eta: float, lmbda: float):
        super().__init__()
        self.eta, self.lmbda = eta, lmbda
        self.weight = nn.Parameter(torch.empty(width, width))
        nn.init.kaiming_uniform_(self.weight)

    def forward(self, Y: Tensor) -> Tensor:
        """Normalised tokens (B, N, d) to sparse tokens (B, N, d)."""
        D = self.weight
        DtDY = F.linear(F.linear(Y, D), D.t())
        DtY = F.linear(Y, D.t())
        return F.relu(Y + self.eta * (DtY - DtDY) - self.eta * self.lmbda)


class PreNorm(nn.Module):
    """A step applied to normalised tokens; `norm` and `fn` are the official names."""

    def __init__(self, width: int, fn: nn.Module):
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-5)
        self.fn = fn

    def forward(self, Z: Tensor):
        """Apply the step to LN(Z)."""
        return self.fn(self.norm(Z))


class Transformer(nn.Module):
    """L layers: Z^{l+1/2} = Z^l + MSSA(LN(Z^l)), then Z^{l+1} = ISTA(LN(Z^{l+1/2})).

    Args:
        depth: L.
        width: d.
        attention: makes MSSA, or what stands in its place.
        ista: makes ISTA.
        name: of the attention's tap.
    """

    def __init__(
        self,
        depth: int,
        width: int,
        attention: Callable[[], nn.Module],
        ista: Callable[[], nn.Module],
        name: str = "mssa",
    ):
        super().__init__()
        self.name = name
        self.layers = nn.ModuleList(
            nn.ModuleList([PreNorm(width, attention()), PreNorm(width, ista())])
            for _ in range(depth)
        )

    def forward(self, Z: Tensor, taps: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
        """Tokens (B, N, d) to tokens (B, N, d), and the taps, layers on axis 0."""
        kept: dict[str, list[Tensor]] = {name: [] for name in taps}
        for attention, ista in self.layers:  # type: ignore
            update, seen = attention(Z)
            half = Z + update
            Z = ista(half)
            seen |= {self.name: update, "z_half": half, "ista": Z}
            for name in taps:
                kept[name].append(seen[name])
        return Z, {name: torch.stack(values) for name, values in kept.items()}


class Frame(Twin):
    """The shared parts of CRATE and models in its frame: the class token, positions and the head.

    Args:
        num_patches: N.
        width: d, the length of a token.
        num_classes: Y, the number of logits.
        pool: "cls", the class token, or "mean", over all tokens, the class token included.
        patch_embedding: from images (B, c, H, W) to patches (B, N, d).
        transformer: the layers.

    Raises:
        ValueError: an unknown pool.
    """

    THRESHOLDED = "ista"

    def __init__(
        self,
        num_patches: int,
        width: int,
        num_classes: int,
        pool: str,
        patch_embedding: nn.Module,
        transformer: Transformer,
    ):
        super().__init__()
        if pool not in ("cls", "mean"):
            raise ValueError(f"pool must be one of cls, mean; got {pool}.")
        self.pool = pool
        self.pos_embedding = nn.Parameter(torch.randn(1, num_patches + 1, width))
        self.cls_token = nn.Parameter(torch.randn(1, 1, width))
        self.to_patch_embedding, self.transformer = patch_embedding, transformer
        self.mlp_head = nn.Sequential(nn.LayerNorm(width, eps=1e-5), nn.Linear(width, num_classes))

    def embed(self, images: Tensor) -> Tensor:
        """Images (B, c, H, W) to the tokens (B, N + 1, d) that enter the first layer."""
        Z = self.to_patch_embedding(images)
        cls_token = self.cls_token.expand(Z.shape[0], -1, -1)
        return torch.cat([cls_token, Z], dim=1) + self.pos_embedding

    def trace(self, images: Tensor, taps: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits (B, Y), and the taps; see `Twin.trace`."""
        self.check_taps(taps)
        Z, seen = self.transformer(self.embed(images), taps)
        pooled = Z[:, 0] if self.pool == "cls" else Z.mean(dim=1)
        return self.mlp_head(pooled), seen


class TorchCrate(Frame):
    """The CRATE image classifier, in PyTorch.

    Computes what `crate_jax.Crate` computes; loads an official checkpoint by ``load_state_dict``.
    Parameters start as the official code's do. There is no dropout: the official recipes use none.
    Source: arXiv 2306.01129.
    Differs from official: written from the equations; only names, shapes and order of the ISTA
    products are shared.

    Args:
        image_size: pixels, a side or (height, width).
        patch_size: pixels, a side or (height, width); divides image_size.
        num_classes: Y, the number of logits.
        width: d, the length of a token.
        depth: L, the number of layers.
        num_heads: K, the number of subspaces.
        head_dim: p, the dimension of a subspace; None: width / num_heads.
        pool: "cls", the class token, or "mean", over all tokens, the class token included.
        in_channels: channels of the images.
        eta: step size of ISTA.
        lmbda: sparsity weight of ISTA.

    Raises:
        ValueError: an unknown pool.
    """

    TAPS = (*MSSA.TAPS, "mssa", "z_half", "ista")

    def __init__(
        self,
        image_size: Size,
        patch_size: Size,
        num_classes: int,
        width: int,
        depth: int,
        num_heads: int,
        head_dim: int | None = None,
        pool: str = "cls",
        in_channels: int = 3,
        eta: float = 0.1,
        lmbda: float = 0.1,
    ):
        (H, W), (h, w) = pair(image_size), pair(patch_size)
        num_patches, patch_dim = (H // h) * (W // w), h * w * in_channels
        head_dim = width // num_heads if head_dim is None else head_dim
        embedding = nn.Sequential(
            Patches((h, w)),
            nn.LayerNorm(patch_dim, eps=1e-5),
            nn.Linear(patch_dim, width),
            nn.LayerNorm(width, eps=1e-5),
        )
        transformer = Transformer(
            depth,
            width,
            functools.partial(MSSA, width, num_heads, head_dim),
            functools.partial(ISTA, width, eta, lmbda),
        )
        super().__init__(num_patches, width, num_classes, pool, embedding, transformer)


# The values of fields in the official codes of CRATE and of its frame.
_OFFICIAL: dict[str, object] = {
    **{"attention_sign": "plus", "tied_output": False},
    **{"threshold": "relu", "ista_steps": 1, "step_sizes": "fixed"},
}


def check_official(model: Crate, attentions: Sequence[str]) -> None:
    """Refuse a model that the official code behind a twin does not have.

    Args:
        model: ours.
        attentions: that the code has; ISTA is its only nonlinearity.

    Raises:
        ValueError: an operator or a switch of the model is not there.
    """
    operators, known = (model.attention, model.nonlinearity), " or ".join(attentions)
    if model.attention not in attentions or model.nonlinearity != "ista":
        raise ValueError(
            f"model.attention and model.nonlinearity must be {known} and ista for a PyTorch twin; "
            f"got {' and '.join(operators)}. The official code has no other operators with "
            f"model.stem {model.stem}."
        )
    for field, value in _OFFICIAL.items():
        if (got := getattr(model, field)) != value:
            raise ValueError(
                f"model.{field} must be {value} for a PyTorch twin; got {got}. The official code "
                "has nothing else."
            )


def crate_twin(model: Crate) -> TorchCrate:
    """The twin of a CRATE of patches, of the same sizes and constants.

    Raises:
        ValueError: an operator of the model is not CRATE's own.
    """
    check_official(model, ("mssa",))
    return TorchCrate(
        image_size=model.image_size,
        patch_size=model.patch_size,
        num_classes=model.num_classes,
        width=model.width,
        depth=model.depth,
        num_heads=model.num_heads,
        head_dim=model.subspace_dim,
        pool=model.pool,
        in_channels=model.in_channels,
        eta=model.eta,
        lmbda=model.lmbda,
    )

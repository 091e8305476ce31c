"""CRATE-MAE in plain PyTorch, from the equations, with the official names; and ours to compare."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
import torch
import torch.nn.functional as F
from jax import Array
from torch import Tensor, nn

from crate_jax.models.classifier import pair
from crate_jax.models.crate_mae import CrateMae
from crate_jax.parity.crate import ISTA, MSSA, PreNorm
from crate_jax.parity.stem import Patches
from crate_jax.parity.twin import Twin, through

RATIO = 0.75  # of the patches that are hidden


def hidden_places(patches: int) -> np.ndarray:
    """The patches that a comparison hides in every image, (P,) bool: three quarters of them.

    They are the same in all images, so that both frameworks need nothing but the images.
    """
    order = np.random.default_rng(0).permutation(patches)
    return order >= max(1, int(patches * (1 - RATIO)))


class Hiding(CrateMae):
    """The autoencoder as `compare` calls it: images of which `hidden_places` are hidden to pixels.

    Its parameters are those of `crate_jax.CrateMae`; "logits" are pixels (B, P, h · w · c).
    """

    def forward(
        self, images_BxHxWxc: Array, *, train: bool, taps: str | Iterable[str] = ()
    ) -> tuple[Array, dict[str, Array]]:
        """The pixels of all patches, and the encoder's taps."""
        hidden_1xP = hidden_places(self.num_patches)[None]
        masked_BxP = jnp.broadcast_to(hidden_1xP, (len(images_BxHxWxc), self.num_patches))
        return self.forward_masked(images_BxHxWxc, masked_BxP, train=train, taps=taps)


def hiding(model: CrateMae) -> Hiding:
    """An autoencoder as `compare` calls it."""
    fields = (f.name for f in dataclasses.fields(model) if f.name not in ("parent", "name"))
    return Hiding(**{name: getattr(model, name) for name in fields})


class Dictionary(nn.Module):
    """D Y, of normalised tokens: with tokens as rows ``Y @ D.T``."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, width))
        nn.init.kaiming_uniform_(self.weight)

    def forward(self, Y: Tensor) -> Tensor:
        """Tokens (B, N, d) to tokens (B, N, d)."""
        return F.linear(Y, self.weight)


class Layer(nn.Module):
    """The frame of an official layer, a transformer of depth one: both halves, each normalised."""

    def __init__(self, width: int, first: nn.Module, second: nn.Module):
        super().__init__()
        halves = nn.ModuleList([PreNorm(width, first), PreNorm(width, second)])
        self.layers = nn.ModuleList([halves])

    def halves(self) -> tuple[Callable[[Tensor], Any], ...]:
        """The first half, and the second."""
        first, second = self.layers[0]  # type: ignore[misc]
        return first, second


class Encoder(Layer):
    """Z^{l+1/2} = Z^l + MSSA(LN(Z^l)), then Z^{l+1} = ISTA(LN(Z^{l+1/2}))."""

    def forward(self, Z: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Tokens (B, N, d) to tokens (B, N, d), and all taps."""
        attention, ista = self.halves()
        update, seen = attention(Z)
        half = Z + update
        out = ista(half)
        return out, seen | {"mssa": update, "z_half": half, "ista": out}


class Decoder(Layer):
    """Z^{l+1/2} = D LN(Z^l), then Z^{l+1} = Z^{l+1/2} − MSSA(LN(Z^{l+1/2}))."""

    def forward(self, Z: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Tokens (B, N, d) to tokens (B, N, d), and all taps."""
        dictionary, attention = self.halves()
        half = dictionary(Z)
        update, _ = attention(half)
        return half - update, {"out": half - update}


def positions(grid: tuple[int, int], width: int) -> Tensor:
    """Sines and cosines of the columns, then of the rows, (1, N, d); the class token's are zero."""
    rows, columns = grid
    frequencies = 10_000 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    parts = []
    for at in (torch.arange(columns).repeat(rows), torch.arange(rows).repeat_interleave(columns)):
        angles = at.double()[:, None] * frequencies
        parts += [angles.sin(), angles.cos()]
    return F.pad(torch.cat(parts, dim=1), (0, 0, 1, 0)).float()[None]


def error(told: Tensor, X: Tensor, hidden: Tensor, *, normalize: bool) -> Tensor:
    """The mean squared error over hidden patches.

    Args:
        told: what a model says of all patches (B, P, k).
        X: the patches.
        hidden: which are hidden (B, P).
        normalize: whether pixels count in units of their patch's deviation, from its mean.
    """
    if normalize:
        X = (X - X.mean(-1, keepdim=True)) / (X.var(-1, keepdim=True) + 1e-6).sqrt()
    return F.mse_loss(told[hidden], X[hidden])


class TorchCrateMae(Twin):
    """CRATE-MAE, in PyTorch: the autoencoder, or its encoder as a classifier.

    Computes what `Hiding` computes, and without a decoder what `crate_jax.CrateMae` computes.
    Parameters start as the official code's do. Source: arXiv 2404.02446.
    Differs from official: written from the equations; `hidden_places` are hidden instead of patches
    by chance; what the official model never reads is there without a gradient.

    Args:
        model: ours, whose sizes and constants it has.
    """

    TAPS = (*MSSA.TAPS, "mssa", "z_half", "ista")
    THRESHOLDED = "ista"
    hidden: Tensor | None  # of an encoder alone None

    def __init__(self, model: CrateMae):
        super().__init__()
        d, patch = model.width, pair(model.patch_size)
        attention = functools.partial(MSSA, d, model.num_heads, model.subspace_dim)
        self.pool, self.cut = model.pool, Patches(patch)
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(model.in_channels, d, patch, patch)})
        self.cls_token = nn.Parameter(torch.empty(1, 1, d).normal_(std=0.02))
        self.pos_embed, self.decoder_pos_embed = (
            nn.Parameter(positions(model.grid, d), requires_grad=False) for _ in range(2)
        )
        self.decoder_embed = nn.Linear(d, d).requires_grad_(False)  # never read
        self.blocks = nn.ModuleList(
            Encoder(d, attention(), ISTA(d, model.eta, model.lmbda)) for _ in range(model.depth)
        )
        self.norm = nn.LayerNorm(d, eps=1e-6)
        hidden = torch.tensor(hidden_places(model.num_patches)) if model.decoder_depth else None
        self.register_buffer("hidden", hidden, persistent=False)
        if model.decoder_depth:
            self.mask_token = nn.Parameter(torch.empty(1, 1, d).normal_(std=0.02))
            self.decoder_blocks = nn.ModuleList(
                Decoder(d, Dictionary(d), attention()) for _ in range(model.decoder_depth)
            )
            self.decoder_norm = nn.LayerNorm(d, eps=1e-6)
            self.decoder_pred = nn.Linear(d, patch[0] * patch[1] * model.in_channels)
        elif model.num_classes:
            self.head = nn.Linear(d, model.num_classes)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        projection: nn.Conv2d = self.patch_embed["proj"]  # type: ignore[assignment]
        nn.init.xavier_uniform_(projection.weight.data.view(d, -1))

    def embed(self, images: Tensor, hidden: Tensor | None = None) -> Tensor:
        """Images (B, c, H, W) to the tokens (B, N, d) that enter the first layer.

        Args:
            images: normalised.
            hidden: which patches are hidden, (P,) or (B, P); None: those of `hidden_places`, of an
                encoder alone none.
        """
        X = self.patch_embed["proj"](images).flatten(2).transpose(1, 2)
        hidden = self.hidden if hidden is None else hidden
        if hidden is not None:
            X = torch.where(hidden[..., None], self.mask_token.to(X.dtype), X)
        Z = torch.cat([self.cls_token.to(X.dtype).expand(len(X), -1, -1), X], dim=1)
        return Z + self.decoder_pos_embed

    def decode(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised tokens of the encoder to pixels (B, P, h · w · c), and what each layer gives.

        The latter are (L, B, N, d).
        """
        Z, seen = through(self.decoder_blocks, latent, ("out",))
        return self.decoder_pred(self.decoder_norm(Z)[:, 1:]), seen["out"]

    def trace(self, images: Tensor, taps: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
        """Pixels (B, P, h · w · c) or logits (B, Y), and the encoder's taps; see `Twin.trace`."""
        self.check_taps(taps)
        Z, seen = through(self.blocks, self.embed(images), taps)
        if self.hidden is not None:
            return self.decode(self.norm(Z))[0], seen
        return self.head(self.norm(Z[:, 0] if self.pool == "cls" else Z.mean(dim=1))), seen

    def targets(self, labels: np.ndarray) -> Tensor:
        """Images, of an autoencoder; of an encoder alone `Twin.targets`."""
        return super().targets(labels) if self.hidden is None else torch.tensor(labels)

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The loss: of pixels and images (B, H, W, c) `error`, normalised; else `Twin.loss`."""
        if self.hidden is None:
            return super().loss(logits, targets)
        X = self.cut(targets.permute(0, 3, 1, 2))
        return error(logits, X, self.hidden.expand(X.shape[:2]), normalize=True)

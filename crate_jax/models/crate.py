"""CRATE, the classifier: alternating compression (MSSA) and sparsification (ISTA)."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from crate_jax.models.derivatives import BACKWARD
from crate_jax.models.embedding import PatchEmbedding
from crate_jax.models.layers import ISTA, MSSA, LayerNorm, dense
from crate_jax.models.variants import CrateFields

TAPS = ("subspace_tokens", "attention", "mssa", "z_half", "ista")

REMAT = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


def pair(size: int | Sequence[int]) -> tuple[int, int]:
    """(height, width) of a size given as a side or as (height, width)."""
    sides = (size,) if isinstance(size, int) else tuple(size)
    return (sides[0], sides[-1])


class CrateBlock(nn.Module):
    """One layer: Z^{l+1/2} = Z^l + MSSA(LN(Z^l)), then Z^{l+1} = ISTA(LN(Z^{l+1/2})).

    Source: arXiv 2306.01129, equation 18 (section 2.5). The ISTA step has no residual.
    """

    num_heads: int
    head_dim: int
    eta: float
    lmbda: float
    dropout: float
    dtype: DTypeLike
    backward: str
    taps: tuple[str, ...]

    @nn.compact
    def __call__(self, Z_BxNxd: Array, train: bool) -> tuple[Array, dict[str, Array]]:
        """Tokens (B, N, d) to tokens (B, N, d), and those of `TAPS` that were asked for."""
        Y_BxNxd = LayerNorm(self.dtype, self.backward, name="mssa_norm")(Z_BxNxd)
        mssa = MSSA(self.num_heads, self.head_dim, self.dtype, self.backward, name="mssa")
        update_BxNxd, seen = mssa(Y_BxNxd)
        half_BxNxd = Z_BxNxd + nn.Dropout(self.dropout, deterministic=not train)(update_BxNxd)
        Y_BxNxd = LayerNorm(self.dtype, self.backward, name="ista_norm")(half_BxNxd)
        Z_BxNxd = ISTA(self.eta, self.lmbda, self.dtype, name="ista")(Y_BxNxd)
        seen |= {"mssa": update_BxNxd, "z_half": half_BxNxd, "ista": Z_BxNxd}
        return Z_BxNxd, {name: seen[name] for name in self.taps}


class Crate(CrateFields, nn.Module):
    """The CRATE image classifier.

    Parameters are float32 and start as the official code's do, in distribution; the computation is
    in `dtype`, with norms, softmax and logits in float32. Layers are stacked on axis 0 of every
    leaf under ``blocks``. Source: arXiv 2306.01129.

    Attributes:
        image_size: pixels, a side or (height, width).
        patch_size: pixels, a side or (height, width); divides image_size.
        num_classes: Y, the number of logits.
        width: d, the length of a token.
        depth: L, the number of layers.
        num_heads: K, the number of subspaces.
        head_dim: p, the dimension of a subspace; None: width / num_heads.
        pool: what the head reads: "cls", the class token, or "mean", the mean over all tokens, the
            class token included.
        in_channels: channels of the images.
        eta: step size of ISTA.
        lmbda: sparsity weight of ISTA.
        dropout: share of the entries dropped while training, of the embedded tokens and of MSSA's
            output; needs a "dropout" key when it is not 0.
        dtype: of the computation, float32 or bfloat16.
        backward: "derived", the written backward passes of `crate_jax.models.derivatives`; or
            "autodiff", slower and larger, which forward mode (`jax.jvp`) needs.
        remat: what the backward pass computes again: "none"; "dots", all but matrix products;
            "full".
        scan_unroll: layers per iteration of the compiled loop over layers.
    """

    @property
    def subspace_dim(self) -> int:
        """p, the dimension of a subspace.

        Raises:
            ValueError: head_dim is not set and width is not a multiple of num_heads.
        """
        if self.head_dim is not None:
            return self.head_dim
        if self.width % self.num_heads:
            raise ValueError(
                "model.width must be a multiple of model.num_heads when model.head_dim is not set; "
                f"got {self.width} and {self.num_heads}. Set model.head_dim."
            )
        return self.width // self.num_heads

    @nn.compact
    def __call__(
        self, images_BxHxWxc: Array, *, train: bool, taps: Sequence[str] = ()
    ) -> Array | tuple[Array, dict[str, Array]]:
        """Classify images.

        Args:
            images_BxHxWxc: normalised images of the model's image_size and in_channels, any float
                dtype.
            train: whether dropout acts.
            taps: names out of `TAPS`; each costs the memory of its array for every layer.

        Returns:
            Logits (B, Y), float32; with taps also {name: array}, layers on axis 0:
            ``subspace_tokens`` (L, B, N, K, p), ``attention`` (L, B, K, N, N), ``mssa`` before the
            residual, ``z_half`` and ``ista`` (L, B, N, d).

        Raises:
            ValueError: a field or the images break a rule.
            KeyError: an unknown tap.
        """
        self._check(images_BxHxWxc, taps)
        embedding = PatchEmbedding(
            pair(self.patch_size), self.width, self.dtype, self.backward, name="embedding"
        )
        Z_BxNxd = embedding(images_BxHxWxc)
        Z_BxNxd = nn.Dropout(self.dropout, deterministic=not train)(Z_BxNxd)
        Z_BxNxd, seen = self._blocks(tuple(taps))(Z_BxNxd, train)
        pooled_Bxd = Z_BxNxd[:, 0] if self.pool == "cls" else Z_BxNxd.mean(axis=1)
        pooled_Bxd = LayerNorm(jnp.float32, self.backward, name="head_norm")(pooled_Bxd)
        logits_BxY = dense(self.num_classes, self.width, jnp.float32, "head")(pooled_Bxd)
        return (logits_BxY, seen) if taps else logits_BxY

    def _blocks(self, taps: tuple[str, ...]) -> nn.Module:
        """The layers as one compiled loop; `remat` and `scan_unroll` shape its backward pass."""
        block: Any = CrateBlock
        if self.remat != "none":
            block = nn.remat(
                block, prevent_cse=False, static_argnums=(2,), policy=REMAT[self.remat]
            )
        layers = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=nn.broadcast,  # type: ignore[arg-type]
            length=self.depth,
            unroll=self.scan_unroll,
        )
        return layers(
            self.num_heads,
            self.subspace_dim,
            self.eta,
            self.lmbda,
            self.dropout,
            self.dtype,
            self.backward,
            taps,
            name="blocks",
        )

    def _check(self, images_BxHxWxc: Array, taps: Sequence[str]) -> None:
        """Every rule that a later shape error would state less clearly."""
        for name, value, known in (
            ("pool", self.pool, ("cls", "mean")),
            ("backward", self.backward, BACKWARD),
            ("remat", self.remat, tuple(REMAT)),
        ):
            if value not in known:
                raise ValueError(f"model.{name} must be one of {', '.join(known)}; got {value}.")
        expected = (*pair(self.image_size), self.in_channels)
        if images_BxHxWxc.ndim != 4 or images_BxHxWxc.shape[1:] != expected:
            raise ValueError(
                f"images must be (B, {', '.join(map(str, expected))}) for this model; got "
                f"{images_BxHxWxc.shape}. Resize them, or set image_size and in_channels."
            )
        for name in taps:
            if name not in TAPS:
                raise KeyError(f"taps must be among {', '.join(TAPS)}; got {name}.")

"""CRATE-α: CRATE with a sparse code in an overcomplete dictionary in the place of ISTA."""

import functools
from typing import ClassVar

import flax.linen as nn
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name as keep
from jax.nn import initializers as init
from jax.typing import DTypeLike

from crate_jax.models.block import Part
from crate_jax.models.classifier import ImageClassifier, pair
from crate_jax.models.derivatives import plain
from crate_jax.models.embedding import PatchEmbedding
from crate_jax.models.fields import AlphaFields
from crate_jax.models.layers import ISTA, MSSA, Linear, relu, times
from crate_jax.models.parameters import dictionary_init, read
from crate_jax.models.steering import STEERING, steered


def odl_code(Y_BxNxd: Array, D_dxm: Array, *, eta: float, lmbda: float) -> Array:
    """Two steps of ISTA in an overcomplete dictionary: the sparse code A² (B, N, m) of `odl`."""
    eta, lmbda = plain(eta), plain(lmbda)
    A1_BxNxm = keep(relu(eta * times(Y_BxNxd, D_dxm) - eta * lmbda), "code")
    E_BxNxd = keep(times(A1_BxNxm, D_dxm.T) - Y_BxNxd, "error")
    return keep(relu(A1_BxNxm - eta * times(E_BxNxd, D_dxm) - eta * lmbda), "code")


def odl(Y_BxNxd: Array, D_dxm: Array, D1_dxm: Array, *, eta: float, lmbda: float) -> Array:
    """Two steps of ISTA in an overcomplete dictionary, and the tokens that the code decodes to.

    A¹ = ReLU(η Dᵀ Y − η λ), the step from A⁰ = 0; A² = ReLU(A¹ − η Dᵀ(D A¹ − Y) − η λ); D₁ A².
    With tokens as rows Dᵀ Y is ``Y @ D`` and D A is ``A @ D.T``.
    Source: arXiv 2405.20299.

    Args:
        Y_BxNxd: tokens, normalised.
        D_dxm: dictionary of m atoms, as columns.
        D1_dxm: dictionary that the code is read with; D itself where the two are not decoupled.
        eta: step size η.
        lmbda: sparsity weight λ.

    Returns:
        Tokens (B, N, d), before the residual; of the tokens' dtype, which the dictionaries share.
    """
    return times(odl_code(Y_BxNxd, D_dxm, eta=eta, lmbda=lmbda), D1_dxm.T)


class OvercompleteISTA(nn.Module):
    """`odl` with its dictionaries D and D1 (d, m), which start uniform in ±√(6/d).

    Without ``decoupled`` there is no D1: the code is read with D. What the collection `STEERING`
    sets of the code is set before it is read.
    """

    TAPS: ClassVar[tuple[str, ...]] = ("code",)

    eta: float
    lmbda: float
    atoms: int
    decoupled: bool = True
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, Y_BxNxd: Array) -> tuple[Array, dict[str, Array]]:
        """Normalised tokens (B, N, d) to tokens (B, N, d), before the residual, and the code."""
        shape = (Y_BxNxd.shape[-1], self.atoms)
        D_dxm = read(self, "D", dictionary_init, shape, self.dtype)
        D1_dxm = read(self, "D1", dictionary_init, shape, self.dtype) if self.decoupled else D_dxm
        Y_BxNxd = Y_BxNxd.astype(self.dtype)
        A_BxNxm = odl_code(Y_BxNxd, D_dxm, eta=self.eta, lmbda=self.lmbda)
        A_BxNxm = steered(A_BxNxm, self.get_variable(STEERING, "code"))
        return times(A_BxNxm, D1_dxm.T), {"code": A_BxNxm}


class CrateAlpha(AlphaFields, ImageClassifier):
    """The CRATE-α image classifier.

    A layer: Z^{l+1/2} = Z^l + MSSA(LN(Z^l)), then Z^{l+1} = Z^{l+1/2} + ODL(LN(Z^{l+1/2})), without
    biases. Patches are embedded by a convolution. Three switches undo what it adds to CRATE, one
    after the other: ``residual``, ``decoupled``, and ``nonlinearity="ista"``, which leaves the
    square dictionary and the one step of CRATE.
    Source: arXiv 2405.20299 and its code. Parameters start as there, in distribution.
    Differs from official: every LayerNorm has ε = 1e-6, as in the JAX code; the head's is 1e-5 in
        the PyTorch port.

    Attributes: as `crate_jax.Crate`, and
        nonlinearity: "odl", or "ista".
        overcompleteness: atoms of the dictionary over the width.
        decoupled: whether the code is read with a dictionary of its own.
        residual: whether the tokens are added to what the code stands for.
        layer_scale: what the factors on both halves start from; None: there are none.
        drop_path: rate of stochastic depth of the last layer; it grows linearly from 0 at the
            first. It needs a "dropout" key.
    """

    EPSILON = 1e-6

    @property
    def attention_part(self) -> Part:
        """MSSA without a bias."""
        start = init.normal(0.02)
        make = functools.partial(
            MSSA,
            self.num_heads,
            self.subspace_dim,
            self.dtype,
            self.kernel,
            bias=False,
            kernel_init=start,
        )
        return Part("mssa", make, MSSA.TAPS)

    @property
    def nonlinearity_part(self) -> Part:
        """ODL, or the ISTA of CRATE."""
        if self.nonlinearity == "ista":
            return Part("ista", functools.partial(ISTA, self.eta, self.lmbda, self.dtype))
        atoms = self.overcompleteness * self.width
        make = functools.partial(
            OvercompleteISTA, self.eta, self.lmbda, atoms, self.decoupled, self.dtype
        )
        return Part("odl", make, OvercompleteISTA.TAPS)

    def block_fields(self) -> dict[str, bool | float | None]:
        """The residual and LayerScale."""
        return {"residual": self.residual, "layer_scale": self.layer_scale}

    def drop_path_rates(self) -> Array | None:
        """From 0 at the first layer to ``drop_path`` at the last."""
        if not self.drop_path:
            return None
        return jnp.linspace(0.0, self.drop_path, self.depth, dtype=jnp.float32)

    def embed(self, train: bool) -> nn.Module:
        """A convolution of stride h, w."""
        del train
        return PatchEmbedding(
            pair(self.patch_size),
            self.width,
            self.dtype,
            self.backward,
            norms=False,
            cls_init=init.normal(1e-6),
            pos_init=init.normal(0.02),
            kernel_init=dictionary_init,
            bias_init=init.zeros,
            name="embedding",
        )

    def make_head(self) -> nn.Module:
        """Weights from N(0, 0.02²)."""
        start = init.normal(0.02)
        return Linear(self.num_classes, kernel_init=start, bias_init=init.zeros, name="head")

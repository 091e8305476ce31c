"""A convolutional stem: images to tokens by stages that halve both sides.

A stage is a 3 x 3 convolution of stride two, without a bias, and a BatchNorm. A GELU stands between
two of them.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name as keep
from jax.nn import initializers as init
from jax.typing import DTypeLike

from crate_jax import placement
from crate_jax.models.block import REMAT
from crate_jax.models.embedding import check_sides, hide, with_class_token
from crate_jax.models.parameters import STATISTICS, linear_kernel_init, parameter, read

_SIDE = 3  # of a convolution, pixels


class BatchNorm(nn.Module):
    """PyTorch's BatchNorm: scale · (X − mean)/√(variance + ε) + bias, over all axes but the last.

    While training, mean and variance are those of the batch, and the running ones move a tenth of
    the way to them: r ← 0.9 r + 0.1 s, with the unbiased variance. Else the running ones are taken.
    They lie in the collection `batch_stats`. All is computed in float32.

    The batch is every row that the program sees as one array. On a mesh that is the batch of all
    devices, as of PyTorch's SyncBatchNorm. Within `jax.shard_map` and `jax.pmap` it is a device's
    own share. `crate_jax.training.step.make_train_step` says what micro-batches make of it.
    """

    train: bool
    dtype: DTypeLike = jnp.float32
    epsilon: float = 1e-5
    momentum: float = 0.1  # PyTorch's: the share of the batch

    @nn.compact
    def __call__(self, X: Array) -> Array:
        """(…, c) to (…, c), of `dtype`.

        Raises:
            ValueError: the running statistics are not among the variables.
        """
        shape, axes = X.shape[-1:], tuple(range(X.ndim - 1))
        if not self.is_initializing() and not self.has_variable(STATISTICS, "mean"):
            raise ValueError(
                f"variables must hold the running statistics, {STATISTICS}, beside params; got "
                "params alone. Take the variables of init or of load_variables."
            )
        scale_c = parameter(self, "scale", init.ones, shape)
        bias_c = parameter(self, "bias", init.zeros, shape)
        running_mean = self.variable(STATISTICS, "mean", jnp.zeros, shape, jnp.float32)
        running_var = self.variable(STATISTICS, "var", jnp.ones, shape, jnp.float32)
        X = X.astype(jnp.float32)
        mean_c, var_c = (
            placement.whole(x.value).astype(jnp.float32) for x in (running_mean, running_var)
        )
        if self.train:
            mean_c = jnp.mean(X, axis=axes)
            var_c = jnp.mean(jnp.square(X - _row(mean_c, X)), axis=axes)
            mean_c, var_c = keep((mean_c, var_c), "statistics")
            if self.is_mutable_collection(STATISTICS) and not self.is_initializing():
                n = X.size // X.shape[-1]
                stays, unbiased_c = 1 - self.momentum, var_c * (n / max(n - 1, 1))
                for running, now in ((running_mean, mean_c), (running_var, unbiased_c)):
                    now = placement.beside(self.momentum * now, running.value)
                    running.value = stays * running.value + now
        factor_c = scale_c.astype(jnp.float32) * jax.lax.rsqrt(var_c + self.epsilon)
        Y = (X - _row(mean_c, X)) * _row(factor_c, X) + _row(bias_c.astype(jnp.float32), X)
        return Y.astype(self.dtype)


def _row(values_c: Array, X: Array) -> Array:
    """Values along the last axis, with as many axes as X."""
    return values_c.reshape((1,) * (X.ndim - 1) + values_c.shape)


def stage_widths(patch_size: tuple[int, int], width: int) -> list[int]:
    """Channels of every stage; they double, and the last has the width.

    Raises:
        ValueError: so many stages make no patch of this size, or cannot share the width.
    """
    h, w = patch_size
    stages = max(h, w).bit_length() - 1
    if (h, w) != (2**stages, 2**stages) or stages < 1:
        raise ValueError(
            f"model.patch_size must be 2, 4, 8, 16, … for a convolutional stem; got {h}x{w}. Each "
            "of its stages halves both sides."
        )
    if width % 2 ** (stages - 1):
        raise ValueError(
            f"model.width must be a multiple of {2 ** (stages - 1)} for the {stages} stages of a "
            f"convolutional stem; got {width}. Their channels double up to it."
        )
    return [width // 2 ** (stages - 1 - i) for i in range(stages)]


def stage_sizes(
    input_shape: tuple[int, int, int], patch_size: tuple[int, int], width: int
) -> list[tuple[int, int]]:
    """The number of values that every stage gives for an image, and their multiply-adds."""
    H, W, before = input_shape
    found = []
    for i, channels in enumerate(stage_widths(patch_size, width), start=1):
        values = (H >> i) * (W >> i) * channels
        found.append((values, values * _SIDE**2 * before))
        before = channels
    return found


class _Stage(nn.Module):
    """A convolution and its BatchNorm, after a GELU if it is not the first."""

    channels: int
    first: bool
    train: bool
    dtype: DTypeLike

    @nn.compact
    def __call__(self, X_BxHxWxc: Array) -> Array:
        if not self.first:
            X_BxHxWxc = jax.nn.gelu(X_BxHxWxc, approximate=False)
        shape = (_SIDE, _SIDE, X_BxHxWxc.shape[-1], self.channels)
        kernel = read(self, "kernel", linear_kernel_init, shape, self.dtype)
        Y_BxHxWxc = jax.lax.conv_general_dilated(
            X_BxHxWxc,
            kernel,
            window_strides=(2, 2),
            padding=((1, 1), (1, 1)),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return BatchNorm(self.train, self.dtype, name="norm")(keep(Y_BxHxWxc, "convolved"))


@dataclasses.dataclass(eq=False, repr=False)
class StemFields:
    """Fields of the stem, and of an embedding that begins with it.

    Attributes:
        patch_size: (height, width) in pixels, of which the stages make one token.
        width: d.
        train: whether statistics are those of the batch.
        dtype: the dtype of the computation.
    """

    patch_size: tuple[int, int]
    width: int
    train: bool
    dtype: DTypeLike = jnp.float32


class _Stages(StemFields, nn.Module):
    """Patches by stages. The convolutions start as PyTorch's do.

    Source: XCiT's patch embedding, which arXiv 2412.17810 and arXiv 2509.16875 take.
    """

    @nn.compact
    def __call__(self, images_BxHxWxc: Array) -> Array:
        """Images (B, H, W, c) to patches (B, P, d), row by row.

        Raises:
            ValueError: the sizes do not fit the stages.
        """
        (_, H, W, _), (h, w) = images_BxHxWxc.shape, self.patch_size
        widths = stage_widths(self.patch_size, self.width)
        check_sides((H, W), (h, w))
        X_BxHxWxc = images_BxHxWxc.astype(self.dtype)
        for i, channels in enumerate(widths):
            stage = _Stage(channels, i == 0, self.train, self.dtype, name=f"stage_{i}")
            X_BxHxWxc = stage(X_BxHxWxc)
        return placement.reshape(X_BxHxWxc, (X_BxHxWxc.shape[0], (H // h) * (W // w), self.width))


# The backward pass keeps what the convolutions give, and computes the rest again.
Stem = nn.remat(_Stages, policy=REMAT["none"])


class ConvolutionalEmbedding(StemFields, nn.Module):
    """`Stem` → class token in front, positions added, as in `PatchEmbedding`.

    Source: the official implementation of arXiv 2509.16875.
    """

    @nn.compact
    def __call__(self, images_BxHxWxc: Array, hidden: tuple[Array, Array] | None = None) -> Array:
        """Images (B, H, W, c) to tokens (B, N, d), some of them hidden by `hide`."""
        stem = Stem(self.patch_size, self.width, self.train, self.dtype, name="stem")
        Z_BxPxd = hide(stem(images_BxHxWxc), hidden)
        return with_class_token(self, Z_BxPxd, init.normal(1.0), init.normal(1.0))

"""Masks of patches, and the targets for hidden patches."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array


def hidden_patches(noise_BxP: Array, kept: int | Array) -> Array:
    """Hide patches: in each image all but those of the least noise.

    Ranks are counted, not sorted: a sort would gather the noise of the whole batch on every device.

    >>> hidden_patches(jnp.array([[0.3, 0.1, 0.9, 0.1]]), 2).tolist()
    [[True, False, True, False]]

    Args:
        noise_BxP: a number for each patch; of equal ones the first counts as less.
        kept: the number of patches of an image that stay, or of each (B, 1).

    Returns:
        True where a patch is hidden (B, P).
    """
    own, other = noise_BxP[:, :, None], noise_BxP[:, None, :]
    places = jnp.arange(noise_BxP.shape[1], dtype=jnp.int32)
    before = (places[None, :] < places[:, None])[None]
    rank_BxP = jnp.sum((other < own) | ((other == own) & before), axis=2, dtype=jnp.int32)
    return rank_BxP >= kept


def check_shares(least: float, most: float) -> None:
    """Refuse shares of hidden patches that go down.

    Raises:
        ValueError: the smallest is larger than the largest.
    """
    if least > most:
        raise ValueError(
            "simdino.min_masked must be at most simdino.max_masked; got "
            f"{least} and {most}. Set one of them."
        )


def masks_of_one_view(key: Array, shape: tuple[int, int], *, least: float, most: float) -> Array:
    """Hide a share of the patches of one of two views of an image, and none of the other.

    Args:
        key: draws the view, its share, and the patches, for each image anew.
        shape: (B, P).
        least: smallest share; a patch is hidden in any case.
        most: largest.

    Returns:
        True where a patch is hidden (B, 2, P).
    """
    (B, P), (of_view, of_share, of_patch) = shape, jax.random.split(key, 3)
    share_Bx1 = jax.random.uniform(of_share, (B, 1), jnp.float32, least, most)
    hidden_Bx1 = jnp.maximum(1, jnp.floor(share_Bx1 * P)).astype(jnp.int32)
    noise_BxP = jax.random.uniform(of_patch, shape, jnp.float32)
    masked_BxP = hidden_patches(noise_BxP, P - hidden_Bx1)
    second_B = jax.random.bernoulli(of_view, shape=(B,))
    view_Bx2 = jnp.stack([~second_B, second_B], axis=1)
    return view_Bx2[:, :, None] & masked_BxP[:, None]


def patch_statistics(X_BxPxk: Array) -> tuple[Array, Array]:
    """Mean and deviation of the pixels of each patch, (B, P, 1): √(variance + 10⁻⁶), unbiased."""
    mean_BxPx1 = X_BxPxk.mean(axis=2, keepdims=True)
    return mean_BxPx1, jnp.sqrt(X_BxPxk.var(axis=2, keepdims=True, ddof=1) + 1e-6)


def seeds_of(images_BxHxWxc: Array) -> Array:
    """A number (B,) uint32 for each image that hangs on its values alone, exact on every device.

    The bits of each value times an odd number of its place, added up modulo 2³².
    """
    bits = images_BxHxWxc.astype(jnp.uint32)
    if jnp.issubdtype(images_BxHxWxc.dtype, jnp.floating):
        floats = images_BxHxWxc.astype(jnp.float32)
        bits = jax.lax.bitcast_convert_type(floats, jnp.uint32)
    places = np.arange(bits[0].size, dtype=np.uint32).reshape(bits.shape[1:])
    odd = (2 * places + 1) * np.uint32(0x9E3779B1)
    return jnp.sum(bits * odd[None], axis=(1, 2, 3), dtype=jnp.uint32)


def own_noise(images_BxHxWxc: Array, patches: int) -> Array:
    """Noise (B, P) in [0, 1) that an image's own values seed; see `seeds_of`."""

    def draw(seed: Array) -> Array:
        return jax.random.uniform(jax.random.key(seed), (patches,), jnp.float32)

    return jax.vmap(draw)(seeds_of(images_BxHxWxc))


def hidden_errors(
    told_BxPxk: Array, X_BxPxk: Array, masked_BxP: Array, *, normalize: bool
) -> tuple[Array, Array]:
    """The mean squared error over the pixels of the hidden patches of each image (B,), twice.

    Args:
        told_BxPxk: what a model says of all patches.
        X_BxPxk: the patches.
        masked_BxP: which are hidden, of each image as many.
        normalize: whether their pixels are told in units of `patch_statistics`, from the mean.

    Returns:
        The error, and that of whoever knows the mean of each patch, and nothing else.
    """
    mean_BxPx1, deviation_BxPx1 = patch_statistics(X_BxPxk)
    centred_BxPxk = X_BxPxk - mean_BxPx1
    if normalize:
        X_BxPxk = centred_BxPxk = centred_BxPxk / deviation_BxPx1
    both = (jnp.square(told_BxPxk - X_BxPxk), jnp.square(centred_BxPxk))
    error_B, of_means_B = (squares.mean(axis=2).mean(axis=1, where=masked_BxP) for squares in both)
    return error_B, of_means_B


def reconstructions(
    told_BxPxk: Array, X_BxPxk: Array, masked_BxP: Array, *, normalize: bool
) -> tuple[Array, Array, Array]:
    """Patches of three pictures: the original, what the model saw, and what it makes of that.

    Hidden patches are zero in the second, which is the mean pixel, and as told in the third, in the
    true mean and deviation of the patch where pixels are normalised.

    Args:
        told_BxPxk: see `hidden_errors`.
        X_BxPxk: see `hidden_errors`.
        masked_BxP: see `hidden_errors`.
        normalize: see `hidden_errors`.
    """
    hidden_BxPx1 = masked_BxP[..., None]
    if normalize:
        mean_BxPx1, deviation_BxPx1 = patch_statistics(X_BxPxk)
        told_BxPxk = told_BxPxk * deviation_BxPx1 + mean_BxPx1
    seen = jnp.where(hidden_BxPx1, 0, X_BxPxk)
    return X_BxPxk, seen, jnp.where(hidden_BxPx1, told_BxPxk, X_BxPxk)

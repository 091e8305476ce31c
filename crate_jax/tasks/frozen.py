"""Features of images, as a frozen model of the family gives them to k-NN and probes."""

from typing import Any

import jax.numpy as jnp
from jax import Array

from crate_jax.models.classifier import ImageClassifier


def gives_features(model: object) -> bool:
    """True if `pooled_token` and `mean_patch` know a model: the image classifiers of the family."""
    return isinstance(model, ImageClassifier)


def pooled_token(model: Any, variables: Any, images_BxHxWxc: Array) -> Array:
    """The input of a head: the pooled token behind the last norm.

    Args:
        model: an `ImageClassifier`, with a head or without.
        variables: the variables of the model, of all its collections.
        images_BxHxWxc: normalised.

    Returns:
        Features (B, d), float32.
    """
    Z_BxNxd = model.apply(variables, images_BxHxWxc, train=False, method="forward_features")
    pooled_Bxd = model.apply(variables, Z_BxNxd, pre_logits=True, method="forward_head")
    return pooled_Bxd.astype(jnp.float32)


def mean_patch(model: Any, variables: Any, images_BxHxWxc: Array) -> Array:
    """The mean of the patch tokens, each behind the last norm: what a decoder would see.

    Args:
        model: an `ImageClassifier`.
        variables: the variables of the model.
        images_BxHxWxc: normalised, whole.

    Returns:
        Features (B, d), float32.
    """
    Z_BxNxd = model.apply(variables, images_BxHxWxc, train=False, method="forward_features")
    Z_BxPxd = Z_BxNxd[:, model.first_patch :]
    B, P, d = Z_BxPxd.shape
    # A token alone is its own pooled token, so that the head's norm acts on each.
    alone = Z_BxPxd.reshape(B * P, 1, d)
    normed = model.apply(variables, alone, pre_logits=True, method="forward_head")
    return normed.reshape(B, P, d).astype(jnp.float32).mean(axis=1)

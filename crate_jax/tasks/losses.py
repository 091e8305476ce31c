"""Losses of several tasks."""

import jax
import jax.numpy as jnp
from jax import Array


def cross_entropy(logits_BxY: Array, labels_B: Array, *, label_smoothing: float = 0.0) -> Array:
    """Cross-entropy against (1 − α) p + α/Y, per example, without making that array.

    logsumexp(z) − (1 − α) Σ_y p_y z_y − α mean(z); PyTorch's
    ``CrossEntropyLoss(label_smoothing=α)``.

    Args:
        logits_BxY: any float dtype; the loss is computed in float32.
        labels_B: integer classes in [0, Y), for p one-hot; or p itself (B, Y), rows of sum 1.
        label_smoothing: α in [0, 1).

    Returns:
        Loss in nats (B,), float32.
    """
    z_BxY = logits_BxY.astype(jnp.float32)
    if labels_B.ndim == 2:
        target_B = jnp.sum(labels_B.astype(jnp.float32) * z_BxY, axis=1)
    else:
        target_B = jnp.take_along_axis(z_BxY, labels_B[:, None], axis=1)[:, 0]
    loss_B = jax.nn.logsumexp(z_BxY, axis=1) - (1 - label_smoothing) * target_B
    return (loss_B - label_smoothing * z_BxY.mean(axis=1)).astype(jnp.float32)


def token_losses(logits_BxNxV: Array, tokens_BxN: Array, *, label_smoothing: float = 0.0) -> Array:
    """Cross-entropy of each token; 0 where there is none to tell.

    Args:
        logits_BxNxV: any float dtype; the loss is computed in float32.
        tokens_BxN: integer ids in [0, V); below 0: none.
        label_smoothing: see `cross_entropy`.

    Returns:
        Loss in nats (B, N), float32.
    """
    B, N, V = logits_BxNxV.shape
    ids = jnp.maximum(tokens_BxN, 0).reshape(B * N)
    logits = logits_BxNxV.reshape(B * N, V)
    loss = cross_entropy(logits, ids, label_smoothing=label_smoothing)
    return jnp.where(tokens_BxN >= 0, loss.reshape(B, N), 0)


def token_cross_entropy(logits_BxNxV: Array, tokens_BxN: Array) -> Array:
    """Mean cross-entropy over the tokens of each text.

    Args:
        logits_BxNxV: see `token_losses`.
        tokens_BxN: integer ids in [0, V).

    Returns:
        Loss in nats a token (B,), float32.
    """
    return token_losses(logits_BxNxV, tokens_BxN).mean(axis=1)

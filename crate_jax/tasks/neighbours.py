"""A bank of recent features, and which class the nearest of them vote for."""

import jax
import jax.numpy as jnp
from jax import Array

EMPTY = -1  # the label of a place of the bank that holds nothing yet


def empty_bank(size: int, width: int) -> dict[str, Array]:
    """Places for so many features: ``features`` (M, d) float32 and ``labels`` (M,) int32."""
    return {
        "features": jnp.zeros((size, width), jnp.float32),
        "labels": jnp.full((size,), EMPTY, jnp.int32),
    }


def pushed(bank: dict[str, Array], features_Bxd: Array, labels_B: Array) -> dict[str, Array]:
    """The bank with new rows in front; the oldest, at its end, fall out."""
    new = {"features": features_Bxd, "labels": labels_B}
    size = len(bank["labels"])
    return {
        name: jnp.concatenate([new[name].astype(old.dtype), old])[:size]
        for name, old in bank.items()
    }


def nearest_class(
    query_Bxd: Array, bank: dict[str, Array], *, k: int, temperature: float = 0.07
) -> Array:
    """The class for which the k nearest of a bank vote, each with exp(cosine / τ).

    No array of classes is made: a neighbour's class has the votes of all neighbours that share it.
    Of equal ones the nearest wins.
    Source: the k-NN evaluation of arXiv 2104.14294.

    Args:
        query_Bxd: unit vectors.
        bank: unit vectors, and their classes; `EMPTY` has no vote.
        k: how many vote.
        temperature: τ.

    Returns:
        Classes (B,) int32; `EMPTY` of an empty bank.
    """
    features_Mxd, labels_M = bank["features"], bank["labels"]
    cosine_BxM = jnp.einsum("bd,md->bm", query_Bxd, features_Mxd, precision="highest")
    cosine_BxM = jnp.where(labels_M[None] == EMPTY, -jnp.inf, cosine_BxM)
    cosine_Bxk, index_Bxk = jax.lax.top_k(cosine_BxM, min(k, len(labels_M)))
    label_Bxk = labels_M[index_Bxk]
    # No weight exp((cosine − 1) / τ) overflows.
    weight_Bxk = jnp.where(label_Bxk == EMPTY, 0, jnp.exp((cosine_Bxk - 1) / temperature))
    same_Bxkxk = label_Bxk[:, :, None] == label_Bxk[:, None, :]
    votes_Bxk = jnp.sum(weight_Bxk[:, None, :], axis=2, where=same_Bxkxk)
    best_Bx1 = jnp.argmax(votes_Bxk, axis=1)[:, None]
    return jnp.take_along_axis(label_Bxk, best_Bx1, axis=1)[:, 0]

"""k nearest neighbours on frozen features: DINO's weighted votes, and DINOv2's probabilities."""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from crate_jax.evaluation.features import Features, num_classes
from crate_jax.tasks.labels import rank_of_label
from crate_jax.tasks.rates import unit

KS, TEMPERATURE = (10, 20, 100, 200), 0.07
FORMS = ("dino", "dinov2")
COLDEST = 1 / 64  # a vote of exp(64) is finite in float32, and so are sums of many
MOST_VALUES = 2**26  # of an array of similarities or votes, which a chunk of the tests needs


@functools.partial(jax.jit, static_argnames=("ks", "classes", "temperature", "form"))
def neighbour_votes(
    train_NxF: Array,
    labels_N: Array,
    tests_MxF: Array,
    *,
    ks: tuple[int, ...],
    classes: int,
    temperature: float = TEMPERATURE,
    form: str = "dino",
) -> dict[int, Array]:
    """Count the votes of the k most similar training rows for each class, for each test row.

        votes_c = Σ_{i ∈ nearest k, y_i = c} exp(cos(x, x_i) / T)           (dino)
        probabilities_c = Σ_{i ∈ nearest k, y_i = c} softmax(cos(x, ·) / T)_i      (dinov2)

    The softmax is taken over the largest of `ks`, and then cut to k: the probabilities of a smaller
    k add up to less than 1. Source: DINO's eval_knn.py and DINOv2's knn.py, as SimDINO has them.

    Args:
        train_NxF: features; each row is scaled to length 1 here.
        labels_N: of them, int32.
        tests_MxF: features.
        ks: how many neighbours, each at most N.
        classes: Y.
        temperature: T.
        form: one of `FORMS`.

    Returns:
        (M, Y) float32 by k.
    """
    cosine_MxN = jnp.matmul(unit(tests_MxF), unit(train_NxF).T, precision="highest")
    cosine_Mxk, nearest_Mxk = jax.lax.top_k(cosine_MxN, max(ks))
    labels_Mxk = labels_N[nearest_Mxk]
    scaled_Mxk = cosine_Mxk / temperature
    weights_Mxk = jax.nn.softmax(scaled_Mxk, axis=1) if form == "dinov2" else jnp.exp(scaled_Mxk)
    row_Mx1 = jnp.arange(len(tests_MxF))[:, None]
    none_MxY = jnp.zeros((len(tests_MxF), classes), jnp.float32)
    return {k: none_MxY.at[row_Mx1, labels_Mxk[:, :k]].add(weights_Mxk[:, :k]) for k in ks}


def knn(
    train: Features,
    test: Features,
    *,
    ks: Sequence[int] = KS,
    temperature: float = TEMPERATURE,
    form: str = "dino",
) -> dict[str, float]:
    """Top-1 and top-5 of k-NN, exact counts over the test rows.

    Of equal votes the lower class comes first. Top-5 is top-k where k is less than 5. A k of more
    than all training rows takes all of them. Tests go in chunks, so that memory is bounded.
    Differs from official: DINO's code fails with less than 100 test rows.

    Args:
        train: whose labels vote.
        test: the rows that are classified.
        ks: each at least 1.
        temperature: at least `COLDEST`.
        form: one of `FORMS`.

    Returns:
        ``k10/top1``, ``k10/top5`` … in [0, 1].

    Raises:
        ValueError: a k, the temperature or the form breaks a rule.
    """
    if not ks or min(ks) < 1:
        raise ValueError(f"k must be at least 1; got {list(ks)}. Choose others.")
    if not COLDEST <= temperature < math.inf:
        raise ValueError(
            f"temperature must be at least {COLDEST}, so that votes are finite; got {temperature}. "
            "DINO's is 0.07."
        )
    if form not in FORMS:
        raise ValueError(f"form must be one of {', '.join(FORMS)}; got {form}.")
    classes, most = num_classes(train, test), len(train.labels)
    used = {k: min(k, most) for k in ks}
    votes_of = functools.partial(
        neighbour_votes,
        jnp.asarray(train.values),
        jnp.asarray(train.labels),
        ks=tuple(sorted(set(used.values()))),
        classes=classes,
        temperature=float(temperature),
        form=form,
    )
    chunk = max(1, min(len(test.labels), MOST_VALUES // max(most, classes)))
    ranks: dict[int, list[np.ndarray]] = {k: [] for k in ks}
    for start in range(0, len(test.labels), chunk):
        values, labels = (x[start : start + chunk] for x in test)
        missing = chunk - len(labels)  # as many rows in every chunk: one program
        values = np.pad(values, ((0, missing), (0, 0)))
        votes = votes_of(jnp.asarray(values))
        for k in ks:
            rank = rank_of_label(votes[used[k]], jnp.asarray(np.pad(labels, (0, missing))))
            ranks[k].append(np.asarray(rank)[: len(labels)])
    found: dict[str, float] = {}
    for k in ks:
        rank = np.concatenate(ranks[k])
        found[f"k{k}/top1"] = float(np.mean(rank < 1))
        found[f"k{k}/top5"] = float(np.mean(rank < min(5, k)))
    return found

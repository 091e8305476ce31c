"""Linear probes on frozen features: logistic regression on the host, or SGD under jit."""

import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from crate_jax.evaluation.features import Features, num_classes, standardize

CS = (0.01, 0.1, 1.0, 10.0)  # inverse strengths of scikit-learn's penalty
RATES = (1e-3, 1e-2, 1e-1, 1.0)  # per 256 rows; the first is SimDINO's
SOLVERS = ("auto", "lbfgs", "sgd")
LARGE = 2**26  # values of the training features from which on SGD is faster
HELD_OUT = 10  # one in so many training rows chooses between strengths or rates
EPOCHS, BATCH, MOMENTUM = 100, 256, 0.9


def linear_probe(
    train: Features,
    test: Features,
    *,
    seed: int,
    solver: str = "auto",
    epochs: int = EPOCHS,
    batch_size: int = BATCH,
) -> dict[str, float]:
    """Top-1 over the test rows of a linear classifier of all training rows.

    Features are standardised by the training rows. A tenth of these, drawn by the seed, chooses the
    strength of the penalty or the rate; then all of them train. Test rows choose nothing.

    Args:
        train: two classes at least.
        test: the rows that are classified.
        seed: of what is held out, and of the order of SGD.
        solver: ``lbfgs`` (scikit-learn's logistic regression), ``sgd``, or ``auto``: the first for
            small sets.
        epochs: of SGD.
        batch_size: likewise.

    Returns:
        ``top1`` in [0, 1], and the chosen ``C`` or ``rate``.

    Raises:
        ValueError: the solver is unknown, there is no epoch, or nothing to tell apart.
    """
    if solver not in SOLVERS:
        raise ValueError(f"solver must be one of {', '.join(SOLVERS)}; got {solver}.")
    if epochs < 1:
        raise ValueError(f"epochs must be at least 1; got {epochs}. DINO's are {EPOCHS}.")
    if len(np.unique(train.labels)) < 2 or len(train.labels) < 2 * HELD_OUT:
        raise ValueError(
            f"a linear probe must get {2 * HELD_OUT} training rows of two classes; got "
            f"{len(train.labels)} of {len(np.unique(train.labels))}. Choose another split."
        )
    large = train.values.size > LARGE
    if solver == "sgd" or (solver == "auto" and large):
        name, choices = "rate", RATES
        sizes = dict(classes=num_classes(train, test), epochs=epochs, batch_size=batch_size)
        predict: Predict = functools.partial(sgd, seed=seed, **sizes)
    else:
        name, choices, predict = "C", CS, logistic
    order = np.random.default_rng(seed).permutation(len(train.labels))
    held, kept = np.split(order, [len(order) // HELD_OUT])
    X_NxF, tests_MxF = (x.astype(np.float32) for x in standardize(train.values, test.values))
    told = predict(X_NxF[kept], train.labels[kept], X_NxF[held], choices)
    hits = (told == train.labels[held]).mean(axis=1)
    best = choices[int(hits.argmax())]
    told = predict(X_NxF, train.labels, tests_MxF, (best,))
    return {"top1": float((told[0] == test.labels).mean()), name: best}


# From training rows, their labels, test rows and choices (R) to classes (R, M).
Predict = Callable[[np.ndarray, np.ndarray, np.ndarray, Sequence[float]], np.ndarray]


def logistic(
    X_NxF: np.ndarray, labels_N: np.ndarray, tests_MxF: np.ndarray, choices: Sequence[float]
) -> np.ndarray:
    """The classes (R, M) predicted by scikit-learn's logistic regression, for each C."""
    from sklearn.linear_model import LogisticRegression
    from threadpoolctl import threadpool_limits

    # In float64, whose last steps converge. Threads wait for each other longer than they work.
    X_NxF = X_NxF.astype(np.float64)
    with threadpool_limits(1):
        models = [LogisticRegression(C=C, max_iter=10_000).fit(X_NxF, labels_N) for C in choices]
        return np.stack([model.predict(tests_MxF.astype(np.float64)) for model in models])


def sgd(
    X_NxF: np.ndarray,
    labels_N: np.ndarray,
    tests_MxF: np.ndarray,
    choices: Sequence[float],
    *,
    seed: int,
    classes: int,
    epochs: int,
    batch_size: int,
) -> np.ndarray:
    """The classes (R, M) predicted by softmax regression with SGD, all rates in one program.

    Weights start at zero. Momentum is 0.9, nothing decays, and the rate of a choice r falls from
    r·B/256 to 0 along a cosine. Every epoch has another order; rows that fill no batch are left out
    of it. Source: the linear probe of DINO and SimDINO.

    Args:
        X_NxF: standardised features, float32.
        labels_N: of them.
        tests_MxF: standardised by the same rows.
        choices: rates per 256 rows.
        seed: the seed of the orders.
        classes: Y.
        epochs: at least 1.
        batch_size: B; all rows if they are fewer.
    """
    B = min(batch_size, len(X_NxF))
    steps = len(X_NxF) // B
    rates_R = jnp.asarray(choices, jnp.float32) * (B / 256)
    tx = optax.trace(decay=MOMENTUM)
    weights = {
        "kernel": jnp.zeros((len(choices), X_NxF.shape[1], classes), jnp.float32),
        "bias": jnp.zeros((len(choices), classes), jnp.float32),
    }
    X, labels = jnp.asarray(X_NxF), jnp.asarray(labels_N, jnp.int32)

    def loss(weights: dict[str, Array], rows_B: Array) -> Array:
        logits_BxY = X[rows_B] @ weights["kernel"] + weights["bias"][None]
        return optax.softmax_cross_entropy_with_integer_labels(logits_BxY, labels[rows_B]).mean()

    gradients = jax.vmap(jax.grad(loss), in_axes=(0, None))

    def step(carry: tuple, rows_B: Array) -> tuple[tuple, None]:
        weights, trace, done = carry
        updates, trace = tx.update(gradients(weights, rows_B), trace)
        rate_R = rates_R * (0.5 * (1 + jnp.cos(math.pi * done / (steps * epochs))))
        weights = jax.tree.map(
            lambda w, u: w - rate_R.reshape(-1, *(1,) * (u.ndim - 1)) * u, weights, updates
        )
        return (weights, trace, done + 1), None

    @functools.partial(jax.jit, donate_argnums=0)
    def epoch(carry: tuple, key: Array) -> tuple:
        order = jax.random.permutation(key, len(X))[: steps * B]
        return jax.lax.scan(step, carry, order.reshape(steps, B))[0]

    carry = (weights, tx.init(weights), jnp.float32(0))
    for key in jax.random.split(jax.random.key(seed), epochs):
        carry = epoch(carry, key)
    weights = jax.device_get(carry[0])
    logits_RxMxY = tests_MxF @ weights["kernel"] + weights["bias"][:, None]
    return logits_RxMxY.argmax(axis=2)

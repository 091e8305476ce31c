"""Linear probes: what separates, SGD against NumPy, what is chosen by held-out rows, mistakes."""

import numpy as np
import pytest

from crate_jax.evaluation import linear as module
from crate_jax.evaluation.features import Features
from crate_jax.evaluation.linear import CS, RATES, linear_probe, logistic, sgd


def blobs(rows, seed, classes=4, noise=0.7, width=6):
    centres = np.random.default_rng(9).normal(size=(classes, width))
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, rows)
    values = centres[labels] + noise * rng.normal(size=(rows, width))
    return Features(values.astype(np.float32), labels.astype(np.int32))


@pytest.mark.parametrize(
    ("solver", "name", "choices"), [("lbfgs", "C", CS), ("sgd", "rate", RATES)]
)
def test_what_is_linear_is_told(solver, name, choices):
    train, test = blobs(200, 0, noise=0.2), blobs(100, 1, noise=0.2)
    found = linear_probe(train, test, seed=0, solver=solver, epochs=20)
    assert found["top1"] == 1.0
    assert found[name] in choices
    assert set(found) == {"top1", name}


def test_a_feature_of_another_scale_is_as_good():
    train, test = blobs(200, 0), blobs(100, 1)
    scaled = [Features(x.values * np.float32(1e4) + 7, x.labels) for x in (train, test)]
    assert linear_probe(*scaled, seed=0) == linear_probe(train, test, seed=0)


def test_held_out_rows_choose_and_test_rows_do_not(monkeypatch):
    train, test = blobs(200, 0), blobs(100, 1)
    asked = []

    def predict(X, labels, tests, choices):
        asked.append((len(X), len(tests), tuple(choices)))
        right = logistic(X, labels, tests, choices)
        right[:2] = (right[:2] + 1) % 4  # the first two choices are wrong everywhere
        return right

    monkeypatch.setattr(module, "logistic", predict)
    found = linear_probe(train, test, seed=0, solver="lbfgs")
    assert asked[0] == (180, 20, CS)
    assert asked[1] == (200, 100, (found["C"],))
    assert found["C"] in CS[2:]


def test_large_sets_go_by_sgd(monkeypatch):
    train, test = blobs(60, 0), blobs(20, 1)
    assert "C" in linear_probe(train, test, seed=0)
    monkeypatch.setattr(module, "LARGE", 60 * 6 - 1)
    assert "rate" in linear_probe(train, test, seed=0, epochs=2)


def test_sgd_is_momentum_along_a_cosine():
    train, test = blobs(24, 0), blobs(50, 1, noise=3.0)
    rates, epochs, B = (0.5, 300.0), 5, 24  # a batch of all rows: the order makes no difference
    found = sgd(
        *(train.values, train.labels, test.values, rates),
        **dict(seed=0, classes=4, epochs=epochs, batch_size=999),
    )
    X, Y = train.values.astype(np.float64), np.eye(4)[train.labels]
    for row, rate in zip(found, rates, strict=True):
        W, b, u, v = np.zeros((6, 4)), np.zeros(4), 0.0, 0.0
        for step in range(epochs):
            Z = X @ W + b
            P = np.exp(Z - Z.max(axis=1, keepdims=True))
            E = (P / P.sum(axis=1, keepdims=True) - Y) / B
            u, v = 0.9 * u + X.T @ E, 0.9 * v + E.sum(axis=0)
            now = rate * B / 256 * 0.5 * (1 + np.cos(np.pi * step / epochs))
            W, b = W - now * u, b - now * v
        np.testing.assert_array_equal(row, (test.values @ W + b).argmax(axis=1))


def test_the_seed_orders_sgd():
    train, test = blobs(64, 0, noise=3.0), blobs(200, 1, noise=3.0)
    options = dict(classes=4, epochs=1, batch_size=8)
    told = [
        sgd(train.values, train.labels, test.values, (1.0,), seed=seed, **options)
        for seed in (0, 0, 1)
    ]
    np.testing.assert_array_equal(told[0], told[1])
    assert (told[0] != told[2]).any()


def test_mistakes():
    train = blobs(60, 0)
    with pytest.raises(ValueError, match="solver must be one of auto, lbfgs, sgd; got newton"):
        linear_probe(train, train, seed=0, solver="newton")
    with pytest.raises(ValueError, match=r"^epochs must be at least 1; got 0\. DINO's are 100\.$"):
        linear_probe(train, train, seed=0, solver="sgd", epochs=0)
    few = Features(train.values[:19], train.labels[:19])
    with pytest.raises(ValueError, match="must get 20 training rows of two classes; got 19"):
        linear_probe(few, train, seed=0)
    same = Features(train.values, np.zeros(60, np.int32))
    with pytest.raises(ValueError, match="two classes; got 60 of 1"):
        linear_probe(same, train, seed=0)

"""Few-shot ridge: golden scores and accuracies, the normal equations, what is drawn, mistakes."""

import json
from pathlib import Path

import numpy as np
import pytest

from crate_jax.evaluation.features import Features
from crate_jax.evaluation.fewshot import few, fewshot, ridge_scores

GOLDEN = Path(__file__).parent.parent / "golden"


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN / "fewshot.npz") as file:
        arrays = dict(file)
    facts = json.loads((GOLDEN / "fewshot.json").read_text())
    splits = [
        Features(arrays[f"{name}_features"], arrays[f"{name}_labels"].astype(np.int32))
        for name in ("train", "test")
    ]
    return arrays, facts, *splits


def test_golden_scores(golden):
    arrays, facts, train, test = golden
    found = ridge_scores(train, test.values, l2=facts["l2"], classes=facts["num_classes"])
    for l2 in facts["l2"]:  # by a float32 decomposition: 3.04e-3 off ours at a score of -2.99
        np.testing.assert_allclose(found[l2], arrays[f"l2_{l2}/scores"], atol=3e-3, rtol=1e-4)


def test_golden_accuracies(golden):
    arrays, facts, train, test = golden
    found = fewshot(train, test, seed=0, shots=(facts["shots"],), l2=facts["l2"])
    for l2 in facts["l2"]:  # ten rows of each class are all there are
        assert found[f"shots_10/l2_{l2:g}/top1"] == arrays[f"l2_{l2}/accuracy"]


def random_features(rows, width, classes=3, seed=0):
    rng = np.random.default_rng(seed)
    labels = np.arange(rows) % classes
    return Features(rng.normal(size=(rows, width)).astype(np.float32), labels.astype(np.int32))


@pytest.mark.parametrize(("rows", "width"), [(30, 4), (6, 11)])  # either square is the smaller
def test_scores_solve_the_normal_equations(rows, width):
    train, test = random_features(rows, width), random_features(5, width, seed=1)
    mean, std = train.values.astype(np.float64).mean(axis=0), train.values.std(axis=0, dtype=float)
    X, T = (
        np.hstack([(x - mean) / (std + 1e-5), np.full((len(x), 1), 100.0)])
        for x in (train.values.astype(np.float64), test.values)
    )
    Y = np.where(train.labels[:, None] == np.arange(3), 1.0, -1.0)
    W = np.linalg.solve(X.T @ X + 0.5 * np.eye(width + 1), X.T @ Y)
    found = ridge_scores(train, test.values, l2=(0.5,), classes=3)
    np.testing.assert_allclose(found[0.5], T @ W, atol=1e-8)


def test_few_are_as_many_of_each_class_and_another_seed_draws_others():
    train = random_features(60, 2)
    drawn = few(train, 4, seed=0)
    assert np.bincount(drawn.labels).tolist() == [4, 4, 4]
    lines = {tuple(row): label for row, label in zip(train.values, train.labels, strict=True)}
    assert [lines[tuple(row)] for row in drawn.values] == drawn.labels.tolist()
    np.testing.assert_array_equal(few(train, 4, seed=0).values, drawn.values)
    assert (few(train, 4, seed=1).values != drawn.values).any()


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (dict(shots=(9,)), "shots must be at most the rows of each class; got 9, of which class 2"),
        (dict(shots=(0,)), "shots must be at least 1; got 0"),
        (dict(l2=(0.0,)), "l2 must be above 0, and finite; got"),
        (dict(l2=(1.0, float("nan"))), "l2 must be above 0, and finite; got"),
        (dict(l2=(float("inf"),)), "l2 must be above 0, and finite; got"),
        (dict(l2=()), "l2 must be above 0, and finite; got"),
    ],
)
def test_mistakes(options, line):
    train = random_features(26, 2)  # 9, 9 and 8 rows of the classes
    with pytest.raises(ValueError, match=line):
        fewshot(train, train, seed=0, **dict(shots=(1,)) | options)

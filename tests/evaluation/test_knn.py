"""k nearest neighbours: golden votes and counts, and NumPy's; few rows; mistakes."""

import json
from pathlib import Path

import numpy as np
import pytest

from crate_jax.evaluation import knn as module
from crate_jax.evaluation.features import Features
from crate_jax.evaluation.knn import knn, neighbour_votes

GOLDEN = Path(__file__).parent.parent / "golden"
KS = (1, 5, 20)


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN / "knn.npz") as file:
        arrays = dict(file)
    facts = json.loads((GOLDEN / "knn.json").read_text())
    splits = [
        Features(arrays[f"{name}_features"], arrays[f"{name}_labels"].astype(np.int32))
        for name in ("train", "test")
    ]
    return arrays, facts, *splits


def votes_of(train, test, form="dino", temperature=0.07, ks=KS, classes=7):
    options = dict(ks=ks, classes=classes, temperature=temperature, form=form)
    return neighbour_votes(train.values, train.labels, test.values, **options)


def test_golden_votes(golden):
    arrays, facts, train, test = golden
    found = votes_of(train, test, temperature=facts["temperature"], classes=facts["num_classes"])
    for k in KS:
        np.testing.assert_allclose(found[k], arrays[f"k{k}/votes"], rtol=1e-4)


def test_golden_probabilities(golden):
    arrays, _, train, test = golden
    found = votes_of(train, test, form="dinov2")
    for k in KS:
        np.testing.assert_allclose(found[k], arrays[f"v2/k{k}/probabilities"], atol=1e-6)
    np.testing.assert_allclose(found[20].sum(axis=1), 1, atol=1e-6)
    assert (np.asarray(found[5].sum(axis=1)) < 1).all()


@pytest.mark.parametrize(
    "chunk", [2**26, 300 * 7]
)  # all at once; seven tests at a time, the last less
def test_golden_counts(golden, chunk, monkeypatch):
    monkeypatch.setattr(module, "MOST_VALUES", chunk)
    arrays, _, train, test = golden
    found = knn(train, test, ks=KS)
    for k in KS:
        top1, top5 = arrays[f"k{k}/top1_top5_percent"]
        assert found[f"k{k}/top1"] == pytest.approx(top1 / 100, abs=1e-12)
        assert found[f"k{k}/top5"] == pytest.approx(top5 / 100, abs=1e-12)


def random_splits(train=40, test=9, classes=6, seed=0):
    rng = np.random.default_rng(seed)
    return [
        Features(
            rng.normal(size=(n, 5)).astype(np.float32), rng.integers(0, classes, n).astype(np.int32)
        )
        for n in (train, test)
    ]


def test_votes_are_those_of_a_loop():
    train, test = random_splits()
    expected = np.zeros((9, 6))
    for i, x in enumerate(test.values.astype(np.float64)):
        cosines = [x @ y / np.linalg.norm(x) / np.linalg.norm(y) for y in train.values]
        for j in np.argsort(cosines)[::-1][:7]:
            expected[i, train.labels[j]] += np.exp(cosines[j] / 0.2)
    found = votes_of(train, test, temperature=0.2, ks=(7,), classes=6)
    np.testing.assert_allclose(found[7], expected, rtol=1e-4)


def test_k_of_more_than_all_training_rows_takes_all():
    train, test = random_splits(train=6, test=3)
    found = knn(train, test, ks=(6, 200))
    assert found["k200/top1"] == found["k6/top1"]
    assert found["k200/top5"] == found["k6/top5"]
    assert set(found) == {"k6/top1", "k6/top5", "k200/top1", "k200/top5"}


def test_a_training_row_finds_itself_and_a_row_of_zeros_finds_someone():
    train, _ = random_splits()
    assert knn(train, train, ks=(1,)) == {"k1/top1": 1.0, "k1/top5": 1.0}
    blank = Features(np.zeros((1, 5), np.float32), np.zeros(1, np.int32))
    assert np.isfinite(votes_of(train, blank, ks=(40,), classes=6)[40]).all()


def test_the_coldest_votes_are_finite():
    train, _ = random_splits(train=400)
    same = Features(np.ones_like(train.values), np.zeros_like(train.labels))
    found = votes_of(same, same, temperature=module.COLDEST, ks=(400,), classes=6)[400]
    np.testing.assert_allclose(found[:, 0], 400 * np.exp(64), rtol=1e-3)
    assert knn(train, train, ks=(400,), temperature=module.COLDEST)["k400/top1"] > 0.9


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (dict(ks=(0,)), "k must be at least 1; got"),
        (dict(ks=()), "k must be at least 1; got"),
        (dict(temperature=0.0), "temperature must be at least 0.015625, so that votes are finite"),
        (dict(temperature=0.015), "votes are finite; got 0.015. DINO's is 0.07."),
        (dict(temperature=float("nan")), "votes are finite; got nan"),
        (dict(temperature=float("inf")), "votes are finite; got inf"),
        (dict(form="v3"), "form must be one of dino, dinov2; got v3"),
    ],
)
def test_mistakes(options, line):
    with pytest.raises(ValueError, match=line):
        knn(*random_splits(), **options)

"""Nearest subspaces and support vector machines on features."""

import numpy as np
import pytest

from crate_jax.evaluation.features import Features
from crate_jax.evaluation.subspaces import (
    linear_svm,
    nearest_subspace,
    subspace_probe,
    svm_probe,
)


def on_planes(rows, seed, planes=3, F=8, r=2):
    """Rows on planes of their own around means of their own, with a little noise, and labels."""
    fixed, rng = np.random.default_rng(7), np.random.default_rng(seed)
    bases = np.linalg.qr(fixed.normal(size=(planes, F, r)))[0]
    means = 0.1 * fixed.normal(size=(planes, F))
    labels = np.arange(rows) % planes
    inside = rng.normal(size=(rows, r))
    X = means[labels] + np.einsum("bfr,br->bf", bases[labels], inside)
    return (X + 0.01 * rng.normal(size=X.shape)).astype(np.float32), labels.astype(np.int32)


def slow_nearest(train, labels, tests, components):
    """By projectors (F, F) of the eigenvectors of each class's covariance."""
    told = []
    for x in tests.astype(np.float64):
        distances = {}
        for c in sorted(set(labels.tolist())):
            rows = train[labels == c].astype(np.float64)
            mean = rows.mean(axis=0)
            vectors = np.linalg.eigh(np.cov((rows - mean).T))[1][:, ::-1][:, :components]
            apart = (np.eye(len(mean)) - vectors @ vectors.T) @ (x - mean)
            distances[c] = np.linalg.norm(apart)
        told.append(min(distances, key=distances.get))
    return np.array(told)


@pytest.mark.parametrize("components", [0, 1, 2, 5])
def test_nearest_subspaces_are_those_of_a_slow_version(components):
    train, labels = on_planes(60, seed=0)
    tests, _ = on_planes(40, seed=1)
    found = nearest_subspace(train, labels, tests, components=components)
    np.testing.assert_array_equal(found, slow_nearest(train, labels, tests, components))
    assert found.dtype == labels.dtype


def test_planes_are_told_apart_where_means_are_not():
    (train, labels), (tests, true) = on_planes(60, seed=0), on_planes(300, seed=1)
    on_plane = np.mean(nearest_subspace(train, labels, tests, components=2) == true)
    of_means = np.mean(nearest_subspace(train, labels, tests, components=0) == true)
    assert on_plane > 0.95 and of_means < 0.6


def test_a_class_of_few_rows_spans_few_directions():
    train = np.array([[0, 0, 1], [0, 0, 1], [5, 0, 0], [6, 0, 0], [5, 1, 0]], np.float32)
    labels = np.array([3, 3, 8, 8, 8])
    tests = np.array([[9, 9, 0.1], [0, 0, 0.9], [-40, 3, 0]], np.float32)
    np.testing.assert_array_equal(nearest_subspace(train, labels, tests, components=2), [8, 3, 8])


def test_components_must_leave_a_residual():
    train, labels = on_planes(9, seed=0)
    for components in (-1, 8):
        message = rf"^components must be >= 0 and below the 8 values .* got {components}\. Choose f"
        with pytest.raises(ValueError, match=message):
            nearest_subspace(train, labels, train, components=components)


def test_a_support_vector_machine_has_the_largest_margin():
    """Of two rows the plane lies half way between them; a bias stands beside the weights."""
    train = np.array([[-1, 0], [1, 0]], np.float32)
    tests = np.array([[-0.1, 9], [0.1, -9]], np.float32)
    found = linear_svm(train, np.array([4, 2]), tests, C=100.0)
    np.testing.assert_array_equal(found, [4, 2])
    rng = np.random.default_rng(0)
    means = 4 * np.eye(3)
    labels = rng.integers(0, 3, 90)
    rows = means[labels] + rng.normal(size=(90, 3)) / 2
    assert np.mean(linear_svm(rows[:60], labels[:60], rows[60:]) == labels[60:]) > 0.95


def test_the_weight_of_the_losses_must_be_positive():
    for C in (0, np.inf, np.nan):
        message = rf"^C must be > 0 and finite; got {C}\. scikit-learn's is 1\.$"
        with pytest.raises(ValueError, match=message):
            linear_svm(np.eye(2), np.arange(2), np.eye(2), C=C)


def test_one_class_has_no_margin():
    message = r"^labels must be of two classes or more; got one\. Choose another split\.$"
    with pytest.raises(ValueError, match=message):
        linear_svm(np.eye(2), np.ones(2), np.eye(2))


def test_probes_share_the_values_out_and_count_hits():
    train, test = Features(*on_planes(60, seed=0)), Features(*on_planes(90, seed=1))
    told = nearest_subspace(*train, test.values, components=2)
    hits = np.mean(told == test.labels)
    assert subspace_probe(train, test) == {"top1": hits, "components": 2}  # of eight values
    few = Features(train.values[:, :1], train.labels), Features(test.values[:, :1], test.labels)
    assert subspace_probe(*few)["components"] == 0
    assert subspace_probe(train, test, components=0)["top1"] < hits
    mean, std = train.values.mean(axis=0), train.values.std(axis=0) + 1e-5
    scaled = ((x.values - mean) / std for x in (train, test))
    ours, theirs = next(scaled), next(scaled)
    told = linear_svm(ours, train.labels, theirs)
    assert svm_probe(train, test)["top1"] == pytest.approx(np.mean(told == test.labels), abs=0.02)
    large = Features(train.values * 1e3, train.labels), Features(test.values * 1e3, test.labels)
    assert svm_probe(*large)["top1"] == pytest.approx(svm_probe(train, test)["top1"], abs=0.02)

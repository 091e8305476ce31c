"""MaskCut: graph, eigenvector and objects, against the equations written out."""

import itertools

import numpy as np
import pytest
import scipy.linalg

from crate_jax.analysis import maskcut as room
from crate_jax.analysis.maskcut import affinity, enlarge, maskcut, second_eigenvector

# A scene of 12 x 12 patches: background, and two objects; a feature for each of them.
SCENE = np.zeros((12, 12), int)
SCENE[2:7, 2:6] = 1
SCENE[8:11, 6:11] = 2
PALETTE = np.eye(4)[:3] + 0.05


def scene(noise=0.02, labels=SCENE):
    features = PALETTE[labels.ravel()]
    return features + noise * np.random.default_rng(1).normal(size=features.shape)


def random_graph(n, seed=0):
    F = np.random.default_rng(seed).normal(size=(n, 5))
    return affinity(F, tau=0.3)


def same_split(x, y):
    one, two = x > x.mean(), y > y.mean()
    return max((one == two).mean(), (one != two).mean())


@pytest.mark.parametrize("similarity", ["cosine", "product"])
def test_the_graph_by_hand(similarity):
    F = np.random.default_rng(0).normal(size=(9, 4)) * np.arange(1, 10)[:, None]
    F[3] = 0
    W = affinity(F, tau=0.15, similarity=similarity)
    for i, j in itertools.product(range(9), repeat=2):
        alike = float(F[i] @ F[j])
        if similarity == "cosine" and alike:
            alike /= np.linalg.norm(F[i]) * np.linalg.norm(F[j])
        assert W[i, j] == np.float32(1 if alike >= 0.15 else 1e-5), (i, j)
    assert W.dtype == np.float32 and 3 < (W == 1).sum() < 60
    assert (W[3] == np.float32(1e-5)).all()


def test_the_scale_counts_for_the_product_alone():
    F = scene()
    np.testing.assert_array_equal(affinity(3 * F), affinity(F))
    assert (affinity(0.1 * F, similarity="product") == np.float32(1e-5)).all()


@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_no_scale_is_too_small_or_too_large_for_a_cosine(scale):
    """Not even one whose square float32 does not have."""
    F_Pxf = np.array([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]])
    np.testing.assert_array_equal(affinity(scale * F_Pxf), affinity(F_Pxf))


def test_the_product_is_that_of_all_subspaces_together():
    W_PxKxp = np.random.default_rng(0).normal(size=(10, 3, 4))
    S = sum(W_PxKxp[:, k] @ W_PxKxp[:, k].T for k in range(3))
    made = affinity(W_PxKxp.reshape(10, -1), tau=0.5, similarity="product")
    np.testing.assert_array_equal(made == 1, S >= 0.5)


@pytest.mark.parametrize("solver", ["lanczos", "dense"])
@pytest.mark.parametrize("n", [2, 3, 20, 150])
def test_the_eigenvector_solves_the_generalised_problem(n, solver):
    W = random_graph(n)
    D = np.diag(W.sum(axis=1, dtype=float))
    expected = scipy.linalg.eigh(D - W, D, subset_by_index=[1, 1])[0][0]
    cost, x = second_eigenvector(W, solver=solver)
    assert cost == pytest.approx(expected, abs=2e-5)
    np.testing.assert_allclose((D - W) @ x, cost * D @ x, atol=2e-3)
    assert x @ D @ np.ones(n) == pytest.approx(0, abs=1e-3)
    assert x @ D @ x == pytest.approx(1, rel=1e-5)
    assert x[np.abs(x).argmax()] > 0


@pytest.mark.parametrize("seed", range(5))
def test_the_solvers_agree(seed):
    F = np.random.default_rng(seed).normal(size=(200, 3)) + np.repeat([[0.0], [1.5]], 100, axis=0)
    W = affinity(F, tau=0.4)
    one, two = (second_eigenvector(W, solver=solver) for solver in ("lanczos", "dense"))
    assert one[0] == pytest.approx(two[0], abs=1e-4)
    assert same_split(one[1], two[1]) > 0.95


def test_no_cut_is_cheaper_than_its_relaxation():
    W = random_graph(9, seed=3).astype(float)
    degrees = W.sum(axis=1)
    costs = []
    for bits in itertools.product([False, True], repeat=8):
        side = np.array([True, *bits])
        if not side.all():
            between = W[side][:, ~side].sum()
            costs.append(between / degrees[side].sum() + between / degrees[~side].sum())
    cost, x = second_eigenvector(W)
    assert 0 < cost <= min(costs) + 1e-9
    side = x > x.mean()
    between = W[side][:, ~side].sum()
    assert between / degrees[side].sum() + between / degrees[~side].sum() < np.median(costs)


def test_the_same_graph_gives_the_same_vector():
    W = random_graph(150)
    np.testing.assert_array_equal(second_eigenvector(W)[1], second_eigenvector(W)[1])


@pytest.mark.parametrize("solver", ["lanczos", "dense"])
def test_of_equal_eigenvalues_any_vector_cuts_between_the_groups(solver):
    groups = np.repeat(np.arange(4), 40)
    W = affinity(np.eye(4)[groups])
    cost, x = second_eigenvector(W, solver=solver)
    assert 0 < cost < 1e-4
    split = [set((x > x.mean())[groups == k].tolist()) for k in range(4)]
    assert all(len(side) == 1 for side in split) and len(set.union(*split)) == 2


def test_without_convergence_the_dense_solver_does_it(monkeypatch):
    W = random_graph(100)
    expected = second_eigenvector(W, solver="dense")

    monkeypatch.setattr(room, "STEPS", 3)
    assert room._lanczos(W, W.sum(axis=1, dtype=float)) is None
    cost, x = second_eigenvector(W)
    assert cost == expected[0]
    np.testing.assert_array_equal(x, expected[1])


@pytest.mark.parametrize("solver", ["lanczos", "dense"])
def test_objects_come_out_whole_and_once(solver):
    cuts = maskcut(scene(), (12, 12), objects=2, solver=solver)
    found = sorted((np.flatnonzero(cut.mask_P).tolist() for cut in cuts), key=lambda at: at[0])
    assert found == [np.flatnonzero(SCENE.ravel() == k).tolist() for k in (1, 2)]
    assert all(0 < cut.cost < 0.1 for cut in cuts)
    assert (cuts[1].x_P[cuts[0].mask_P] == 0).all()


def test_a_side_may_be_taken_whole():
    cuts = maskcut(scene(), (12, 12), objects=2, connected=False)
    np.testing.assert_array_equal(cuts[0].mask_P, SCENE.ravel() > 0)


def test_no_more_than_there_is():
    cuts = maskcut(scene(noise=0), (12, 12), objects=9)
    assert len(cuts) == 2  # what is left is one colour
    assert sum(cut.mask_P for cut in cuts).max() == 1
    assert maskcut(np.ones((16, 3)), (4, 4)) == []
    assert maskcut(np.ones((1, 3)), (1, 1)) == []


def test_the_larger_entries_are_the_object():
    labels = np.zeros((12, 12), int)
    labels[3:6, 4:8] = 1
    (cut,) = maskcut(scene(labels=labels), (12, 12), objects=1)
    np.testing.assert_array_equal(cut.mask_P, labels.ravel() == 1)
    assert cut.mask_P[np.abs(cut.x_P).argmax()]


@pytest.mark.parametrize(
    ("held", "other", "flips"), [(0, 4, False), (1, 3, False), (2, 2, False), (3, 1, True)]
)
def test_an_object_holds_few_corners(held, other, flips):
    corners = np.zeros(10, bool)
    x = np.r_[np.full(4, 3.0), np.full(6, -2.0)]
    corners[:held] = True
    corners[4 : 4 + other] = True
    np.testing.assert_array_equal(room._object_side(x, corners), (x > 0) != flips)


def test_a_frame_is_background_though_its_entries_are_larger():
    labels = np.ones((12, 12), int)
    labels[1:-1, 1:-1] = 0  # 44 patches around 100
    (cut,) = maskcut(scene(labels=labels), (12, 12), objects=1)
    assert not cut.mask_P[np.abs(cut.x_P).argmax()]
    np.testing.assert_array_equal(cut.mask_P, labels.ravel() == 0)


def test_enlarging_asks_the_patch_below_each_pixel():
    values = np.arange(6)
    np.testing.assert_array_equal(
        enlarge(values, (2, 3), (4, 6)), values.reshape(2, 3).repeat(2, axis=0).repeat(2, axis=1)
    )
    rows = [0, 0, 1, 1, 1]  # pixel centres at 0.2, 0.6, 1, 1.4, 1.8 of two rows
    np.testing.assert_array_equal(enlarge(np.arange(2), (2, 1), (5, 1))[:, 0], rows)
    assert enlarge(np.array([True, False]), (1, 2), (3, 7)).dtype == bool


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: maskcut(np.ones((17, 2)), (4, 4)), r"^features must be \(16, f\) .*class token\."),
        (lambda: maskcut(np.ones((16, 2)), (4, 4), objects=0), "^objects must be at least 1; got"),
        (lambda: maskcut(np.full((16, 2), np.nan), (4, 4)), "^features must be finite; got NaN"),
        (lambda: affinity(np.ones((4, 2)), similarity="l2"), "^similarity must be one of cosine, "),
        (lambda: affinity(np.ones((4, 2)), tau=np.nan), "^tau must be a finite number; got nan"),
        (lambda: maskcut(np.ones((4, 2)), (2, 2), tau=1.5), "^tau must be from -1 to 1, as a cosi"),
        (lambda: second_eigenvector(np.eye(3), solver="qr"), "^solver must be one of lanczos, "),
        (lambda: second_eigenvector(np.zeros((3, 3))), "^weights must connect every patch"),
    ],
)
def test_what_it_refuses(call, message):
    with pytest.raises(ValueError, match=message):
        call()

"""ReduNet: its operators against NumPy and the gradients of the objective, ΔR on subspaces."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crate_jax.models import redunet
from crate_jax.objective import class_coding_rate, coding_rate

C, J, m, EPS, ETA, LMBDA = 6, 3, 30, 0.5, 0.5, 20.0


def subspaces(count, seed):
    """Unit vectors near three planes in R^6, and which plane it is."""
    rng = np.random.default_rng(0)
    bases = [np.linalg.qr(rng.normal(size=(C, 2)))[0] for _ in range(J)]
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % J
    X = np.stack([bases[j] @ rng.normal(size=2) + 0.05 * rng.normal(size=C) for j in labels])
    return (X / np.linalg.norm(X, axis=1, keepdims=True)).astype(np.float32), labels


X, LABELS = subspaces(m, 1)
Pi = np.eye(J, dtype=np.float32)[LABELS]


# --- NumPy, in float64, examples as columns -------------------------------------------------------


def operator(Z_Cxm, C, eps=EPS):
    alpha = C / (Z_Cxm.shape[1] * eps**2)
    return alpha * np.linalg.inv(np.eye(len(Z_Cxm)) + alpha * Z_Cxm @ Z_Cxm.conj().T)


def layer(Z_Cxm, labels, share):
    """One layer: its operators, the features behind it, the memberships."""
    E = operator(Z_Cxm, C)
    C_j = [operator(Z_Cxm[:, labels == j], C) for j in range(J)]
    lengths = np.array([np.linalg.norm(each @ Z_Cxm, axis=0) for each in C_j])
    e = np.exp(-LMBDA * (lengths - lengths.min(axis=0)))
    guess = e / e.sum(axis=0)
    compressed = sum(share[j] * guess[j] * (C_j[j] @ Z_Cxm) for j in range(J))
    Z_Cxm = Z_Cxm + ETA * (E @ Z_Cxm - compressed)
    return E, C_j, Z_Cxm / np.linalg.norm(Z_Cxm, axis=0), guess


@pytest.fixture(scope="module")
def built():
    return redunet.build(
        jnp.asarray(X), jnp.asarray(LABELS), num_classes=J, depth=4, eps=EPS, eta=ETA, lmbda=LMBDA
    )


def test_layers_are_those_in_numpy(built):
    net, passed = built
    Z = X.T.astype(np.float64)
    for index in range(4):
        E, C_j, Z, guess = layer(Z, LABELS, Pi.mean(axis=0))
        np.testing.assert_allclose(net.layers.E_FxCxC[index, 0], E, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(net.layers.C_JxFxCxC[index, :, 0], C_j, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(passed.memberships_LxmxJ[index], guess.T, atol=1e-4)
    np.testing.assert_allclose(passed.features, Z.T, atol=1e-4)
    np.testing.assert_allclose(net.layers.gamma_J, np.full((4, J), 1 / J), rtol=1e-6)


def test_the_operators_are_the_gradients_of_the_rates():
    """∂R/∂Z = E Z and ∂R^c/∂Z = Σ_j γ_j C_j Z Π_j."""
    built = redunet.build_layer(jnp.asarray(X)[:, None], jnp.asarray(Pi), eps=EPS)
    expands = jax.grad(lambda Z: coding_rate(Z, eps=EPS))(jnp.asarray(X))
    np.testing.assert_allclose(X @ built.E_FxCxC[0], expands, rtol=1e-3, atol=1e-4)
    compresses = jax.grad(lambda Z: class_coding_rate(Z, jnp.asarray(Pi), eps=EPS))(jnp.asarray(X))
    mine = [built.gamma_J[j] * built.C_JxFxCxC[j, 0] @ x for x, j in zip(X, LABELS, strict=True)]
    np.testing.assert_allclose(mine, compresses, rtol=1e-3, atol=1e-4)


def test_rate_reduction_rises_layer_by_layer_on_subspaces():
    net, passed = redunet.build(
        jnp.asarray(X), jnp.asarray(LABELS), num_classes=J, depth=30, eps=EPS, lmbda=500.0
    )
    before = coding_rate(X, eps=EPS) - class_coding_rate(X, jnp.asarray(Pi), eps=EPS)
    gains = np.array([before, *(passed.rates_Lx2[:, 0] - passed.rates_Lx2[:, 1])])
    assert (np.diff(gains) > 0).all() and gains[-1] > 1.2 * gains[0]
    expected = coding_rate(passed.features, eps=EPS)
    np.testing.assert_allclose(passed.rates_Lx2[-1, 0], expected, rtol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(passed.features, axis=1), 1, rtol=1e-5)
    # Vectors of different planes are more nearly at right angles than they were.
    others = LABELS[:, None] != LABELS
    angles = [np.abs(Z @ Z.T)[others].mean() for Z in (X, np.asarray(passed.features))]
    assert angles[1] < 0.6 * angles[0]
    assert net.layers.E_FxCxC.shape == (30, 1, C, C)


def test_new_examples_are_told_to_their_classes():
    net, _ = redunet.build(
        jnp.asarray(X), jnp.asarray(LABELS), num_classes=J, depth=10, eps=EPS, lmbda=500.0
    )
    new, labels = subspaces(90, 2)
    passed = redunet.apply(net, jnp.asarray(new))
    predicted = passed.memberships_LxmxJ[-1].argmax(-1)
    assert np.mean(predicted == labels) > 0.95
    np.testing.assert_allclose(passed.memberships_LxmxJ.sum(-1), np.ones((10, 90)), rtol=1e-5)


def test_the_same_examples_go_the_same_way(built):
    net, passed = built
    again = jax.jit(redunet.apply)(net, jnp.asarray(3 * X))  # lengths are not looked at
    np.testing.assert_allclose(again.features, passed.features, atol=1e-5)
    np.testing.assert_allclose(again.memberships_LxmxJ, passed.memberships_LxmxJ, atol=1e-4)
    np.testing.assert_allclose(again.rates_Lx2[:, 0], passed.rates_Lx2[:, 0], rtol=1e-5)
    guess = np.asarray(again.memberships_LxmxJ[-1])
    expected = class_coding_rate(again.features, jnp.asarray(guess), eps=EPS)
    np.testing.assert_allclose(again.rates_Lx2[-1, 1], expected, rtol=1e-5)


@pytest.mark.parametrize("tau", [0.1, 1.0])
def test_further_examples_move_the_layers_a_share_of_the_way(built, tau):
    net, _ = built
    new, labels = subspaces(45, 3)
    moved = redunet.update(net, jnp.asarray(new), jnp.asarray(labels), tau=tau)
    E = operator(new.T.astype(np.float64), C)
    first = np.asarray(net.layers.E_FxCxC[0, 0], np.float64)
    expected = first + tau * (E - first)
    np.testing.assert_allclose(moved.layers.E_FxCxC[0, 0], expected, rtol=1e-3, atol=1e-4)
    np.testing.assert_array_equal(moved.layers.gamma_J, net.layers.gamma_J)
    if tau == 1:  # what was built before is forgotten
        other, _ = redunet.build(
            *(jnp.asarray(new), jnp.asarray(labels)),
            **dict(num_classes=J, depth=4, eps=EPS, eta=ETA, lmbda=LMBDA),
        )
        for ours, theirs in zip(moved.layers, other.layers, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-3)


# --- signals --------------------------------------------------------------------------------------


def signals(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("shape", [(12, 5, 2), (12, 3, 4, 2)], ids=["1-D", "2-D"])
def test_a_shift_of_the_signal_shifts_its_features(shape):
    S, labels = signals(*shape), np.arange(12) % 2
    net, passed = redunet.build(
        jnp.asarray(S), jnp.asarray(labels), num_classes=2, depth=3, eps=EPS, lmbda=LMBDA
    )
    assert passed.features.shape == shape and passed.features.dtype == jnp.float32
    places = tuple(range(1, len(shape) - 1))
    shifted = np.roll(S, (2,) * len(places), places)
    found = redunet.apply(net, jnp.asarray(shifted))
    expected = np.roll(passed.features, (2,) * len(places), places)
    np.testing.assert_allclose(found.features, expected, atol=1e-5)
    np.testing.assert_allclose(found.memberships_LxmxJ, passed.memberships_LxmxJ, atol=1e-4)
    lengths = np.linalg.norm(S.reshape(12, -1), axis=1).reshape(12, *[1] * len(shape[1:]))
    assert np.abs(passed.features - S / lengths).max() > 1e-3


def test_a_layer_of_signals_is_one_of_vectors_that_has_seen_all_shifts():
    """Frequencies make the block-circulant operator of all shifted signals block-diagonal.

    Those are m T vectors of T C entries, of which each frequency has a T-th of the power. I +
    α V Vᴴ is that of ε √T, and α in front of its inverse T times as large.
    """
    T, c = 5, 2
    S, labels = signals(8, T, c), np.arange(8) % 2
    S /= np.linalg.norm(S.reshape(8, -1), axis=1)[:, None, None]
    Pi = jnp.asarray(np.eye(2, dtype=np.float32)[labels])
    V = jnp.fft.fft(jnp.asarray(S), axis=1, norm="ortho")
    built = redunet.build_layer(V, Pi, eps=EPS)
    expanded = np.fft.ifft(np.einsum("fck,mfk->mfc", built.E_FxCxC, V), axis=1, norm="ortho")
    shifts = np.concatenate([np.roll(S, t, axis=1).reshape(8, -1) for t in range(T)])
    E = operator(shifts.T.astype(np.float64), T * c, eps=EPS * T**0.5)
    np.testing.assert_allclose(expanded.real.reshape(8, -1), T * S.reshape(8, -1) @ E, atol=1e-4)
    assert np.abs(expanded.imag).max() < 1e-5
    rate = np.asarray(coding_rate(V.swapaxes(0, 1), eps=EPS)).mean()
    of_shifts = coding_rate(jnp.asarray(shifts), eps=EPS * T**0.5)
    np.testing.assert_allclose(T * rate, of_shifts, rtol=1e-4)


def test_lifting_is_a_circular_correlation():
    S, filters = signals(2, 5, 3), signals(2, 3, 4, seed=1)
    expected = np.zeros((2, 5, 4))
    for n in range(5):
        for i in range(2):
            expected[:, n] += S[:, (n + i) % 5] @ filters[i]
    found = redunet.lift(jnp.asarray(S), jnp.asarray(filters))
    np.testing.assert_allclose(found, np.maximum(expected, 0), atol=1e-5)
    assert (found == 0).any() and (found > 0).any()


def test_lifting_an_image():
    S, filters = signals(2, 4, 5, 1), signals(3, 3, 1, 6, seed=1)
    expected = sum(np.roll(S, (-i, -j), (1, 2)) @ filters[i, j] for i in range(3) for j in range(3))
    found = redunet.lift(jnp.asarray(S), jnp.asarray(filters))
    np.testing.assert_allclose(found, np.maximum(expected, 0), atol=1e-5)


def test_a_network_is_built_within_a_program():
    X, labels = jnp.asarray(signals(6, 3)), jnp.arange(6) % 2
    build = functools.partial(redunet.build, num_classes=2, depth=2, eps=EPS)
    found, expected = jax.jit(build)(X, labels)[1], build(X, labels)[1]
    np.testing.assert_allclose(found.features, expected.features, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "labels", "message"),
    [
        ((4,), [0, 1, 0, 1], r"^examples must be \(m, C\), .* got \(4,\) and \(4,\)\. Put the"),
        ((4, 2), [0, 1, 0], r"^examples must be .* got \(4, 2\) and \(3,\)\."),
        ((4, 2), [0, 0, 0, 0], r"^labels must name each of the 2 classes; got none of some\. A"),
        ((4, 2), [0, 1, 2, 0], r"^labels must be >= 0 and < 2; got others too\. Number the"),
        ((4, 2), [0, 1, -1, 0], r"^labels must be >= 0 and < 2; got others too\. Number the"),
    ],
)
def test_what_builds_no_network(shape, labels, message):
    with pytest.raises(ValueError, match=message):
        redunet.build(jnp.ones(shape), jnp.asarray(labels), num_classes=2, depth=1, eps=EPS)

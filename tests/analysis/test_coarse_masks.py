"""Coarse masks of attention, and mIoU: against loops over entries, and by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crate_jax.analysis import taps
from crate_jax.analysis.coarse_masks import (
    class_attention,
    class_scores,
    mean_iou,
    share_of_entries,
    share_of_mass,
)

MAPS = jnp.asarray(np.random.default_rng(0).dirichlet(np.full(16, 0.3), (2, 3)), jnp.float32)


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


@pytest.mark.parametrize("definition", ["paper", "official_code"])
def test_maps_by_loops(definition):
    W = np.random.default_rng(1).normal(size=(2, 6, 3, 4))
    found = np.asarray(class_attention(jnp.asarray(W, jnp.float32), definition=definition))
    for b in range(2):
        for k in range(3):
            products = W[b, :, k] @ W[b, 0, k]
            paper, code = softmax(products[1:]), softmax(products / 2)[1:]
            expected = {"paper": paper, "official_code": code}[definition]
            np.testing.assert_allclose(found[b, k], expected, rtol=1e-5)


def test_the_code_s_map_is_the_model_s_attention(tiny_model, tiny_params, tiny_images):
    names = ("subspace_tokens", "attention")
    _, seen = taps(tiny_model, tiny_params, tiny_images, names=names)
    for layer in range(3):
        made = class_attention(seen["subspace_tokens"][layer], definition="official_code")
        np.testing.assert_allclose(made, seen["attention"][layer][:, :, 0, 1:], rtol=1e-4)


def test_shares_by_loops():
    for map_P, entries_P, mass_P in zip(
        *(np.asarray(x).reshape(-1, 16) for x in (MAPS, share_of_entries(MAPS, 0.3),
                                                  share_of_mass(MAPS, 0.3))), strict=True
    ):  # fmt: skip
        order = sorted(range(16), key=lambda i: -map_P[i])
        assert set(np.flatnonzero(entries_P)) == set(order[:5])  # 4.8 of 16
        taken, held = [], 0.0
        while held < 0.3:
            taken.append(order[len(taken)])
            held += map_P[taken[-1]]
        assert set(np.flatnonzero(mass_P)) == set(taken)


def test_shares_at_their_ends():
    assert share_of_entries(MAPS, 1.0).all()
    assert share_of_entries(jnp.arange(10.0), 0.7).tolist() == [False] * 3 + [True] * 7
    assert (share_of_mass(MAPS, 1.0) | (MAPS < 1e-6)).all()
    assert not share_of_mass(jnp.zeros(4)).any()
    assert share_of_mass(jnp.ones(5)).tolist() == [True, True, True, False, False]
    assert share_of_entries(jnp.ones(5)).tolist() == [True, True, True, False, False]


def test_both_maps_give_the_same_share_of_entries_but_not_of_mass():
    W = jax.random.normal(jax.random.key(0), (4, 17, 3, 8))
    paper, code = (class_attention(W, definition=name) for name in ("paper", "official_code"))
    np.testing.assert_array_equal(share_of_entries(paper), share_of_entries(code))
    assert (share_of_mass(paper) != share_of_mass(code)).any()


def test_under_jit():
    same = jax.jit(share_of_mass, static_argnums=1)(MAPS, 0.6)
    np.testing.assert_array_equal(same, share_of_mass(MAPS, 0.6))


# A class in the left half, one in a corner, and a seam of void between them.
LABELS = np.array([[1, 1, 255, 7], [1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 0, 0]])


def test_scores_by_hand():
    left = np.zeros((4, 4), bool)
    left[:, :2] = True
    top = np.zeros((4, 4), bool)
    top[0] = True
    found = class_scores(np.stack([left, top]), LABELS)
    # left: 8 of 8; top: 1 of |S| + |A| − 1 = 1 + 3 − 1, for the pixel of void is in no mask.
    assert found == {1: 1.0, 7: pytest.approx(1 / 3)}
    assert class_scores(top[None], LABELS)[1] == pytest.approx(2 / 9)
    assert class_scores(top[None], np.zeros((4, 4), int)) == {}
    assert class_scores(np.zeros((1, 4, 4), bool), LABELS) == {1: 0.0, 7: 0.0}


def test_the_mean_is_of_images_and_not_of_classes():
    assert mean_iou([{1: 1.0}, {1: 0.0, 2: 0.5}]) == pytest.approx(0.625)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: class_attention(jnp.ones((1, 2, 1, 1)), definition="dino"), "^definition must be"),
        (lambda: share_of_entries(MAPS, 0.0), "^share must be above 0 and at most 1; got 0.0"),
        (lambda: share_of_mass(MAPS, 1.1), "^share must be above 0 and at most 1; got 1.1"),
        (lambda: class_scores(np.ones((1, 2, 2), bool), LABELS), "^masks must be of the labels'"),
        (lambda: mean_iou([{}, {}]), "^images must hold a class to fit; got none"),
    ],
)
def test_what_it_refuses(call, message):
    with pytest.raises(ValueError, match=message):
        call()

"""Shared principal components: against scikit-learn, and on scenes whose foreground is known."""

import numpy as np
import pytest
from sklearn.decomposition import PCA

from crate_jax.analysis.pca import foreground, principal_components

GRID = (6, 7)
RING = np.zeros(GRID, bool)
RING[1:5, 2:6] = True
RING[2:4, 3:5] = False  # a hole
DEFINITIONS = ["official_code", "paper"]


def scene(J=2, f=8, seed=0):
    rng = np.random.default_rng(seed)
    masks = np.stack([np.roll(RING, j, axis=1) for j in range(J)]).reshape(J, -1)
    objects = 4 * rng.normal(size=f) + rng.normal(size=(J, 42, f))
    return np.where(masks[..., None], objects, 0.2 * rng.normal(size=(J, 42, f))), masks


def test_components_are_scikit_learn_s():
    F = np.random.default_rng(0).normal(size=(50, 6)) * np.arange(1, 7)[None]
    pca = PCA(4).fit(F)
    scores, share = principal_components(F, 4)
    np.testing.assert_allclose(share, pca.explained_variance_ratio_, rtol=1e-6)
    np.testing.assert_allclose(np.abs(scores), np.abs(pca.transform(F)), atol=1e-8)
    flipped, _ = principal_components(-F, 4)
    np.testing.assert_allclose(flipped, -scores, atol=1e-8)  # the directions are the same


def test_a_direction_that_is_not_there_is_zero():
    F = np.outer(np.arange(5.0), [1, 2, 2])
    scores, share = principal_components(F, 3)
    np.testing.assert_allclose(scores[:, 0], [-6, -3, 0, 3, 6], atol=1e-9)
    np.testing.assert_allclose(share, [1, 0, 0], atol=1e-12)
    np.testing.assert_allclose(scores[:, 1:], 0, atol=1e-6)


@pytest.mark.parametrize("sign", [1, -1])
def test_the_code_s_foreground_has_its_holes_filled(sign):
    F, masks = scene()
    shown = foreground(sign * F, GRID)
    whole = masks.reshape(2, *GRID).copy()
    whole[0, 2:4, 3:5] = whole[1, 2:4, 4:6] = True
    np.testing.assert_array_equal(shown.masks_JxP, whole.reshape(2, -1))
    assert shown.scores_JxP.min() == 0 and shown.scores_JxP.max() == 1
    assert (shown.colours_JxPx3[~shown.masks_JxP] == 0).all()


@pytest.mark.parametrize("sign", [1, -1])
def test_the_paper_s_foreground_and_its_colours(sign):
    F, masks = scene()
    shown = foreground(sign * F, GRID, definition="paper")
    np.testing.assert_array_equal(shown.masks_JxP, masks)
    colours = shown.colours_JxPx3[masks]
    expected = PCA(3).fit_transform(F[masks])
    for c in range(3):
        assert abs(np.corrcoef(colours[:, c], expected[:, c])[0, 1]) > 1 - 1e-9
    np.testing.assert_allclose(colours.min(axis=0), 0)
    np.testing.assert_allclose(colours.max(axis=0), 1)
    assert (shown.colours_JxPx3[~masks] == 0).all()


def test_the_code_s_colours_are_the_next_components_of_all_patches():
    F, masks = scene()
    shown = foreground(F, GRID)
    scores = PCA(4).fit_transform(F.reshape(-1, 8)).reshape(2, 42, 4)
    for c in range(3):
        found = shown.colours_JxPx3[..., c][masks]
        assert abs(np.corrcoef(found, scores[..., c + 1][masks])[0, 1]) > 1 - 1e-9


@pytest.mark.parametrize("definition", DEFINITIONS)
def test_images_share_their_components(definition):
    F, masks = scene()
    F[1, ~masks[1]] = F[0, ~masks[0]]  # the same behind
    F[1, masks[1]] = -F[0, masks[0]]  # an object at the other end
    shown = foreground(F, GRID, definition=definition)
    assert not shown.masks_JxP[0, masks[0]].all() or not shown.masks_JxP[1, masks[1]].all()


@pytest.mark.parametrize("definition", DEFINITIONS)
def test_without_variance_there_is_no_foreground(definition):
    shown = foreground(np.ones((1, 42, 5)), GRID, definition=definition)
    assert not shown.masks_JxP.any() and not shown.colours_JxPx3.any()
    assert (shown.variance_4 == 0).all()


@pytest.mark.parametrize("definition", ["official_code", "paper"])
def test_rounding_is_no_variance(definition):
    """Neither that of a mean in float64, nor of features that float32 keeps."""
    last = np.full((3, 9, 5), 5, np.float32)
    last[0, 0, 0] = np.nextafter(last[0, 0, 0], np.float32(6))
    for features in (np.full((3, 9, 5), 0.1), last):
        shown = foreground(features, (3, 3), definition=definition)
        assert not shown.masks_JxP.any() and not shown.variance_4.any()


def test_colours_of_directions_that_are_not_there_are_black():
    """Two kinds of patches vary in one direction."""
    F_JxPxf = np.tile([0.0, 1.0, 0.0, 0.3], (2, 9, 1))
    F_JxPxf[:, 4] = [1.1, 0.0, 0.7, 2.3]
    shown = foreground(F_JxPxf, (3, 3))
    assert np.flatnonzero(shown.masks_JxP).tolist() == [4, 13]
    assert not shown.colours_JxPx3.any()
    np.testing.assert_allclose(shown.variance_4, [1, 0, 0, 0], atol=1e-12)


def test_the_share_of_the_variance():
    F, masks = scene()
    code, paper = (foreground(F, GRID, definition=name).variance_4 for name in DEFINITIONS)
    np.testing.assert_allclose(code, PCA(4).fit(F.reshape(-1, 8)).explained_variance_ratio_)
    np.testing.assert_allclose(paper[1:], PCA(3).fit(F[masks]).explained_variance_ratio_)
    assert paper[0] == code[0] > 0.5


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: foreground(np.ones((1, 42, 5)), GRID, definition="code"), "^definition must be "),
        (lambda: foreground(np.ones((1, 43, 5)), GRID), r"^features must be \(J, 42, f\) for a "),
        (lambda: foreground(np.ones((1, 42, 3)), GRID), "^features must have at least 4 values"),
        (lambda: foreground(np.full((1, 42, 5), np.inf), GRID), "^features must be finite; got"),
    ],
)
def test_what_it_refuses(call, message):
    with pytest.raises(ValueError, match=message):
        call()

"""Positions and patch projections of other sizes."""

import jax
import numpy as np
import pytest

from crate_jax.models.embedding import resize_patch_kernel, resize_positions

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("new", [(4, 6), (9, 5), (8, 12), (2, 3)])
def test_positions_are_those_of_pytorch(new):
    torch = pytest.importorskip("torch")
    positions = RNG.normal(size=(1 + 4 * 6, 5)).astype(np.float32)
    resized = np.asarray(resize_positions(positions, (4, 6), new))
    grid = torch.tensor(positions[1:].reshape(1, 4, 6, 5)).permute(0, 3, 1, 2)
    expected = torch.nn.functional.interpolate(
        grid, size=new, mode="bicubic", antialias=True, align_corners=False
    )
    expected = expected[0].permute(1, 2, 0).reshape(-1, 5).numpy()
    np.testing.assert_array_equal(resized[0], positions[0])
    np.testing.assert_allclose(resized[1:], expected, atol=2e-6)


def test_positions_of_the_same_grid_and_of_a_plane():
    positions = RNG.normal(size=(1 + 12, 3)).astype(np.float32)
    np.testing.assert_allclose(resize_positions(positions, (3, 4), (3, 4)), positions, atol=1e-6)
    flat = np.concatenate([positions[:1], np.full((12, 3), 2.5, np.float32)])
    resized = resize_positions(flat, (3, 4), (7, 2))
    np.testing.assert_allclose(resized[1:], np.full((14, 3), 2.5), rtol=1e-6)
    # Rows and columns are not mixed up: what varies along one axis alone goes on doing so.
    rows = np.repeat(np.arange(3.0, dtype=np.float32), 4)[:, None]
    resized = np.asarray(resize_positions(np.concatenate([[[9.0]], rows]), (3, 4), (6, 5)))
    grid = resized[1:, 0].reshape(6, 5)
    np.testing.assert_allclose(grid, np.repeat(grid[:, :1], 5, axis=1), atol=1e-6)
    assert (np.diff(grid[:, 0]) > 0).all()


@pytest.mark.parametrize("new", [(4, 6), (3, 5), (8, 9)])
def test_an_enlarged_patch_keeps_its_values(new):
    kernel = RNG.normal(size=(3, 5, 2, 7)).astype(np.float32)
    resized = resize_patch_kernel(kernel, (3, 5), new)
    assert resized.shape == (*new, 2, 7) and resized.dtype == np.float32
    patches = RNG.normal(size=(4, 3, 5, 2)).astype(np.float32)
    enlarged = np.asarray(jax.image.resize(patches, (4, *new, 2), "cubic"))
    expected = np.einsum("bhwc,hwcd->bd", patches, kernel)
    np.testing.assert_allclose(np.einsum("bhwc,hwcd->bd", enlarged, resized), expected, atol=2e-5)
    if new == (3, 5):
        np.testing.assert_allclose(resized, kernel, atol=1e-6)


def test_a_shrunk_patch_comes_as_near_as_it_can():
    kernel = RNG.normal(size=(6, 6, 1, 2)).astype(np.float32)
    resized = resize_patch_kernel(kernel, (6, 6), (3, 3))

    def error(candidate):
        """Mean square over white noise: the squared length of w - B^T w'."""
        pixels = np.eye(36, dtype=np.float32).reshape(36, 6, 6)
        shrunk = np.asarray(jax.image.resize(pixels, (36, 3, 3), "cubic")).reshape(36, 9)
        return np.square(kernel.reshape(36, 2) - shrunk @ candidate.reshape(9, 2)).sum()

    least = error(resized)
    for _ in range(20):
        nearby = resized + 0.05 * RNG.normal(size=resized.shape).astype(np.float32)
        assert error(nearby) > least

"""Both ways to resize patches and positions, by value; embeddings without a patch norm."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from weights import random_params

from crate_jax import Crate, load_weights, save_weights
from crate_jax.interop.fit import _fit_patches, fit_params, source_model
from crate_jax.interop.resize import resized_kernel, resized_positions
from crate_jax.models.embedding import (
    patchify,
    resize_patch_kernel,
    resize_positions,
    resize_positions_as_official_maps,
)

MODEL = Crate(16, 4, 5, width=12, depth=2, num_heads=2)
RNG = np.random.default_rng(5)


def test_positions_of_a_ramp_are_the_ramp_from_corner_to_corner():
    rows, columns = np.meshgrid(np.arange(3.0), np.arange(4.0), indexing="ij")
    grid = np.stack([10 * rows + columns, np.full((3, 4), 7.0)], axis=-1)
    pos = np.concatenate([[[100.0, 200.0]], grid.reshape(12, 2)]).astype(np.float32)
    new = resized_positions(pos, (3, 4), (5, 7), "crate_alpha")
    np.testing.assert_array_equal(new[0], [100, 200])
    ramp = 10 * np.linspace(0, 2, 5)[:, None] + np.linspace(0, 3, 7)
    np.testing.assert_allclose(new[1:, 0].reshape(5, 7), ramp, rtol=1e-6)
    np.testing.assert_array_equal(new[1:, 1], 7)
    assert new.dtype == np.float32


@pytest.mark.parametrize("new", [(5, 7), (2, 3), (1, 1), (4, 4)])
def test_positions_as_scipy_zooms_them(new):
    ndimage = pytest.importorskip("scipy.ndimage")
    pos = RNG.normal(size=(17, 6)).astype(np.float32)
    zoom = (new[0] / 4, new[1] / 4, 1)
    expected = ndimage.zoom(pos[1:].reshape(4, 4, 6), zoom, order=1)
    ours = resized_positions(pos, (4, 4), new, "crate_alpha")
    np.testing.assert_allclose(ours[1:].reshape(*new, 6), expected, atol=1e-6)
    right = resized_positions(pos, (4, 4), new, "right")
    np.testing.assert_array_equal(right, resize_positions(pos, (4, 4), new))


def test_a_kernel_as_an_image():
    kernel = RNG.normal(size=(4, 6, 3, 5)).astype(np.float32)
    expected = jax.image.resize(kernel, (8, 3, 3, 5), "bilinear")
    np.testing.assert_array_equal(resized_kernel(kernel, (8, 3), "crate_alpha"), expected)
    right = resized_kernel(kernel, (8, 3), "right")
    np.testing.assert_array_equal(right, resize_patch_kernel(kernel, (4, 6), (8, 3)))


def test_a_file_is_fitted_as_crate_alpha_does(tmp_path):
    params = random_params(MODEL)
    save_weights(tmp_path / "w.npz", params, MODEL, layout="official")
    model = MODEL.clone(image_size=(16, 20), patch_size=2)
    fit = ("patch_size", "image_size")
    fitted = load_weights(tmp_path / "w.npz", model, fit=fit, method="crate_alpha")
    direct, report = fit_params(params, MODEL, model, method="crate_alpha")
    assert report == [
        "embedding/projection: 4x4 pixels of 3 channels to 2x2 of 3, patch_norm folded in, "
        "bilinear",
        "embedding/pos_embedding: 4x4 to 8x10 patches, linear",
    ]
    jax.tree.map(np.testing.assert_array_equal, fitted, direct)
    norm, projection = params["embedding"]["patch_norm"], params["embedding"]["projection"]
    folded = (norm["scale"][:, None] * projection["kernel"]).reshape(4, 4, 3, 12)
    np.testing.assert_allclose(
        fitted["embedding"]["projection"]["kernel"],
        jax.image.resize(folded, (2, 2, 3, 12), "bilinear").reshape(12, 12),
        atol=1e-6,
    )
    with pytest.raises(
        ValueError, match="method must be one of right, crate_alpha, official_maps; got"
    ):
        fit_params(params, MODEL, model, method="best")


@pytest.mark.parametrize(("channels", "patch"), [(1, (4, 4)), (3, (8, 8)), (1, (8, 8))])
def test_a_convolution_has_no_norm_to_fold(channels, patch):
    kernel, bias = RNG.normal(size=(48, 12)).astype("f4"), RNG.normal(size=12).astype("f4")
    flat = {"embedding/projection/kernel": kernel, "embedding/projection/bias": bias}
    model = MODEL.clone(image_size=32, patch_size=patch, in_channels=channels)
    report = _fit_patches(flat, MODEL, model, "right")
    assert report == [
        f"embedding/projection: 4x4 pixels of 3 channels to {patch[0]}x{patch[0]} of {channels}"
    ]
    assert set(flat) == {"embedding/projection/kernel", "embedding/projection/bias"}
    np.testing.assert_array_equal(flat["embedding/projection/bias"], bias)
    grey = RNG.normal(size=(2, 4, 4, 1)).astype(np.float32)  # one patch an image
    large = jax.image.resize(grey, (2, *patch, 1), "cubic").repeat(channels, axis=3)
    ours = patchify(large, patch) @ flat["embedding/projection/kernel"]
    expected = patchify(jnp.asarray(grey.repeat(3, axis=3)), (4, 4)) @ kernel
    np.testing.assert_allclose(ours, expected, atol=2e-5)


def test_a_convolution_states_its_patch():
    """48 values could be 4 x 4 of 3 channels, the model's, but the file says 8 x 6 of 1."""
    found = {"pixels of a patch": 48, "positions": 10}
    declared = {"patch_size": (8, 6), "in_channels": 1}
    source = source_model(found, declared, MODEL, ("patch_size", "in_channels"))
    assert (source.patch_size, source.in_channels) == ((8, 6), 1)
    assert source.image_size == (24, 18)
    source = source_model(found, declared, MODEL, ("in_channels",))
    assert (source.patch_size, source.in_channels, source.image_size) == ((4, 4), 1, (16, 16))


@pytest.mark.parametrize(("old", "new"), [((4, 4), (7, 7)), ((3, 5), (4, 2)), ((2, 2), (2, 2))])
def test_positions_of_official_maps_are_pytorchs(old, new):
    """``interpolate`` with the factor (m + 0.1) / n, which is not m / n."""
    torch = pytest.importorskip("torch")
    pos = RNG.normal(size=(1 + old[0] * old[1], 6)).astype(np.float32)
    grid = torch.from_numpy(pos[1:].reshape(1, *old, 6)).permute(0, 3, 1, 2)
    factors = tuple((m + 0.1) / n for n, m in zip(old, new, strict=True))
    resized = torch.nn.functional.interpolate(grid, scale_factor=factors, mode="bicubic")
    expected = resized.permute(0, 2, 3, 1).reshape(-1, 6).numpy()
    compiled = jax.jit(resize_positions_as_official_maps, static_argnums=(1, 2))
    for resize in (resize_positions_as_official_maps, compiled):
        ours = resize(pos, old, new)
        np.testing.assert_array_equal(ours[0], pos[0])
        np.testing.assert_allclose(ours[1:], expected, atol=2e-6)
    half = resize_positions_as_official_maps(jnp.asarray(pos, jnp.bfloat16), old, new)
    assert half.dtype == jnp.bfloat16
    resized = resized_positions(pos, old, new, "official_maps")
    np.testing.assert_array_equal(resized, resize_positions_as_official_maps(pos, old, new))


def test_official_maps_leave_the_kernel_to_the_pseudo_inverse():
    kernel = RNG.normal(size=(4, 6, 3, 5)).astype(np.float32)
    ours = resized_kernel(kernel, (8, 3), "official_maps")
    np.testing.assert_array_equal(ours, resize_patch_kernel(kernel, (4, 6), (8, 3)))


def test_official_maps_need_positions_to_resize(tmp_path):
    save_weights(tmp_path / "w.npz", random_params(MODEL), MODEL)
    for fit, got in (((), "nothing"), (("head",), "head")):
        with pytest.raises(ValueError, match=f"^fit must have image_size for .*; got {got}\\. "):
            load_weights(tmp_path / "w.npz", MODEL, fit=fit, method="official_maps")

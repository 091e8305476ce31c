"""The convolutional stem: its BatchNorm against PyTorch's, its stages, and what does not fit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crate_jax import Crate, ToST
from crate_jax.models.stem import BatchNorm, Stem, stage_sizes, stage_widths

STATISTICS = ["batch_stats"]


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("rows", [1, 3])
def test_batch_norm_is_pytorchs(rows):
    """Two batches while training, then evaluation by what they left."""
    torch = pytest.importorskip("torch")
    theirs = torch.nn.BatchNorm2d(4)
    scale, bias = 1 + 0.3 * normal(0, 4), normal(1, 4)
    with torch.no_grad():
        theirs.weight.copy_(torch.from_numpy(scale))
        theirs.bias.copy_(torch.from_numpy(bias))
    params = {"scale": jnp.asarray(scale), "bias": jnp.asarray(bias)}
    variables = BatchNorm(False).init(jax.random.key(0), jnp.zeros((rows, 2, 3, 4)))
    variables = variables | {"params": params}
    for seed in (2, 3):
        X = 2 + 3 * normal(seed, rows, 2, 3, 4)
        got, updated = BatchNorm(True).apply(variables, X, mutable=STATISTICS)
        expected = theirs(torch.from_numpy(X.transpose(0, 3, 1, 2)))
        np.testing.assert_allclose(got, expected.detach().numpy().transpose(0, 2, 3, 1), atol=2e-5)
        variables = variables | updated
    statistics = variables["batch_stats"]
    np.testing.assert_allclose(statistics["mean"], theirs.running_mean, rtol=1e-5)
    np.testing.assert_allclose(statistics["var"], theirs.running_var, rtol=1e-5)
    X = normal(4, rows, 2, 3, 4)
    expected = theirs.eval()(torch.from_numpy(X.transpose(0, 3, 1, 2))).detach().numpy()
    got = BatchNorm(False).apply(variables, X)
    np.testing.assert_allclose(got, expected.transpose(0, 2, 3, 1), atol=2e-5)


def test_statistics_stay_where_nobody_may_change_them():
    X = normal(0, 3, 2, 2, 4)
    variables = BatchNorm(True).init(jax.random.key(0), X)
    np.testing.assert_array_equal(variables["batch_stats"]["mean"], 0)  # init moves none
    by_batch = BatchNorm(True).apply(variables, X)
    np.testing.assert_allclose(by_batch.mean(axis=(0, 1, 2)), np.zeros(4), atol=1e-6)
    _, updated = BatchNorm(False).apply(variables, X, mutable=STATISTICS)
    jax.tree.map(np.testing.assert_array_equal, updated["batch_stats"], variables["batch_stats"])


def test_half_precision_has_float32_statistics():
    X = jnp.asarray(5 + normal(0, 8, 4, 4, 2)).astype(jnp.bfloat16)
    norm = BatchNorm(True, jnp.bfloat16)
    variables = norm.init(jax.random.key(0), X)
    got, updated = norm.apply(variables, X, mutable=STATISTICS)
    assert got.dtype == jnp.bfloat16
    mean = updated["batch_stats"]["mean"]
    assert mean.dtype == jnp.float32
    exact = np.asarray(X.astype(jnp.float32), np.float64).mean(axis=(0, 1, 2))
    np.testing.assert_allclose(mean, 0.1 * exact, rtol=1e-6)


def test_stages_halve_the_sides_and_double_the_channels():
    assert stage_widths((16, 16), 192) == [24, 48, 96, 192]
    assert stage_widths((8, 8), 192) == [48, 96, 192]
    assert stage_widths((2, 2), 5) == [5]
    sizes = stage_sizes((32, 48, 3), (4, 4), 10)
    assert sizes == [(16 * 24 * 5, 16 * 24 * 5 * 27), (8 * 12 * 10, 8 * 12 * 10 * 45)]
    images = jnp.asarray(normal(0, 2, 16, 24, 3))
    stem = Stem((4, 4), 10, train=False)
    patches, variables = stem.init_with_output(jax.random.key(0), images)
    assert patches.shape == (2, 4 * 6, 10)
    stages = variables["params"]
    assert {name: tree["kernel"].shape for name, tree in stages.items()} == {
        "stage_0": (3, 3, 3, 5),
        "stage_1": (3, 3, 5, 10),
    }
    bound = 27**-0.5  # PyTorch's: uniform in one over the root of what goes in
    assert bound * 0.8 < np.abs(stages["stage_0"]["kernel"]).max() <= bound


def test_a_patch_sees_its_surroundings_alone():
    """Two stages of 3 x 3: a pixel at (8, 8) reaches the patches within three pixels of it."""
    images = jnp.zeros((1, 24, 24, 1))
    stem = Stem((4, 4), 6, train=False)
    variables = stem.init(jax.random.key(0), images)
    moved = stem.apply(variables, images.at[0, 8, 8].set(1.0))
    changed = np.abs(moved - stem.apply(variables, images)).max(axis=-1).reshape(6, 6) > 0
    assert set(zip(*np.nonzero(changed), strict=True)) == {(2, 2)}


SIZES = dict(num_classes=2, depth=1, num_heads=2)


@pytest.mark.parametrize("kind", [Crate, ToST])
@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (
            dict(image_size=12, patch_size=6, width=8),
            r"^model\.patch_size must be 2, 4, 8, 16, … for a convolutional stem; got 6x6\. Each",
        ),
        (
            dict(image_size=8, patch_size=(4, 2), width=8),
            r"^model\.patch_size must be 2, 4, 8, 16, … for a convolutional stem; got 4x2\. Each",
        ),
        (
            dict(image_size=8, patch_size=1, width=8),
            r"^model\.patch_size must be 2, 4, 8, 16, … for a convolutional stem; got 1x1\. Each",
        ),
        (
            dict(image_size=16, patch_size=8, width=6),
            r"^model\.width must be a multiple of 4 for the 3 stages of a .* stem; got 6\. Their",
        ),
        (
            dict(image_size=(16, 20), patch_size=8, width=8),
            r"^model\.image_size must be a multiple of model\.patch_size; got 16x20 and 8x8\.",
        ),
    ],
)
def test_sizes_that_do_not_fit(kind, sizes, message):
    model = kind(**SIZES, **sizes, **({"stem": "convolutions"} if kind is Crate else {}))
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(
            lambda key: model.init(key, model.sample_input(), train=False), jax.random.key(0)
        )

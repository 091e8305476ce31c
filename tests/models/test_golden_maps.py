"""The published attention maps: positions, attention and keys as the official notebook has them.

The case is told in tests/golden/README.md.
"""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from crate_jax import Crate, analysis, load_weights
from crate_jax.interop.fit import fit_params
from crate_jax.models.embedding import resize_positions_as_official_maps

pytest.importorskip("torch")  # the weights are a PyTorch file

GOLDEN = Path(__file__).parent.parent / "golden"
CONFIG = json.loads((GOLDEN / "crate_maps.json").read_text())
MODEL = Crate(
    image_size=CONFIG["image_size"],
    patch_size=CONFIG["patch_size"],
    num_classes=CONFIG["num_classes"],
    width=CONFIG["dim"],
    depth=CONFIG["depth"],
    num_heads=CONFIG["heads"],
    head_dim=CONFIG["dim_head"],
    pool=CONFIG["pool"],
    eta=CONFIG["ista"],
)
SIZES = {"square": CONFIG["square"], "native": CONFIG["image_size"], "rect": tuple(CONFIG["rect"])}


def relative(a, b) -> float:
    """Largest difference, as a share of the largest expected value."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert a.shape == b.shape
    return float(np.abs(a - b).max() / np.abs(b).max())


@pytest.fixture(scope="module")
def expected():
    with np.load(GOLDEN / "crate_maps.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def loaded():
    """The weights at each size, by the official positions."""
    path = GOLDEN / CONFIG["weights"]
    options = dict(fit=("image_size",), method="official_maps")
    return {
        name: load_weights(path, MODEL.clone(image_size=size), **options)
        for name, size in SIZES.items()
    }


@pytest.mark.parametrize("name", ["square", "native"])
def test_positions(name, loaded, expected):
    positions = loaded[name]["embedding"]["pos_embedding"]
    assert relative(positions, expected[f"{name}/pos_embedding"][0]) <= 1e-5


def test_positions_of_an_oblong_grid_are_the_official_ones_laid_by_rows(loaded, expected):
    """Officially they are made for (columns, rows), and read as (rows, columns)."""
    trained = load_weights(GOLDEN / CONFIG["weights"], MODEL)["embedding"]["pos_embedding"]
    theirs = expected["rect/pos_embedding"][0]
    assert relative(resize_positions_as_official_maps(trained, (4, 4), (8, 6)), theirs) <= 1e-5
    # Of a grid turned over, which the official code turns over once more.
    turned = np.concatenate(
        [trained[:1], trained[1:].reshape(4, 4, -1).swapaxes(0, 1).reshape(16, -1)]
    )
    again = resize_positions_as_official_maps(turned, (4, 4), (8, 6))[1:]
    by_rows = np.asarray(again).reshape(8, 6, -1).swapaxes(0, 1).reshape(48, -1)
    assert relative(loaded["rect"]["embedding"]["pos_embedding"][1:], by_rows) <= 1e-6


@pytest.mark.parametrize("name", SIZES)
def test_attention_and_keys(name, loaded, expected):
    params = loaded[name]
    if name == "rect":  # the official positions, which are not those of the tokens
        positions = expected["rect/pos_embedding"][0]
        params = params | {"embedding": params["embedding"] | {"pos_embedding": positions}}
    images = expected[f"{name}/images_nchw"].transpose(0, 2, 3, 1)
    model = MODEL.clone(image_size=SIZES[name])
    run = jax.jit(lambda p, x: analysis.taps(model, p, x, names=("attention", "subspace_tokens")))
    _, seen = run(params, images)
    for layer in (0, 2):
        official = expected[f"{name}/layer{layer:02d}/attention"]
        assert relative(seen["attention"][layer], official) <= 1e-5
    keys = seen["subspace_tokens"][-1][:, 1:]
    assert (
        relative(keys.reshape(1, *keys.shape[:2], -1)[0][None], expected[f"{name}/key_last"])
        <= 1e-5
    )


@pytest.mark.parametrize("name", ["square", "native"])
def test_taps_of_the_trained_weights_at_any_size(name, expected):
    """As a user asks for them: the weights as they are, images of a size, and whose positions."""
    trained = load_weights(GOLDEN / CONFIG["weights"], MODEL)
    images = expected[f"{name}/images_nchw"].transpose(0, 2, 3, 1)
    seen = {
        positions: analysis.taps(MODEL, trained, images, "attention", positions=positions)[1]
        for positions in ("official_maps", "right")
    }
    official = expected[f"{name}/layer02/attention"]
    assert relative(seen["official_maps"]["attention"][2], official) <= 1e-5
    assert relative(seen["right"]["attention"][2], official) > 1e-4


def test_ours_are_other_positions(loaded, expected):
    """At the trained size ours are the weights' own; the official ones are resampled."""
    trained = load_weights(GOLDEN / CONFIG["weights"], MODEL, fit=("image_size",))
    assert (
        relative(
            loaded["native"]["embedding"]["pos_embedding"], trained["embedding"]["pos_embedding"]
        )
        > 1e-2
    )


def test_parameters_without_a_file(loaded):
    trained = load_weights(GOLDEN / CONFIG["weights"], MODEL)
    model = MODEL.clone(image_size=64)
    params, report = fit_params(trained, MODEL, model, method="official_maps")
    assert report == ["embedding/pos_embedding: 4x4 to 8x8 patches, as official maps"]
    jax.tree.map(np.testing.assert_array_equal, params, loaded["square"])

"""The operators that other papers put into CRATE's frame: CBSA and TSSA, and no nonlinearity."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crate_jax import Crate, analysis, create_model, list_models, load_weights, save_weights
from crate_jax.models.cost import abstract_parameters, abstract_variables, count_parameters

# (d, L, K) and the parameters at 224 pixels with 1000 classes, arXiv 2509.16875.
CBSA = {
    "cbsa_tiny_patch16_224": (192, 12, 3, 1_789_192),
    "cbsa_small_patch16_224": (384, 12, 6, 6_667_048),
    "cbsa_base_patch16_224": (768, 12, 12, 25_691_752),
    "cbsa_large_patch16_224": (1024, 24, 16, 83_051_368),
}
SIZES = dict(image_size=16, patch_size=4, num_classes=5, width=12, depth=3, num_heads=2)
STEMS = ["patches", "convolutions"]


def filled(shapes):
    """Numbers off their start; positive where they are variances."""
    rng = np.random.default_rng(1)

    def fill(path, leaf):
        values = 0.3 * rng.normal(size=leaf.shape)
        return jnp.asarray(1 + np.abs(values) if path[-1].key == "var" else values, leaf.dtype)

    return jax.tree.map_with_path(fill, shapes)


@pytest.fixture(scope="module")
def images():
    return jax.random.normal(jax.random.key(2), (3, 16, 16, 3))


def test_every_cbsa_is_in_the_table():
    assert set(list_models("cbsa_*")) == set(CBSA)


@pytest.mark.parametrize("name", CBSA)
def test_parameter_count(name):
    d, L, K, count = CBSA[name]
    channels = [3, d // 8, d // 4, d // 2, d]
    stem = sum(9 * a * b + 2 * b for a, b in itertools.pairwise(channels))
    layer = 3 * d * d + 5 * d + 2 * K  # U, W_out, D; b_out, two norms; both steps
    assert count == stem + L * layer + d + 197 * d + 2 * d + 1000 * (d + 1)
    assert count_parameters(create_model(name)) == count


@pytest.mark.parametrize("stem", STEMS)
@pytest.mark.parametrize("attention", ["mssa", "tssa", "cbsa"])
def test_one_field_swaps_the_attention(attention, stem, images):
    """The trees differ in what is the attention's own, and each runs by itself."""
    model = Crate(**SIZES, attention=attention, stem=stem, representatives=2)
    variables = filled(abstract_variables(model))
    assert set(variables) == {"params"} | ({"batch_stats"} if stem == "convolutions" else set())
    assert set(variables["params"]["blocks"]) == {
        *(attention, f"{attention}_norm", "ista", "ista_norm")
    }
    logits, seen = jax.jit(lambda v, x: analysis.taps(model, v, x, (attention, "ista")))(
        variables, images
    )
    assert np.isfinite(logits).all() and np.ptp(logits) > 0
    assert seen[attention].shape == (3, 3, 17, 12)
    assert seen["ista"].min() == 0


def test_a_layer_without_nonlinearity_is_the_papers(images):
    """Z ← Z + MSSA(LN(Z)), written out in double precision, and 2 d² weights a layer."""
    model = Crate(**SIZES, nonlinearity="none")
    params = filled(abstract_parameters(model))
    assert model.tap_names == ("subspace_tokens", "attention", "mssa", "out")
    d = SIZES["width"]
    of_layer = sum(leaf.size for leaf in jax.tree.leaves(params["blocks"])) / SIZES["depth"]
    assert of_layer == 2 * d * d + 3 * d  # U and W_out; b_out and one norm
    _, seen = jax.jit(lambda p, x: analysis.taps(model, p, x, ("mssa", "out")))(params, images)
    Z = np.asarray(seen["out"][0] - seen["mssa"][0], np.float64)
    for i in range(SIZES["depth"]):
        layer = jax.tree.map(lambda leaf, i=i: np.asarray(leaf[i], np.float64), params["blocks"])
        deviation = np.sqrt(Z.var(axis=-1, keepdims=True) + 1e-5)
        Y = (Z - Z.mean(axis=-1, keepdims=True)) / deviation
        Y = Y * layer["mssa_norm"]["scale"] + layer["mssa_norm"]["bias"]
        V = np.einsum("bnd,dkp->bknp", Y, layer["mssa"]["U"])
        S = np.exp(V @ V.swapaxes(-1, -2) / np.sqrt(V.shape[-1]))
        O = S / S.sum(axis=-1, keepdims=True) @ V  # noqa: E741
        Z = Z + np.einsum("bknp,kpd->bnd", O, layer["mssa"]["W_out"]) + layer["mssa"]["b_out"]
        np.testing.assert_allclose(seen["out"][i], Z, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("suffix", ["pth", "npz"])
def test_official_names_are_not_for_layers_without_nonlinearity(suffix, tmp_path):
    model = Crate(**SIZES, nonlinearity="none")
    params, path = filled(abstract_parameters(model)), tmp_path / f"w.{suffix}"
    layout = None if suffix == "pth" else "official"
    with pytest.raises(ValueError, match=r"^model\.nonlinearity must be ista for weights with"):
        save_weights(path, params, model, layout=layout)
    assert not path.exists()


def test_our_files_state_the_operators(tmp_path):
    fields = dict(attention="tssa", nonlinearity="none", representatives=(2, 4))
    model = create_model("crate_tiny_patch16_224", **SIZES, **fields)
    params = filled(abstract_parameters(model))
    save_weights(tmp_path / "w.safetensors", params, model)
    jax.tree.map(
        np.testing.assert_array_equal, load_weights(tmp_path / "w.safetensors", model), params
    )
    message = r"they have representatives \[2, 4\] where the model has \[4, 4\]"
    with pytest.raises(ValueError, match=message):
        load_weights(tmp_path / "w.safetensors", model.clone(representatives=4))

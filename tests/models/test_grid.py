"""{MSSA, MHSA} x {ISTA, MLP} in one block: operators, residuals, counts, files, two steps each."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from crate_jax import Crate, ViT, analysis, create_model, list_models, load_weights, save_weights
from crate_jax.interop.load import load_fitted
from crate_jax.interop.tree import tree_of
from crate_jax.models.cost import abstract_parameters, count_parameters
from crate_jax.models.zoo import architecture, from_architecture
from crate_jax.tasks import Classify
from crate_jax.training.state import init_state
from crate_jax.training.step import make_train_step

# The models of arXiv 2308.16271, section 4.3, and the operators of each.
GRID = {
    "crate_small_384_patch8_224": ("mssa", "ista"),
    "crate_mlp_small_384_patch8_224": ("mssa", "mlp"),
    "crate_mhsa_small_384_patch8_224": ("mhsa", "ista"),
    "crate_mhsa_mlp_small_384_patch8_224": ("mhsa", "mlp"),
}
ADDS = {"ista": False, "mlp": True}  # whether the second half keeps its tokens
TINY = dict(image_size=16, patch_size=8, num_classes=5, width=12, depth=2, num_heads=2)


def test_the_table_names_all_four():
    assert set(list_models("crate_*small_384_patch8_224")) == set(GRID)
    assert set(list_models("crate_m[hl]*")) == set(GRID) - {"crate_small_384_patch8_224"}


@pytest.mark.parametrize("name", GRID)
def test_parameter_count(name):
    """At 224 pixels with 1000 classes, written out."""
    attention, nonlinearity = GRID[name]
    d, m, pixels, tokens = 384, 4 * 384, 3 * 8**2, 28 * 28 + 1
    embedding = 2 * pixels + (pixels * d + d) + 2 * d + d + tokens * d
    maps = {"mssa": 1, "mhsa": 3}[attention]
    first = maps * d * d + (d * d + d)  # no bias on the maps; W_out has one
    second = {"ista": d * d, "mlp": (d * m + m) + (m * d + d)}[nonlinearity]
    head = 2 * d + d * 1000 + 1000
    expected = embedding + 12 * (2 * d + first + 2 * d + second) + head
    assert count_parameters(create_model(name)) == expected


@pytest.fixture(scope="module", params=GRID)
def named(request):
    """A tiny form of each, and parameters that are off their start."""
    model = create_model(request.param, **TINY)
    rng = np.random.default_rng(1)

    def fill(path, leaf):
        return jnp.asarray(
            0.3 * rng.normal(size=leaf.shape) + (path[-1].key == "scale"), leaf.dtype
        )

    return request.param, model, jax.tree.map_with_path(fill, abstract_parameters(model))


@pytest.fixture(scope="module")
def images():
    return jax.random.normal(jax.random.key(2), (4, 16, 16, 3))


def test_operators_residuals_and_taps(named, images):
    name, model, params = named
    attention, nonlinearity = GRID[name]
    assert type(model) is Crate
    assert set(params["blocks"]) == {
        *(attention, nonlinearity),
        *(f"{attention}_norm", f"{nonlinearity}_norm"),
    }
    subspaces = ("subspace_tokens",) * (attention == "mssa")
    assert model.tap_names == (*subspaces, "attention", attention, "z_half", nonlinearity, "out")
    _, seen = jax.jit(lambda p, x: analysis.taps(model, p, x))(params, images)
    kept = seen["z_half"] if ADDS[nonlinearity] else 0 * seen["z_half"]
    np.testing.assert_allclose(kept + seen[nonlinearity], seen["out"], atol=1e-5)
    np.testing.assert_allclose(
        seen["out"][0] + seen[attention][1], seen["z_half"][1], atol=1e-5
    )  # the first half always keeps them


def test_two_steps_of_training(named, images):
    _, model, _ = named
    task, tx = Classify(model, label_smoothing=0.1), optax.adam(1e-2)
    state = jax.jit(lambda key: init_state(task, tx, key))(jax.random.key(0))
    step = jax.jit(make_train_step(task, tx))
    batch = {"image": images, "label": jnp.arange(4, dtype=jnp.int32)}
    before, losses = state.params, []
    for _ in range(2):
        state, metrics = step(state, batch, jax.random.key(1))
        losses.append(float(metrics["loss"]))
    assert losses[1] < losses[0]
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), before, state.params)
    assert min(jax.tree.leaves(moved)) > 0


def test_a_file_states_the_operators(named, tmp_path):
    name, model, params = named
    stated = architecture(model)
    assert (stated["attention"], stated["nonlinearity"]) == GRID[name]
    assert architecture(from_architecture(stated)) == stated
    path = tmp_path / "model.safetensors"
    save_weights(path, params, model)
    loaded = load_fitted(path, None)  # the file says which of the four it is
    assert architecture(loaded.model) == stated
    jax.tree.map(np.testing.assert_array_equal, loaded.params, jax.tree.map(np.asarray, params))
    save_weights(tmp_path / "model.npz", params, model)
    again = load_weights(tmp_path / "model.npz", model)
    jax.tree.map(np.testing.assert_array_equal, again, loaded.params)


def test_weights_of_one_are_not_weights_of_another(named, tmp_path):
    name, model, params = named
    save_weights(tmp_path / "model.npz", params, model)
    for other, (attention, nonlinearity) in GRID.items():
        if other != name:
            with pytest.raises(ValueError, match="must hold the parameters of the model and noth"):
                load_weights(
                    tmp_path / "model.npz",
                    Crate(**TINY, attention=attention, nonlinearity=nonlinearity),
                )


def test_mhsa_with_an_mlp_is_a_vit_but_for_embedding_biases_and_norms():
    """The grid changes the layer alone: what is around it stays CRATE's."""
    corner = Crate(**TINY, attention="mhsa", nonlinearity="mlp")
    vit = ViT(**TINY)
    ours, theirs = (set(tree_of(model).shapes) for model in (corner, vit))
    assert theirs - ours == {"blocks/mhsa/b_qkv"}
    assert {path.split("/")[1] for path in ours - theirs} == {"patch_norm", "token_norm"}

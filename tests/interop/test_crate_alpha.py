"""What users hold of CRATE-α: the released kinds of files, small and made here."""

import jax.numpy as jnp
import numpy as np
import pytest
from weights import assert_equal_trees, random_params

from crate_jax import CrateAlpha, load_weights, save_weights
from crate_jax.interop import load_fitted, to_state_dict
from crate_jax.models.embedding import resize_patch_kernel, resize_positions

MODEL = CrateAlpha(16, 8, 5, width=8, depth=2, num_heads=2)
FINER = MODEL.clone(patch_size=4)


@pytest.fixture(scope="module")
def params():
    return random_params(MODEL)


def test_a_training_file_of_the_official_code(params, tmp_path):
    """Parameters, some of them bfloat16, which NumPy reads as bytes, and the optimizer beside."""
    state = to_state_dict(params, MODEL, layout="jax")
    arrays = {f"params/{name}": array for name, array in state.items()}
    short = "params/Transformer/encoderblock_1/OvercompleteISTABlock_0/D1"
    arrays[short] = arrays[short].astype(jnp.bfloat16)
    arrays |= {f"opt/0/mu/{name}": array.astype(jnp.bfloat16) for name, array in state.items()}
    arrays |= {"opt/0/count": np.int32(7), "chrono/accum_train_time": np.float64(1.5)}
    np.savez(tmp_path / "w.npz", **arrays)
    with np.load(tmp_path / "w.npz") as file:
        assert file[short].dtype.kind == "V"
    loaded = load_fitted(tmp_path / "w.npz", MODEL)
    entries = len(state) + 1
    assert loaded.report == [f"left aside opt ({entries}), chrono (1): the state of a training run"]
    D1 = loaded.params["blocks"]["odl"]["D1"]
    np.testing.assert_array_equal(D1[1], np.asarray(arrays[short], np.float32))
    np.testing.assert_array_equal(D1[0], params["blocks"]["odl"]["D1"][0])
    assert_equal_trees(loaded.params["head"], params["head"])


def test_a_pytorch_file_without_extension(params, tmp_path):
    torch = pytest.importorskip("torch")
    state = {name: torch.tensor(array) for name, array in to_state_dict(params, MODEL).items()}
    torch.save(state, tmp_path / "crate_alpha_B16_IN21K")
    assert_equal_trees(load_weights(tmp_path / "crate_alpha_B16_IN21K", MODEL), params)


@pytest.mark.parametrize("layout", ["torch", "jax", "clipa"])
@pytest.mark.parametrize("method", ["right", "crate_alpha"])
def test_patches_of_another_size(params, tmp_path, layout, method):
    """As weights of L/32 start a model of L/14."""
    if layout == "clipa":
        params = without_biases(params)
    save_weights(tmp_path / "w.npz", params, MODEL, layout=layout)
    fitted = load_fitted(tmp_path / "w.npz", FINER, fit=("patch_size", "image_size"), method=method)
    by, positions = ("", "bicubic") if method == "right" else (", bilinear", "linear")
    assert fitted.report == [
        f"embedding/projection: 8x8 pixels of 3 channels to 4x4 of 3{by}",
        f"embedding/pos_embedding: 2x2 to 4x4 patches, {positions}",
    ]
    embedding, before = fitted.params["embedding"], params["embedding"]
    kernel = embedding["projection"]["kernel"].reshape(4, 4, 3, 8)
    was = before["projection"]["kernel"].reshape(8, 8, 3, 8)
    grid, corners = embedding["pos_embedding"][1:].reshape(4, 4, 8), before["pos_embedding"][1:]
    if method == "right":
        np.testing.assert_allclose(kernel, resize_patch_kernel(was, (8, 8), (4, 4)), atol=1e-6)
        same = resize_positions(before["pos_embedding"], (2, 2), (4, 4))
        np.testing.assert_array_equal(embedding["pos_embedding"], same)
    else:
        # Antialiased by a triangle twice as wide: 1, 3, 3, 1 in 8, and at the edge 3, 3, 1 in 7.
        weights = np.array([[3, 3, 1, 0, 0, 0, 0, 0], [0, 1, 3, 3, 1, 0, 0, 0]], np.float64)
        weights = np.concatenate([weights, weights[::-1, ::-1]])
        weights /= weights.sum(axis=1, keepdims=True)
        expected = np.einsum("ih,jw,hwcd->ijcd", weights, weights, was)
        np.testing.assert_allclose(kernel, expected, atol=1e-6)
        np.testing.assert_allclose(grid[[0, 0, -1, -1], [0, -1, 0, -1]], corners, atol=1e-6)
        np.testing.assert_allclose(grid[0, 1], (2 * corners[0] + corners[1]) / 3, atol=1e-6)
    np.testing.assert_array_equal(embedding["pos_embedding"][0], before["pos_embedding"][0])
    assert_equal_trees(fitted.params["blocks"], params["blocks"])


def without_biases(params):
    """A CLIPA tower has none in its embedding and none in its projection."""
    embedding, head = params["embedding"], params["head"]
    projection = embedding["projection"]
    return params | {
        "embedding": embedding
        | {"projection": projection | {"bias": np.zeros_like(projection["bias"])}},
        "head": head | {"bias": np.zeros_like(head["bias"])},
    }


def clipa_state(params, model):
    """A CLIPA file: the visual tower, its bases stored three times, and the text tower."""
    (d, K, p), m = params["blocks"]["mssa"]["U"].shape[1:], model.overcompleteness * model.width
    rng = np.random.default_rng(4)
    projection = params["embedding"]["projection"]["kernel"]
    state = {
        "visual.class_embedding": params["embedding"]["cls_token"],
        "visual.positional_embedding": params["embedding"]["pos_embedding"],
        "visual.conv1.weight": projection.reshape(8, 8, 3, d).transpose(3, 2, 0, 1),
        "visual.ln_post.weight": params["head_norm"]["scale"],
        "visual.ln_post.bias": params["head_norm"]["bias"],
        "visual.proj": params["head"]["kernel"],
        "token_embedding.weight": rng.normal(size=(32, d)),
        "positional_embedding": rng.normal(size=(4, d)),
        "transformer.resblocks.0.ln_1.weight": rng.normal(size=d),
        "transformer.resblocks.0.mlp.c_fc.weight": rng.normal(size=(m, d)),
        "ln_final.weight": rng.normal(size=d),
        "text_projection": rng.normal(size=(d, 5)),
        "logit_scale": np.float32(4.6),
    }
    blocks = params["blocks"]
    for i in range(model.depth):
        name = f"visual.transformer.resblocks.{i}"
        state |= {
            f"{name}.ln_1.weight": blocks["mssa_norm"]["scale"][i],
            f"{name}.ln_1.bias": blocks["mssa_norm"]["bias"][i],
            f"{name}.ln_2.weight": blocks["odl_norm"]["scale"][i],
            f"{name}.ln_2.bias": blocks["odl_norm"]["bias"][i],
            f"{name}.attn.in_proj_weight": np.tile(
                blocks["mssa"]["U"][i].reshape(d, K * p).T, (3, 1)
            ),
            f"{name}.attn.out_proj.weight": blocks["mssa"]["W_out"][i].reshape(K * p, d).T,
            f"{name}.mlp.c_fc": blocks["odl"]["D"][i],
            f"{name}.mlp.c_proj": blocks["odl"]["D1"][i],
        }
    return {key: np.asarray(value, np.float32) for key, value in state.items()}


TEXT = "left aside token_embedding (1), positional_embedding (1), transformer (2), ln_final (1)"


def test_a_clipa_tower_is_an_image_model(params, tmp_path):
    torch = pytest.importorskip("torch")
    state = clipa_state(params, MODEL)
    torch.save({name: torch.tensor(array) for name, array in state.items()}, tmp_path / "clipa")
    loaded = load_fitted(tmp_path / "clipa", MODEL)
    assert_equal_trees(loaded.params, without_biases(params))
    assert loaded.report == [f"{TEXT}, text_projection (1), logit_scale (1)"]
    logits = MODEL.apply({"params": loaded.params}, jnp.zeros((1, 16, 16, 3)), train=False)
    assert logits.shape == (1, 5)  # the embedding of the image, in the space of the texts


def test_a_clipa_tower_with_a_new_head(params, tmp_path):
    np.savez(tmp_path / "clipa.npz", **clipa_state(params, MODEL))
    loaded = load_fitted(tmp_path / "clipa.npz", MODEL.clone(num_classes=3), fit=("head",))
    assert loaded.params["head"]["kernel"].shape == (8, 3)
    assert loaded.report[1:] == ["head: new, for 3 classes"]
    assert_equal_trees(loaded.params["blocks"], params["blocks"])

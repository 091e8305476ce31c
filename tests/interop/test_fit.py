"""Weights of one model in another: each kind of fit by what it computes, and its report."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from weights import assert_equal_trees, random_params, random_state

from crate_jax import Crate, ViT, load_weights, save_weights
from crate_jax.interop import load_fitted
from crate_jax.interop.fit import fit_params
from crate_jax.models.embedding import resize_positions

MODEL = Crate(16, 4, 5, width=12, depth=2, num_heads=2)
RNG = np.random.default_rng(3)


@pytest.fixture(scope="module")
def params():
    """Small enough that no softmax saturates; norms and biases that would show if left out."""
    return jax.tree.map(lambda x: 0.4 * x, random_params(MODEL))


@pytest.fixture
def official(tmp_path, params):
    """A file of official names, which states nothing of its model."""
    from crate_jax.interop import to_state_dict

    np.savez(tmp_path / "official.npz", **to_state_dict(params, MODEL))
    return tmp_path / "official.npz"


@pytest.fixture
def stated(tmp_path, params):
    save_weights(tmp_path / "stated.safetensors", params, MODEL)
    return tmp_path / "stated.safetensors"


def logits(model, params, images):
    return np.asarray(model.apply({"params": params}, images, train=False))


def differing(a, b):
    """Paths of the leaves that are not the same to the bit."""
    same = jax.tree.map(lambda x, y: x.shape == y.shape and bool((x == y).all()), a, b)
    leaves = jax.tree.leaves_with_path(same)
    return {jax.tree_util.keystr(p, simple=True, separator="/") for p, equal in leaves if not equal}


@pytest.mark.parametrize("file", ["official", "stated"])
def test_a_grey_image_keeps_its_logits_in_one_channel(file, params, request):
    model = MODEL.clone(in_channels=1)
    loaded = load_fitted(request.getfixturevalue(file), model, fit=("in_channels",))
    grey = RNG.normal(size=(3, 16, 16, 1)).astype(np.float32)
    expected = logits(MODEL, params, np.repeat(grey, 3, axis=3))
    np.testing.assert_allclose(logits(model, loaded.params, grey), expected, atol=2e-5)
    assert loaded.report == [
        "embedding/projection: 4x4 pixels of 3 channels to 4x4 of 1, patch_norm folded in"
    ]


@pytest.mark.parametrize("channels", [3, 4])
def test_a_grey_image_keeps_its_logits_in_more_channels(params, channels):
    one = fit_params(params, MODEL, MODEL.clone(in_channels=1))[0]
    more = fit_params(one, MODEL.clone(in_channels=1), MODEL.clone(in_channels=channels))[0]
    grey = RNG.normal(size=(2, 16, 16, 1)).astype(np.float32)
    np.testing.assert_allclose(
        logits(MODEL.clone(in_channels=channels), more, np.repeat(grey, channels, axis=3)),
        logits(MODEL.clone(in_channels=1), one, grey),
        atol=2e-5,
    )


@pytest.mark.parametrize("file", ["official", "stated"])
def test_an_enlarged_image_keeps_its_logits_with_larger_patches(file, params, request):
    model = MODEL.clone(image_size=32, patch_size=8)
    loaded = load_fitted(request.getfixturevalue(file), model, fit=("patch_size", "image_size"))
    # Patches enlarged one by one, as the fit has it. LayerNorm sees almost the same statistics
    # when the content is smooth, and so are these.
    smooth = jax.image.resize(
        RNG.normal(size=(2, 4, 4, 3)).astype(np.float32), (2, 16, 16, 3), "cubic"
    )
    patches = jnp.reshape(smooth, (2, 4, 4, 4, 4, 3)).transpose(0, 1, 3, 2, 4, 5)
    large = jax.image.resize(patches, (2, 4, 4, 8, 8, 3), "cubic")
    large = large.transpose(0, 1, 3, 2, 4, 5).reshape(2, 32, 32, 3)
    ours, expected = logits(model, loaded.params, large), logits(MODEL, params, smooth)
    between_images = np.abs(expected[0] - expected[1]).max()
    assert np.abs(ours - expected).max() < 0.03 * between_images
    assert loaded.report == [
        "embedding/projection: 4x4 pixels of 3 channels to 8x8 of 3, patch_norm folded in"
    ]


@pytest.mark.parametrize("file", ["official", "stated"])
@pytest.mark.parametrize("size", [(24, 24), (8, 20)])
def test_another_image_size_moves_the_positions_alone(file, size, params, request):
    model = MODEL.clone(image_size=size)
    path = request.getfixturevalue(file)
    loaded = load_fitted(path, model, fit=("image_size",))
    assert differing(loaded.params, params) == {"embedding/pos_embedding"}
    grid = (size[0] // 4, size[1] // 4)
    np.testing.assert_array_equal(
        loaded.params["embedding"]["pos_embedding"],
        resize_positions(params["embedding"]["pos_embedding"], (4, 4), grid),
    )
    assert loaded.report == [
        f"embedding/pos_embedding: 4x4 to {grid[0]}x{grid[1]} patches, bicubic"
    ]


def test_the_grid_of_oblong_images(tmp_path, params):
    """Ours state it; of official weights it is square, or else of the model's proportions."""
    oblong = MODEL.clone(image_size=(8, 32))
    weights = fit_params(params, MODEL, oblong)[0]
    save_weights(tmp_path / "w.safetensors", weights, oblong)
    loaded = load_fitted(tmp_path / "w.safetensors", MODEL, fit=("image_size",))
    assert loaded.report == ["embedding/pos_embedding: 2x8 to 4x4 patches, bicubic"]
    from crate_jax.interop import to_state_dict

    six = MODEL.clone(image_size=(8, 12))
    np.savez(tmp_path / "w.npz", **to_state_dict(fit_params(params, MODEL, six)[0], six))
    loaded = load_fitted(tmp_path / "w.npz", MODEL.clone(image_size=(16, 24)), fit=("image_size",))
    assert loaded.report == ["embedding/pos_embedding: 2x3 to 4x6 patches, bicubic"]
    with pytest.raises(ValueError, match="positions 7 where the model has 17"):
        load_weights(tmp_path / "w.npz", MODEL, fit=("image_size",))


@pytest.mark.parametrize("file", ["official", "stated"])
def test_a_new_head(file, params, request):
    model, key = MODEL.clone(num_classes=9), jax.random.key(7)
    loaded = load_fitted(request.getfixturevalue(file), model, fit=("head",), key=key)
    assert differing(loaded.params["embedding"], params["embedding"]) == set()
    assert differing(loaded.params["blocks"], params["blocks"]) == set()
    assert_equal_trees(loaded.params["head_norm"], params["head_norm"])
    fresh = model.init(key, jnp.zeros((1, 16, 16, 3)), train=False)["params"]["head"]
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), loaded.params["head"], fresh
    )
    assert loaded.report == ["head: new, for 9 classes"]
    # The same number of classes is no reason to keep the old one.
    again = load_fitted(request.getfixturevalue(file), MODEL, fit=("head",))
    assert {"kernel", "bias"} == differing(again.params["head"], params["head"])


def test_a_head_of_two_layers(tmp_path):
    """As the released 8-pixel demonstration has it; only its norm is read."""
    state = random_state(MODEL)
    state["mlp_head.1.weight"], state["mlp_head.1.bias"] = np.ones((12, 12)), np.ones(12)
    state["mlp_head.2.weight"], state["mlp_head.2.bias"] = np.ones((99, 12)), np.ones(99)
    np.savez(tmp_path / "w.npz", **state)
    params = load_weights(tmp_path / "w.npz", MODEL, fit=("head",))
    assert_equal_trees(params["head_norm"], random_params(MODEL)["head_norm"])
    with pytest.raises(ValueError, match=r"unknown: mlp_head\.2\.weight, mlp_head\.2\.bias"):
        load_weights(tmp_path / "w.npz", MODEL.clone(num_classes=12))


def test_everything_at_once(official, tmp_path):
    model = Crate(24, 8, 3, width=12, depth=2, num_heads=2, in_channels=1)
    fit = ("head", "image_size", "patch_size", "in_channels")
    loaded = load_fitted(official, model, fit=fit)
    assert [line.split(":")[0] for line in loaded.report] == [
        "embedding/projection",
        "embedding/pos_embedding",
        "head",
    ]
    assert np.isfinite(logits(model, loaded.params, np.ones((1, 24, 24, 1), np.float32))).all()
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded.params)} == {np.dtype(np.float32)}


@pytest.mark.parametrize("file", ["official", "stated"])
def test_where_nothing_differs_nothing_changes(file, params, request):
    fit = ("image_size", "patch_size", "in_channels", "pool", "eta", "lmbda")
    loaded = load_fitted(request.getfixturevalue(file), MODEL, fit=fit)
    assert_equal_trees(loaded.params, params)
    assert loaded.report == []


def test_as_many_patches_as_the_model_has_are_its_own_grid(tmp_path, params):
    """16 patches could be 4 x 4, but the model's 2 x 8 fits as it is."""
    from crate_jax.interop import to_state_dict

    oblong = MODEL.clone(image_size=(8, 32))
    np.savez(tmp_path / "w.npz", **to_state_dict(params, oblong))
    loaded = load_fitted(tmp_path / "w.npz", oblong, fit=("image_size",))
    assert loaded.report == []
    assert_equal_trees(loaded.params, params)


def test_load_weights_logs_what_it_fitted(official, caplog):
    with caplog.at_level("INFO", logger="crate_jax"):
        load_weights(official, MODEL.clone(image_size=24), fit=("image_size",))
    assert caplog.messages == [f"{official}: embedding/pos_embedding: 4x4 to 6x6 patches, bicubic"]


def test_what_no_fit_can_help(official, params):
    with pytest.raises(ValueError, match=r"fit must be among head, image_size, .*; got width"):
        load_weights(official, MODEL, fit=("width",))
    fit = ("head", "image_size", "patch_size", "in_channels")
    with pytest.raises(ValueError, match="width 12 where the model has 24"):
        load_weights(official, MODEL.clone(width=24), fit=fit)
    with pytest.raises(ValueError, match=r"of the same layers; got .*blocks/ista/D \(2, 12, 12\)"):
        fit_params(params, MODEL, MODEL.clone(width=24))
    with pytest.raises(ValueError, match="pixels of a patch 48 where the model has 75"):
        load_weights(official, MODEL.clone(image_size=15, patch_size=5), fit=("image_size",))


def test_weights_of_another_family_are_not_fitted(stated, params):
    """The families are compared before any field of theirs."""
    vit = ViT(16, 4, 5, width=12, depth=2, num_heads=2)
    message = r"model's family, vit, to be fitted; got those of crate\. Build a model of that"
    with pytest.raises(ValueError, match=message):
        load_weights(stated, vit, fit=("eta",))
    with pytest.raises(ValueError, match=message):
        fit_params(params, MODEL, vit)
    with pytest.raises(ValueError, match=r"family, crate, to be fitted; got those of vit\. "):
        fit_params(random_params(vit), vit, MODEL)


# --- no head --------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["official", "stated"])
def test_a_model_of_features_leaves_the_head_aside_and_says_so(file, params, request):
    model, path = MODEL.clone(num_classes=0), request.getfixturevalue(file)
    loaded = load_fitted(path, model)
    assert loaded.report == ["head: left aside, for the model has none (num_classes=0)"]
    assert_equal_trees(loaded.params, {k: v for k, v in params.items() if k != "head"})
    resized = load_fitted(path, model.clone(image_size=24), fit=("image_size", "head"))
    assert set(resized.params) == set(loaded.params)
    assert resized.report[1:] == ["embedding/pos_embedding: 4x4 to 6x6 patches, bicubic"]
    fitted, report = fit_params(params, MODEL, model)
    assert report == ["head: left out"]
    assert_equal_trees(fitted, loaded.params)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_features_are_saved_and_get_a_head_again(suffix, params, tmp_path):
    if suffix == ".pth":
        pytest.importorskip("torch")
    model, path = MODEL.clone(num_classes=0), tmp_path / f"features{suffix}"
    features = {name: of for name, of in params.items() if name != "head"}
    save_weights(path, features, model)
    again = load_fitted(path, model)
    assert_equal_trees(again.params, features)
    assert again.report == []
    with pytest.raises(ValueError, match=r"these weights have no head; missing: .*Build it with n"):
        load_weights(path, MODEL)
    whole = load_fitted(path, MODEL, fit=("head",))
    assert whole.report == ["head: new, for 5 classes"]
    assert_equal_trees({k: v for k, v in whole.params.items() if k != "head"}, features)
    if suffix == ".safetensors":  # the file states its model
        assert load_fitted(path, None).model.num_classes == 0

"""CRATE-MAE: exact counts, positions, what a hidden patch tells, cost, and its encoder alone."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crate_jax import CrateMae, create_model, list_models, load_weights, save_weights
from crate_jax.interop import load_fitted
from crate_jax.models.cost import count_parameters
from crate_jax.models.embedding import grid_positions, patchify, unpatchify

# (d, L, K), and the parameters of the official code at 224 pixels: with the two fixed tables of
# positions, and the map `decoder_embed` that it never reads.
NAMED = {
    "crate_mae_tiny_patch16_224": (384, 12, 6, 11_555_328),
    "crate_mae_small_patch16_224": (576, 12, 12, 25_405_824),
    "crate_mae_base_patch16_224": (768, 12, 12, 44_638_464),
    "crate_mae_large_patch16_224": (1024, 24, 16, 154_274_560),
}
MODEL = CrateMae((16, 24), 8, 0, width=12, depth=2, num_heads=2, decoder_depth=1)
PATCHES = 6


@pytest.fixture(scope="module")
def images():
    return jnp.asarray(np.random.default_rng(0).normal(size=(2, 16, 24, 3)), jnp.float32)


@pytest.fixture(scope="module")
def params(images):
    init = jax.jit(lambda key: MODEL.init(key, images, train=False)["params"])
    return init(jax.random.key(0))


@pytest.fixture(scope="module")
def reconstruct():
    """Of the model: (parameters, images, mask) to patches."""
    return jax.jit(
        lambda params, images, masked: MODEL.apply(
            {"params": params}, images, masked, train=False, method="reconstruct"
        )
    )


def test_every_crate_mae_is_in_the_table():
    assert set(list_models("crate_mae_*")) == set(NAMED)


@pytest.mark.parametrize("name", NAMED)
def test_parameter_count(name):
    d, L, K, official = NAMED[name]
    fixed, unread = 2 * 197 * d, d * d + d
    model = create_model(name)
    assert (model.width, model.depth, model.decoder_depth, model.num_heads) == (d, L, L, K)
    assert (model.eta, model.lmbda, model.num_classes) == (0.1, 0.5, 0)
    assert count_parameters(model) == official - fixed - unread
    if name == "crate_mae_small_patch16_224":
        assert official - fixed == 25_178_880  # of which the official code says that they train
    encoder = model.clone(decoder_depth=0)
    layer = 3 * d * d + d + 4 * d
    assert count_parameters(encoder) == d + (768 * d + d) + L * layer + 2 * d


def test_positions_are_those_of_columns_then_of_rows():
    found = np.asarray(grid_positions((2, 3), 8))
    assert found.shape == (7, 8) and (found[0] == 0).all()
    for (row, column), i in itertools.product(np.ndindex(2, 3), range(2)):
        angle, at = 10_000 ** (-i / 2), found[1 + 3 * row + column]
        expected = [np.sin(column * angle), np.cos(column * angle)]
        expected += [np.sin(row * angle), np.cos(row * angle)]
        np.testing.assert_allclose(at[i::2], expected, atol=1e-6)


def test_patches_become_the_image_again(images):
    patches = patchify(images, (8, 4))
    np.testing.assert_array_equal(unpatchify(patches, (8, 4), (2, 6)), images)


def test_a_hidden_patch_tells_nothing(params, images, reconstruct):
    """What the model says does not hang on it, and it does on every patch that is seen."""
    masked = jnp.asarray([[True, False, True, True, False, True]] * 2)
    before = reconstruct(params, images, masked)
    assert before.shape == (2, PATCHES, 192) and before.dtype == jnp.float32
    patches = patchify(images, (8, 8))
    for patch in range(PATCHES):
        other = unpatchify(patches.at[:, patch].add(1.0), (8, 8), (2, 3))
        moved = np.abs(reconstruct(params, other, masked) - before).max()
        assert (moved == 0) if masked[0, patch] else (moved > 1e-4)


def test_a_mask_is_that_of_its_image(params, images, reconstruct):
    masks = jnp.asarray([[True] * 3 + [False] * 3, [False, True] * 3])
    both = reconstruct(params, images, masks)
    for i in range(2):
        alone = reconstruct(params, images[i : i + 1], masks[i : i + 1])
        np.testing.assert_allclose(alone[0], both[i], rtol=1e-4, atol=1e-5)


def test_a_layer_of_the_decoder_is_its_equation(params, images):
    """In NumPy, float64: D LN(Z), then Z − MSSA(LN(Z)); LayerNorm and the map to pixels."""
    masked = jnp.zeros((2, PATCHES), bool)
    pixels, state = MODEL.apply(
        {"params": params},
        images,
        masked,
        train=False,
        method="reconstruct",
        capture_intermediates=True,
    )
    own = jax.tree.map(lambda x: np.asarray(x, np.float64), params["decoder"])

    def norm(Z, of, epsilon):
        centred = Z - Z.mean(-1, keepdims=True)
        scaled = centred / np.sqrt(np.square(centred).mean(-1, keepdims=True) + epsilon)
        return scaled * of["scale"] + of["bias"]

    layer = jax.tree.map(lambda x: x[0], own["blocks"])
    Z = np.asarray(state["intermediates"]["head_norm"]["__call__"][0], np.float64)
    Z = norm(Z, layer["dictionary_norm"], 1e-5) @ layer["dictionary"]["D"].T
    V = np.einsum("bnd,dkp->bknp", norm(Z, layer["mssa_norm"], 1e-5), layer["mssa"]["U"])
    scores = np.einsum("bknp,bkmp->bknm", V, V) / np.sqrt(6)
    A = np.exp(scores - scores.max(-1, keepdims=True))
    A /= A.sum(-1, keepdims=True)
    mssa = np.einsum("bknm,bkmp,kpd->bnd", A, V, layer["mssa"]["W_out"])
    Z = Z - mssa - layer["mssa"]["b_out"]
    told = norm(Z[:, 1:], own["norm"], 1e-6) @ own["prediction"]["kernel"]
    np.testing.assert_allclose(pixels, told + own["prediction"]["bias"], rtol=1e-4, atol=1e-5)


def test_parameters_start_as_the_official_ones():
    model = CrateMae(32, 8, 0, width=64, depth=1, num_heads=4, decoder_depth=1)
    start = jax.jit(lambda key: model.init(key, model.sample_input(), train=False)["params"])
    params = start(jax.random.key(0))
    decoder = params["decoder"]
    xavier, kaiming = np.sqrt(6 / 128), np.sqrt(6 / 64)
    bounds = [
        (params["blocks"]["mssa"]["U"], xavier),
        (params["blocks"]["mssa"]["W_out"], xavier),
        (decoder["blocks"]["mssa"]["U"], xavier),
        (params["blocks"]["ista"]["D"], kaiming),
        (decoder["blocks"]["dictionary"]["D"], kaiming),
        (params["embedding"]["projection"]["kernel"], np.sqrt(6 / (192 + 64))),
        (decoder["prediction"]["kernel"], np.sqrt(6 / (192 + 64))),
    ]
    for values, bound in bounds:
        assert 0.97 * bound < np.abs(values).max() <= bound
        assert abs(np.std(values) / (bound / np.sqrt(3)) - 1) < 0.1
    for values in (params["blocks"]["mssa"]["b_out"], decoder["prediction"]["bias"]):
        assert (values == 0).all()
    for token in (params["mask_token"], params["embedding"]["cls_token"]):
        assert 0.012 < np.std(token) < 0.03


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_the_encoder_classifies(params, images, pool):
    """Its features are those of the autoencoder, of whole images."""
    encoder = MODEL.clone(decoder_depth=0, num_classes=3, pool=pool)
    init = jax.jit(lambda key: encoder.init(key, images, train=False)["params"])
    own = init(jax.random.key(1))
    assert own.keys() == params.keys() - {"decoder", "mask_token"} | {"head"}
    logits = encoder.apply({"params": params | {"head": own["head"]}}, images, train=False)
    whole = MODEL.clone(pool=pool)
    features = whole.apply({"params": params}, images, train=False)
    assert logits.shape == (2, 3) and features.shape == (2, 12)
    expected = features @ own["head"]["kernel"] + own["head"]["bias"][None]
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-6)


# --- weights --------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["safetensors", "npz", "pth"])
def test_an_encoder_takes_the_weights_of_an_autoencoder(params, images, suffix, tmp_path):
    if suffix == "pth":
        pytest.importorskip("torch")
    path = tmp_path / f"mae.{suffix}"
    save_weights(path, params, MODEL)
    encoder = MODEL.clone(decoder_depth=0, num_classes=3)
    loaded = load_fitted(path, encoder, fit=("head",))
    left = "decoder, mask_token: left aside, for the model has none (decoder_depth=0)"
    assert left in loaded.report and "head: new, for 3 classes" in loaded.report
    assert loaded.params.keys() == {"embedding", "blocks", "head_norm", "head"}
    jax.tree.map(np.testing.assert_array_equal, loaded.params["blocks"], params["blocks"])
    features = load_weights(path, MODEL.clone(decoder_depth=0))
    jax.tree.map(np.testing.assert_array_equal, features["embedding"], params["embedding"])
    with pytest.raises(ValueError, match=r"these weights have no head; missing: head"):
        load_weights(path, encoder)


def test_an_autoencoder_needs_a_decoder(params, tmp_path):
    encoder = MODEL.clone(decoder_depth=0)
    own = {k: v for k, v in params.items() if k not in ("decoder", "mask_token")}
    save_weights(tmp_path / "encoder.safetensors", own, encoder)
    with pytest.raises(ValueError, match="missing: decoder/blocks/dictionary/D"):
        load_weights(tmp_path / "encoder.safetensors", MODEL)


@pytest.mark.parametrize(
    ("name", "lmbda"),
    [
        ("crate-mae-base-lmd5.0-checkpoint-799", 5.0),
        ("crate-mae-base-lmd0.5-checkpoint-799", 0.5),
        ("crate-mae-small-lmd5", 5.0),
        ("checkpoint-799", None),
    ],
)
def test_the_name_of_an_official_file_tells_lambda(params, name, lmbda, tmp_path):
    pytest.importorskip("torch")
    path = tmp_path / f"{name}.pth"
    save_weights(path, params, MODEL)
    right = MODEL.clone(lmbda=0.25 if lmbda is None else lmbda)
    jax.tree.map(np.testing.assert_array_equal, load_weights(path, right), params)
    wrong = MODEL.clone(lmbda=0.75)
    if lmbda is None:
        load_weights(path, wrong)
        return
    message = rf"model\.lmbda must be {lmbda}, as the name of .*{name}\.pth says; got 0\.75\. Set"
    with pytest.raises(ValueError, match=message):
        load_weights(path, wrong)
    loaded = load_fitted(path, wrong, fit="lmbda")
    assert f"lmbda: 0.75, where the weights had {lmbda}" in loaded.report


def test_a_file_that_states_lambda_counts_for_more_than_its_name(params, tmp_path):
    path = tmp_path / "lmd5.0.safetensors"
    save_weights(path, params, MODEL)
    assert load_fitted(path, None).model.lmbda == MODEL.lmbda == 0.5


# --- mistakes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(width=6), "model.width must be a multiple of 4, for sines and cosines"),
        (
            dict(position_size=(20, 24)),
            "model.position_size must be a multiple of model.patch_size; got 20x24 and 8x8",
        ),
        (dict(num_classes=3), "model.decoder_depth must be 0 for a model that classifies; got 1"),
    ],
)
def test_fields_that_do_not_go_together(fields, message, images):
    with pytest.raises(ValueError, match=f"^{message}"):
        MODEL.clone(**fields).init(jax.random.key(0), images, train=False)


def test_without_a_decoder_nothing_is_reconstructed(params, images):
    encoder = MODEL.clone(decoder_depth=0)
    with pytest.raises(ValueError, match=r"^model\.decoder_depth must be at least 1 to recon"):
        encoder.apply(
            {"params": params}, images, np.zeros((2, 6), bool), train=False, method="reconstruct"
        )


@pytest.mark.parametrize(
    ("masked", "got"),
    [
        (np.zeros((2, 5), bool), r"bool \(2, 5\)"),
        (np.zeros((2, 6), np.float32), r"float32 \(2, 6\)"),
        ([[True] * 6] * 2, "list"),
    ],
)
def test_what_is_no_mask(params, images, masked, got):
    with pytest.raises(ValueError, match=rf"^masked must be an array \(2, 6\) of .*; got {got}\."):
        MODEL.apply({"params": params}, images, masked, train=False, method="reconstruct")

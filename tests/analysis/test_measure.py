"""Every measure of every layer, computed a second time in float64 from the equations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crate_jax import Crate, CrateAlpha, CrateCausal, CrateLM, ViT, create_model
from crate_jax.analysis import DecoderLayers, layerwise, measure, measured_of, taps
from crate_jax.analysis.measured import GEOMETRY, HALVES, OBJECTIVE, TITLES
from crate_jax.models.cost import abstract_parameters

TINY = dict(image_size=16, patch_size=8, num_classes=5, width=12, depth=2, num_heads=2)
MODELS = {
    "crate": Crate(**TINY, lmbda=0.3),
    "minus": Crate(**TINY, attention_sign="minus"),
    "steps": Crate(**TINY, ista_steps=2, threshold="soft", step_sizes="per_layer"),
    "shared": Crate(**TINY, step_sizes="shared"),
    "alpha": CrateAlpha(**TINY, layer_scale=0.5),
    "aot": Crate(**TINY, nonlinearity="none"),
    "mlp": Crate(**TINY, nonlinearity="mlp"),
    "mhsa": Crate(**TINY, attention="mhsa"),
    "vit": ViT(**TINY),
}
TEXT = dict(context_length=6, vocab_size=9, width=12, depth=2, num_heads=2)


def some_params(model):
    rng = np.random.default_rng(3)
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) / 2, leaf.dtype),
        abstract_parameters(model),
    )


@pytest.fixture(scope="module")
def images():
    return np.asarray(jax.random.normal(jax.random.key(4), (5, 16, 16, 3)))


def rate(X_Nxd, eps=0.1):
    N, d = X_Nxd.shape
    return np.linalg.slogdet(np.eye(d) + d / (N * eps**2) * X_Nxd.T @ X_Nxd)[1] / 2


def in_subspaces(Z_Nxd, U_dxKxp):
    return sum(rate(Z_Nxd @ U_dxKxp[:, k]) for k in range(U_dxKxp.shape[1]))


def layer_norm(Z, norm, at, epsilon):
    centred = Z - Z.mean(-1, keepdims=True)
    scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + epsilon)
    return scaled * np.asarray(norm["scale"][at], np.float64) + np.asarray(norm["bias"][at])


def cosines_of(X_dxm):
    return np.abs(X_dxm.T @ X_dxm) / np.outer(*[np.linalg.norm(X_dxm, axis=0)] * 2)


def expected(model, params, images, entering):
    """By the equations, image by image: {name: (L, B)}. ``entering`` (L, B, N, d)."""
    _, seen = taps(model, params, images)
    seen = {name: np.asarray(array, np.float64) for name, array in seen.items()}
    blocks = params["blocks"]
    half = seen.get("z_half", seen["out"])
    L, B = half.shape[:2]
    found = {name: np.zeros((L, B)) for name in TITLES}
    U = blocks[model.attention_part.name].get("U")
    for at in range(L):
        for b in range(B):
            Z = half[at, b]
            row = {"rate": rate(Z), "rate_before": rate(entering[at, b])}
            if U is not None:
                U_dxKxp = np.asarray(U[at], np.float64)
                row["subspace_rate"] = in_subspaces(Z, U_dxKxp)
                row["subspace_rate_before"] = in_subspaces(entering[at, b], U_dxKxp)
                row["rate_reduction"] = row["rate"] - row["subspace_rate"]
                row["compression"] = row["subspace_rate"] - row["subspace_rate_before"]
                ranks = []
                for k in range(U_dxKxp.shape[1]):
                    s = np.linalg.svd(Z @ U_dxKxp[:, k], compute_uv=False)
                    ranks.append(np.exp(-np.sum(s / s.sum() * np.log(s / s.sum()))))
                row["effective_rank"] = np.mean(ranks)
                cosines, own = cosines_of(U_dxKxp.reshape(len(U_dxKxp), -1)), U_dxKxp.shape[2]
                rows, columns = np.triu_indices(len(cosines), 1)
                alike = rows // own == columns // own
                row["coherence_within"] = cosines[rows, columns][alike].mean()
                row["coherence_between"] = cosines[rows, columns][~alike].mean()
            name = "ista" if "ista" in seen else "code" if "code" in seen else None
            if name:
                part = "ista" if name == "ista" else "odl"
                A = seen[name][at, b]
                Y = layer_norm(Z, blocks[f"{part}_norm"], at, model.EPSILON)
                D = np.asarray(blocks[part]["D"][at], np.float64)
                lmbda = model.lmbda
                if getattr(model, "step_sizes", "fixed") == "per_layer":
                    lmbda = np.exp(float(blocks[part]["log_lmbda"][at]))
                if getattr(model, "step_sizes", "fixed") == "shared":
                    lmbda = np.exp(float(params["log_lmbda"]))

                def lasso(A, Y=Y, D=D, lmbda=lmbda):
                    value = ((Y.T - D @ A.T) ** 2).sum() / 2 + lmbda * np.abs(A).sum()
                    return value / len(Y)

                atoms = cosines_of(D)
                row["dictionary_coherence"] = atoms[np.triu_indices(len(atoms), 1)].mean()
                row["zeros"], row["l0"] = (A == 0).mean(), (A != 0).sum() / len(A)
                row["l1"] = np.abs(A).sum() / len(A)
                row["lasso_before"] = lasso(Y if name == "ista" else np.zeros_like(A))
                row["lasso_after"] = lasso(A)
                row["descent"] = row["lasso_after"] - row["lasso_before"]
            out = seen["out"][at, b]
            s = np.linalg.svd(out, compute_uv=False)
            s = s[s > 0] / s.sum()
            row["token_rank"] = np.exp(-np.sum(s * np.log(s)))
            pairs = [
                np.degrees(np.arccos(x @ y / np.linalg.norm(x) / np.linalg.norm(y)))
                for i, x in enumerate(out)
                for y in out[i + 1 :]
            ]
            row["mean_angle"] = np.mean(pairs)
            if "attention" in seen:
                A = seen["attention"][at, b]
                row["attention_entropy"] = np.mean(
                    [-np.sum(a[a > 0] * np.log(a[a > 0])) for a in A.reshape(-1, A.shape[-1])]
                )
            for name, value in row.items():
                found[name][at, b] = value
    return found


def entering_tokens(model, params, images):
    """Those of a model one layer shorter: what leaves its last layer enters the next one."""
    layers = []
    for depth in range(model.depth):
        if not depth:
            fields = model.block_fields()
            _, seen = taps(model, params, images)
            update = np.asarray(seen[model.attention_part.name][0], np.float64)
            if fields.get("layer_scale"):
                name = f"{model.attention_part.name}_scale"
                update = update * np.asarray(params["blocks"][name][0], np.float64)
            half = np.asarray(seen.get("z_half", seen["out"])[0], np.float64)
            layers.append(half - fields.get("sign", 1) * update)
            continue
        shorter = params | {"blocks": jax.tree.map(lambda x, n=depth: x[:n], params["blocks"])}
        tokens = model.clone(depth=depth).apply(
            {"params": shorter}, images, train=False, method="forward_features"
        )
        layers.append(np.asarray(tokens, np.float64))
    return np.stack(layers)


@pytest.mark.parametrize("name", MODELS)
def test_by_the_equations(name, images):
    model = MODELS[name]
    params = some_params(model)
    wanted = expected(model, params, images, entering_tokens(model, params, images))
    known = measured_of(model)
    got = measure(model, params, [images[:2], images[2:]], known)
    assert tuple(got) == known
    for measured, values in got.items():
        assert values.count == 5 and values.mean.shape == values.std.shape == (2,)
        exact = wanted[measured]
        scale = max(np.abs(exact).max(), 1e-3)
        if measured in ("compression", "rate_reduction", "descent"):  # of two that are larger
            parts = {"compression": "subspace_rate", "rate_reduction": "rate"}
            scale = np.abs(wanted[parts.get(measured, "lasso_before")]).max()
        np.testing.assert_allclose(values.mean, exact.mean(1), atol=1e-4 * scale, err_msg=measured)
        np.testing.assert_allclose(
            values.std, exact.std(1, ddof=1), atol=1e-4 * scale, err_msg=measured
        )


def test_a_decoder(images):
    """Its attention comes last in a layer, with a minus; it has no code."""
    model = create_model(
        "crate_mae_tiny_patch16_224", **{**TINY, "num_classes": 0}, decoder_depth=3
    )
    params, decoder = some_params(model), DecoderLayers(model)
    known = measured_of(decoder)
    sparse = {"zeros", "l0", "l1", "lasso_before", "lasso_after", "descent", "dictionary_coherence"}
    assert set(known) == set(TITLES) - sparse
    got = measure(decoder, params, images, known)
    _, seen = taps(decoder, params, images)
    seen = {name: np.asarray(array, np.float64) for name, array in seen.items()}
    assert seen["dictionary"].shape == (3, 5, 5, 12)
    np.testing.assert_allclose(seen["z_half"] - seen["mssa"], seen["out"], atol=1e-4)
    U = np.asarray(params["decoder"]["blocks"]["mssa"]["U"], np.float64)
    for name, tap in {"subspace_rate_before": "z_half", "subspace_rate": "out"}.items():
        exact = [[in_subspaces(Z, U[at]) for Z in seen[tap][at]] for at in range(3)]
        np.testing.assert_allclose(got[name].mean, np.mean(exact, axis=1), rtol=1e-5)
    whole = [[rate(Z) for Z in seen["out"][at]] for at in range(3)]
    np.testing.assert_allclose(got["rate"].mean, np.mean(whole, axis=1), rtol=1e-5)
    pixels = model.apply({"params": params}, images, None, train=False, method="forward_masked")[0]
    nothing = np.zeros((5, 4), bool)
    told = model.apply({"params": params}, images, nothing, train=False, method="reconstruct")
    np.testing.assert_allclose(pixels, told, atol=1e-5)
    with pytest.raises(KeyError, match=r"taps must be among dictionary, z_half, .*; got ista"):
        taps(decoder, params, images, "ista")


def test_what_each_model_has():
    everything = set(TITLES)
    sparse = {"zeros", "l0", "l1", "lasso_before", "lasso_after", "descent", "dictionary_coherence"}
    subspaces = {
        *("subspace_rate", "rate_reduction", "subspace_rate_before", "compression"),
        *("effective_rank", "coherence_within", "coherence_between"),
    }
    assert set(OBJECTIVE) | set(HALVES) | set(GEOMETRY) == everything
    assert set(measured_of(MODELS["crate"])) == everything == set(measured_of(MODELS["alpha"]))
    assert set(measured_of(MODELS["aot"])) == everything - sparse
    assert set(measured_of(MODELS["mhsa"])) == everything - subspaces
    assert set(measured_of(MODELS["vit"])) == everything - subspaces - sparse
    assert set(measured_of(MODELS["crate"], definition="official_code")) == {
        "subspace_rate",
        "zeros",
    }


def test_a_model_that_modulates_has_no_halves(images):
    model = create_model("hyperset_patch16_224", **{**TINY, "width": 16})
    assert not set(HALVES) & set(measured_of(model))
    variables = jax.jit(lambda k: model.init(k, images[:1], train=False))(jax.random.key(0))
    got = measure(model, variables["params"], images, ("rate", "mean_angle"))
    assert got["rate"].mean.shape == (2,)


def test_running_statistics_and_tssa(images):
    model = create_model("tost_tiny_patch16_224", **TINY)
    variables = jax.jit(lambda k: model.init(k, images[:1], train=False))(jax.random.key(0))
    got = measure(model, variables, images)
    old = layerwise(model, variables, images)
    np.testing.assert_allclose(got["subspace_rate"].mean, old["coding_rate_mean"], rtol=2e-5)


@pytest.mark.parametrize("definition", ["paper", "official_code"])
def test_the_same_as_layerwise_on_the_device(definition, images):
    """Which factors by QR in float32."""
    model = MODELS["crate"]
    params = some_params(model)
    got = measure(model, params, images, definition=definition)
    old = layerwise(model, params, images, definition=definition)
    np.testing.assert_allclose(got["subspace_rate"].mean, old["coding_rate_mean"], rtol=2e-5)
    np.testing.assert_allclose(got["subspace_rate"].std, old["coding_rate_std"], rtol=2e-2)
    np.testing.assert_allclose(got["zeros"].mean, old["zero_fraction"], rtol=1e-5)


@pytest.mark.parametrize("kind", [CrateCausal, CrateLM])
def test_a_model_of_text(kind):
    model = kind(**TEXT)
    tokens = np.asarray(jax.random.randint(jax.random.key(0), (3, 6), 0, 9))
    params = some_params(model)
    got = measure(model, params, tokens)
    old = layerwise(model, params, tokens)
    np.testing.assert_allclose(got["rate"].mean, old["rate_mean"], rtol=2e-5)
    np.testing.assert_allclose(got["zeros"].mean, old["zero_fraction"], rtol=1e-5)


def test_images_of_another_size(images):
    """Positions are resized; there are as many tokens as the size asks for."""
    model, larger = MODELS["crate"], np.zeros((2, 32, 24, 3), np.float32)
    params = some_params(model)
    got = measure(model, params, larger, ("attention_entropy",))
    assert np.isfinite(got["attention_entropy"].mean).all()
    _, seen = taps(model, params, larger, "out")
    assert seen["out"].shape == (2, 2, 13, 12)


def test_the_entropy_of_attention_whose_rows_do_not_sum_to_one(images):
    """Hyper-SET adds a softmax over keys and one over queries."""
    model = create_model("hyperset_patch16_224", **{**TINY, "width": 16})
    params = some_params(model)
    _, seen = taps(model, params, images, "attention")
    A = np.asarray(seen["attention"], np.float64)
    assert np.abs(A.sum(axis=-1) - 1).max() > 0.1
    A /= A.sum(axis=-1, keepdims=True)
    exact = -(A * np.log(A)).sum(axis=-1).mean(axis=(2, 3))
    got = measure(model, params, images, ("attention_entropy",))["attention_entropy"]
    np.testing.assert_allclose(got.mean, exact.mean(axis=1), rtol=1e-5)


def test_one_image_has_no_deviation(images):
    got = measure(MODELS["vit"], some_params(MODELS["vit"]), images[:1], ("rate",))["rate"]
    assert got.count == 1 and np.isnan(got.std).all() and np.isnan(got.error).all()


def test_mistakes(images):
    model = MODELS["vit"]
    params = some_params(model)
    with pytest.raises(KeyError, match=r"names must be among rate, .*; got zeros"):
        measure(model, params, images, ("zeros",))
    with pytest.raises(ValueError, match=r"^definition must be one of paper, official_code; got x"):
        measure(model, params, images, definition="x")
    with pytest.raises(ValueError, match=r"^definition must be paper for a model without subspace"):
        measure(model, params, images, definition="official_code")
    with pytest.raises(ValueError, match=r"^images must be at least one; got none"):
        measure(model, params, images[:0])
    with pytest.raises(ValueError, match=r"^images must have sides that are multiples of the patc"):
        measure(model, params, images[:, :12])
    with pytest.raises(ValueError, match=r"^positions must be one of right, official_maps; got x"):
        taps(model, params, images, positions="x")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("tost_tiny_patch16_224", "a ToST, whose positions are not resized; got official_maps"),
        ("hyperset_patch16_224", "a HyperSet, whose positions are not resized; got official_maps"),
        ("crate_lm_1l", "a CrateLM, which takes no images; got official_maps"),
    ],
)
def test_positions_that_nothing_resizes(name, words):
    sizes = dict(width=8, depth=1, num_heads=2)
    if name == "crate_lm_1l":
        sizes |= dict(context_length=4, vocab_size=7)
    else:
        sizes |= dict(image_size=8, patch_size=4, num_classes=2)
    model = create_model(name, **sizes)
    inputs = model.sample_input()
    variables = model.init(jax.random.key(0), inputs, train=False)
    with pytest.raises(ValueError, match=rf"^positions must be right for {words}\. Leave it out"):
        taps(model, variables, inputs, positions="official_maps")
    assert taps(model, variables, inputs, "out")[1]["out"].shape[0] == 1

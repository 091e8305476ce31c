"""CRATE-α: its counts, its step written out, and every switch."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crate_jax import CrateAlpha, create_model, list_models
from crate_jax.models.cost import count_parameters
from crate_jax.models.crate_alpha import odl
from crate_jax.models.variants import VARIANTS

BASE = dict(image_size=16, patch_size=4, num_classes=7, width=12, depth=2, num_heads=3)

# Parameters at 224 pixels with 1000 classes, and with the 19,167 of ImageNet-21K.
PARAMETERS = {
    "tiny_patch16": (4_811_944, None),
    "small_patch16": (40_975_912, None),
    "base_patch32": (73_985_512, 87_955_935),
    "base_patch16": (72_328_936, 86_299_359),
    "base_patch8": (72_338_152, 86_308_575),
    "large_patch32": (255_982_568, 274_603_743),
    "large_patch14": (253_650_920, 272_272_095),
    "large_patch8": (253_786_088, 272_407_263),
    "huge_patch14": (526_819_560, None),
}
# The ablation of B/32, a step a row.
ABLATION = {
    "CRATE": (dict(nonlinearity="ista", residual=False), 24_440_296),
    "overcomplete": (dict(decoupled=False, residual=False), 45_673_960),
    "decoupled": (dict(residual=False), 73_985_512),
    "residual": ({}, 73_985_512),
}


def build(**changes):
    return CrateAlpha(**BASE | changes)


@pytest.fixture(scope="module")
def images():
    return jax.random.normal(jax.random.key(1), (2, 16, 16, 3))


def draw(model, images, seed=3):
    """Parameters of init's shapes, all off their start, drawn by NumPy."""
    start = jax.eval_shape(lambda key: model.init(key, images, train=False), jax.random.key(0))
    rng = np.random.default_rng(seed)

    def fill(path, leaf):
        values = 0.3 * rng.normal(size=leaf.shape).astype(leaf.dtype)
        return jnp.asarray(values + (path[-1].key == "scale"))

    return jax.tree.map_with_path(fill, start["params"])


def forward(model, params, images, taps=(), **options):
    @jax.jit
    def apply(params, images):
        return model.apply(
            {"params": params}, images, taps=taps, method="forward", **{"train": False} | options
        )

    return apply(params, images)


# --- the step -------------------------------------------------------------------------------------


def slow_odl(y, D, D1, eta, lmbda):
    """The two steps for one token, an atom at a time."""
    atoms = range(D.shape[1])
    first = [max(eta * sum(D[:, j] * y) - eta * lmbda, 0) for j in atoms]
    error = sum(first[j] * D[:, j] for j in atoms) - y
    second = [max(first[j] - eta * sum(D[:, j] * error) - eta * lmbda, 0) for j in atoms]
    return sum(second[j] * D1[:, j] for j in atoms)


def slow_forward(model, params, images):
    """The model in float64, a token at a time, with its own idea of every switch."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    blocks = params["blocks"]

    def norm(x, weights):
        return (x - x.mean()) / np.sqrt(x.var() + 1e-6) * weights["scale"] + weights["bias"]

    def attend(Y, U, W_out):
        updates = 0
        for k in range(U.shape[1]):
            V = Y @ U[:, k]
            weight = np.exp(V @ V.T / np.sqrt(U.shape[2]))
            updates = updates + weight / weight.sum(axis=1, keepdims=True) @ V @ W_out[k]
        return updates

    def nonlinear(y, at):
        if model.nonlinearity == "ista":
            D = blocks["ista"]["D"][at]
            return np.maximum(y + model.eta * (D.T @ (y - D @ y) - model.lmbda), 0)
        D = blocks["odl"]["D"][at]
        D1 = blocks["odl"]["D1"][at] if model.decoupled else D
        return slow_odl(y, D, D1, model.eta, model.lmbda)

    def layer(Z, at):
        here = {name: jax.tree.map(lambda leaf: leaf[at], of) for name, of in blocks.items()}
        Y = np.stack([norm(z, here["mssa_norm"]) for z in Z])
        scales = {name: 1.0 if model.layer_scale is None else here.get(f"{name}_scale", 1.0)
                  for name in ("mssa", model.nonlinearity)}  # fmt: skip
        Z = Z + scales["mssa"] * attend(Y, here["mssa"]["U"], here["mssa"]["W_out"])
        norms = here[f"{model.nonlinearity}_norm"]
        new = np.stack([nonlinear(norm(z, norms), at) for z in Z])
        new = scales[model.nonlinearity] * new
        return Z + new if model.residual else new

    logits = []
    for image in np.asarray(images, np.float64):
        embedding, h = params["embedding"], model.patch_size
        patches = [
            image[r : r + h, c : c + h].ravel()
            for r in range(0, image.shape[0], h)
            for c in range(0, image.shape[1], h)
        ]
        projection = embedding["projection"]
        tokens = np.stack(patches) @ projection["kernel"] + projection["bias"]
        Z = np.concatenate([embedding["cls_token"][None], tokens]) + embedding["pos_embedding"]
        for at in range(model.depth):
            Z = layer(Z, at)
        pooled = norm(Z[0], params["head_norm"])
        logits.append(pooled @ params["head"]["kernel"] + params["head"]["bias"])
    return np.stack(logits)


def test_odl_is_its_two_steps():
    rng = np.random.default_rng(0)
    Y, D, D1 = rng.normal(size=(2, 3, 4)), rng.normal(size=(4, 9)), rng.normal(size=(4, 9))
    with jax.enable_x64(True):
        ours = odl(jnp.asarray(Y), jnp.asarray(D), jnp.asarray(D1), eta=0.3, lmbda=0.2)
    expected = [[slow_odl(y, D, D1, 0.3, 0.2) for y in of] for of in Y]
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-12)


def test_the_gradient_of_odl_is_that_of_its_differences():
    rng = np.random.default_rng(1)
    shapes = {"Y": (2, 3, 4), "D": (4, 9), "D1": (4, 9), "weights": (2, 3, 4)}
    values = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    weights = values.pop("weights")

    def value(Y, D, D1):
        return (odl(Y, D, D1, eta=0.3, lmbda=0.2) * weights).sum()

    with jax.enable_x64(True):
        grads = jax.grad(value, (0, 1, 2))(*map(jnp.asarray, values.values()))
        for i, (name, array) in enumerate(values.items()):
            direction, step = rng.normal(size=array.shape), 1e-6
            ends = [
                value(
                    *map(jnp.asarray, (values | {name: array + sign * step * direction}).values())
                )
                for sign in (1, -1)
            ]
            slope = float(ends[0] - ends[1]) / (2 * step)
            assert float((grads[i] * direction).sum()) == pytest.approx(slope, rel=1e-6), name


def test_odl_at_its_threshold():
    """One atom, D = D₁ = 1, η = λ = ½: at y = ½ both codes reach zero exactly, from above."""
    one = jnp.ones((1, 1))

    def step(y):
        return odl(y.reshape(1, 1, 1), one, one, eta=0.5, lmbda=0.5)[0, 0, 0]

    # y = 1: A¹ = ¼, A² = ¼ − ½ (¼ − 1) − ¼ = ⅜, and dA²/dy = ½ − ½ (½ − 1) = ¾.
    for y, value, slope in (
        (1.0, 0.375, 0.75),
        (0.5, 0.0, 0.0),
        (0.25, 0.0, 0.0),
        (-1.0, 0.0, 0.0),
    ):
        assert jax.value_and_grad(step)(jnp.float32(y)) == (value, slope), y


# --- the model ------------------------------------------------------------------------------------


def test_every_size_has_all_patches():
    sizes, patches = ("tiny", "small", "base", "large", "huge"), (32, 16, 14, 8)
    names = {f"crate_alpha_{size}_patch{patch}_224" for size in sizes for patch in patches}
    assert names == set(list_models("crate_alpha_*"))
    assert {VARIANTS[name].family for name in names} == {"crate_alpha"}


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_count(name):
    plain, wide = PARAMETERS[name]
    model = create_model(f"crate_alpha_{name}_224")
    assert isinstance(model, CrateAlpha) and count_parameters(model) == plain
    if wide:
        assert count_parameters(model.clone(num_classes=19_167)) == wide


@pytest.mark.parametrize("step", ABLATION)
def test_parameter_count_of_the_ablation(step):
    switches, expected = ABLATION[step]
    assert count_parameters(create_model("crate_alpha_base_patch32_224", **switches)) == expected


SWITCHES = {
    "none": {},
    "ista": dict(nonlinearity="ista"),
    "ista without residual": dict(nonlinearity="ista", residual=False),
    "not decoupled": dict(decoupled=False),
    "no residual": dict(residual=False),
    "overcompleteness": dict(overcompleteness=2),
    "layer_scale": dict(layer_scale=0.5),
    "eta": dict(eta=0.25),
    "lmbda": dict(lmbda=0.7),
    "head_dim": dict(head_dim=5),
}


@pytest.mark.parametrize("switch", SWITCHES)
def test_logits_are_those_of_the_model_written_out(switch, images):
    model = build(**SWITCHES[switch])
    params = draw(model, images)
    logits, _ = forward(model, params, images)
    np.testing.assert_allclose(logits, slow_forward(model, params, images), atol=5e-5)


def test_parameters_of_the_switches(images):
    def of(**changes):
        return set(draw(build(**changes), images)["blocks"])

    plain = {"mssa", "mssa_norm", "odl", "odl_norm"}
    assert of() == plain
    assert of(layer_scale=0.1) == plain | {"mssa_scale", "odl_scale"}
    assert of(layer_scale=0.1, residual=False) == plain | {"mssa_scale", "odl_scale"}
    assert of(nonlinearity="ista") == {"mssa", "mssa_norm", "ista", "ista_norm"}
    assert set(draw(build(decoupled=False), images)["blocks"]["odl"]) == {"D"}


def test_parameters_start_as_officially():
    model = build(width=96, num_heads=3, num_classes=64, layer_scale=0.25)
    start = jax.jit(lambda key: model.init(key, jnp.zeros((1, 16, 16, 3)), train=False))
    params = start(jax.random.key(0))["params"]
    embedding, blocks = params["embedding"], params["blocks"]
    normal = {
        "U": (blocks["mssa"]["U"], 0.02),
        "W_out": (blocks["mssa"]["W_out"], 0.02),
        "head": (params["head"]["kernel"], 0.02),
        "positions": (embedding["pos_embedding"], 0.02),
        "class token": (embedding["cls_token"], 1e-6),
    }
    for name, (leaf, deviation) in normal.items():
        leaf = np.asarray(leaf)
        assert leaf.std() == pytest.approx(deviation, rel=0.25 if leaf.size < 100 else 0.06), name
        assert np.abs(leaf).max() > 1.9 * deviation, f"{name} is cut off"
    uniform = {
        "D": (blocks["odl"]["D"], (6 / 96) ** 0.5),
        "D1": (blocks["odl"]["D1"], (6 / 96) ** 0.5),
        "patches": (embedding["projection"]["kernel"], (6 / (4 * 4 * 3)) ** 0.5),
    }
    for name, (leaf, bound) in uniform.items():
        leaf = np.asarray(leaf)
        assert 0.99 * bound < np.abs(leaf).max() <= bound, name
        assert leaf.std() == pytest.approx(bound / 3**0.5, rel=0.03), name
    assert not np.array_equal(*blocks["odl"].values())
    assert not params["head"]["bias"].any() and not embedding["projection"]["bias"].any()
    for name in ("mssa_scale", "odl_scale"):
        np.testing.assert_array_equal(blocks[name], np.full((2, 96), 0.25, np.float32))


# --- stochastic depth -----------------------------------------------------------------------------


def test_rates_of_stochastic_depth_grow_linearly():
    assert build().drop_path_rates() is None
    rates = build(depth=5, drop_path=0.4).drop_path_rates()
    np.testing.assert_allclose(rates, [0, 0.1, 0.2, 0.3, 0.4], rtol=1e-6)


def test_stochastic_depth_skips_halves_of_some_examples(images):
    """At the first layer none; at the last a share, and what is left is scaled up."""
    model = build(drop_path=0.25)
    params = draw(model, images)
    many = jnp.tile(images, (100, 1, 1, 1))
    taps = ("mssa", "z_half", "odl", "out")
    options = dict(train=True, rngs={"dropout": jax.random.key(7)})
    _, seen = forward(model, params, many, taps, **options)
    halves = {
        "mssa": (seen["z_half"][1] - seen["out"][0], seen["mssa"][1]),
        "odl": (seen["out"][1] - seen["z_half"][1], seen["odl"][1]),
    }
    shares = {}
    for name, (added, update) in halves.items():
        taken = np.abs(added).max(axis=(1, 2)) > 0
        expected = np.where(taken[:, None, None], np.asarray(update) / 0.75, 0)
        np.testing.assert_allclose(added, expected, atol=1e-4, err_msg=name)
        shares[name] = taken
        assert taken.mean() == pytest.approx(0.75, abs=0.1), name
    assert (shares["mssa"] != shares["odl"]).any(), "each half is drawn for itself"
    first = seen["out"][0] - seen["z_half"][0]
    np.testing.assert_allclose(first, seen["odl"][0], atol=1e-4)


def test_no_stochastic_depth_at_evaluation(images):
    model = build(drop_path=0.9)
    params = draw(model, images)
    expected, _ = forward(build(), params, images)
    np.testing.assert_array_equal(forward(model, params, images)[0], expected)


# --- how it is computed ---------------------------------------------------------------------------


def loss_and_gradient(model, params, images):
    def loss(params):
        logits = model.apply({"params": params}, images, train=True)
        return -jax.nn.log_softmax(logits)[:, 1].mean()

    return jax.jit(jax.value_and_grad(loss))(params)


@pytest.fixture(scope="module")
def plain(images):
    params = draw(build(), images)
    return params, loss_and_gradient(build(), params, images)


@pytest.mark.parametrize(
    "how",
    [dict(remat="dots"), dict(remat="full"), dict(backward="autodiff"), dict(scan_unroll=2)],
    ids=str,
)
def test_how_it_is_computed_changes_nothing(how, images, plain):
    params, expected = plain
    got = loss_and_gradient(build(**how), params, images)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2e-6), got, expected)


def test_bfloat16_is_near_float32(images):
    model, exact = build(dtype=jnp.bfloat16), build()
    params = draw(exact, images)
    logits, seen = forward(model, params, images, model.tap_names)
    expected, exactly = forward(exact, params, images, model.tap_names)
    assert logits.dtype == jnp.float32
    for name in model.tap_names:
        assert (seen[name].dtype, exactly[name].dtype) == (jnp.bfloat16, jnp.float32), name
    pairs = {name: (seen[name], exactly[name]) for name in seen} | {"logits": (logits, expected)}
    for name, (got, wanted) in pairs.items():
        error = np.abs(np.asarray(got, np.float32) - wanted).max() / np.abs(wanted).max()
        assert 0 < error < 0.05, f"{name}: {error:.2g}"


# --- fields ---------------------------------------------------------------------------------------


def test_every_field_is_tested():
    fields = {f.name for f in dataclasses.fields(CrateAlpha)} - {"parent", "name"}
    here = {name for changes in SWITCHES.values() for name in changes}
    how = {"backward", "attention_kernel", "remat", "scan_unroll", "dtype", "drop_path"}
    # The shared ones are those of tests/models/test_crate.py; a mean is no choice here.
    assert fields == here | how | set(BASE) | {"pool", "in_channels", "dropout"}


@pytest.mark.parametrize(
    ("field", "value", "rule"),
    [
        ("pool", "mean", "one of cls; got mean"),
        ("nonlinearity", "mlp", "one of odl, ista; got mlp"),
        ("overcompleteness", 0, ">= 1; got 0"),
        ("decoupled", "yes", "True or False; got 'yes'"),
        ("layer_scale", 0.0, "> 0; got 0.0"),
        ("drop_path", 1.0, "< 1; got 1.0"),
    ],
)
def test_a_wrong_value_is_one_line(field, value, rule):
    with pytest.raises(ValueError) as caught:
        create_model("crate_alpha_tiny_patch16_224", **{field: value})
    assert str(caught.value).startswith(f"model.{field} must be ") and rule in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_wrong_word_in_a_module_is_one_line(images):
    with pytest.raises(ValueError, match=r"^model\.nonlinearity must be one of odl, ista; got mlp"):
        build(nonlinearity="mlp").init(jax.random.key(0), images, train=False)


def test_a_field_of_another_family():
    with pytest.raises(KeyError, match=r"model\.mlp_ratio must name a field of crate_alpha_tiny"):
        create_model("crate_alpha_tiny_patch16_224", mlp_ratio=4)

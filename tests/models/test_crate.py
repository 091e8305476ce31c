"""The whole model: every field acts, the layers follow the recursion, mistakes are named."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crate_jax import Crate

BASE = dict(image_size=16, patch_size=4, num_classes=7, width=24, depth=3, num_heads=3)


def build(**changes):
    return Crate(**BASE | changes)


def draw(model, images, seed=5):
    """Parameters of init's shapes, all of them off their start, so that no norm or bias is trivial.

    Drawn by NumPy: compiling `init` takes longer than everything else here.
    """
    start = jax.eval_shape(lambda key: model.init(key, images, train=False), jax.random.key(0))
    rng = np.random.default_rng(seed)

    def fill(path, leaf):
        values = 0.2 * rng.normal(size=leaf.shape).astype(leaf.dtype)
        return jnp.asarray(values + (path[-1].key == "scale"))

    return jax.tree.map_with_path(fill, start["params"])


def forward(model, params, images, taps=()):
    """Logits; with taps also what they show."""

    @jax.jit
    def apply(params, images):
        options = dict(taps=taps, method="forward") if taps else {}
        return model.apply({"params": params}, images, train=False, **options)

    return apply(params, images)


def paper_forward(model, params, images):
    """The model written out in float64, a token at a time, with its own idea of every field."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)

    def norm(x, weights):
        centred = x - x.mean()
        scaled = centred / np.sqrt((centred**2).mean() + 1e-5)
        return scaled * weights["scale"] + weights["bias"]

    def linear(x, weights):
        return x @ weights["kernel"] + weights["bias"]

    def layer(tokens, at):
        mssa = {name: leaf[at] for name, leaf in params["blocks"]["mssa"].items()}
        norms = [
            {part: leaf[at] for part, leaf in params["blocks"][name].items()}
            for name in ("mssa_norm", "ista_norm")
        ]
        D = params["blocks"]["ista"]["D"][at]
        normed = [norm(z, norms[0]) for z in tokens]
        half = []
        for n, z in enumerate(tokens):
            attended = []
            for k in range(mssa["U"].shape[1]):
                W = [mssa["U"][:, k].T @ y for y in normed]
                weight = np.exp([W[n] @ w / np.sqrt(len(w)) for w in W])
                attended.append(sum(a * w for a, w in zip(weight / weight.sum(), W, strict=True)))
            if "W_out" in mssa:
                update = sum(o @ w for o, w in zip(attended, mssa["W_out"], strict=True))
                update = update + mssa["b_out"]
            else:
                update = attended[0]
            half.append(z + update)
        after = []
        for z in half:
            y = norm(z, norms[1])
            step = model.eta * D.T @ (y - D @ y) - model.eta * model.lmbda
            after.append(np.maximum(y + step, 0))
        return after

    logits = []
    for image in np.asarray(images, np.float64):
        h, w = model.patch_size if isinstance(model.patch_size, tuple) else (model.patch_size,) * 2
        embedding = params["embedding"]
        tokens = [embedding["cls_token"]]
        for row in range(0, image.shape[0], h):
            for column in range(0, image.shape[1], w):
                pixels = image[row : row + h, column : column + w].ravel()
                token = linear(norm(pixels, embedding["patch_norm"]), embedding["projection"])
                tokens.append(norm(token, embedding["token_norm"]))
        tokens = [z + at for z, at in zip(tokens, embedding["pos_embedding"], strict=True)]
        for at in range(model.depth):
            tokens = layer(tokens, at)
        pooled = tokens[0] if model.pool == "cls" else np.mean(tokens, axis=0)
        logits.append(linear(norm(pooled, params["head_norm"]), params["head"]))
    return np.stack(logits)


# One entry a field that changes the function or the shapes; the values are not the defaults.
FUNCTION = {
    "image_size": dict(image_size=(8, 16)),
    "patch_size": dict(patch_size=(8, 4)),
    "num_classes": dict(num_classes=3),
    "width": dict(width=12),
    "depth": dict(depth=1),
    "num_heads": dict(num_heads=4),
    "head_dim": dict(head_dim=5),
    "pool": dict(pool="mean"),
    "in_channels": dict(in_channels=1),
    "eta": dict(eta=0.25),
    "lmbda": dict(lmbda=0.7),
}
# Fields with a test of their own below.
ELSEWHERE = {"dropout", "dtype", "backward", "attention_kernel", "remat", "scan_unroll"}
# Those of tests/models/test_grid.py.
OPERATORS = {"attention", "nonlinearity"}
# By test_theory.py, test_cbsa.py and test_stem.py.
SWITCHES = {"attention_sign", "tied_output", "threshold", "ista_steps", "step_sizes"}
SWITCHES |= {"representatives", "stem"}


def test_every_field_is_tested():
    fields = {f.name for f in dataclasses.fields(Crate)} - {"parent", "name"}
    assert fields == set(FUNCTION) | ELSEWHERE | OPERATORS | SWITCHES


@pytest.mark.parametrize("field", ["none", *FUNCTION, "one_head"])
def test_logits_are_those_of_the_model_written_out(field):
    model = build(**FUNCTION.get(field, dict(num_heads=1) if field == "one_head" else {}))
    H, W = model.image_size if isinstance(model.image_size, tuple) else (model.image_size,) * 2
    images = jax.random.normal(jax.random.key(1), (2, H, W, model.in_channels))
    params = draw(model, images)
    logits = forward(model, params, images)
    assert logits.shape == (2, model.num_classes)
    np.testing.assert_allclose(logits, paper_forward(model, params, images), atol=5e-5)


@pytest.mark.parametrize("field", ["pool", "eta", "lmbda"])
def test_fields_without_a_shape_change_the_logits(field, tiny_model, tiny_params, tiny_images):
    other = build(**FUNCTION[field])
    change = forward(other, tiny_params, tiny_images) - forward(
        tiny_model, tiny_params, tiny_images
    )
    assert np.abs(change).max() > 1e-3


def test_sizes_may_be_a_side_or_a_pair(tiny_model, tiny_params, tiny_images):
    pairs = build(image_size=(16, 16), patch_size=(4, 4))
    np.testing.assert_array_equal(
        forward(pairs, tiny_params, tiny_images), forward(tiny_model, tiny_params, tiny_images)
    )


def test_shapes_of_the_parameter_tree(tiny_images):
    model = build(head_dim=5)
    start = jax.eval_shape(lambda key: model.init(key, tiny_images, train=False), jax.random.key(0))
    shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), start["params"])
    f32, L, d, K, p = jnp.float32, 3, 24, 3, 5
    norm = lambda *shape: {"scale": (shape, f32), "bias": (shape, f32)}  # noqa: E731
    assert shapes == {
        "embedding": {
            "cls_token": ((d,), f32),
            "pos_embedding": ((17, d), f32),
            "patch_norm": norm(48),
            "projection": {"kernel": ((48, d), f32), "bias": ((d,), f32)},
            "token_norm": norm(d),
        },
        "blocks": {
            "mssa_norm": norm(L, d),
            "mssa": {
                "U": ((L, d, K, p), f32),
                "W_out": ((L, K, p, d), f32),
                "b_out": ((L, d), f32),
            },
            "ista_norm": norm(L, d),
            "ista": {"D": ((L, d, d), f32)},
        },
        "head_norm": norm(d),
        "head": {"kernel": ((d, 7), f32), "bias": ((7,), f32)},
    }


@pytest.mark.parametrize(
    ("changes", "projected"),
    [
        (dict(num_heads=1), False),
        (dict(num_heads=1, head_dim=24), False),
        (dict(num_heads=1, head_dim=8), True),
        (dict(num_heads=3), True),
    ],
)
def test_only_one_full_subspace_goes_without_output_projection(changes, projected, tiny_images):
    params = jax.eval_shape(
        lambda key: build(**changes).init(key, tiny_images, train=False), jax.random.key(0)
    )["params"]
    assert ("W_out" in params["blocks"]["mssa"]) == projected
    assert ("b_out" in params["blocks"]["mssa"]) == projected


def test_taps_have_their_shapes_and_leave_the_logits_alone(tiny_model, tiny_params, tiny_images):
    logits, seen = forward(tiny_model, tiny_params, tiny_images, tiny_model.tap_names)
    L, B, N, K, p, d = 3, 2, 17, 3, 8, 24
    assert {name: array.shape for name, array in seen.items()} == {
        "subspace_tokens": (L, B, N, K, p),
        "attention": (L, B, K, N, N),
        "mssa": (L, B, N, d),
        "z_half": (L, B, N, d),
        "ista": (L, B, N, d),
        "out": (L, B, N, d),
    }
    alone = forward(tiny_model, tiny_params, tiny_images)
    np.testing.assert_allclose(logits, alone, atol=2e-6)
    _, one = forward(tiny_model, tiny_params, tiny_images, taps=("mssa",))
    assert list(one) == ["mssa"]
    np.testing.assert_allclose(one["mssa"], seen["mssa"], atol=2e-6)


def test_layers_follow_the_recursion(tiny_model, tiny_params, tiny_images):
    _, seen = forward(tiny_model, tiny_params, tiny_images, tiny_model.tap_names)
    seen = {name: np.asarray(array) for name, array in seen.items()}
    blocks = jax.tree.map(np.asarray, tiny_params["blocks"])
    for at in range(1, 3):
        np.testing.assert_allclose(
            seen["z_half"][at], seen["ista"][at - 1] + seen["mssa"][at], atol=1e-5
        )
    # The first layer's input: the class token and the patches, each with its position.
    tokens0 = seen["z_half"][0] - seen["mssa"][0]
    embedding = jax.tree.map(np.asarray, tiny_params["embedding"])
    np.testing.assert_allclose(
        tokens0[:, 0],
        np.broadcast_to(embedding["cls_token"] + embedding["pos_embedding"][0], (2, 24)),
        atol=1e-5,
    )
    patches = tokens0[:, 1:] - embedding["pos_embedding"][None, 1:]
    np.testing.assert_allclose(patches.mean(axis=-1), 0.0, atol=1e-5)  # normalised tokens
    np.testing.assert_allclose(patches.std(axis=-1), 1.0, atol=1e-3)
    for at in range(3):
        attended = np.einsum("bknm,bmkp->bnkp", seen["attention"][at], seen["subspace_tokens"][at])
        update = np.einsum("bnkp,kpd->bnd", attended, blocks["mssa"]["W_out"][at])
        np.testing.assert_allclose(
            seen["mssa"][at], update + blocks["mssa"]["b_out"][at][None, None], atol=1e-5
        )
        half = seen["z_half"][at]
        Y = (half - half.mean(-1, keepdims=True)) / np.sqrt(half.var(-1, keepdims=True) + 1e-5)
        D = blocks["ista"]["D"][at]
        A = np.maximum(Y + 0.1 * (Y - Y @ D.T) @ D - 0.01, 0)
        np.testing.assert_allclose(seen["ista"][at], A, atol=1e-5)


def drop(model, params, images, seed, taps=()):
    options = dict(taps=taps, method="forward") if taps else {}
    apply = jax.jit(
        lambda params, key: model.apply(
            {"params": params}, images, train=True, rngs={"dropout": key}, **options
        )
    )
    return apply(params, jax.random.key(seed))


def test_dropout_acts_in_training_only(tiny_model, tiny_params, tiny_images):
    model = build(dropout=0.5)
    plain = forward(tiny_model, tiny_params, tiny_images)
    np.testing.assert_allclose(forward(model, tiny_params, tiny_images), plain, atol=2e-6)
    one, same, other = (drop(model, tiny_params, tiny_images, seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, same)
    assert np.abs(one - plain).max() > 1e-2
    assert np.abs(one - other).max() > 1e-2
    train = jax.jit(lambda p: tiny_model.apply({"params": p}, tiny_images, train=True))
    np.testing.assert_allclose(train(tiny_params), plain, atol=2e-6)  # rate 0 needs no key


def test_dropout_drops_its_share_and_scales_the_rest(tiny_params, tiny_images):
    _, seen = drop(
        build(dropout=0.25), tiny_params, tiny_images, 3, taps=("mssa", "z_half", "ista")
    )
    seen = {name: np.asarray(array) for name, array in seen.items()}
    masks = []
    for at in (1, 2):
        change = seen["z_half"][at] - seen["ista"][at - 1]
        dropped = np.abs(change) < 1e-6
        np.testing.assert_allclose(
            change[~dropped], seen["mssa"][at][~dropped] / 0.75, rtol=1e-3, atol=1e-5
        )
        np.testing.assert_allclose(dropped.mean(), 0.25, atol=0.05)  # of 816: 3.3 deviations
        masks.append(dropped)
    assert (masks[0] != masks[1]).mean() > 0.25  # each layer its own; 0.375 expected
    # The embedded tokens as well: an entry of the class token is 0 or itself over 0.75, and to
    # that MSSA's update is added, or not.
    embedding = jax.tree.map(np.asarray, tiny_params["embedding"])
    cls = (embedding["cls_token"] + embedding["pos_embedding"][0]) / 0.75
    rest = seen["z_half"][0][:, 0]
    update = seen["mssa"][0][:, 0] / 0.75
    cases = np.stack([rest, rest - update, rest - cls, rest - cls - update])
    explained = np.abs(cases).min(axis=0)
    assert explained.max() < 1e-5
    embedded = np.abs(cases).argmin(axis=0) >= 2
    assert 0.5 < embedded.mean() < 0.95


def test_bfloat16_is_near_float32_and_keeps_parameters_and_logits_exact(tiny_images):
    model, exact = build(dtype=jnp.bfloat16), build()
    # Flax's LayerNorm promotes bfloat16 to float32 without saying so.
    with jax.numpy_dtype_promotion("standard"):
        params = draw(model, tiny_images)
        logits, seen = forward(model, params, tiny_images, taps=model.tap_names)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}
    expected, exactly = forward(exact, params, tiny_images, taps=model.tap_names)
    assert logits.dtype == expected.dtype == jnp.float32
    for name in model.tap_names:
        assert (seen[name].dtype, exactly[name].dtype) == (jnp.bfloat16, jnp.float32), name
        scale = np.abs(exactly[name]).max()
        got = np.asarray(seen[name].astype(jnp.float32))
        assert 0 < np.abs(got - exactly[name]).max() < 0.05 * scale, name
    assert 0 < np.abs(logits - expected).max() < 0.05 * np.abs(expected).max()


def test_images_may_have_half_precision(tiny_model, tiny_params, tiny_images):
    images = tiny_images.astype(jnp.bfloat16)
    got = forward(tiny_model, tiny_params, images)
    expected = forward(tiny_model, tiny_params, images.astype(jnp.float32))
    np.testing.assert_array_equal(got, expected)


def loss_of(model, images):
    def loss(params):
        logits = model.apply({"params": params}, images, train=False)
        return -jax.nn.log_softmax(logits)[:, 0].mean()

    return loss


def kept_bytes(model, params, images):
    """Bytes that the backward pass closes over, parameters left out."""
    backward = jax.eval_shape(lambda p: jax.vjp(loss_of(model, images), p)[1], params)
    parameters = {leaf.shape for leaf in jax.tree.leaves(params)}
    kept = [leaf for leaf in jax.tree.leaves(backward) if leaf.shape not in parameters]
    return sum(leaf.size * leaf.dtype.itemsize for leaf in kept)


def test_remat_keeps_less_and_changes_nothing(tiny_params, tiny_images):
    models = {remat: build(remat=remat) for remat in ("none", "dots", "full")}
    results, kept = {}, {}
    for remat, model in models.items():
        results[remat] = jax.jit(jax.value_and_grad(loss_of(model, tiny_images)))(tiny_params)
        kept[remat] = kept_bytes(model, tiny_params, tiny_images)
    for remat in ("dots", "full"):
        np.testing.assert_allclose(results[remat][0], results["none"][0], rtol=1e-6)
        for got, expected in zip(
            jax.tree.leaves(results[remat][1]), jax.tree.leaves(results["none"][1]), strict=True
        ):
            np.testing.assert_allclose(got, expected, atol=1e-6)
    assert kept["full"] < 0.7 * kept["dots"] and kept["dots"] < 0.75 * kept["none"]
    # Automatic differentiation keeps the attention besides.
    attention = 4 * 3 * len(tiny_images) * 3 * 17 * 17
    autodiff = kept_bytes(build(backward="autodiff"), tiny_params, tiny_images)
    assert kept["none"] < autodiff - 0.9 * attention


def test_remat_of_dots_computes_no_dense_product_twice(tiny_params, tiny_images, equations):
    """Products by a weight in the backward loop: none, against one each under "full"."""

    def products(remat):
        program = jax.make_jaxpr(jax.grad(loss_of(build(remat=remat), tiny_images)))(tiny_params)
        dots = [e for e, _ in equations(program.jaxpr) if e.primitive.name == "dot_general"]
        return sum(not e.params["dimension_numbers"][1][0] for e in dots)  # without batch axes

    # U, W_out and D once, and D the second time: what is kept need not be computed again.
    assert products("none") == products("dots") <= products("full") - 3


def test_scan_unroll_reaches_the_loop_and_changes_nothing(
    tiny_model, tiny_params, tiny_images, equations
):
    def unrolls(model):
        program = jax.make_jaxpr(lambda p: model.apply({"params": p}, tiny_images, train=False))
        scans = [e for e, _ in equations(program(tiny_params).jaxpr) if e.primitive.name == "scan"]
        return [(e.params["length"], e.params["unroll"]) for e in scans]

    unrolled = build(scan_unroll=3)
    assert unrolls(tiny_model) == [(3, 1)]
    assert unrolls(unrolled) == [(3, 3)]
    np.testing.assert_allclose(
        forward(unrolled, tiny_params, tiny_images),
        forward(tiny_model, tiny_params, tiny_images),
        atol=2e-6,
    )


@pytest.mark.parametrize(
    ("changes", "shape", "taps", "error", "message"),
    [
        (
            dict(width=25),
            (1, 16, 16, 3),
            (),
            ValueError,
            r"^model\.width must be a multiple of model",
        ),
        (
            dict(pool="max"),
            (1, 16, 16, 3),
            (),
            ValueError,
            r"^model\.pool must be one of cls, mean",
        ),
        (dict(remat="all"), (1, 16, 16, 3), (), ValueError, r"^model\.remat must be .*got all"),
        ({}, (1, 16, 12, 3), (), ValueError, r"^images must be \(B, 16, 16, 3\).*\(1, 16, 12, 3\)"),
        (
            {},
            (1, 16, 16, 1),
            (),
            ValueError,
            r"^images must be .*set .*image_size and .*in_channels",
        ),
        ({}, (16, 16, 3), (), ValueError, r"^images must be \(B, 16, 16, 3\).*got \(16, 16, 3\)"),
        (
            dict(image_size=(16, 18)),
            (1, 16, 18, 3),
            (),
            ValueError,
            r"^model\.image_size must be a multiple of model\.patch_size; got 16x18 and 4x4\. "
            r"Nearest that fits: 16x16",
        ),
        ({}, (1, 16, 16, 3), ("mssa", "Z"), KeyError, r"taps must be among .*; got Z\."),
    ],
)
def test_errors_name_the_rule(changes, shape, taps, error, message):
    model = build(**changes)
    images = jnp.zeros(shape)
    with pytest.raises(error, match=message):
        jax.eval_shape(
            lambda key: model.init(key, images, train=False, taps=taps, method="forward"),
            jax.random.key(0),
        )

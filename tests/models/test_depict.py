"""DEPICT's decoder against NumPy, a layer at a time; and as a head on the models of the zoo."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from weights import random_params

from crate_jax import ViT, analysis, create_model
from crate_jax.models.cost import count_parameters
from crate_jax.models.depict import FORMS, Depict, TiedCrossMSSA, subspace_cross_attention
from crate_jax.models.layers import mssa
from crate_jax.models.segmenter import Segmenter

B, P, d, Y, K, p = 2, 6, 10, 3, 2, 4
SIZES = dict(depth=2, num_heads=K, head_dim=p, cross_head_dim=3)

# Parameters of the decoder with 150 classes, for the widths of ViT-T, -S, -B and -L.
PARAMETERS = {
    "self": {192: 203_439, 384: 406_575, 768: 812_847, 1024: 1_083_695},
    "cross": {192: 291_378, 384: 582_450, 768: 1_164_594, 1024: 1_552_690},
}


@pytest.fixture(scope="module")
def patches():
    return np.random.default_rng(0).normal(size=(B, P, d)).astype(np.float32)


def moved(decoder, patches):
    """Parameters away from their initial values, so that no norm is trivial."""
    params = jax.jit(lambda key: decoder.init(key, patches)["params"])(jax.random.key(1))
    rng = np.random.default_rng(2)
    return jax.tree.map(lambda x: x + 0.3 * rng.normal(size=x.shape).astype(np.float32), params)


# --- NumPy, in float64 ----------------------------------------------------------------------------


def norm(params, X, layer=...):
    X = np.asarray(X, np.float64)
    scale, bias = (np.asarray(params[name], np.float64)[layer] for name in ("scale", "bias"))
    centred = X - X.mean(axis=-1, keepdims=True)
    return centred / np.sqrt(X.var(axis=-1, keepdims=True) + 1e-5) * scale + bias


def softmax(S):
    e = np.exp(S - S.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def update(params, layer, queries, tokens):
    """s Σ_k softmax(p^{-1/2} (queries U_k)(tokens U_k)ᵀ) (tokens U_k) U_kᵀ, a head at a time."""
    U, step = (np.asarray(params[name], np.float64)[layer] for name in ("U", "step"))
    total = np.zeros_like(queries)
    for k in range(U.shape[1]):
        q, V = queries @ U[:, k], tokens @ U[:, k]
        total += softmax(q @ V.T / np.sqrt(U.shape[2])) @ V @ U[:, k].T
    return step * total


def attend(params, Z, depth):
    for layer in range(depth):
        normed = norm(params["mssa_norm"], Z, layer)
        Z = Z + update(params["mssa"], layer, normed, normed)
    return Z


def masks(params, form, patches, depth):
    """One image."""
    Q = np.asarray(params["class_embedding"], np.float64)
    if form == "self":
        Z = norm(params["norm"], attend(params["blocks"], np.concatenate([patches, Q]), depth))
        Z, Q = Z[: len(patches)], Z[len(patches) :]
    else:
        Z = norm(params["norm"], attend(params["blocks"], patches, depth))
        cross = params["cross_blocks"]["mssa"]
        for layer in range(depth):
            Q = Q + update(cross, layer, Q, norm(cross["norm"], Z, layer))
        Q = norm(params["cross_norm"], Q)
    cosines = np.array([[z @ q / np.linalg.norm(z) / np.linalg.norm(q) for q in Q] for z in Z])
    return norm(params["mask_norm"], cosines)


@pytest.mark.parametrize("form", FORMS)
def test_the_decoder_is_the_one_in_numpy(form, patches):
    decoder = Depict(Y, form, **SIZES)
    params = moved(decoder, patches)
    expected = [masks(params, form, image.astype(np.float64), SIZES["depth"]) for image in patches]
    got = decoder.apply({"params": params}, patches)
    assert got.dtype == jnp.float32
    # The norm over the classes enlarges how far three nearly equal cosines are off.
    np.testing.assert_allclose(got, expected, atol=1e-4)
    exact = decoder.clone(backward="autodiff").apply({"params": params}, patches)
    np.testing.assert_allclose(exact, expected, atol=1e-4)
    half = decoder.clone(dtype=jnp.bfloat16).apply({"params": params}, patches)
    assert half.dtype == jnp.float32
    assert 1e-4 < np.abs(half - got).mean() < 0.1


# --- equations ------------------------------------------------------------------------------------


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def test_tokens_that_attend_to_themselves_are_tied_mssa():
    """Queries that are the tokens: the cross form is MSSA with W_out = s [U_1, …, U_K]ᵀ."""
    X, U, step = draw(B, P, d), draw(d, K, p, seed=1), jnp.float32(0.7)
    cross, seen = subspace_cross_attention(X, X, U, step)
    expected, theirs = mssa(X, U, step * U.transpose(1, 2, 0))
    np.testing.assert_allclose(cross, expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(seen["attention"], theirs["attention"], atol=1e-6)


def test_a_full_orthogonal_subspace_averages_the_tokens():
    """K = 1, U orthogonal, s = 1: U and Uᵀ undo each other, and queries get means of the tokens."""
    U = np.linalg.qr(np.random.default_rng(3).normal(size=(d, d)))[0].astype(np.float32)
    Q, X = draw(B, Y, d), draw(B, P, d, seed=1)
    found, seen = subspace_cross_attention(Q, X, jnp.asarray(U[:, None]), jnp.float32(1))
    np.testing.assert_allclose(found, seen["attention"][:, 0] @ X, atol=1e-5)
    scores = np.einsum("byd,bnd->byn", Q, X) / np.sqrt(d)
    np.testing.assert_allclose(seen["attention"][:, 0], softmax(scores), atol=1e-5)


def test_a_masked_token_is_not_seen():
    mask = jnp.arange(P)[None, None, None] != 2
    module, queries = TiedCrossMSSA(K, p), draw(B, Y, d, seed=1)

    def found(tokens):
        args = (queries, mask, (), tokens)
        return module.apply(module.init(jax.random.key(0), *args), *args).update

    seen = np.abs(jax.grad(lambda tokens: jnp.sum(jnp.sin(found(tokens))))(draw(B, P, d)))
    seen = seen.max(axis=(0, 2))
    assert seen[2] == 0 and np.delete(seen, 2).min() > 1e-3


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("width", [192, 384, 768, 1024])
def test_parameter_count(form, width):
    decoder = Depict(150, form)
    shapes = jax.eval_shape(lambda key: decoder.init(key, jnp.zeros((1, 4, width))), KEY)
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == PARAMETERS[form][width]


KEY = jax.eval_shape(lambda: jax.random.key(0))


def test_parameters_start_as_the_official_ones():
    params = Depict(50, "cross").init(jax.random.key(0), jnp.zeros((1, 2, 64)))["params"]
    U, step = params["blocks"]["mssa"]["U"], params["blocks"]["mssa"]["step"]
    assert U.shape == (3, 64, 3, 100) and step.shape == (3,)
    assert np.std(U) == pytest.approx(64**-0.5, rel=0.02)
    assert np.abs(U[0] - U[1]).max() > 0.1 and len({*np.asarray(step).tolist()}) == 3
    assert np.std(params["class_embedding"]) == pytest.approx(0.02, rel=0.05)
    many = Depict(2, depth=2000, num_heads=1, head_dim=1)
    steps = many.init(jax.random.key(0), jnp.zeros((1, 2, 1)))["params"]["blocks"]["mssa"]["step"]
    assert np.std(steps) == pytest.approx(1, rel=0.1) and abs(np.mean(steps)) < 0.1


# --- as a head ------------------------------------------------------------------------------------

SMALL = dict(image_size=(8, 12), patch_size=4, width=12, depth=2, num_heads=2, num_classes=5)
BACKBONES = {
    "crate": create_model("crate_tiny_patch16_224", **SMALL),
    "alpha": create_model("crate_alpha_tiny_patch16_224", **SMALL),
    "vit": create_model("vit_tiny_patch16_224", **SMALL),
    "hyper_set": create_model("hyperset_patch16_224", **SMALL),
}


@pytest.fixture(scope="module")
def images():
    return jnp.asarray(np.random.default_rng(5).normal(size=(2, 8, 12, 3)).astype(np.float32))


def enlarged(masks_RxC, H, W):
    """Linear interpolation by hand: pixel i lies at (i + ½) n/m − ½, and edges go on."""

    def weights(n, m):
        at = np.clip((np.arange(m) + 0.5) * n / m - 0.5, 0, n - 1)
        return np.maximum(0, 1 - np.abs(at[:, None] - np.arange(n)))

    R, C = masks_RxC.shape
    return weights(R, H) @ masks_RxC @ weights(C, W).T


@pytest.mark.parametrize(
    ("name", "normed"), [*((name, True) for name in BACKBONES), ("crate", False)]
)
def test_images_to_logits_of_every_pixel(name, normed, images):
    backbone, decoder = BACKBONES[name], Depict(Y, "cross", **SIZES)
    model = Segmenter(backbone, decoder, norm=normed)
    shapes = jax.eval_shape(lambda key: model.init(key, images, train=False)["params"], KEY)
    assert set(shapes) == {"backbone", "decoder"}
    # The weights of a classifier, its head and all, go in as they are.
    weights = random_params(backbone)
    tokens = backbone.apply({"params": weights}, images, train=False, method="forward_features")
    assert tokens.shape == (2, 7, 12)
    if normed:
        scale, bias = (np.asarray(weights["head_norm"][key]) for key in ("scale", "bias"))
        epsilon, tokens = backbone.EPSILON, np.asarray(tokens, np.float64)
        centred = tokens - tokens.mean(axis=-1, keepdims=True)
        tokens = centred / np.sqrt(tokens.var(axis=-1, keepdims=True) + epsilon) * scale + bias
    patches = jnp.asarray(tokens[:, 1:], jnp.float32)
    params = {"backbone": weights, "decoder": moved(decoder, patches)}
    masks_BxPxY = np.asarray(decoder.apply({"params": params["decoder"]}, patches))
    logits = jax.jit(lambda params: model.apply({"params": params}, images, train=False))(params)
    assert (logits.shape, logits.dtype) == ((2, 8, 12, Y), jnp.float32)
    for y in range(Y):
        expected = enlarged(masks_BxPxY[1, :, y].reshape(2, 3), 8, 12)
        np.testing.assert_allclose(logits[1, :, :, y], expected, atol=1e-4)


@pytest.mark.parametrize("name", ["tost_tiny_patch16_224", "cbsa_tiny_patch16_224"])
def test_a_backbone_with_running_statistics(name, images):
    """They lie beside the parameters as the backbone's, and training moves them."""
    sizes = {**SMALL, "width": 16} | ({"representatives": 2} if name.startswith("cbsa") else {})
    backbone, decoder = create_model(name, **sizes), Depict(Y, **SIZES)
    model = Segmenter(backbone, decoder)
    variables = jax.jit(lambda key: model.init(key, images, train=False))(jax.random.key(0))
    assert set(variables["batch_stats"]) == {"backbone"}
    own = {kind: tree["backbone"] for kind, tree in variables.items()}
    tokens = backbone.apply(own, images, train=False, method="forward_features")
    alone = Segmenter(backbone, decoder, norm=False).apply(variables, images, train=False)
    decoded = decoder.apply({"params": variables["params"]["decoder"]}, tokens[:, -6:])
    expected = enlarged(np.asarray(decoded)[1, :, 2].reshape(2, 3), 8, 12)
    np.testing.assert_allclose(alone[1, :, :, 2], expected, atol=1e-4)
    train = jax.jit(lambda v, x: model.apply(v, x, train=True, mutable=["batch_stats"]))
    logits, moved = train(variables, images)
    assert logits.shape == (2, 8, 12, Y)
    before, after = variables["batch_stats"], moved["batch_stats"]
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: (a != b).any(), before, after)))


def test_a_backbone_learns_through_the_decoder(images):
    """And a tap of any layer will do for the decoder."""
    backbone, decoder = BACKBONES["crate"], Depict(Y, **SIZES)
    model = Segmenter(backbone, decoder)
    params = jax.jit(lambda key: model.init(key, images, train=False)["params"])(jax.random.key(0))
    labels = jnp.asarray(np.random.default_rng(6).integers(Y, size=(2, 8, 12)))

    def loss(params):
        logp = jax.nn.log_softmax(model.apply({"params": params}, images, train=True))
        return -jnp.take_along_axis(logp, labels[..., None], axis=-1).mean()

    value, gradients = jax.jit(jax.value_and_grad(loss))(params)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradients))
    square = sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(gradients))
    stepped = jax.tree.map(lambda x, g: x - 0.01 / square * g, params, gradients)
    np.testing.assert_allclose(loss(stepped), value - 0.01, atol=2e-3)
    weights = random_params(backbone)
    _, seen = analysis.taps(backbone, weights, images, names="z_half")
    masks_BxPxY = decoder.apply({"params": params["decoder"]}, seen["z_half"][0][:, 1:])
    assert masks_BxPxY.shape == (2, 6, Y)


def test_a_zero_token_has_a_mask_and_a_gradient():
    decoder = Depict(Y, "cross", **SIZES)
    zeros = jnp.zeros((1, P, d))
    params = decoder.init(jax.random.key(0), zeros)["params"]
    found, gradient = jax.value_and_grad(
        lambda tokens: decoder.apply({"params": params}, tokens).sum()
    )(zeros)
    assert np.isfinite(found) and np.isfinite(gradient).all()


@pytest.mark.parametrize(
    ("decoder", "shape", "message"),
    [
        (Depict(Y, "both"), (1, P, d), r"^form must be one of self, cross; got both\."),
        (Depict(Y), (1, 2, 3, d), r"^patches must be \(B, P, d\); got \(1, 2, 3, 10\)\. Take"),
    ],
)
def test_what_is_no_decoder_and_what_are_no_tokens(decoder, shape, message):
    with pytest.raises(ValueError, match=message):
        decoder.init(jax.random.key(0), jnp.zeros(shape))


def test_images_of_another_size_are_refused():
    model = Segmenter(ViT(8, 4, 3, width=4, depth=1, num_heads=1), Depict(Y))
    with pytest.raises(ValueError, match=r"^images must be .*got \(1, 8, 12, 3\)"):
        model.init(jax.random.key(0), jnp.zeros((1, 8, 12, 3)), train=False)


def test_the_backbone_counts_as_it_does_alone(images):
    model = Segmenter(BACKBONES["vit"], Depict(Y, **SIZES))
    shapes = jax.eval_shape(lambda key: model.init(key, images, train=False)["params"], KEY)
    counted = sum(leaf.size for leaf in jax.tree.leaves(shapes["backbone"]))
    assert counted == count_parameters(BACKBONES["vit"].clone(num_classes=0))

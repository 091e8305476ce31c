"""Models of text: sizes, who sees whom, the past, padding, and the passes that compute them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crate_jax import (
    CrateBert,
    CrateCausal,
    CrateLM,
    TostLM,
    ViT,
    analysis,
    create_model,
    generate,
    list_models,
)
from crate_jax.interop import to_state_dict
from crate_jax.models.causal_tssa import CausalTSSA
from crate_jax.models.cost import (
    abstract_parameters,
    activation_bytes,
    count_parameters,
    multiply_adds,
    step_flops,
)
from crate_jax.models.crate_alpha import OvercompleteISTA
from crate_jax.models.crate_bert import places_of
from crate_jax.models.layers import LayerNorm
from crate_jax.models.variants import VARIANTS

# Of the official code with GPT-2's padded vocabulary: without positions, with the 1,024 of them.
CAUSAL = {
    "crate_causal_base": (59_913_216, 60_699_648),
    "crate_causal_medium": (127_131_648, 128_180_224),
    "crate_causal_large": (241_566_720, 242_877_440),
    "crate_causal_xl": (449_510_400, 451_148_800),
    "crate_lm_1l": (6_538_112, 6_538_112 + 1024 * 128),
    "crate_lm_2l": (6_637_056, 6_637_056 + 1024 * 128),
    "crate_lm_3l": (6_736_000, 6_736_000 + 1024 * 128),
    "crate_lm_small": (59_891_712, 59_891_712 + 1024 * 768),
    "crate_lm_base": (81_148_416, 81_148_416 + 1024 * 768),
}
# (d, L, K), from the papers.
SIZES = {
    "crate_causal_base": (768, 12, 12),
    "crate_causal_medium": (1024, 24, 16),
    "crate_causal_large": (1280, 36, 20),
    "crate_causal_xl": (1600, 48, 25),
    "crate_lm_1l": (128, 1, 4),
    "crate_lm_2l": (128, 2, 4),
    "crate_lm_3l": (128, 3, 4),
    "crate_lm_small": (768, 6, 12),
    "crate_lm_base": (768, 12, 12),
}
# Printed, in millions and without positions; and (d, L, K).
TOST = {
    "tost_lm_base": (109.60, (768, 12, 12)),
    "tost_lm_medium": (303.66, (1024, 24, 16)),
    "tost_lm_large": (655.14, (1280, 36, 20)),
}
SMALL = dict(context_length=9, vocab_size=17, width=12, depth=2, num_heads=3)
CLASSES = {
    "crate_causal": CrateCausal,
    "crate_lm": CrateLM,
    "tost_lm": TostLM,
    "crate_bert": CrateBert,
}
PAD = 1


def start(model, key=0):
    """Parameters away from their initial values, so that no scale or bias is trivial."""
    params = jax.jit(lambda key: model.init(key, model.sample_input(), train=False))(
        jax.random.key(key)
    )["params"]
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(key + 1), len(leaves))
    moved = [x + 0.3 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(tree, moved)


@functools.cache
def made(family):
    """A small model of a family, and its parameters."""
    model = CLASSES[family](**SMALL)
    return model, start(model)


def texts(rows, length, seed=3):
    """Token ids without padding."""
    return jax.random.randint(jax.random.key(seed), (rows, length), 2, SMALL["vocab_size"])


causal = pytest.mark.parametrize("family", [f for f in CLASSES if CLASSES[f].causal])


# --- sizes ----------------------------------------------------------------------------------------


def test_every_model_of_text_is_in_the_table():
    of_text = {name for name, variant in VARIANTS.items() if variant.family in CLASSES}
    assert of_text == {*CAUSAL, *TOST, "crate_bert_base"}
    assert set(CAUSAL) == set(SIZES) and set(list_models("tost_lm_*")) == set(TOST)


@pytest.mark.parametrize("name", CAUSAL)
def test_parameter_count(name):
    without, whole = CAUSAL[name]
    d, L, K = SIZES[name]
    model = create_model(name)
    assert (model.width, model.depth, model.num_heads) == (d, L, K)
    assert (model.context_length, model.vocab_size) == (1024, 50_304)
    mssa = d * d + (d * d + d)
    wide = name.startswith("crate_lm")
    layer = mssa + (4 if wide else 1) * d * d + 4 * d
    assert without == 50_304 * d + L * layer + 2 * d * wide
    assert count_parameters(model) == whole == without + 1024 * d


@pytest.mark.parametrize("name", TOST)
def test_parameter_count_of_tost(name):
    printed, (d, L, K) = TOST[name]
    model = create_model(name)
    assert (model.width, model.depth, model.num_heads, model.bias) == (d, L, K, False)
    tssa = 2 * d * d + K + K * 1024  # U and W_out, temperatures, a bias of each place
    without = 50_304 * d + L * (tssa + 8 * d * d + 2 * d + 2 * d) + d
    assert round(without / 1e6, 2) == printed
    assert count_parameters(model) == without + 1024 * d
    biases = L * (d + d + 4 * d + d + 2 * d) + d  # of linear maps, and of norms
    assert count_parameters(model.clone(bias=True)) == without + 1024 * d + biases


def test_parameter_count_of_the_encoder_and_with_its_head():
    model, d = create_model("crate_bert_base"), 768
    encoder = (50_265 + 1 + 514) * d + 2 * d + 12 * (3 * d * d + 4 * d)
    head = d * d + d + 2 * d + 50_265
    assert (encoder, encoder + head) == (60_271_104, 60_913_497)
    assert count_parameters(model) == encoder + head
    assert count_parameters(model.clone(tied=False)) == encoder + head + 50_265 * d
    shapes = jax.tree.map(jnp.shape, abstract_parameters(model)["embedding"])
    assert shapes["positions"] == (514, d) and shapes["token_type"] == (d,)


def test_attention_alone_is_the_papers_layer():
    """Z ← Z + MSSA(LN(Z)) with a causal mask, in double precision; 2 d² weights a layer."""
    model = CrateCausal(**SMALL, nonlinearity="none")
    params, tokens, d = start(model), texts(2, 6), SMALL["width"]
    of_layer = sum(leaf.size for leaf in jax.tree.leaves(params["blocks"])) / SMALL["depth"]
    assert of_layer == 2 * d * d + 3 * d  # U and W_out; b_out and one norm
    assert model.tap_names == ("subspace_tokens", "attention", "mssa", "out")
    weights = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    table, places = (weights["embedding"][name] for name in ("tokens", "positions"))
    Z = table[np.asarray(tokens)] + places[:6]
    for i in range(SMALL["depth"]):
        layer = jax.tree.map(lambda leaf, i=i: leaf[i], weights["blocks"])
        Y = (Z - Z.mean(-1, keepdims=True)) / np.sqrt(Z.var(-1, keepdims=True) + 1e-5)
        Y = Y * layer["mssa_norm"]["scale"] + layer["mssa_norm"]["bias"]
        V = np.einsum("bnd,dkp->bknp", Y, layer["mssa"]["U"])
        S = np.exp(V @ V.swapaxes(-1, -2) / np.sqrt(V.shape[-1])) * np.tri(6)
        O = S / S.sum(axis=-1, keepdims=True) @ V  # noqa: E741
        Z = Z + np.einsum("bknp,kpd->bnd", O, layer["mssa"]["W_out"]) + layer["mssa"]["b_out"]
    logits = jax.jit(lambda p, x: model.apply({"params": p}, x, train=False))(params, tokens)
    np.testing.assert_allclose(logits, Z @ table.T, rtol=1e-4, atol=1e-3)
    after = generate(model, params, tokens[:, :5], 1)[:, -1]
    np.testing.assert_array_equal(after, np.asarray(logits)[:, 4].argmax(-1))
    with pytest.raises(ValueError, match=r"^model\.nonlinearity must be ista for weights with"):
        to_state_dict(params, model)


def test_a_head_with_a_table_of_its_own():
    model = CrateCausal(**SMALL, tied=False)
    params = start(model)
    assert params["head"]["tokens"].shape == (17, 12)
    tokens = texts(2, 5)
    features = model.apply({"params": params}, tokens, train=False, method="forward_features")
    logits = model.apply({"params": params}, tokens, train=False)
    expected = np.asarray(features) @ np.asarray(params["head"]["tokens"]).T
    np.testing.assert_allclose(logits, expected, atol=1e-5)
    tied = CrateCausal(**SMALL)
    assert count_parameters(model) == count_parameters(tied) + 17 * 12


@pytest.mark.parametrize("family", CLASSES)
def test_a_head_on_its_own_reads_some_of_the_tokens(family):
    model, params = made(family)
    tokens, variables = texts(2, 6), {"params": params}
    Z = model.apply(variables, tokens, train=False, method="forward_features")
    whole = model.apply(variables, tokens, train=False)
    last = model.apply(variables, Z[:, -2:], method="forward_head")
    np.testing.assert_allclose(last, whole[:, -2:], atol=1e-5)
    read = model.apply(variables, Z, pre_logits=True, method="forward_head")
    table = np.asarray(params["embedding"]["tokens"])
    bias = np.asarray(params["head"]["bias"]) if family == "crate_bert" else 0
    np.testing.assert_allclose(np.asarray(read) @ table.T + bias, whole, atol=1e-4)


def test_how_parameters_start():
    model = CrateCausal(context_length=40, vocab_size=60, width=48, depth=8, num_heads=4)
    params = model.init(jax.random.key(0), model.sample_input(), train=False)["params"]
    mssa = params["blocks"]["mssa"]
    for leaf, std in (
        (params["embedding"]["tokens"], 0.02),
        (params["embedding"]["positions"], 0.02),
        (mssa["U"], 0.02),
        (mssa["W_out"], 0.02 / 16**0.5),
    ):
        assert np.std(leaf) == pytest.approx(std, rel=0.05) and abs(np.mean(leaf)) < std / 10
    assert not mssa["b_out"].any()
    D = params["blocks"]["ista"]["D"]
    assert np.abs(D).max() <= (6 / 48) ** 0.5 and np.std(D) == pytest.approx(1 / 24**0.5, rel=0.03)


# --- the second half of CRATE-LM ------------------------------------------------------------------


def test_a_layer_of_crate_lm_is_odl_with_one_dictionary_and_no_residual():
    """CRATE-α's two dictionaries with D₁ = D; and the equations, with W = Dᵀ, of the authors."""
    model, params = made("crate_lm")
    _, seen = analysis.taps(model, params, texts(2, 7), ("z_half", "code", "odl", "out"))
    for layer in range(model.depth):
        own = jax.tree.map(lambda x, layer=layer: x[layer], params["blocks"])
        norm = LayerNorm(epsilon=model.EPSILON)
        Y = norm.apply({"params": own["odl_norm"]}, seen["z_half"][layer])
        two = {"D": own["odl"]["D"], "D1": own["odl"]["D"]}
        decoupled = OvercompleteISTA(model.eta, model.lmbda, 4 * model.width, decoupled=True)
        expected, code = decoupled.apply({"params": two}, Y)
        np.testing.assert_allclose(seen["out"][layer], expected, atol=1e-5)
        np.testing.assert_allclose(seen["code"][layer], code["code"], atol=1e-5)
        np.testing.assert_array_equal(seen["odl"][layer], seen["out"][layer])
        Y, W = (np.asarray(x, np.float64) for x in (Y, own["odl"]["D"].T))
        eta, shrink = model.eta, model.eta * model.lmbda
        A1 = np.maximum(eta * Y @ W.T - shrink, 0)
        A2 = np.maximum(A1 + eta * (Y @ W.T - A1 @ W @ W.T) - shrink, 0)
        assert 0 < (A2 == 0).mean() < 1
        np.testing.assert_allclose(seen["out"][layer], A2 @ W, atol=1e-5)


# --- who sees whom --------------------------------------------------------------------------------


@causal
def test_no_gradient_comes_from_a_later_token(family):
    """Of the logits at place n by what is embedded at each place."""
    model, params = made(family)
    tokens, n = texts(1, 8), 4

    def logits(moved):
        at = params["embedding"]["positions"].at[:8].add(moved)
        embedding = params["embedding"] | {"positions": at}
        whole = params | {"embedding": embedding}
        return model.apply({"params": whole}, tokens, train=False)[0, n].std()

    gradient = np.abs(jax.grad(logits)(jnp.zeros((8, 12)))).sum(1)
    assert (gradient[: n + 1] > 1e-6).all()
    np.testing.assert_array_equal(gradient[n + 1 :], 0)


@causal
def test_what_follows_changes_nothing_before(family):
    model, params = made(family)
    tokens = texts(2, 8)
    whole = model.apply({"params": params}, tokens, train=False)
    start = model.apply({"params": params}, tokens[:, :5], train=False)
    np.testing.assert_allclose(start, whole[:, :5], atol=1e-5)
    other = model.apply({"params": params}, tokens.at[:, 2].add(-1), train=False)
    assert np.abs(other - whole)[:, 2:].max() > 1e-2


def test_padding_never_changes_a_real_token():
    model, params = made("crate_bert")
    short = texts(2, 5)
    padded = jnp.pad(short, ((0, 0), (0, 4)), constant_values=PAD)
    apply = functools.partial(model.apply, {"params": params}, train=False)
    np.testing.assert_allclose(apply(padded)[:, :5], apply(short), atol=1e-6)
    between = jnp.concatenate([short[:, :2], jnp.full((2, 3), PAD), short[:, 2:]], axis=1)
    np.testing.assert_allclose(apply(between)[:, [0, 1, 5, 6, 7]], apply(short), atol=1e-6)
    # Each sees those after it, and places count.
    assert np.abs(apply(short.at[:, 4].add(-1)) - apply(short))[:, 0].max() > 1e-3
    assert np.abs(apply(short[:, ::-1])[:, ::-1] - apply(short)).max() > 1e-3


def test_the_gradient_of_padding_is_none_and_a_text_of_nothing_else_is_finite():
    model, params = made("crate_bert")
    tokens = jnp.full((2, 6), PAD).at[0, :3].set(texts(1, 3)[0])

    def loss(params, rows):
        logits = model.apply({"params": params}, tokens, train=False)
        return (logits[rows].std(axis=-1)).sum()

    real = jax.grad(lambda p: loss(p, (0, slice(3))))(params)
    positions = np.abs(real["embedding"]["positions"]).sum(1)
    assert (positions[2:5] > 0).all() and positions[1] == 0
    everything = jax.grad(lambda p: loss(p, ...))(params)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(everything))


def test_places_count_from_behind_the_padding():
    tokens = jnp.array([[4, PAD, 5, 6], [PAD, PAD, 7, PAD]])
    assert places_of(tokens, PAD).tolist() == [[2, 1, 3, 4], [1, 1, 2, 1]]


# --- the past -------------------------------------------------------------------------------------


@causal
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_text_that_grows_has_the_logits_of_the_whole(family, dtype):
    """By pieces of several lengths, up to the context."""
    model, params = made(family)
    model = model.clone(dtype=dtype)
    tokens = texts(2, 9)
    whole = model.apply({"params": params}, tokens, train=False)
    extend = jax.jit(functools.partial(model.apply, method="extend", mutable=["past"]))
    variables, end = {"params": params, "past": model.empty_past(2)}, 0
    assert all(leaf.shape[:1] == (2,) for leaf in jax.tree.leaves(variables["past"]["blocks"]))
    for length in (3, 1, 1, 4):
        end += length
        logits, grown = extend(variables, tokens[:, end - length : end])
        variables |= grown
        assert logits.dtype == jnp.float32 and int(variables["past"]["length"]) == end
        scale = np.abs(whole).max() * (1e-5 if dtype == jnp.float32 else 5e-2)
        np.testing.assert_allclose(logits, whole[:, end - 1], atol=scale)
    logits, _ = extend(variables, tokens[:, :1])  # of a tenth token
    assert np.isnan(logits).all()


def test_what_keeps_no_past_is_refused():
    message = r"^a model must be causal, .*; CrateBert has tokens that see those after\. Call it"
    with pytest.raises(ValueError, match=message):
        CrateBert(**SMALL).empty_past(1)

    class Other(CrateCausal):
        """With an attention that nobody knows."""

        @property
        def attention_part(self):
            return super().attention_part._replace(name="other")

    with pytest.raises(ValueError, match=r"Other has an attention without a past\. Call it on who"):
        Other(**SMALL).empty_past(1)
    model, params = made("crate_causal")
    with pytest.raises(ValueError, match=r"^extend must have the collection past .* Begin with"):
        model.apply({"params": params}, texts(1, 2), method="extend")


# --- what goes in ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "got"),
    [
        (np.zeros((1, 10), np.int32), r"int32 \(1, 10\)"),
        (np.zeros((2, 0), np.int32), r"int32 \(2, 0\)"),
        (np.zeros(3, np.int32), r"int32 \(3,\)"),
        (np.zeros((1, 3), np.float32), r"float32 \(1, 3\)"),
        ([[1, 2]], "list"),
    ],
)
def test_other_tokens_are_one_line(tokens, got):
    model, params = made("crate_causal")
    message = rf"^tokens must be an array \(B, N\) of integers with 1 <= N <= 9, .*; got {got}\."
    with pytest.raises(ValueError, match=message):
        model.apply({"params": params}, tokens, train=False)


@pytest.mark.parametrize("family", CLASSES)
def test_a_token_that_there_is_not_is_seen_in_the_logits_of_its_text(family):
    model, params = made(family)
    tokens = texts(3, 4).at[1, 2].set(17).at[2, 0].set(-1)
    logits = model.apply({"params": params}, tokens, train=False)
    assert np.isfinite(logits[0]).all() and np.isnan(logits[1:]).all()


def test_dropout_needs_a_key_and_acts():
    model, params = made("crate_bert")
    assert model.dropout == 0.1
    tokens = texts(2, 5)
    with pytest.raises(Exception, match="dropout"):
        model.apply({"params": params}, tokens, train=True)
    apply = functools.partial(model.apply, {"params": params}, tokens, train=True)
    one, other = (apply(rngs={"dropout": jax.random.key(i)}) for i in range(2))
    assert np.abs(one - other).max() > 1e-3


# --- how it is computed ---------------------------------------------------------------------------


@pytest.mark.parametrize("family", CLASSES)
@pytest.mark.parametrize("remat", ["none", "dots"])
def test_the_derived_backward_pass_knows_the_mask(family, remat):
    """Against automatic differentiation; and what padding there is, is no one's."""
    model, params = made(family)
    tokens = texts(2, 7).at[1, 5:].set(PAD)

    def loss(params, model):
        return jnp.sin(model.apply({"params": params}, tokens, train=False)).sum()

    gradient = jax.jit(jax.grad(loss), static_argnums=1)
    derived = gradient(params, model.clone(remat=remat, scan_unroll=1))
    plain = gradient(params, model.clone(backward="autodiff"))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * np.abs(b).max()),
        derived,
        plain,
    )


@pytest.mark.parametrize("kernel", ["pallas", "cudnn"])
def test_a_kernel_that_is_asked_for_is_refused_and_auto_takes_the_plain_program(kernel):
    model, params = made("crate_causal")
    tokens = texts(1, 4)
    with pytest.raises(ValueError, match=rf"^attention_kernel={kernel} must fit; it .* Set it to"):
        model.clone(attention_kernel=kernel).apply({"params": params}, tokens, train=False)
    auto, xla = (
        model.clone(attention_kernel=k).apply({"params": params}, tokens, train=False)
        for k in ("auto", "xla")
    )
    np.testing.assert_array_equal(auto, xla)


@pytest.mark.parametrize("family", CLASSES)
def test_half_precision_is_near(family):
    model, params = made(family)
    tokens = texts(2, 8)
    exact = model.apply({"params": params}, tokens, train=False)
    half = model.clone(dtype=jnp.bfloat16).apply({"params": params}, tokens, train=False)
    assert half.dtype == jnp.float32
    np.testing.assert_allclose(half, exact, atol=5e-2 * np.abs(exact).max())


def test_shared_rows_of_an_explicit_mesh():
    """The type of the tokens alone names the mesh."""
    mesh = jax.make_mesh((4,), ("rows",), devices=jax.devices()[:4])
    model, params = made("crate_lm")
    tokens = texts(4, 6)
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("rows"))

    def loss(params, tokens):
        return jnp.sin(model.apply({"params": params}, tokens, train=False)).sum()

    expected = jax.jit(jax.grad(loss))(params, tokens)
    with jax.set_mesh(mesh):
        got = jax.jit(jax.grad(loss))(params, jax.device_put(tokens, rows))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), got, expected)


@pytest.mark.parametrize("family", CLASSES)
def test_formulas_of_what_it_costs(family):
    model = CLASSES[family](**SMALL | dict(context_length=5))
    N, d, L, V = 5, 12, 2, 17
    second = {"crate_lm": 4 * 4 * d * d, "tost_lm": 2 * 4 * d * d}.get(family, 2 * d * d)
    with_tokens = 0 if family == "tost_lm" else 2 * N * N * d
    layer = N * 2 * d * d + with_tokens + N * second
    head = N * d * V + (N * d * d if family == "crate_bert" else 0)
    assert multiply_adds(model) == L * layer + head
    assert step_flops(model) == 6 * multiply_adds(model)
    assert activation_bytes(model) > L * N * d * 4


def test_who_has_a_last_norm():
    found = {family for family in CLASSES if "head_norm" in made(family)[1]}
    assert found == {"crate_lm", "tost_lm"} and CrateCausal(**SMALL).make_head_norm() is None
    assert not hasattr(ViT, "empty_past")


def test_biases_of_tost_are_a_choice():
    model, params = made("tost_lm")
    blocks = params["blocks"]
    assert set(blocks["tssa"]) == {"U", "tau", "W_out", "b_place"}
    assert set(blocks["mlp"]) == {"W_in", "W_out"} and set(blocks["mlp_norm"]) == {"scale"}
    assert blocks["tssa"]["b_place"].shape == (2, 3, 9)
    biased = abstract_parameters(model.clone(bias=True))
    assert set(biased["blocks"]["tssa"]) == {*blocks["tssa"], "b_U", "b_out"}
    assert set(biased["blocks"]["tssa_norm"]) == set(biased["head_norm"]) == {"scale", "bias"}
    start = model.init(jax.random.key(0), model.sample_input(), train=False)["params"]["blocks"]
    np.testing.assert_array_equal(start["tssa_scale"], np.float32(1e-5))
    np.testing.assert_array_equal(start["tssa"]["tau"], 1)


def test_what_tost_keeps_of_a_text_does_not_grow_with_the_context():
    short, long = (
        jax.tree.leaves(TostLM(**SMALL | dict(context_length=n)).empty_past(2)) for n in (8, 64)
    )
    assert [x.shape for x in short] == [x.shape for x in long]
    with pytest.raises(ValueError, match=r"^mask must be None for causal TSSA; got one\."):
        CausalTSSA(3, 4, context_length=9).init(
            jax.random.key(0), jnp.ones((1, 5, 12)), jnp.ones((5, 5), bool)
        )

"""Models of text against what their official implementations computed.

The cases are told in tests/golden/README.md.
"""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from crate_jax import CrateCausal, CrateLM, TostLM, analysis, generate, load_weights
from crate_jax.config import OptimConfig
from crate_jax.interop import to_state_dict
from crate_jax.training.optimizer import make_optimizer

GOLDEN = Path(__file__).parent.parent / "golden"
SIZES = dict(context_length=16, vocab_size=61, width=32, depth=2, num_heads=4)
MODELS = {
    "crate_gpt": CrateCausal(**SIZES),
    "crate_lm": CrateLM(**SIZES),
    "tost_lang": TostLM(**SIZES, bias=True),
}
# Taps, and what the official arrays of a layer are called.
TAPS = {
    "crate_gpt": {"subspace_tokens": "subspace_tokens", "attention": "attention"},
    "crate_lm": {"subspace_tokens": "subspace_tokens", "code": "sparse_code"},
    "tost_lang": {},
}
ATTENTION = {"crate_gpt": "mssa", "crate_lm": "mssa", "tost_lang": "tssa"}
# Those of two axes or more, but for the temperature and the places of causal TSSA.
DECAYING = {name: ("tokens", "positions", "U", "W_out", "D") for name in MODELS}
DECAYING["tost_lang"] = ("tokens", "positions", "U", "W_in", "W_out")


def relative(a, b) -> float:
    """Largest difference, as a share of the largest expected value."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert a.shape == b.shape
    return float(np.abs(a - b).max() / np.abs(b).max())


def loss_of(model, params, arrays):
    """Mean cross-entropy of the targets that count."""
    logits = model.apply({"params": params}, jnp.asarray(arrays["tokens"]), train=False)
    targets = jnp.asarray(arrays["targets"])
    each = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(targets, 0))
    return each.mean(where=targets >= 0)


@pytest.fixture(scope="module", params=MODELS)
def case(request):
    """Name, model, parameters, arrays and settings."""
    pytest.importorskip("torch")
    name, model = request.param, MODELS[request.param]
    params = jax.tree.map(jnp.asarray, load_weights(GOLDEN / f"{name}.pth", model))
    with np.load(GOLDEN / f"{name}.npz") as file:
        arrays = {key: file[key] for key in file.files}
    return name, model, params, arrays, json.loads((GOLDEN / f"{name}.json").read_text())


def test_the_configuration_is_the_models(case):
    _, model, _, _, settings = case
    assert model.context_length == settings["block_size"]
    assert model.vocab_size == settings["vocab_size"] and model.tied
    sizes = [settings[key] for key in ("n_embd", "n_layer", "n_head")]
    assert [model.width, model.depth, model.num_heads] == sizes


def test_every_layer_and_the_logits(case):
    name, model, params, arrays, _ = case
    layers = TAPS[name] | {ATTENTION[name]: "attn_out", "out": "out"}
    tokens = jnp.asarray(arrays["tokens"])
    logits, seen = analysis.taps(model, params, tokens, layers)
    for tap, official in layers.items():
        for layer, ours in enumerate(seen[tap]):
            theirs = arrays[f"layer{layer:02}/{official}"]
            assert relative(ours.reshape(theirs.shape), theirs) <= 1e-5, (tap, layer)
    assert relative(logits, arrays["logits"]) <= 1e-5
    _, caught = model.apply(
        {"params": params},
        tokens,
        train=False,
        capture_intermediates=lambda module, _: module.name == "embedding",
        mutable=["intermediates"],
    )
    (embedded,) = caught["intermediates"]["embedding"]["__call__"]
    assert relative(embedded, arrays["tokens0"]) <= 1e-6


def test_the_loss_and_every_gradient(case):
    _, model, params, arrays, _ = case
    value, gradient = jax.jit(jax.value_and_grad(loss_of, 1), static_argnums=0)(
        model, params, {key: arrays[key] for key in ("tokens", "targets")}
    )
    assert relative(value, arrays["loss"]) <= 1e-5
    ours = to_state_dict(gradient, model)
    theirs = {key[5:]: value for key, value in arrays.items() if key.startswith("grad/")}
    again = {name for name in ours if name == "lm_head.weight" or name.endswith(".attn.bias")}
    assert set(ours) - again == set(theirs)
    errors = {key: relative(ours[key], theirs[key]) for key in theirs}
    worst = max(errors, key=errors.__getitem__)
    assert errors[worst] <= 1e-4, (worst, errors[worst])


def test_ten_steps_of_adamw(case):
    name, model, params, arrays, settings = case
    adamw, steps = settings["adamw"], settings["steps"]
    optim = OptimConfig(
        lr=adamw["lr"],
        b1=adamw["betas"][0],
        b2=adamw["betas"][1],
        weight_decay=adamw["weight_decay"],
        decay_only=DECAYING[name],
        clip_norm=adamw["clip"],
    )
    tx = make_optimizer(optim, optax.constant_schedule(optim.lr))
    batch = {key: arrays[key] for key in ("tokens", "targets")}

    @jax.jit
    def step(params, state):
        loss, gradient = jax.value_and_grad(loss_of, 1)(model, params, batch)
        with jax.numpy_dtype_promotion("standard"):  # optax mixes integer counts and floats
            updates, state = tx.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, loss

    state, losses = tx.init(params), []
    for _ in range(steps):
        params, state, loss = step(params, state)
        losses.append(loss)
    np.testing.assert_allclose(losses, arrays["traj_adamw"], rtol=1e-5)
    ours = to_state_dict(params, model)
    for key, theirs in arrays.items():
        if key.startswith("after_adamw/"):
            error = np.abs(ours[key.removeprefix("after_adamw/")] - theirs).max()
            assert error <= 5e-3 * optim.lr, key


def test_the_most_likely_tokens_past_the_context(case):
    """Four tokens that grow to 22 where the context has 16."""
    _, model, params, arrays, _ = case
    theirs = arrays["generated_top_k_1"]
    assert theirs.shape[1] == 4 + model.context_length + 2
    ours = generate(model, params, theirs[:, :4], theirs.shape[1] - 4)
    np.testing.assert_array_equal(ours, theirs)

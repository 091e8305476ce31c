"""Models of text in PyTorch: equal to the official implementations, and ours equal to them."""

import functools
from pathlib import Path

import jax
import numpy as np
import pytest
from weights import random_params

from crate_jax import CrateBert, CrateCausal, CrateLM, TostLM, create_model, list_models
from crate_jax.cli.steps import text_steps
from crate_jax.models.cost import count_parameters
from crate_jax.tasks.losses import token_cross_entropy

torch = pytest.importorskip("torch")
from crate_jax.parity.compare import compare  # noqa: E402 (needs PyTorch)
from crate_jax.parity.comparison import table  # noqa: E402
from crate_jax.parity.torch_reference import from_flax_model  # noqa: E402

GOLDEN = Path(__file__).parent.parent / "golden"
SIZES = dict(context_length=16, vocab_size=61, width=32, depth=2, num_heads=4)
OFFICIAL = {
    "crate_gpt": CrateCausal(**SIZES),
    "crate_lm": CrateLM(**SIZES),
    "tost_lang": TostLM(**SIZES, bias=True),
}
# What the official arrays of a layer are called, where it is not the tap's name.
FILED = {
    "crate_gpt": {"mssa": "attn_out", "ista": "out"},
    "crate_lm": {"mssa": "attn_out", "code": "sparse_code", "odl": "out"},
    "tost_lang": {"tssa": "attn_out"},
}
TINY = dict(context_length=7, vocab_size=11, width=8, depth=2, num_heads=2)
MODELS = {
    "causal": CrateCausal(**TINY, head_dim=3, eta=0.3, lmbda=0.2),
    "causal, one full subspace": CrateCausal(**TINY | {"num_heads": 1}, tied=False),
    "lm": CrateLM(**TINY, overcompleteness=3),
    "tost": TostLM(**TINY, layer_scale=0.5),
    "tost, biases": TostLM(**TINY, bias=True, tied=False, head_dim=5, mlp_ratio=2),
    "bert": CrateBert(**TINY, dropout=0.0),
    "bert, a table for the head": CrateBert(**TINY, dropout=0.0, tied=False, pad_token=3),
}
TRAINED = ("causal", "lm", "tost", "bert")


def relative(a, b) -> float:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert a.shape == b.shape
    return float(np.abs(a - b).max() / np.abs(b).max())


def flat(named):
    """Arrays of two axes or more with the last ones joined, as the files have subspaces."""
    return {
        k: v.detach().flatten(3) if k == "subspace_tokens" else v.detach() for k, v in named.items()
    }


@pytest.mark.parametrize("name", OFFICIAL)
def test_reproduces_the_official_implementation(name):
    with np.load(GOLDEN / f"{name}.npz") as file:
        expected = dict(file)
    twin = from_flax_model(OFFICIAL[name])
    checkpoint = torch.load(GOLDEN / f"{name}.pth", weights_only=True)
    twin.load_state_dict(checkpoint["model"], strict=True)

    tokens = twin.inputs(expected["tokens"])
    assert relative(twin.embed(tokens).detach(), expected["tokens0"]) <= 1e-6
    logits, seen = twin.trace(tokens, twin.TAPS)
    assert relative(logits.detach(), expected["logits"]) <= 1e-6
    assert tuple(seen) == twin.TAPS
    seen, compared = flat(seen), set()
    for tap in twin.TAPS:
        for layer, ours in enumerate(seen[tap]):
            key = f"layer{layer:02}/{FILED[name].get(tap, tap)}"
            if key in expected:
                compared.add(key)
                assert relative(ours, expected[key]) <= 2e-6, (tap, layer)
    assert compared == {key for key in expected if key.startswith("layer")}

    targets = torch.tensor(expected["targets"]).long()
    targets[targets < 0] = -100  # what PyTorch leaves out
    loss = twin.loss(logits, targets)
    loss.backward()
    assert relative(loss.detach(), expected["loss"]) <= 1e-6
    gradients = {key: parameter.grad for key, parameter in twin.named_parameters()}
    assert set(gradients) == {k.removeprefix("grad/") for k in expected if k.startswith("grad/")}
    for key, gradient in gradients.items():
        assert relative(gradient, expected[f"grad/{key}"]) <= 1e-5, key


@pytest.mark.parametrize(
    "name",
    [
        name
        for kind in ("crate_causal", "crate_lm", "tost_lm", "crate_bert")
        for name in list_models(f"{kind}_*")
    ],
)
def test_as_many_parameters_as_the_jax_model(name):
    model = create_model(name)
    with torch.device("meta"):
        twin = from_flax_model(model)
    assert sum(p.numel() for p in twin.parameters()) == count_parameters(model)


def compared(model, tokens, **options):
    targets = np.roll(tokens, -1, axis=1)
    train = functools.partial(text_steps, model)
    options = {"loss": token_cross_entropy, "train": train, "rounds": 1} | options
    return compare(model, random_params(model), tokens, targets, **options)


@pytest.mark.parametrize("name", MODELS)
def test_the_jax_model_computes_the_same(name):
    model = MODELS[name]
    tokens = np.random.default_rng(1).integers(0, 11, (4, 6), np.int32)  # less than the context
    tokens[0, 3:] = getattr(model, "pad_token", 0)
    steps = 2 if name in TRAINED else 0
    found = compared(model, tokens, train_steps=steps, float64=name == "tost")
    assert found.first_difference is None and found.top1_agreement == 1
    assert found.images == 4 and found.examples == "texts" and found.gradient_images >= 2
    layers = [row for row in found.rows if row.name.startswith("layer")]
    twin = from_flax_model(model)
    assert len(layers) == 2 * len(twin.TAPS)
    gradients = [row for row in found.rows if row.kind == "gradients"]
    assert len(gradients) == len(list(twin.parameters()))
    assert set(found.training) == ({"adamw", "lion"} if steps else set())
    if name == "tost":
        assert 0 < max(found.training["adamw"]["torch_relative_to_float64"]) < 1e-5
    for row in found.rows:
        assert row.relative <= row.tolerance <= 1e-4 and np.isfinite(row.max_abs)
    assert found.losses["ours"] == pytest.approx(found.losses["torch"], rel=1e-5)
    assert "texts/s" in table(found) and "images" not in table(found)


@pytest.mark.parametrize(
    ("name", "path", "first"),
    [
        ("lm", "blocks/odl/D", "layer 1 code"),
        ("tost", "blocks/tssa/b_place", "layer 1 membership"),
        ("bert", "head/dense/bias", "logits"),
    ],
)
def test_one_weight_moved_is_found_where_it_is(name, path, first):
    model = MODELS[name]
    changed = jax.tree.map(np.array, random_params(model))
    *groups, leaf = path.split("/")
    array = functools.reduce(lambda tree, group: tree[group], groups, changed)[leaf]
    array[(1,) * array.ndim] += 0.1
    tokens = np.random.default_rng(1).integers(2, 11, (3, 7), np.int32)
    assert compared(model, tokens, reference_params=changed).first_difference == first


def test_starts_as_the_official_code_does():
    torch.manual_seed(0)
    sizes = dict(context_length=64, vocab_size=64, width=64, depth=2, num_heads=4)
    twin = from_flax_model(CrateLM(**sizes))
    block = twin.transformer["h"][0]
    for weight in (twin.lm_head.weight, twin.transformer["wpe"].weight, block.attn.c_attn.weight):
        assert weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert block.attn.c_proj.weight.std().item() == pytest.approx(0.01, rel=0.05)
    assert not block.attn.c_proj.bias.any()
    bound = (6 / 64) ** 0.5
    assert 0.98 * bound < block.ista.weight.abs().max().item() <= bound
    tost = from_flax_model(TostLM(**sizes, layer_scale=0.5)).transformer["h"][0]
    assert (tost.gamma1 == 0.5).all() and (tost.attn.temp == 1).all()
    assert not tost.attn.denom_bias.any() and tost.attn.c_attn.bias is None
    assert tost.mlp.c_proj.weight.std().item() == pytest.approx(0.01, rel=0.05)

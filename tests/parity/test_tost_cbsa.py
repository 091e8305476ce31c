"""The twins with running statistics: ToST's, and that of CBSA's frame with each attention.

They equal the official code on its golden files, and our models equal them.
"""

import dataclasses
import functools
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from crate_jax import Crate, ToST, create_model, list_models
from crate_jax.cli.steps import classifier_steps
from crate_jax.interop import to_state_dict
from crate_jax.models.cost import abstract_variables, count_parameters
from crate_jax.tasks.losses import cross_entropy

torch = pytest.importorskip("torch")
from crate_jax.parity import compare as comparing  # noqa: E402 (needs PyTorch)
from crate_jax.parity import comparison  # noqa: E402
from crate_jax.parity.difference import Comparison  # noqa: E402
from crate_jax.parity.runs import without_chance  # noqa: E402
from crate_jax.parity.torch_reference import (  # noqa: E402
    TorchCbsaFrame,
    TorchToST,
    from_flax_model,
)

GOLDEN = Path(__file__).parent.parent / "golden"
FRAME = dict(stem="convolutions", representatives=(2, 3))
ODD = dict(image_size=(12, 20), patch_size=4, num_classes=7, in_channels=2)
ODD |= dict(width=14, depth=2, num_heads=3, head_dim=5)
MODELS = {
    "tost": ToST(**ODD, mlp_ratio=2, class_layers=1, layer_scale=0.3),
    "tost_of_the_class_token": ToST(**ODD, mlp_ratio=3, tokens_norm=False),
    "cbsa": Crate(**ODD, **FRAME, attention="cbsa"),
    "tssa": Crate(**ODD, **FRAME, attention="tssa", pool="mean"),
    "mssa": Crate(**ODD, **FRAME, attention="mssa", eta=0.3, lmbda=0.2),
    "one_subspace": Crate(**ODD | dict(num_heads=1, head_dim=14), **FRAME),
}
FRAMES = {"cbsa": "cbsa", "cbsa_tssa": "tssa", "cbsa_mssa": "mssa"}


def relative(a, b) -> float:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert a.shape == b.shape
    return float(np.abs(a - b).max() / np.abs(b).max())


def golden(name):
    """What the official code computed, its constants and its weights."""
    with np.load(GOLDEN / f"{name}.npz") as file:
        expected = dict(file)
    (path,) = GOLDEN.glob(f"{name}.pth*")
    stored = torch.load(path, weights_only=True)
    state = stored.get("model", stored.get("state_dict"))
    state = {key.removeprefix("module."): value for key, value in state.items()}
    return expected, json.loads((GOLDEN / f"{name}.json").read_text()), state


def check_forward(twin, images, expected, names, prefix=""):
    """Embedding, taps and logits against the file; the logits."""
    logits, seen = twin.trace(images, twin.TAPS)
    assert relative(twin.embed(images).detach(), expected["tokens0"]) <= 1e-6
    for tap, theirs in names.items():
        for layer, value in enumerate(seen[tap]):
            wanted = expected[f"layer{layer:02d}/{theirs}"]
            assert relative(value.detach().reshape(wanted.shape), wanted) <= 2e-6, (tap, layer)
    assert relative(logits.detach(), expected[f"{prefix}logits"]) <= 2e-6
    return logits


def check_gradients(twin, logits, expected, prefix=""):
    loss = torch.nn.functional.cross_entropy(logits, torch.tensor(expected["labels"]).long())
    loss.backward()
    assert relative(loss.detach(), expected[f"{prefix}loss"]) <= 1e-6
    for key, parameter in twin.named_parameters():
        assert relative(parameter.grad, expected[f"{prefix}grad/{key}"]) <= 1e-5, key


@pytest.mark.parametrize("name", FRAMES)
def test_the_frame_reproduces_the_official_implementation(name):
    expected, config, state = golden(name)
    twin = TorchCbsaFrame(
        Crate(
            image_size=config["image_size"],
            patch_size=config["patch_size"],
            num_classes=config["num_classes"],
            width=config["dim"],
            depth=config["depth"],
            num_heads=config["heads"],
            head_dim=config["dim_head"],
            attention=FRAMES[name],
            stem="convolutions",
            representatives=tuple(config["representatives"]),
        )
    ).eval()
    twin.load_state_dict(state, strict=True)
    shown = {"cbsa": {"contraction": "contraction"}, "tssa": {"membership": "membership"}}
    names = {"subspace_tokens": "subspace_tokens", FRAMES[name]: "attn_out", "ista": "ista_out"}
    names |= shown.get(FRAMES[name], {})
    logits = check_forward(twin, torch.tensor(expected["images_nchw"]), expected, names)
    check_gradients(twin, logits, expected)


def tost_of(config, **fields):
    return ToST(
        image_size=config["image_size"],
        patch_size=config["patch_size"],
        num_classes=config["num_classes"],
        width=config["embed_dim"],
        depth=config["depth"],
        num_heads=config["num_heads"],
        mlp_ratio=int(config["mlp_ratio"]),
        layer_scale=config["eta"],
        class_layers=config["cls_attn_layers"],
        **fields,
    )


def test_tost_reproduces_the_official_implementation():
    """In evaluation mode, and in training mode with the running statistics after it."""
    expected, config, state = golden("tost")
    twin, images = TorchToST(tost_of(config)).eval(), torch.tensor(expected["images_nchw"])
    twin.load_state_dict(state, strict=True)
    names = {"membership": "membership", "tssa": "tssa_out", "mlp": "mlp_out", "out": "out"}
    check_gradients(twin, check_forward(twin, images, expected, names), expected)
    twin.train().zero_grad()
    logits = twin(images)
    assert relative(logits.detach(), expected["train/logits"]) <= 2e-6
    check_gradients(twin, logits, expected, "train/")
    buffers = dict(twin.named_buffers())
    assert len(buffers) == 9
    for name, value in buffers.items():
        assert relative(value, expected[f"train/buffers_after/{name}"]) <= 1e-6, name


def test_tost_without_the_norm_of_all_tokens():
    expected, config, state = golden("tost")
    twin = TorchToST(tost_of(config, tokens_norm=False)).eval()
    twin.load_state_dict(state, strict=True)
    with torch.no_grad():
        logits = twin(torch.tensor(expected["images_nchw"]))
    assert relative(logits, expected["tokens_norm_false/logits"]) <= 2e-6


@pytest.mark.parametrize("name", [*list_models("tost_*_224"), *list_models("cbsa_*")])
def test_as_many_parameters_as_the_jax_model(name):
    model = create_model(name)
    with torch.device("meta"):
        twin = from_flax_model(model)
    assert sum(p.numel() for p in twin.parameters()) == count_parameters(model)


def variables_of(model):
    """Off their start, so that what is left out shows."""
    rng = np.random.default_rng(0)

    def fill(path, leaf):
        values = 0.3 * rng.normal(size=leaf.shape)
        values = {"scale": 1 + values, "var": 1 + np.abs(values)}.get(path[-1].key, values)
        return np.asarray(values, leaf.dtype)

    return jax.tree.map_with_path(fill, abstract_variables(model))


def inputs_of(model):
    """Images and labels."""
    rng = np.random.default_rng(1)
    return rng.normal(size=(4, *model.input_shape)).astype(np.float32), np.array([0, 2, 1, 6])


def compare(model, **options):
    return comparing.compare(
        model,
        variables_of(model),
        *inputs_of(model),
        loss=functools.partial(cross_entropy, label_smoothing=comparing.SMOOTHING),
        train=functools.partial(classifier_steps, model),
        rate_scale=0.05,
        rounds=1,
        **options,
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_the_jax_model_computes_the_same(name):
    """Forward pass, gradients, and of some two steps with the statistics after them."""
    model, trained = MODELS[name], name in ("tost", "cbsa")
    found = compare(model, train_steps=2 * trained)
    assert found.first_difference is None
    twin = from_flax_model(model)
    layers = [f"layer {layer} {tap}" for layer in range(2) for tap in twin.TAPS]
    names = [row.name for row in found.rows]
    assert names[: 2 + len(layers)] == ["embedding tokens", *layers, "logits"]
    gradients = {f"gradient {name}" for name, _ in twin.named_parameters()}
    assert set(names[2 + len(layers) :]) == gradients
    assert set(found.training) == ({"adamw", "lion"} if trained else set())
    for training in found.training.values():
        assert training["statistics"] <= 1e-5
    assert (
        " ".join(comparison.table(found).split()).count("the running statistics after them")
        == 2 * trained
    )


def test_running_statistics_that_parted_are_found():
    """Of a training that leaves them where they were, as evaluation mode would."""
    model = MODELS["tssa"]
    variables, images, labels = variables_of(model), *inputs_of(model)
    reference = comparing._Reference.of(model, variables, images, labels)
    training = comparing._train_both(
        comparing.OPTIMIZERS["adamw"],
        lambda optim, steps: ([1.0], variables),
        reference,
        steps=1,
        float64=False,
    )
    assert training["statistics"] > 0.01
    agreeing = training | {"relative": [0.0], "weights_within": 1.0}
    found = Comparison("float32", "images", 4, [], 1.0, {}, 4, {"adamw": agreeing}, {})
    assert found.first_difference == "adamw running statistics after the last step"
    for other in (
        dataclasses.replace(found, training={"lion": agreeing}),
        dataclasses.replace(found, training={"adamw": agreeing | {"statistics": 1e-5}}),
        dataclasses.replace(found, dtype="bfloat16"),
    ):
        assert other.first_difference is None


def test_chance_is_left_out():
    model = MODELS["tost"].clone(dropout=0.1, drop_path=0.2)
    assert without_chance(model) == MODELS["tost"]
    crate = MODELS["cbsa"].clone(dropout=0.1)
    assert without_chance(crate) == MODELS["cbsa"]


def test_start_as_ours():
    """By their deviations; a mean of zero but for scales, and no constant that ours has not."""
    torch.manual_seed(0)
    sizes = dict(image_size=16, patch_size=4, num_classes=50, width=64, num_heads=4)
    for model in (
        ToST(**sizes, depth=1, layer_scale=0.5),
        *(Crate(**sizes, depth=1, stem="convolutions", attention=a) for a in FRAMES.values()),
    ):
        init = jax.jit(functools.partial(model.init, train=False))
        ours = init(jax.random.key(0), model.sample_input())
        twin = from_flax_model(model).state_dict()
        for name, value in to_state_dict(ours, model).items():
            theirs = twin[name].numpy()
            spread, mean = float(value.std()), float(value.mean())
            assert theirs.std() == pytest.approx(spread, rel=0.3 if value.size > 99 else 2), name
            assert theirs.mean() == pytest.approx(mean, abs=1e-6 + 4 * spread), name


def test_what_the_official_code_has_not():
    tost, frame = MODELS["tost"], MODELS["cbsa"]
    for model, message in (
        (tost.clone(attention="mssa"), r"model\.attention must be tssa for a PyTorch twin; got ms"),
        (frame.clone(nonlinearity="mlp"), r"must be mssa or tssa or cbsa and ista for a PyTorch t"),
        (frame.clone(ista_steps=2), r"model\.ista_steps must be 1 for a PyTorch twin; got 2"),
        (frame.clone(stem="patches"), r"must be mssa and ista for a PyTorch twin; got cbsa and is"),
    ):
        with pytest.raises(ValueError, match=message):
            from_flax_model(model)
    with pytest.raises(KeyError, match=r"taps must be among .*, membership, .*; got mssa"):
        TorchToST(tost).trace(torch.zeros(1, 2, 12, 20), ("mssa",))

"""`compare`: silent where both agree, and pointing at the first tensor that does not."""

import dataclasses
import functools
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from command import ROOT

from crate_jax import Crate, load_weights, save_weights
from crate_jax.cli import compare as command
from crate_jax.cli import main as cli
from crate_jax.cli.steps import classifier_steps
from crate_jax.interop import to_state_dict
from crate_jax.tasks.losses import cross_entropy

torch = pytest.importorskip("torch")
from crate_jax.parity import compare as comparing  # noqa: E402 (needs PyTorch)
from crate_jax.parity import comparison as compare_report  # noqa: E402
from crate_jax.parity import difference, runs, torch_reference  # noqa: E402

MODEL = Crate((8, 12), 4, 6, width=12, depth=3, num_heads=2, head_dim=5, in_channels=1, pool="mean")
GOLDEN = [
    f"--weights={ROOT / 'tests/golden/crate_cls.pth.tar'}",
    "--model=crate_tiny_patch16_224",
    "--model-kwargs",
    *["image_size=32", "patch_size=8", "num_classes=10", "width=48", "depth=3", "num_heads=4"],
]


@pytest.fixture(scope="module")
def inputs():
    images = np.random.default_rng(1).normal(size=(4, 8, 12, 1)).astype(np.float32)
    labels = np.random.default_rng(2).integers(0, 6, 4)
    init = jax.jit(lambda key: MODEL.init(key, images, train=False)["params"])
    return jax.device_get(init(jax.random.key(0))), images, labels


def compare(model, params, images, labels, **options):
    options = {"train": functools.partial(classifier_steps, model), "rounds": 1} | options
    loss = functools.partial(cross_entropy, label_smoothing=comparing.SMOOTHING)
    return comparing.compare(model, params, images, labels, loss=loss, **options)


def moved(params, path, by=1e-2):
    """The same parameters but for one weight."""
    changed = jax.tree.map(np.array, params)
    *groups, leaf = path.split("/")
    array = functools.reduce(lambda tree, name: tree[name], groups, changed)[leaf]
    array[(1,) * array.ndim if groups[0] == "blocks" else (0,) * array.ndim] += by
    return changed


@pytest.fixture(scope="module")
def agreeing(inputs):
    return compare(MODEL, *inputs, train_steps=3, float64=True)


def test_the_same_weights_are_within_tolerance(agreeing):
    assert agreeing.first_difference is None
    assert agreeing.top1_agreement == 1 and agreeing.images == 4
    names = [row.name for row in agreeing.rows]
    taps = ("subspace_tokens", "attention", "mssa", "z_half", "ista")
    layers = [f"layer {layer} {tap}" for layer in range(3) for tap in taps]
    assert names[:17] == ["embedding tokens", *layers, "logits"]
    # Patch and token norm, projection, class token, positions; 8 in each layer; the head's 4.
    assert len(names[17:]) == 8 + 3 * 8 + 4
    assert all(name.startswith("gradient ") for name in names[17:])
    for row in agreeing.rows:
        assert row.within and row.relative <= row.tolerance <= 1e-4 and row.cosine > 1 - 1e-6
        assert row.torch_relative is None
    assert agreeing.losses["ours"] == pytest.approx(agreeing.losses["torch"], rel=1e-5)
    assert set(agreeing.training) == {"adamw", "lion"}
    for training in agreeing.training.values():
        assert len(training["ours"]) == len(training["torch"]) == 3
        assert training["ours"][0] > training["ours"][2]
        assert training["weights_within"] > 0.99
        for whose in ("relative_to_float64", "torch_relative_to_float64"):
            assert 0 < max(training[whose]) < 1e-5
    assert all(rate > 0 for rate in agreeing.images_per_s.values())


@pytest.mark.parametrize(
    ("path", "first"),
    [
        ("embedding/pos_embedding", "embedding tokens"),
        ("blocks/mssa/U", "layer 1 subspace_tokens"),
        ("blocks/mssa/W_out", "layer 1 mssa"),
        ("blocks/ista/D", "layer 1 ista"),
        ("head/kernel", "logits"),
    ],
)
def test_one_weight_moved_is_found_where_it_is(inputs, path, first):
    params, images, labels = inputs
    found = compare(MODEL, params, images, labels, reference_params=moved(params, path))
    assert found.first_difference == first


def test_a_training_step_that_differs_is_found(inputs):
    def twice_the_rate(params, images, labels, optim, steps):
        optim = dataclasses.replace(optim, lr=2 * optim.lr)
        return classifier_steps(MODEL, params, images, labels, optim, steps)

    found = compare(MODEL, *inputs, train=twice_the_rate, train_steps=2)
    assert found.first_difference == "adamw loss of step 2"


def test_weights_that_parted_are_found(agreeing):
    run = agreeing.training["adamw"]
    apart = agreeing.training | {"adamw": run | {"weights_within": 0.9989}}
    found = dataclasses.replace(agreeing, training=apart)
    assert found.first_difference == "adamw weights after the last step"
    lion = agreeing.training | {"lion": run | {"weights_within": 0.5}}
    assert dataclasses.replace(agreeing, training=lion).first_difference is None
    late = agreeing.training | {"lion": run | {"relative": [0.0, 1e-5, 2e-4]}}
    assert dataclasses.replace(agreeing, training=late).first_difference == "lion loss of step 3"


def test_bfloat16_is_measured_from_float32_beside_autocast(inputs):
    found = compare(MODEL.clone(dtype=jnp.bfloat16), *inputs)
    assert found.dtype == "bfloat16"
    for row in found.rows:
        judged = difference.LOW_PRECISION_FACTOR * row.torch_relative
        assert row.tolerance == (np.inf if row.kind == "gradients" else judged)
    layers = [row for row in found.rows if row.kind == "layers"]
    assert 1e-3 < max(row.relative for row in layers) < 0.1
    assert 1e-3 < max(row.torch_relative for row in layers) < 0.1
    assert found.loss_tolerance == difference.LOW_PRECISION_LOSS
    assert found.first_difference is None


def test_difference_by_value():
    yardstick = np.array([[3.0, -4.0], [0.0, 0.0]])
    row = difference.difference("layer 0 mssa", yardstick + [[0.0, 0.02], [0, 0]], yardstick)
    assert row.max_abs == pytest.approx(0.02) and row.relative == pytest.approx(0.005)
    assert row.cosine == pytest.approx((9 + 15.92) / (5 * np.hypot(3, 3.98)))
    assert not row.within and row.tolerance == 1e-5
    assert difference.difference("logits", yardstick, yardstick).tolerance == 1e-4
    assert difference.difference("gradient cls_token", yardstick, yardstick).kind == "gradients"
    assert not difference.difference("logits", yardstick * np.nan, yardstick).within
    zero = np.zeros(3)
    assert difference.difference("logits", zero, zero).within
    low = difference.difference("logits", yardstick + 0.03, yardstick, yardstick + 0.004)
    assert low.torch_relative == pytest.approx(0.001) and low.within


def test_gradients_count_where_every_threshold_fell_alike():
    """Image 2 differs among four; image 3 only once image 2 is gone, as rounding may."""
    calls = []

    def ours(kept):
        calls.append(list(kept))
        return {"loss": np.float32(len(kept))}, np.ones((2, len(kept), 3, 5), bool)

    def theirs(kept):
        support = np.ones((2, len(kept), 3, 5), bool)
        gone = 2 if 2 in kept else 3
        support[1, list(kept).index(gone) if gone in kept else 0, 0, 0] = gone not in kept
        return {"loss": np.float32(0)}, support

    grads, _, count = comparing._gradients(ours, theirs, images=4, exact=True)
    assert calls == [[0, 1, 2, 3], [0, 1, 3], [0, 1]] and count == 2 and grads["loss"] == 2
    assert comparing._gradients(ours, theirs, images=4, exact=False)[2] == 4

    def never(kept):
        return {}, np.zeros((2, len(kept), 3, 5), bool)

    assert comparing._gradients(ours, never, images=3, exact=True)[2] == 3


def test_a_twin_without_a_threshold_keeps_every_image(inputs):
    params, images, labels = inputs
    loss = functools.partial(cross_entropy, label_smoothing=comparing.SMOOTHING)
    y = jnp.asarray(labels)
    ours, support = runs.our_gradients(MODEL, params, images, y, loss, None)
    assert support.shape == (1, 4, 1, 1) and support.all()
    module = torch_reference.from_flax_model(MODEL)
    state = {k: torch.tensor(v) for k, v in to_state_dict(params, MODEL).items()}
    module.load_state_dict(state)
    module.THRESHOLDED = None
    pixels = torch.tensor(images.transpose(0, 3, 1, 2))
    theirs, their_support = runs.torch_gradients(
        module, pixels, torch.tensor(labels), torch.float32
    )
    np.testing.assert_array_equal(support, their_support)
    assert ours.keys() == theirs.keys()
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)


def test_the_table_and_the_page_tell_the_same(agreeing):
    text = compare_report.table(agreeing)
    assert "layer 2 attention" in text and "the 10 that differ most" in text
    assert text.endswith("within tolerance\n") and "OUT" not in text
    page = compare_report.page(agreeing, {"weights": "a<b>.pth"})
    assert page.count("<svg") == 1 and "a&lt;b&gt;.pth" in page and "adamw step 3" in page
    assert "src=" not in page and "@import" not in page and "<link" not in page
    worse = [
        dataclasses.replace(row, relative=2e-5) if row.name == "layer 1 mssa" else row
        for row in agreeing.rows
    ]
    other = dataclasses.replace(agreeing, rows=worse)
    text = compare_report.table(other)
    assert text.endswith("DIFFERENT, first at: layer 1 mssa\n")
    lines = [line for line in text.splitlines() if line.endswith("OUT")]
    assert lines[0].startswith("layer 1 mssa")
    assert '<tr class="out"><th scope="row">layer 1 mssa</th>' in compare_report.page(other, {})


def main(capsys, *arguments):
    """A command in this process: status, stdout, stderr."""
    status = cli.main(["compare", *map(str, arguments)])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_the_command_on_a_golden_checkpoint(tmp_path, capsys):
    page = tmp_path / "comparison.html"
    status, out, err = main(capsys, *GOLDEN, f"--html={page}")
    assert status == 0, err
    assert "layer 2 ista" in out and "lion step 10" in out
    result = json.loads(out.splitlines()[-1])
    assert result["within_tolerance"] is True and result["first_difference"] is None
    assert max(v for k, v in result["relative"].items() if k.startswith("layer")) <= 1e-5
    assert max(result["training"]["adamw"]["relative"]) <= 1e-4
    assert result["training"]["adamw"]["weights_within"] >= 0.999
    assert page.read_text().startswith("<!doctype html>")


def test_the_command_names_the_layer_of_a_moved_weight_and_ends_with_1(tmp_path, capsys):
    model = Crate(32, 8, 10, width=48, depth=3, num_heads=4)
    params = load_weights(ROOT / "tests/golden/crate_cls.pth.tar", model)
    changed = moved(params, "blocks/ista/D", by=1e-3)
    save_weights(tmp_path / "changed.safetensors", changed, model)
    status, out, _ = main(
        capsys, *GOLDEN, f"--reference={tmp_path / 'changed.safetensors'}", "--train-steps=0"
    )
    assert status == 1
    result = json.loads(out.splitlines()[-1])
    assert result["within_tolerance"] is False
    assert result["first_difference"] == "layer 1 ista"


def test_the_command_on_a_folder_of_images(tmp_path, capsys, inputs):
    import cv2

    save_weights(tmp_path / "weights.safetensors", inputs[0], MODEL)
    (tmp_path / "images" / "below").mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (3, 20, 30, 1), np.uint8)
    for i, image in enumerate(pixels):
        cv2.imwrite(str(tmp_path / "images" / "below" / f"{i}.png"), image)
    status, out, err = main(
        capsys,
        f"--weights={tmp_path / 'weights.safetensors'}",
        f"--images={tmp_path / 'images'}",
        "--train-steps=0",
    )
    assert status == 0, err
    result = json.loads(out.splitlines()[-1])
    assert result["images"] == 3 and result["inputs"] == str(tmp_path / "images")


def test_what_the_command_refuses(tmp_path, capsys, inputs, monkeypatch):
    weights = tmp_path / "weights.safetensors"
    save_weights(weights, inputs[0], MODEL)
    (tmp_path / "empty").mkdir()
    page = tmp_path / "page.html"
    page.write_text("before")
    cases = [
        (["--train-steps=-1"], "--train-steps must be >= 0"),
        (["--rate-scale=0"], "--rate-scale > 0"),
        (["--images=x", "--dataset=digits"], "one of --images and --dataset"),
        ([f"--images={tmp_path / 'empty'}"], "--images must be a folder with images"),
        (["--dataset=digits"], "model.num_classes must equal the 10 classes of digits/test; got 6"),
        ([f"--html={tmp_path / 'none' / 'page.html'}"], "must lie in an existing folder"),
        (["--model-kwargs", "width=3"], "got width 3 in the place of 12. Leave --model-kwargs out"),
        (["--model=crate_tiny_patch16_224", "--model-kwargs", "width"], "must be FIELD=VALUE"),
        (["--model=vit_tiny_patch16_224", f"--html={page}"], "family vit in the place of crate"),
        (["--batch_size=0"], "--batch_size must be >= 1; got 0"),
    ]
    for arguments, message in cases:
        status, out, err = main(capsys, f"--weights={weights}", *arguments)
        assert status == 2 and out == "" and message in err, (arguments, err)
        assert err.count("\n") == 1 and err.startswith("error: ")
    assert page.read_text() == "before"
    assert not list(tmp_path.glob(".page.html*"))
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    status, _, err = main(capsys, f"--weights={weights}", f"--html={page}")
    assert status == 2 and "--html must have matplotlib. Install it: pip install" in err
    monkeypatch.delitem(sys.modules, "crate_jax.parity.compare")
    monkeypatch.delattr("crate_jax.parity.compare")
    monkeypatch.setitem(sys.modules, "torch", None)
    status, _, err = main(capsys, f"--weights={weights}")
    assert status == 2 and "compare must have PyTorch; it is missing. Install it" in err


def test_a_model_of_features_has_no_twin(tmp_path, capsys, inputs):
    model = MODEL.clone(num_classes=0)
    features = {name: of for name, of in inputs[0].items() if name != "head"}
    save_weights(tmp_path / "features.safetensors", features, model)
    status, out, err = main(capsys, f"--weights={tmp_path / 'features.safetensors'}")
    message = "model.num_classes must be at least 1 for its PyTorch twin; got 0, features. Set it"
    assert (status, out) == (2, "") and err.startswith(f"error: {message} by --model and")
    with pytest.raises(ValueError, match=message):
        torch_reference.from_flax_model(model)

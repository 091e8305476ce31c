"""Models of text: the sizes that `summary` takes, what `compare` does, and one line for a task.

The other commands are in test_family_commands.py.
"""

import json

import pytest
from command import ROOT
from weights import random_params

from crate_jax import CrateBert, CrateLM, save_weights
from crate_jax.cli.flags import parse_config
from crate_jax.cli.main import main
from crate_jax.cli.running import run_command
from crate_jax.tasks import Classify
from crate_jax.training.loop import train

TINY = dict(context_length=5, vocab_size=7, width=6, depth=2, num_heads=2)
MODEL = CrateLM(**TINY)
KWARGS = ["--model-kwargs", *(f"{name}={value}" for name, value in TINY.items())]
NO_TASK = "of text. Choose a model of images, or the task next_token."


@pytest.fixture
def weights(tmp_path):
    save_weights(tmp_path / "w.safetensors", random_params(MODEL), MODEL)
    return tmp_path / "w.safetensors"


def result(capsys, *arguments):
    assert main([str(argument) for argument in arguments]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def refused(capsys, status):
    out, err = capsys.readouterr()
    assert status == 2 and out == ""
    (line,) = err.splitlines()
    return line


def test_summary(capsys):
    found = result(capsys, "summary", "crate_causal_base")
    assert found["context_length"] == found["tokens"] == 1024 and found["vocab_size"] == 50_304
    assert found["parameters"] == 60_699_648 and "image_size" not in found
    layer = 1024 * (2 * 768**2 + 2 * 1024 * 768 + 2 * 768**2)
    assert found["gmacs"] == round((12 * layer + 1024 * 768 * 50_304) / 1e9, 3)
    assert found["activation_mib_per_text"] > 0
    sizes = ["--context_length", "64", "--vocab_size", "256"]
    small = result(capsys, "summary", "crate_lm_1l", *sizes)
    assert small["tokens"] == 64
    assert small["parameters"] == 6_538_112 - (50_304 - 256) * 128 + 64 * 128
    line = refused(capsys, main(["summary", "crate_lm_1l", "--image_size", "32"]))
    assert "model.image_size must name a field of crate_lm_1l." in line
    line = refused(capsys, main(["summary", "vit_tiny_patch16_224", "--vocab_size", "32"]))
    assert "model.vocab_size must name a field of vit_tiny_patch16_224." in line


def test_training_and_evaluating_are_refused(weights, capsys, tmp_path):
    recipe, name = str(ROOT / "configs/digits.py"), "--config.model.name=crate_lm_1l"
    flags = [name, "--config.batch_size=16"]  # as the tests have eight devices
    status = run_command(lambda: train(parse_config(recipe, flags), tmp_path / "run"))
    assert refused(capsys, status).endswith(f"got a CrateLM, {NO_TASK}")
    model = ["--model=crate_lm_2l", *KWARGS]
    evaluate = ["evaluate", f"--weights={weights}", "--dataset=digits", *model]
    line = refused(capsys, main(evaluate))
    assert (
        "data.dataset must be one of tokens, text, pydoc for a model of text; got digits." in line
    )
    with pytest.raises(ValueError, match=r"^model must classify images here; got a CrateLM, of te"):
        Classify(MODEL)


def test_compare_trains_without_dropout(capsys, tmp_path):
    pytest.importorskip("torch")
    model = CrateBert(**TINY)
    assert model.dropout
    save_weights(tmp_path / "w.safetensors", random_params(model), model)
    arguments = ["--batch_size=3", "--train-steps=1"]
    found = result(capsys, "compare", f"--weights={tmp_path / 'w.safetensors'}", *arguments)
    assert found["texts"] == 3 and found["gradient_texts"] and set(found["texts_per_s"])
    assert not any("image" in key for key in found)
    assert found["inputs"] == "seeded random token ids" and found["within_tolerance"]
    assert set(found["training"]) == {"adamw", "lion"}


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("images", "x"),
        ("dataset", "digits"),
        ("data_dir", "x"),
        ("split", "test"),
        ("image_key", "x"),
        ("label_key", "x"),
        ("transforms", "x"),
    ],
)
def test_compare_refuses_flags_about_images(flag, value, weights, capsys):
    pytest.importorskip("torch")
    line = refused(capsys, main(["compare", f"--weights={weights}", f"--{flag}={value}"]))
    assert line.startswith(f"error: --{flag} must be left out for a model of text; got ")
    assert line.endswith(". compare draws token ids for it.")


def test_compare_fits_no_images(weights, capsys):
    pytest.importorskip("torch")
    arguments = ["--fit", "image_size", "--method", "right"]
    line = refused(capsys, main(["compare", f"--weights={weights}", *arguments]))
    assert "for a model of text; got image_size." in line
    arguments = ["--fit", "eta", "--method", "right"]
    line = refused(capsys, main(["compare", f"--weights={weights}", *arguments]))
    assert line.startswith("error: --method must be left out for a model of text; got right.")

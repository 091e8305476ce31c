"""`convert`: how it resizes and whose names it writes; the flags of `evaluate` that it shares."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest
from command import ROOT, TINY, environment, run
from weights import assert_equal_trees

from crate_jax import (
    CrateAlpha,
    Preprocessing,
    load_pretrained,
    load_weights,
    preprocessing,
    save_weights,
)
from crate_jax.cli.main import main
from crate_jax.interop import read_class_names
from crate_jax.interop.convert import find_layout
from crate_jax.models.cost import abstract_parameters
from crate_jax.models.zoo import architecture

SMALL = dict(width=6, depth=1, num_heads=2, num_classes=3, patch_size=4)
MODEL = CrateAlpha(image_size=8, **SMALL)
NAMED = ["--model=crate_alpha_tiny_patch8_224", "--model-kwargs", "image_size=12"]
NAMED += [f"{name}={value}" for name, value in SMALL.items()]


@pytest.fixture
def weights(tmp_path):
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape), abstract_parameters(MODEL))
    save_weights(tmp_path / "w.safetensors", params, MODEL)
    return tmp_path / "w.safetensors"


def refused(capsys, *arguments):
    """The one line of a command that must fail."""
    assert main([str(a) for a in arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_method_and_layout_reach_the_file(weights, capsys):
    larger, target = MODEL.clone(image_size=12), weights.with_name("w.npz")
    convert = ["convert", f"--from={weights}", f"--to={target}", *NAMED, "--fit", "image_size"]
    positions = []
    for method in ("right", "crate_alpha"):
        assert main([*convert, f"--method={method}", "--layout=jax"]) == 0
        result = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert len(result["fitted"]) == 1
        expected = load_weights(weights, larger, fit=("image_size",), method=method)
        positions.append(load_weights(target, larger)["embedding"]["pos_embedding"])
        np.testing.assert_array_equal(positions[-1], expected["embedding"]["pos_embedding"])
        with np.load(target) as file:
            prefix = find_layout(larger, "jax").prefix
            assert f"{prefix}head/kernel" in file and "blocks/mssa/U" not in file
    assert np.abs(positions[0] - positions[1]).max() > 1e-3


@pytest.mark.parametrize("suffix", ["safetensors", "npz", "pth"])
def test_names_of_classes_go_along_where_they_can(weights, capsys, suffix):
    if suffix == "pth":
        pytest.importorskip("torch")
    params, names = load_weights(weights, MODEL), ("ant", "bee", "cat")
    save_weights(weights, params, MODEL, class_names=names)
    target = weights.with_name(f"x.{suffix}")
    assert main(["convert", f"--from={weights}", f"--to={target}"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    held = suffix != "pth"
    assert read_class_names(target) == (names if held else ())
    told = [] if held else ["left aside the names of 3 classes, for a bare state dict"]
    assert result["fitted"] == told


def test_a_folder_for_the_hub(weights, capsys):
    save_weights(weights, load_weights(weights, MODEL), MODEL, class_names=("ant", "bee", "cat"))
    folder = weights.with_name("mine")
    convert = ["convert", f"--from={weights}", f"--to={folder}/", "--license=mit"]
    assert main(convert) == 0
    model, params = load_pretrained(str(folder))
    assert architecture(model) == architecture(MODEL)
    assert_equal_trees(params, load_weights(weights, MODEL))
    assert read_class_names(folder) == ("ant", "bee", "cat")
    assert "license: mit" in (folder / "README.md").read_text()
    assert preprocessing(str(folder)).transforms == "resize((8, 8))"  # the usual one
    line = refused(capsys, *convert[:2], f"--to={weights.with_name('w.npz')}", "--license=mit")
    assert line == "error: --license must go with --to FOLDER/. End the path in a slash."


def test_a_run_becomes_a_folder_with_its_metrics(tmp_path, capsys):
    """And `evaluate` of the folder measures what the run measured, by the run's preprocessing."""
    other = ["--config.data.eval_transforms=resize_shorter(20)|center_crop(16)"]
    other += ["--config.data.mean=0.25,", "--config.total_steps=4", f"--workdir={tmp_path}/run"]
    status, out, err = run("-m", "crate_jax", "train", "--config=digits", *TINY, *other)
    assert status == 0, err
    measured = json.loads(out.splitlines()[-1])
    assert main(["convert", f"--from={tmp_path}/run", f"--to={tmp_path}/mine/"]) == 0
    prepared = preprocessing(f"{tmp_path}/mine")
    assert prepared == Preprocessing((16, 16), (0.25,), (0.5,), 0.8, "bilinear")
    text = (tmp_path / "mine/README.md").read_text()
    assert f"| top1 | {measured['test/top1']:.4g} |" in text and "Measured on digits, test" in text
    model, _ = load_pretrained(f"{tmp_path}/mine")
    kwargs = [f"{k}={v}" for k, v in architecture(model).items() if k in FIELDS]
    capsys.readouterr()
    evaluate = ["evaluate", f"--weights={tmp_path}/mine", "--model=crate_tiny_patch16_224"]
    assert main([*evaluate, "--dataset=digits", "--model-kwargs", *kwargs]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    for name in ("loss", "top1"):
        np.testing.assert_allclose(found[name], measured[f"test/{name}"], rtol=1e-5)


FIELDS = {"image_size", "patch_size", "num_classes", "width", "depth", "num_heads", "head_dim"}
FIELDS |= {"pool", "in_channels"}


@pytest.mark.parametrize("offline", [False, True])
def test_an_address_that_cannot_be_reached_is_one_line(tmp_path, offline):
    """As a program of its own, which reads the variables of the hub's client."""
    variables = {"HF_ENDPOINT": "http://127.0.0.1:1", "HF_HUB_OFFLINE": str(int(offline))}
    convert = ["-m", "crate_jax", "convert", "--from=hf://me/mine/w.npz", f"--to={tmp_path}/w.npz"]
    done = subprocess.run(
        [sys.executable, *convert], cwd=ROOT, env=environment() | variables, capture_output=True
    )
    (line,) = done.stderr.decode().splitlines()
    assert done.returncode == 2
    why = "in the cache while HF_HUB_OFFLINE is set" if offline else "reachable; it is not (Connect"
    assert line.startswith(f"error: hf://me/mine/w.npz must be {why}")
    assert line.endswith("weights/hf/me/mine/w.npz.")


def test_mistakes_are_one_line(weights, capsys):
    convert = ["convert", f"--from={weights}", f"--to={weights.with_name('w.npz')}"]
    line = refused(capsys, *convert, "--layout=timm")
    assert "layout must be one of torch, jax, clipa for CrateAlpha; got timm" in line
    assert "--method must go with --fit" in refused(capsys, *convert, "--method=right")
    fit = [*convert, *NAMED, "--fit", "image_size", "--method=best"]
    assert "method must be one of right, crate_alpha, official_maps; got best" in refused(
        capsys, *fit
    )
    evaluate = ["evaluate", f"--weights={weights}", *NAMED, "--dataset=synthetic"]
    assert "must be one of right, crate_alpha, official_maps; got best" in refused(
        capsys, *evaluate, "--fit", "image_size", "--method=best"
    )
    evaluate += ["--method=right"]
    assert "--method must go with --fit" in refused(capsys, *evaluate)

"""`convert`: how it resizes and whose names it writes; the flags of `evaluate` that it shares."""

import json

import jax
import numpy as np
import pytest

from crate_jax import CrateAlpha, load_weights, save_weights
from crate_jax.cli.main import main
from crate_jax.interop import read_class_names
from crate_jax.interop.convert import find_layout
from crate_jax.models.cost import abstract_parameters

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

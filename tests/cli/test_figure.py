"""`figure`: every figure of a run, its files and its JSON, and what it refuses."""

import csv
import sys

import cv2
import numpy as np
import pytest

pytest.importorskip("matplotlib")

from crate_jax.analysis import taps
from crate_jax.checkpoint.reading import read_trained
from crate_jax.cli import figures
from crate_jax.cli.drawings import FIGURES, HEEDED_BY
from crate_jax.config import DataConfig, ModelConfig, OptimConfig, TrainConfig
from crate_jax.models.zoo import build_model
from crate_jax.training.loop import train

FIELDS = dict(image_size=(16, 16), patch_size=(8, 8), in_channels=1, width=16, depth=2, num_heads=2)


def config(name="crate_tiny_patch16_224", **fields):
    return TrainConfig(
        batch_size=48,
        eval_batch_size=16,
        total_steps=1,
        log_objective_every_steps=0,
        model=ModelConfig(name=name, **FIELDS, **fields),
        data=DataConfig(
            eval_split="test[:20]", train_transforms="resize(16)", eval_transforms="resize(16)"
        ),
        optim=OptimConfig(lr=1e-3),
    )


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("crate")
    train(config(), folder)
    return folder


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vit")
    train(config("vit_tiny_patch16_224"), folder)
    return folder


def read(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_of_a_run(name, workdir, call, tmp_path):
    output = tmp_path / f"{name}.svg"
    status, found, err = call("figure", name, "--workdir", workdir, "--output", output)
    assert status == 0, err
    assert found["figure"] == name and found["step"] == 1 and found["output"] == str(output)
    assert output.read_bytes().startswith(b"<?xml")
    assert found["data"] == str(tmp_path / f"{name}.csv")
    assert read(found["data"]) and any(x.isdigit() for x in found["alt"])


def test_the_data_is_that_of_the_model(workdir, call, tmp_path):
    """Bases, atoms and measures beside the parameters of the checkpoint and the old measure."""
    params, _, _ = read_trained(workdir, "latest")
    output = tmp_path / "a.png"
    given = ["--workdir", workdir, "--output", output]
    assert call("figure", "subspaces", *given, "--layer", 2)[0] == 0
    U = params["blocks"]["mssa"]["U"][1].reshape(16, 16)
    U = U / np.linalg.norm(U, axis=0)
    cosines = [float(row["cosine"]) for row in read(tmp_path / "a.csv")]
    np.testing.assert_allclose(np.reshape(cosines, (16, 16)), U.T @ U, atol=1e-6)
    assert call("figure", "atoms", "--workdir", workdir, "--output", output)[0] == 0
    D, W = params["blocks"]["ista"]["D"][0], params["embedding"]["projection"]["kernel"]
    for row in read(tmp_path / "a.csv")[::37]:
        pixel = W[8 * (int(row["row"]) - 1) + int(row["column"]) - 1]
        expected = float(pixel @ D[:, int(row["atom"]) - 1])
        assert float(row["value"]) == pytest.approx(expected, rel=1e-4)
    assert call("figure", "objective", "--workdir", workdir, "--output", output)[0] == 0
    rows = read(tmp_path / "a.csv")
    assert {row["of"] for row in rows} == {"test", "train", "before training"}
    assert {row["measure"] for row in rows} == {"subspace_rate", "zeros", "rate", "rate_reduction"}


def test_a_folder_of_images(workdir, call, tmp_path):
    """Its images in the order of their names; folders are kinds; where the class token looks."""
    rng = np.random.default_rng(0)
    stored = {}
    for name in ("x/1.png", "x/2.png", "y/1.png"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        stored[name] = rng.integers(0, 256, (16, 16), np.uint8)
        cv2.imwrite(str(tmp_path / "in" / name), stored[name])
    output = tmp_path / "a.svg"
    from_folder = ["--workdir", workdir, "--images", tmp_path / "in", "--output", output]
    assert call("figure", "heads", *from_folder)[0] == 0
    assert {row["kind"] for row in read(tmp_path / "a.csv")} == {"x", "y"}
    status, found, err = call("figure", "saliency", *from_folder, "--layer", 1, "--head", 2)
    assert status == 0 and "in layer 1: 3 images" in found["alt"], err
    shares = [float(row["share"]) for row in read(tmp_path / "a.csv")]
    params, _, _ = read_trained(workdir, "latest")
    made = config(num_classes=10)
    mean, std = made.data.mean[0], made.data.std[0]
    x = (np.stack([*stored.values()])[..., None] / 255 - mean) / std
    _, seen = taps(build_model(made.model), params, x.astype(np.float32), "attention")
    looks = np.asarray(seen["attention"])[0, :, 1, 0, 1:]
    expected = looks / looks.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(np.reshape(shares, (3, 4)), expected, rtol=1e-4)


def test_images_of_another_size(workdir, call, tmp_path):
    """The grid grows, positions are interpolated, and the maps are those of `taps`."""
    rng = np.random.default_rng(1)
    (tmp_path / "in").mkdir()
    stored = rng.integers(0, 256, (24, 24), np.uint8)
    cv2.imwrite(str(tmp_path / "in/1.png"), stored)
    given = ["--workdir", workdir, "--size", 24, "--output", tmp_path / "a.svg"]
    for name in ("pca", "segmentation", "heads", "operators"):
        assert call("figure", name, *given)[0] == 0, name
    status, _, err = call("figure", "saliency", *given, "--images", tmp_path / "in", "--head", 1)
    assert status == 0, err
    shares = [float(row["share"]) for row in read(tmp_path / "a.csv")]
    params, _, _ = read_trained(workdir, "latest")
    made = config(num_classes=10)
    x = (stored[None, ..., None] / 255 - made.data.mean[0]) / made.data.std[0]
    _, seen = taps(build_model(made.model), params, x.astype(np.float32), "attention")
    looks = np.asarray(seen["attention"])[-1, 0, 0, 0, 1:]
    assert len(shares) == 9
    np.testing.assert_allclose(shares, looks / looks.sum(), rtol=1e-4)


def test_several_runs(workdir, vit, call, tmp_path):
    output = tmp_path / "a.svg"
    both = ["--workdir", workdir, "--against", vit, "--output", output]
    assert call("figure", "operators", *both)[0] == 0
    assert {row["model"] for row in read(tmp_path / "a.csv")} == {"MSSA + ISTA", "MHSA + MLP"}
    assert call("figure", "objective", *both)[0] == 0
    rows = {(row["of"], row["measure"]) for row in read(tmp_path / "a.csv")}
    assert (vit.name, "rate") in rows and (vit.name, "zeros") not in rows
    assert (workdir.name, "zeros") in rows
    assert call("figure", "curves", *both)[0] == 0
    same = ["--workdir", workdir, "--against", workdir, "--output", output]
    assert call("figure", "operators", *same)[0] == 0
    assert len({row["model"] for row in read(tmp_path / "a.csv")}) == 2


def test_what_it_refuses(workdir, vit, call, tmp_path):
    """Each in one line, with status 2, and nothing is written."""
    bad = tmp_path / "bad"
    bad.mkdir()
    (tmp_path / "none").mkdir()
    (bad / "a.png").write_bytes(b"no image")
    output = tmp_path / "a.svg"
    for arguments, message in (
        (["saliency", "--layer", 3], "--layer must be one of 1 … 2; got 3"),
        (["subspaces", "--layer", 0], "--layer must be one of 1 … 2; got 0"),
        (["saliency", "--head", 3], "--head must be one of 1 … 2; got 3"),
        (["atoms", "--layer", 2], "--layer must be 1 for atoms"),
        (["heads", "--head", 1], "--head must go with saliency; the figure heads does not heed it"),
        (["tokens", "--layer", 1], "the figure tokens does not heed it. Leave it out"),
        (["atoms", "--against", vit], "--against must go with objective, halves, geometry, op"),
        (["saliency", "--against", vit], "the figure saliency does not heed it"),
        (["dictionary", "--size", 24], "--size must go with tokens, saliency, heads, pca, seg"),
        (["objective", "--size", 24], "the figure objective does not heed it"),
        (["confusion", "--images", bad], "--images must go with tokens, saliency, heads, pca"),
        (["curves", "--step", 1], "--step must go with objective, halves, geometry, tokens"),
        (["tokens", "--examples", 3], "--examples must go with objective, halves, geometry, sal"),
        (["pca", "--images", bad, "--examples", 3], "--examples must go without --images"),
        (["heads", "--examples", 0], "--examples must be >= 1; got 0"),
        (["saliency", "--size", 0], "--size must be >= 1; got 0"),
        (["saliency", "--size", 20], "sides that are multiples of the patch, 8 x 8; got 20 x 20"),
        (["tokens", "--step", 7], "step must be latest, best or one of 1; got 7"),
        (["nothing"], "invalid choice: 'nothing'"),
        (["saliency", "--images", tmp_path / "none"], "--images must be a folder with images"),
        (["saliency", "--images", bad], "a.png"),
        (["tokens", "--output", tmp_path / "a.txt"], "--output must end in one of .svg"),
        (["tokens", "--output", tmp_path / "no" / "a.svg"], "must lie in an existing folder"),
        (["pca", "--workdir", vit], "tap must be one of attention, mhsa, z_half, mlp, out for"),
        (["subspaces", "--workdir", vit], "must have U for this figure; they have neither bases"),
        (["dictionary", "--workdir", vit], "must have D for this figure"),
        (["tokens", "--workdir", tmp_path / "bad"], "checkpoint"),
    ):
        given = ["--workdir", workdir] if "--workdir" not in arguments else []
        given += ["--output", output] if "--output" not in arguments else []
        status, found, err = call("figure", *arguments, *given)
        assert status == 2 and found is None and message in err, (arguments, err)
        assert err.startswith("error: ") and err.count("\n") == 1
    assert not list(tmp_path.glob("a.*"))


def test_where_it_could_not_write_is_said_before_anything_is_opened(call, tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "open_runs", lambda *_, **__: pytest.fail("opened"))
    (tmp_path / "a.csv").mkdir()
    for output, message in (
        (tmp_path / "a.txt", "--output must end in one of .svg"),
        (tmp_path / "no" / "a.svg", "must lie in an existing folder"),
        (tmp_path / "a.svg", f"{tmp_path / 'a.csv'} must be a file; it is a folder"),
        (tmp_path / f"{'a' * 250}.svg", "File name too long"),  # refused by the system
    ):
        status, _, err = call("figure", "tokens", "--workdir", tmp_path, "--output", output)
        assert status == 2 and message in err and err.count("\n") == 1, err
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    given = ["--workdir", tmp_path, "--output", tmp_path / "b.svg"]
    status, _, err = call("figure", "tokens", *given)
    assert status == 2 and "pip install 'crate-jax[report]'" in err and err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["a.csv"]


def test_flags_are_heeded_by_figures_that_are_there():
    for flag, names in HEEDED_BY.items():
        assert names and set(names) < set(FIGURES), flag


def test_a_size_for_tokens(workdir, call, tmp_path):
    given = ["--workdir", workdir, "--size", 24, "--output", tmp_path / "a.svg"]
    status, found, err = call("figure", "tokens", *given)
    assert status == 0 and "of 10 tokens across" in found["alt"], err

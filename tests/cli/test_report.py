"""`report`: what the page has of runs of several tasks, its data, --watch, and what it refuses."""

import csv
import json
import re
import shutil
import sys
from html.parser import HTMLParser

import numpy as np
import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

from crate_jax.analysis import measure
from crate_jax.checkpoint.reading import read_trained
from crate_jax.cli import following
from crate_jax.cli import report as command
from crate_jax.cli.examples import first_examples
from crate_jax.cli.looking import open_specimen
from crate_jax.cli.main import main
from crate_jax.config import DataConfig, ModelConfig, OptimConfig, TrainConfig
from crate_jax.pages import render
from crate_jax.training.loop import train

FIELDS = dict(image_size=(16, 16), patch_size=(8, 8), in_channels=1, width=16, depth=2, num_heads=2)


def config(name="crate_tiny_patch16_224", task="classify", **fields):
    return TrainConfig(
        name="tiny",
        task=task,
        batch_size=48,
        eval_batch_size=16,
        total_steps=2,
        log_every_steps=1,
        checkpoint_every_steps=1,
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
def mae(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mae")
    made = config("crate_mae_tiny_patch16_224", "masked_autoencoding", decoder_depth=1)
    train(made, folder)
    return folder


class Outline(HTMLParser):
    """What a page consists of."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.ids, self.links, self.headings, self.open = [], [], [], [], []
        self.labels = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.tags.append(tag)
        self.ids += [given["id"]] if "id" in given else []
        self.links += [v for k, v in attributes if k in ("href", "src", "xlink:href")]
        if tag == "svg":
            self.labels.append((given.get("role"), given.get("aria-label")))
        if re.fullmatch("h[1-6]", tag):
            self.headings.append(int(tag[1]))


def read(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_the_page_of_a_run(workdir, call):
    status, found, err = call("report", "--workdir", workdir)
    assert status == 0, err
    folder = workdir / "report"
    assert found["output"] == str(folder / "index.html") and found["step"] == 2
    assert found["left_out"] == [] and found["pages"] == 1
    text = (folder / "index.html").read_text(encoding="utf-8")
    page = Outline(text)
    for tag in ("header", "main", "nav", "footer", "math", "figcaption"):
        assert tag in page.tags, tag
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert page.headings[0] == 1 and page.headings.count(1) == 1
    assert all(b - a <= 1 for a, b in zip(page.headings, page.headings[1:], strict=False))
    assert len(set(page.ids)) == len(page.ids)
    assert page.tags.count("svg") == found["figures"] == len(page.labels)
    assert all(role == "img" and any(c.isdigit() for c in alt) for role, alt in page.labels)
    for link in page.links:
        if link.startswith("#"):
            assert link[1:] in page.ids, link
        elif not link.startswith("data:"):
            assert (folder / link).is_file() and read(folder / link), link
    assert "http" not in re.sub(r'xmlns(:xlink)?="[^"]*"', "", text)
    assert 'lang="en"' in text and "prefers-color-scheme: dark" in text and "refresh" not in text


def test_its_numbers_are_those_of_the_run(workdir, call, tmp_path):
    given = ["--workdir", workdir, "--step", 1, "--examples", 5, "--output", tmp_path / "page"]
    status, found, err = call("report", *given)
    assert status == 0 and found["step"] == 1, err
    run = open_specimen(str(workdir), "1", examples=5)
    inside = run.inside(first_examples(run.run, 5))
    expected = measure(inside.model, inside.variables, np.asarray(inside.inputs))
    assert len(inside.inputs) == 5
    for name in ("subspace_rate", "zeros", "descent"):
        np.testing.assert_allclose(found[name], expected[name].mean, atol=6e-5)
        rows = [r for r in read(tmp_path / f"page/data/layers_{name}.csv") if r["of"] == "test"]
        np.testing.assert_allclose([float(r["mean"]) for r in rows], expected[name].mean, rtol=1e-6)
    first, _, _ = read_trained(workdir, 1)
    U = first["blocks"]["mssa"]["U"][0].reshape(16, 16)
    cosine = (U[:, 0] @ U[:, 1]) / np.linalg.norm(U[:, 0]) / np.linalg.norm(U[:, 1])
    assert float(read(tmp_path / "page/data/subspaces.csv")[1]["cosine"]) == pytest.approx(
        float(cosine), abs=1e-6
    )
    lines = [json.loads(x) for x in (workdir / "metrics.jsonl").read_text().splitlines()]
    losses = [x["train/loss"] for x in lines if "train/loss" in x]
    rows = [r for r in read(tmp_path / "page/data/curve_loss.csv") if r["split"] == "train"]
    np.testing.assert_allclose([float(r["value"]) for r in rows], losses, rtol=1e-6)
    text = (tmp_path / "page/index.html").read_text(encoding="utf-8")
    assert "Measured on 5 examples of digits, test[:20] and train." in text
    assert "Layer 1: the attention" in text  # the verdict


@pytest.mark.slow
def test_two_runs_of_two_tasks(workdir, mae, call, tmp_path):
    status, found, err = call(
        "report", "--workdir", mae, "--against", workdir, "--output", tmp_path
    )
    assert status == 0 and found["left_out"] == [], err
    text = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert "A layer of the decoder" in text and 'id="decoder"' in text
    assert 'id="task"' in text and (tmp_path / "data/reconstruction_1.csv").is_file()
    assert f"confusion must get a run that classifies; {mae} does not." in text
    assert (tmp_path / "data/confusion_2.csv").is_file()
    assert not (tmp_path / "data/confusion_1.csv").exists()
    assert {r["of"] for r in read(tmp_path / "data/layers_rate.csv")} == {mae.name, workdir.name}
    assert {r["run"] for r in read(tmp_path / "data/curve_loss.csv")} == {mae.name, workdir.name}


@pytest.mark.slow
def test_what_a_run_lacks_is_said(mae, call, tmp_path):
    status, found, err = call("report", "--workdir", mae, "--output", tmp_path)
    assert status == 0, err
    assert found["left_out"] == [
        f"Confusion: confusion must get a run that classifies; {mae} does not."
    ]
    text = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert "What is left out" in text and 'id="confusion"' not in text
    assert {r["of"] for r in read(tmp_path / "data/decoder_rate.csv")} == {
        "test",
        "before training",
    }


@pytest.mark.slow
def test_what_a_run_began_with_is_gone(workdir, call, tmp_path):
    shutil.copytree(workdir, tmp_path / "other", ignore=shutil.ignore_patterns("report"))
    made = config()
    made.init_weights, made.seed, made.total_steps = str(tmp_path / "other"), 3, 1
    train(made, tmp_path / "run")
    given = ["--workdir", tmp_path / "run", "--examples", 4, "--output", tmp_path / "page"]
    rates = tmp_path / "page/data/layers_rate.csv"
    status, found, err = call("report", *given)
    assert status == 0 and found["left_out"] == [], err
    assert {r["of"] for r in read(rates)} == {"test", "train", "before training"}
    shutil.rmtree(tmp_path / "other")
    status, found, err = call("report", *given)
    assert status == 0 and len(found["left_out"]) == 1, err
    assert found["left_out"][0].startswith("Before training: init_weights must still be there")
    assert {r["of"] for r in read(rates)} == {"test", "train"}


@pytest.mark.slow
def test_watch_writes_at_each_checkpoint_and_ends_in_one_line(
    workdir, tmp_path, monkeypatch, capsys
):
    """A run that has nothing yet, then a checkpoint, then a newer one, then Ctrl-C."""
    run = tmp_path / "run"
    steps, pages = [], []
    page = run / "report" / "index.html"

    def wait(seconds):
        assert seconds == following.EVERY_S
        steps.append(page.read_text(encoding="utf-8") if page.exists() else None)
        if len(steps) == 1:  # nothing was there to be shown
            shutil.copytree(workdir, run, ignore=shutil.ignore_patterns("2", "report"))
        elif len(steps) == 3:  # looked twice, wrote once
            shutil.copytree(workdir / "checkpoints/2", run / "checkpoints/2")
        elif len(steps) == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(following.time, "sleep", wait)
    pages.append(main(["report", "--workdir", str(run), "--watch", "--examples", "4"]))
    out, err = capsys.readouterr()
    *lines, last = out.splitlines()
    assert pages == [0] and err == ""
    waiting = f"waiting for the first checkpoint of a run in {run}"
    assert [line.split(":")[0] for line in lines] == [waiting, "step 1", "step 2"]
    assert json.loads(last)["pages"] == 2 and json.loads(last)["step"] == 2
    assert steps[0] is None and steps[1] == steps[2] != steps[3]
    assert 'http-equiv="refresh"' in steps[1] and "checkpoint of step 1" in steps[1]
    text = page.read_text(encoding="utf-8")
    assert "checkpoint of step 2" in text and 'http-equiv="refresh"' not in text
    assert not list(page.parent.glob(".index*"))


def test_watch_that_saw_nothing(tmp_path, monkeypatch, capsys):
    """It says once for what it waits, and where."""
    slept = []

    def interrupt(seconds):
        slept.append(seconds)
        if len(slept) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(following.time, "sleep", interrupt)
    assert main(["report", "--workdir", str(tmp_path / "no"), "--watch"]) == 130
    out, err = capsys.readouterr()
    assert out == f"waiting for the first checkpoint of a run in {tmp_path / 'no'}\n"
    assert (
        not (tmp_path / "no").exists()
        and err.startswith("error: interrupted")
        and err.count("\n") == 1
    )


@pytest.mark.parametrize("watch", [True, False])
def test_what_it_refuses(watch, workdir, call, tmp_path, monkeypatch):
    """With --watch before it waits for anything."""
    monkeypatch.setattr(following.time, "sleep", lambda _: pytest.fail("it waits"))
    monkeypatch.setattr(command, "open_runs", lambda _: pytest.fail("it opens the run"))
    (tmp_path / "file").write_text("")
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "index.html").write_text("<html>mine")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.png").write_bytes(b"no image")
    run = ["--workdir", workdir]
    for arguments, message in (
        ([*run, "--against", tmp_path], "workdir must hold a checkpoint"),
        ([*run, "--images", tmp_path / "site"], "--images must be a folder with images"),
        ([*run, "--images", tmp_path / "no"], f"{tmp_path / 'no'} must be a folder; there is"),
        ([*run, "--images", tmp_path / "bad"], "a.png"),
        ([*run, "--examples", 0], "--examples must be >= 1; got 0"),
        ([*run, "--output", tmp_path / "file"], "--output must be a folder; "),
        ([*run, "--output", tmp_path / "file" / "page"], "--output must be a folder; "),
        ([*run, "--output", tmp_path / "site"], "site/index.html is another page. Choose"),
        (["--workdir", tmp_path / "file"], "--workdir must be a folder; "),
    ):
        status, found, err = call("report", *arguments, *(["--watch"] if watch else []))
        assert status == 2 and found is None and message in err, (arguments, err)
        assert err.startswith("error: ") and err.count("\n") == 1
    for package in ("jinja2", "matplotlib"):
        with monkeypatch.context() as without:
            without.setitem(sys.modules, package, None)
            status, _, err = call("report", *run, "--output", tmp_path / "page")
        assert status == 2 and "pip install 'crate-jax[report]'" in err and err.count("\n") == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad", "file", "site"]
    assert (tmp_path / "site" / "index.html").read_text() == "<html>mine"


def test_a_page_that_is_renewed_is_of_no_fixed_step(workdir, call, tmp_path):
    for step in (1, "x"):
        status, found, err = call("report", "--workdir", workdir, "--watch", "--step", step)
        assert status == 2 and found is None and err.count("\n") == 1
        assert "--step must be latest or best with --watch, for a page that is ren" in err
    assert call("report", "--workdir", tmp_path)[0] == 2


@pytest.mark.slow
def test_a_page_in_the_place_of_another_runs(workdir, mae, call, tmp_path):
    """Data that only the earlier page had is gone; other files stay."""
    given = ["--output", tmp_path, "--examples", 4]
    assert call("report", "--workdir", mae, *given)[0] == 0
    assert (tmp_path / "data/decoder_rate.csv").is_file()
    (tmp_path / "data/mine.csv").write_text("1")
    assert call("report", "--workdir", workdir, *given)[0] == 0
    text = (tmp_path / "index.html").read_text(encoding="utf-8")
    there = {path.name for path in (tmp_path / "data").iterdir()}
    assert there - {"mine.csv"} == {link[5:] for link in Outline(text).links if "data/" in link}
    assert "mine.csv" in there and "decoder_rate.csv" not in there and "confusion.csv" in there


def test_values_are_escaped():
    given: dict = dict(title="<b>", within=True, verdict=["a & b"], conditions={"x": "<i>"})
    given |= dict(plot="<svg></svg>", tables={})
    text = render("comparison.html", **given)
    assert "<title>&lt;b&gt;</title>" in text and "a &amp; b" in text and "&lt;i&gt;" in text
    assert "<svg></svg>" in text

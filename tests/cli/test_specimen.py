"""What is opened of a run, and what figures say where its model lacks what they show."""

import argparse
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

pytest.importorskip("matplotlib")

from crate_jax import create_model
from crate_jax.cli import drawings, examples, looking
from crate_jax.cli.drawings import Asked
from crate_jax.cli.measuring import measured, named, of_decoders
from crate_jax.cli.specimen import NotThere, Specimen
from crate_jax.config import TrainConfig
from crate_jax.tasks.task import Inside

TEXT = dict(context_length=6, vocab_size=11, width=16, depth=2, num_heads=2)


def specimen(inside=None, batch=None, **config) -> Specimen:
    """Of a run that is not there: what its task looks into, and its examples."""
    task = SimpleNamespace(inside=inside, facts=lambda rows: {}, model=None)
    run: Any = SimpleNamespace(task=task, rows={"eval": None}, config=TrainConfig(**config))
    found = Specimen("run", "runs/run", 3, run, {}, (), 4)
    if batch is not None:
        found.__dict__["batch"] = batch
    return found


@pytest.fixture(scope="module")
def text():
    """Of a model of text, with examples of it."""
    model = create_model("crate_lm_1l", **TEXT)
    params = jax.jit(model.init, static_argnames="train")(
        jax.random.key(0), model.sample_input(), train=False
    )["params"]

    def inside(state, extra, batch):
        return Inside(model, {"params": params}, batch["tokens"])

    tokens = np.random.default_rng(0).integers(0, 11, (4, 6)).astype(np.int32)
    return specimen(inside, {"tokens": tokens})


def test_a_model_of_text_has_tokens_and_measures_and_no_pictures(text):
    picture = drawings.tokens([text], Asked())
    assert "of 6 tokens across, after each of 2 layers" in picture.alt
    text.__dict__["train_batch"] = text.batch
    text.__dict__["beginning"] = "its weights are gone"
    found = measured([text])
    assert set(found) == {"test", "train"}
    assert set(found["test"]) >= {"rate", "subspace_rate", "zeros", "compression", "descent"}
    with pytest.raises(NotThere, match="its weights are gone"):
        text.inside(text.batch, first=True)
    assert of_decoders([text]) == {}
    assert "2 bases of 8 columns in each of 2 layers" in drawings.subspaces([text], Asked()).alt
    for draw in (drawings.saliency, drawings.heads, drawings.pca, drawings.segmentation):
        with pytest.raises(NotThere, match="must have a run of images; runs/run has none"):
            draw([text], Asked())
    with pytest.raises(NotThere, match="must have a run of images"):
        drawings._maps(text, 1, None)
    with pytest.raises(NotThere, match="atoms must get a model that embeds patches by one"):
        drawings.atoms([text], Asked())
    with pytest.raises(NotThere, match="must get a run that classifies; runs/run does not"):
        drawings.confusion([text], Asked())


def test_what_a_task_without_layers_says(monkeypatch):
    def none(*_):
        raise ValueError("task must be one whose model is a stack of blocks")

    run = specimen(none, {"image": np.zeros((1, 4, 4, 1), np.uint8)})
    with pytest.raises(NotThere, match=r"^task must be one whose model is a stack of blocks$"):
        drawings.tokens([run], Asked())
    monkeypatch.setattr(drawings, "measured", lambda runs, names: {"test": {}})
    with pytest.raises(NotThere, match="the layers of runs/run have none of compression, descent"):
        drawings.halves([run], Asked())


def test_a_run_without_a_loss(tmp_path):
    run = specimen()
    run.__dict__["metrics"] = [{"step": 1, "examples_per_s": 3.0}]
    with pytest.raises(NotThere, match="must have a loss in metrics"):
        drawings.curves([run], Asked())


def test_a_class_token_that_comes_after_the_layers():
    model: Any = SimpleNamespace(tap_names=("attention",), depth=2, num_tokens=4, num_patches=4)
    run: Any = SimpleNamespace(model=model, workdir="runs/tost", rows_shown=lambda *_, **__: {})
    with pytest.raises(NotThere, match="that of runs/tost adds it after them"):
        drawings._maps(run, 1, None)


def test_a_line_that_is_being_written_is_left_out(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "train/loss": 2}\n{"step": 2, "tra')
    run: Any = specimen()
    object.__setattr__(run, "workdir", str(tmp_path))
    assert run.metrics == [{"step": 1, "train/loss": 2}]


def test_operators_stand_upon_the_same_images(monkeypatch):
    batch = {"image": np.zeros((1, 4, 4, 1), np.uint8)}
    one, other = specimen(batch=batch), specimen(batch=batch)
    one.config.data.dataset, other.config.data.dataset = "digits", "cifar10"
    monkeypatch.setattr(drawings, "_operators", lambda run: "MSSA + ISTA")
    monkeypatch.setattr(drawings, "_maps", lambda *_: (np.ones((1, 2, 2, 2)), 1))
    with pytest.raises(ValueError, match="has those of digits/test, runs/run those of cifar10/te"):
        drawings.operators([one, other], Asked())


@pytest.mark.parametrize("flag", ["images", "size"])
def test_images_for_runs_that_take_none(flag, text, monkeypatch):
    def opened(*_, **how):
        return text

    monkeypatch.setattr(looking, "open_specimen", opened)
    given: Any = dict(workdir="runs/run", step=None, against=["a"], examples=None, images=None)
    args = argparse.Namespace(**given)
    assert looking.open_runs(args) == [text, text]
    side = None
    if flag == "images":
        args.images = "photos"
    else:
        side = 32
    with pytest.raises(ValueError, match=f"--{flag} must go with a run of images; runs/run has"):
        looking.open_runs(args, side=side)


def test_runs_have_names_that_tell_them_apart():
    def run(name, workdir) -> Any:
        return SimpleNamespace(name=name, workdir=workdir)

    assert list(named([run("a", "x/a"), run("b", "x/b")])) == ["a", "b"]
    assert list(named([run("a", "x/a"), run("a", "y/a")])) == ["x/a", "y/a"]
    assert list(named([run("a", "x/a"), run("a", "x/a")])) == ["x/a (1)", "x/a (2)"]


def test_batches_fit_into_memory(monkeypatch):
    inputs = np.arange(10)[:, None]
    model: Any = SimpleNamespace(depth=2, num_tokens=3, width=4)
    monkeypatch.setattr(examples, "_VALUES_AT_ONCE", 100)  # of 24 an example
    parts = [*examples.parts(Inside(model, {}, inputs))]  # type: ignore[arg-type]
    assert [len(part) for part in parts] == [4, 4, 2]
    np.testing.assert_array_equal(np.concatenate(parts), inputs)

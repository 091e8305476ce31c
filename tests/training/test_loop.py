"""The loop: resuming, what it writes, what it refuses, and that it reads its whole config."""

import dataclasses
import itertools
import json
import math
import resource
import sys
import warnings
from pathlib import Path

import jax
import numpy as np
import pytest
from stored import convert, encode_crops, write_array_record, write_folder

import crate_jax.checkpoint.owner as owner_module
import crate_jax.config as config_module
import crate_jax.training.loop as loop_module
import crate_jax.training.run as run_module
from crate_jax.checkpoint.manager import Checkpointer
from crate_jax.checkpoint.owner import Owner
from crate_jax.checkpoint.reading import restore_params
from crate_jax.cli.recipes import load_recipe
from crate_jax.config import (
    DataConfig,
    MaskingConfig,
    OptimConfig,
    ParallelConfig,
    PenaltyConfig,
    SimDinoConfig,
    TextConfig,
    TrainConfig,
)
from crate_jax.data.stores.sources import open_source
from crate_jax.data.text.rows import open_text
from crate_jax.interop.resize import METHODS
from crate_jax.options import option_of
from crate_jax.parallel import start_processes
from crate_jax.tasks.masked_autoencoding import MaskedAutoencoding
from crate_jax.tasks.mcr2 import Mcr2
from crate_jax.tasks.next_token import NextToken
from crate_jax.tasks.simdino import SimDino
from crate_jax.training.loop import open_checkpoints, restore_or_init, train
from crate_jax.training.run import evaluate_split, set_up
from crate_jax.training.workdir import write_config


def metrics_of(workdir):
    """The metrics file without what depends on the clock."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    clock = ("examples_per_s", "data_wait_share")
    return [{k: v for k, v in line.items() if k not in clock} for line in lines]


def state_of(workdir, step):
    """All arrays of a checkpoint by path."""
    import orbax.checkpoint as ocp

    path = Path(workdir) / "checkpoints" / str(step) / "state"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Orbax's about restoring without shardings
        tree = ocp.PyTreeCheckpointer().restore(path)
    return {jax.tree_util.keystr(k): np.asarray(v) for k, v in jax.tree.leaves_with_path(tree)}


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def four_steps(shared, tiny_config):
    """A complete run of four steps, trained once."""
    workdir = shared / "four"
    summary = train(tiny_config(log_objective_every_steps=2, optim__ema_decay=0.9), workdir)
    return workdir, summary


def test_two_steps_and_two_more_are_four_bit_for_bit(four_steps, tiny_config, tmp_path):
    workdir, summary = four_steps
    options = dict(log_objective_every_steps=2, optim__ema_decay=0.9)
    # The schedule must be that of the longer run, so the first half is stopped, not finished.
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, step=2)
        with pytest.raises(KeyboardInterrupt, match=r"SIGTERM at step 2 of 4.*again to resume"):
            train(tiny_config(**options), tmp_path)
    assert Checkpointer(tmp_path, read_only=True).steps == [2]
    resumed = train(tiny_config(**options), tmp_path)
    for name in ("step", "train/loss", "test/loss", "test/top1", "test/examples"):
        assert resumed[name] == summary[name]
    whole, parts = state_of(workdir, 4), state_of(tmp_path, 4)
    assert whole.keys() == parts.keys() and len(whole) > 20
    for path in whole:
        np.testing.assert_array_equal(parts[path], whole[path], err_msg=path)
    assert metrics_of(tmp_path) == metrics_of(workdir)


def stop_at(patch, step):
    """Send this process SIGTERM while it runs a step."""
    import signal

    from crate_jax.data.loader import Batches

    original = Batches.__next__
    seen = {"batches": 0}

    def following(batches):
        batch = original(batches)
        seen["batches"] += "mask" not in batch
        if seen["batches"] == step and "mask" not in batch:
            signal.raise_signal(signal.SIGTERM)
        return batch

    patch.setattr(Batches, "__next__", following)


def test_metrics_are_complete(four_steps):
    workdir, summary = four_steps
    lines = metrics_of(workdir)
    trained = [line for line in lines if "train/loss" in line]
    assert [line["step"] for line in trained] == [1, 2, 3, 4]
    for line in trained:
        expected = {"train/loss", "train/top1", "train/lr", "train/grad_norm", "train/param_norm"}
        assert expected <= set(line)
        assert all(math.isfinite(v) for v in line.values())
    assert summary["train/loss"] == trained[-1]["train/loss"]
    tested = [line for line in lines if "test/top1" in line]
    assert [line["step"] for line in tested] == [2, 4]
    assert all(line["test/examples"] == 297 for line in tested)
    measured = [line for line in lines if "objective/zero_fraction/layer00" in line]
    assert [line["step"] for line in measured] == [2, 4]
    for line in measured:
        assert line["objective/coding_rate_mean/layer01"] > 0
        assert 0 < line["objective/zero_fraction/layer01"] < 1
    assert list(workdir.glob("events.out.tfevents*"))


def test_test_metrics_are_those_of_the_averaged_parameters(four_steps, tiny_config):
    workdir, summary = four_steps
    run = set_up(tiny_config(), "eval")
    state, shapes = state_of(workdir, 4), jax.eval_shape(run.task.init, run.key)[0]

    def load(which):
        return jax.tree.map_with_path(
            lambda path, _: state[f"['{which}']" + jax.tree_util.keystr(path)], shapes
        )

    averaged = evaluate_split(run, load("ema_params"), ())
    latest = evaluate_split(run, load("params"), ())
    np.testing.assert_allclose(averaged["loss"], summary["test/loss"], rtol=1e-5)
    assert abs(latest["loss"] - averaged["loss"]) > 1e-3


def test_a_complete_run_does_nothing(four_steps, tiny_config, capsys):
    workdir, summary = four_steps
    before = {p: p.stat().st_mtime_ns for p in (workdir / "checkpoints").rglob("*")}
    metrics = (workdir / "metrics.jsonl").read_bytes()
    again = train(tiny_config(log_objective_every_steps=2, optim__ema_decay=0.9), workdir)
    assert "is complete at step 4. Nothing to do." in capsys.readouterr().err
    assert {k: again[k] for k in summary if k != "seconds"} == {
        k: summary[k] for k in summary if k != "seconds"
    }
    assert (workdir / "metrics.jsonl").read_bytes() == metrics
    assert {p: p.stat().st_mtime_ns for p in (workdir / "checkpoints").rglob("*")} == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(model__width=36), r"model.width must stay 24 in .*; got 36. Choose another"),
        (dict(name="other"), r"name must stay tiny in .* belongs to that config"),
        (dict(seed=5), r"seed must stay 0"),
        (dict(optim__optimizer="lion"), r"optim.optimizer must stay adamw"),
    ],
)
def test_another_config_is_refused(four_steps, tiny_config, change, message):
    workdir, _ = four_steps
    before = (workdir / "config.json").read_bytes()
    with pytest.raises(ValueError, match=message):
        train(tiny_config(log_objective_every_steps=2, optim__ema_decay=0.9, **change), workdir)
    assert (workdir / "config.json").read_bytes() == before


def test_splits_of_other_classes_are_refused(tiny_config, tmp_path, photographs):
    (image,) = encode_crops(photographs, 1)
    write_folder(tmp_path / "data", "train", {"ant/1.jpg": image, "bee/1.jpg": image})
    write_folder(tmp_path / "data", "val", {"bee/1.jpg": image})
    data = dict(data__dataset="folder", data__data_dir=str(tmp_path / "data"))
    with pytest.raises(ValueError, match=r"val must have the 2 classes of .*; it has 1, ant … are"):
        train(tiny_config(**data, data__eval_split="val"), tmp_path / "run")


def test_a_non_finite_loss_stops_the_run_and_spares_the_checkpoint(tiny_config, tmp_path):
    train(tiny_config(total_steps=2), tmp_path)
    before, _ = restore_params(tmp_path, abstract(tiny_config))
    message = r"train/\w+ must be finite; got (nan|inf) at step \d+. Checkpoint 2 is intact; lower"
    with pytest.raises(FloatingPointError, match=message):
        train(tiny_config(total_steps=6, optim__lr=1e30), tmp_path)
    assert Checkpointer(tmp_path, read_only=True).steps == [2]
    after, step = restore_params(tmp_path, abstract(tiny_config))
    assert step == 2
    for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        np.testing.assert_array_equal(a, b)
        assert np.isfinite(a).all()


def full_disk_at(patch, step):
    """While a step is saved, no file may grow beyond 4 kB."""
    original = Checkpointer.save

    def save(self, at, *args):
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        if at == step:
            self.wait()
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
        try:
            original(self, at, *args)
            if at == step:
                self.wait()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    patch.setattr(Checkpointer, "save", save)


# Orbax's writers that were cancelled complain when they are collected.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("choice", ["stop", "continue"])
def test_a_save_that_fails(tiny_config, tmp_path, monkeypatch, capsys, choice):
    full_disk_at(monkeypatch, step=4)
    config = tiny_config(total_steps=6, on_failed_save=choice)
    if choice == "stop":
        with pytest.raises(OSError, match=r"must take checkpoints; .*large.* Intact: 2\. Free or"):
            train(config, tmp_path)
        assert Checkpointer(tmp_path, read_only=True).steps == [2]
    else:
        assert train(config, tmp_path)["step"] == 6
        assert Checkpointer(tmp_path, read_only=True).steps == [2, 6]
        assert "not saved: " in capsys.readouterr().err
    monkeypatch.undo()
    assert train(config, tmp_path)["step"] == 6


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_damaged_checkpoint_costs_the_steps_since_the_one_before(tiny_config, tmp_path, capsys):
    config = tiny_config(total_steps=6)
    expected = train(config, tmp_path)
    whole = state_of(tmp_path, 6)
    manifest = tmp_path / "checkpoints/6/state/manifest.ocdbt"
    manifest.write_bytes(manifest.read_bytes()[:50])
    again = train(config, tmp_path)
    assert "set aside: checkpoint must be readable; step 6 in" in capsys.readouterr().err
    assert {k: v for k, v in again.items() if k != "seconds"} == {
        k: v for k, v in expected.items() if k != "seconds"
    }
    for path, array in state_of(tmp_path, 6).items():
        np.testing.assert_array_equal(array, whole[path], err_msg=path)


def abstract(tiny_config):
    from crate_jax.models.cost import abstract_parameters
    from crate_jax.models.zoo import build_model

    return abstract_parameters(build_model(tiny_config().model).clone(num_classes=10))


def test_fine_tuning_starts_from_the_weights_with_a_new_head(four_steps, tiny_config, tmp_path):
    workdir, _ = four_steps
    config = tiny_config(init_weights=str(workdir), init_fit=("head",), seed=7)
    run = set_up(config, "train", "eval")
    state, _, record = restore_or_init(run, open_checkpoints(run, tmp_path))
    stored, _ = restore_params(workdir, abstract(tiny_config))
    assert record["step"] == 0
    np.testing.assert_array_equal(
        state.params["blocks"]["ista"]["D"], stored["blocks"]["ista"]["D"]
    )
    assert np.all(
        np.asarray(state.params["head"]["kernel"]) != np.asarray(stored["head"]["kernel"])
    )


def test_the_weights_are_resized_as_the_config_says(four_steps, tiny_config, tmp_path):
    """To patches of half the size: two methods differ in the kernel, all in the positions."""
    assert option_of(TrainConfig.__dataclass_fields__["init_method"]).choices == METHODS
    kernels, positions = {}, {}
    for method in METHODS:
        config = tiny_config(
            init_weights=str(four_steps[0]),
            init_fit=("patch_size", "image_size"),  # which official_maps asks for
            init_method=method,
        )
        config.model.patch_size = (4, 4)
        run = set_up(config, "train", "eval")
        state, _, record = restore_or_init(run, open_checkpoints(run, tmp_path / method))
        kernels[method] = np.asarray(state.params["embedding"]["projection"]["kernel"])
        positions[method] = np.asarray(state.params["embedding"]["pos_embedding"])
        told = any("bilinear" in note for note in record["notes"])
        assert told == (method == "crate_alpha")
    assert kernels["right"].shape == kernels["crate_alpha"].shape
    assert np.abs(kernels["right"] - kernels["crate_alpha"]).max() > 1e-3
    for one, other in itertools.combinations(METHODS, 2):
        assert np.abs(positions[one] - positions[other]).max() > 1e-3


def test_every_field_of_the_config_is_read(four_steps, tiny_config, tmp_path, photographs):
    """By code outside config.py, in a run that uses every feature."""
    (image,) = encode_crops(photographs, 1)
    write_folder(tmp_path / "folder", "train", {"ant/1.jpg": image})
    prepared = write_array_record(tmp_path / "folder", tmp_path / "array_record", "photos")
    convert(prepared, tmp_path / "tfrecord", "tfrecord")
    read = set()
    classes = (TrainConfig, DataConfig, OptimConfig, PenaltyConfig, MaskingConfig, ParallelConfig)
    classes += (SimDinoConfig, TextConfig)

    def spy(cls):
        names = {field.name for field in dataclasses.fields(cls)}

        def getter(self, name):
            caller = sys._getframe(1).f_code.co_filename
            if name in names and caller not in (config_module.__file__, dataclasses.__file__):
                read.add((cls.__name__, name))
            return object.__getattribute__(self, name)

        return getter

    with pytest.MonkeyPatch.context() as patch:
        for cls in classes:
            patch.setattr(cls, "__getattribute__", spy(cls), raising=False)
        train(
            tiny_config(init_weights=str(four_steps[0]), init_fit=("head",), total_steps=1),
            tmp_path,
        )
        with pytest.raises(FileNotFoundError):
            open_source(
                DataConfig(dataset="cifar10", data_dir=str(tmp_path)),
                "train",
                image_shape=(8, 8, 3),
                num_classes=10,
            )
        with pytest.raises(ValueError, match=r"process_id < num_processes"):
            start_processes(ParallelConfig(coordinator="a:1", num_processes=1, process_id=1))
        MaskedAutoencoding.from_config(load_recipe("digits:mae"))
        mcr2 = Mcr2.from_config(load_recipe("digits:mcr2"))
        key = jax.random.key(0)
        jax.eval_shape(mcr2.loss, *jax.eval_shape(mcr2.init, key), mcr2.blank(), key)
        SimDino.open(load_recipe("digits:simdino"), ("train", True))
        NextToken.from_config(load_recipe("text"))
        sizes = dict(train=True, context=8, vocab_size=257)
        assert open_text(DataConfig(dataset="pydoc"), TextConfig(), "train", **sizes)
        records = DataConfig(dataset="photos", data_dir=str(tmp_path / "tfrecord"))
        assert len(open_source(records, "train", image_shape=(8, 8, 3), num_classes=1)) == 1
    # The section of the model is unpacked whole, and tests/models/test_zoo.py sees who reads it.
    unread = {(cls.__name__, field.name) for cls in classes for field in dataclasses.fields(cls)}
    # The name is read by train.py, see test_cli; the section of the model by build_model.
    assert unread - read == {("TrainConfig", "name")}


def test_a_workdir_with_an_owner_is_left_alone(tiny_config, tmp_path, monkeypatch):
    monkeypatch.setattr(owner_module, "WAIT_S", 0.1)
    owner = Owner(tmp_path)
    before = sorted(p.name for p in tmp_path.iterdir())
    with pytest.raises(OSError, match=r"^workdir must have one owner at a time; .* belongs to pro"):
        train(tiny_config(), tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == before
    owner.release()


def test_of_two_starts_at_once_the_second_belongs_to_the_config_of_the_first(
    tiny_config, tmp_path, monkeypatch
):
    other = tiny_config(model__depth=3)

    def after_the_other(run, workdir):
        write_config(other, workdir)
        return open_checkpoints(run, workdir)

    monkeypatch.setattr(loop_module, "open_checkpoints", after_the_other)
    with pytest.raises(ValueError, match=r"^model\.depth must stay 3 in"):
        train(tiny_config(), tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model"]["depth"] == 3
    assert not (tmp_path / "metrics.jsonl").exists()
    Owner(tmp_path).release()  # it is free again


@pytest.mark.parametrize("other", ["hf://bucket/run", "https://host/run", "gs://", "s3:///"])
def test_another_address_is_no_workdir(tiny_config, other):
    message = r"workdir must be a local path, gs://BUCKET/PATH or s3://BUCKET/PATH; got "
    with pytest.raises(ValueError, match=message + other):
        train(tiny_config(), other)


def test_a_bucket_that_pathlib_has_mangled_is_told(tiny_config):
    with pytest.raises(ValueError, match=r"workdir must have two slashes after gs:; got gs:"):
        train(tiny_config(), Path("gs://bucket/run"))


def test_too_little_memory_is_a_mistake_with_a_remedy(tiny_config, tmp_path, monkeypatch):
    def full(*args):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.")

    monkeypatch.setattr(run_module, "make_train_step", lambda *args, **options: full)
    message = (
        r"a step must fit into the memory of a device; .* Raise optim\.accumulate_steps, set mo"
    )
    with pytest.raises(ValueError, match=message):
        train(tiny_config(), tmp_path)

"""``~`` is the home directory wherever a path is given: in flags, fields, calls and variables."""

import argparse
import os
import pwd
from pathlib import Path

import cv2
import jax
import numpy as np
import pytest
from command import ROOT

from crate_jax import load_weights, save_weights
from crate_jax.analysis.figures import curves, save
from crate_jax.checkpoint.manager import Checkpointer
from crate_jax.checkpoint.reading import inspect
from crate_jax.cli import main as cli
from crate_jax.cli.flags import parse_config
from crate_jax.cli.running import enable_compilation_cache
from crate_jax.config import DataConfig, TrainConfig, get_field, option_of, options, validate
from crate_jax.data.stores.prepare import prepare
from crate_jax.data.stores.sources import open_source
from crate_jax.files import cache_folder, expanded
from crate_jax.training.loop import train
from crate_jax.training.run import set_up

PATH_FIELDS = ("init_weights", "data.data_dir", "data.index_dir", "text.tokenizer")


@pytest.fixture
def home(tmp_path, monkeypatch):
    """An empty home directory, and an empty current one beside it."""
    (tmp_path / "home").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "here")
    yield tmp_path / "home"
    assert list((tmp_path / "here").iterdir()) == []  # no folder called ~


def test_what_is_expanded(home):
    assert expanded("~", "x") == str(home)
    assert expanded(Path("~/a/b"), "x") == f"{home}/a/b"
    user = pwd.getpwuid(os.getuid())
    assert expanded(f"~{user.pw_name}/a", "x") == os.path.join(user.pw_dir, "a")
    for text in ("a/~", "gs://~/a", "$HOME/a", "/~/a", "", "a~"):
        assert expanded(text, "x") == text
    # A folder of that name, which stays one however often the path is read.
    assert expanded("./~/a", "x") == f"{home.parent}/here/~/a"
    with pytest.raises(ValueError, match=r"^workdir must name a user's home after ~; got ~nob"):
        expanded("~nobodyy/x", "workdir")


def test_every_field_that_is_a_path(home):
    config = TrainConfig()
    assert {p for p, _, field in options(config) if option_of(field).path} == set(PATH_FIELDS)
    flags = [f"--config.{path}=~/{i}" for i, path in enumerate(PATH_FIELDS)]
    config = parse_config(str(ROOT / "configs/digits.py"), flags)
    validate(config)
    assert [get_field(config, p) for p in PATH_FIELDS] == [f"{home}/{i}" for i in range(4)]
    config.data.data_dir = "gs://bucket/~"
    assert validate(config).data.data_dir == "gs://bucket/~"
    config.data.data_dir = "~nobodyy"
    with pytest.raises(ValueError, match=r"^data\.data_dir must name a user's home after ~"):
        validate(config)


# Flags and arguments that name no file or folder.
OTHERS = {
    *["step", "model", "model_kwargs", "fit", "method", "dataset", "split", "batch_size"],
    *["transforms", "layout", "name", "dtype", "train_steps", "rate_scale", "float64"],
    *["image_size", "num_classes", "mesh", "config", "help", "image_key", "label_key"],
    *["topology", "context_length", "vocab_size"],
    *["tap", "layer", "head", "size", "positions", "objects", "tau", "similarity", "connected"],
    *["share", "share_of", "definition", "limit", "pictures", "initial", "geometry"],
    *["examples", "watch", "decoder", "no_training", "pixels", "platforms", "interval", "license"],
    *["topology", "context_length", "vocab_size", "train_split", "task", "baselines", "seeds"],
    *["k", "temperature", "form", "classifiers", "solver", "epochs", "shots", "l2", "detail"],
    *["recipe", "section", "json"],
    *[
        "which",
        "components",
        "C",
        "ratio",
        "not_normalized",
        "prompt",
        "tokens",
        "top_k",
        "seed",
        "end_token",
    ],
}
# Likewise: a name where other commands have a path.
NAMESAKES = {("summary", "model"), ("layerwise", "images")}


def actions():
    """(command, argument) of every command."""
    subparsers = argparse.ArgumentParser().add_subparsers()
    for add in cli.COMMANDS:
        add(subparsers)
    for command, parser in subparsers.choices.items():
        for action in parser._actions:
            if action.dest not in OTHERS and (command, action.dest) not in NAMESAKES:
                yield command, action


def test_every_flag_that_is_a_path(home, capsys):
    found = {
        (command, action.option_strings[0] if action.option_strings else action.dest)
        for command, action in actions()
    }
    assert {("evaluate", "--workdir"), ("compare", "--html"), ("checkpoints", "run")} <= found
    assert len(found) >= 14
    for command, action in actions():
        required = {
            "convert": ["--from", "a", "--to", "b"],
            "prepare": ["--from", "a", "--to", "b"],
            "report": ["--workdir=a"],
            "figure": ["objective", "--workdir=a"],
            "compare": ["--weights=a"],
        }.get(command, [])
        flag = action.option_strings[:1]
        if command == "checkpoints":
            required = []
        args = cli.parse([command, *required, *flag, "~/x"])
        given = getattr(args, action.dest)
        several = action.nargs == "+"
        assert given == ([f"{home}/x"] if several else f"{home}/x"), (command, action.dest)
        with pytest.raises(SystemExit):
            cli.parse([command, *required, *flag, "~nobodyy/x"])
        line = capsys.readouterr().err
        assert "must name a user's home after ~; got ~nobodyy/x" in line and line.count("\n") == 1


def test_calls_take_it(home, tiny_model, tiny_params):
    save_weights("~/w.npz", tiny_params, tiny_model)
    assert (home / "w.npz").is_file()
    again = load_weights("~/w.npz", tiny_model)
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(tiny_params), strict=True):
        np.testing.assert_array_equal(a, b)
    checkpointer = Checkpointer("~/run")
    checkpointer.save(1, {"step": np.int32(1)}, {})
    checkpointer.close()
    assert (home / "run/checkpoints/1").is_dir()
    assert [row["step"] for row in inspect("~/run")] == [1]
    with pytest.raises(ValueError, match=r"^workdir must name a user's home after ~; got ~nobodyy"):
        train(TrainConfig(), "~nobodyy/run")


def test_pictures_take_it(home):
    pytest.importorskip("matplotlib")
    save(curves({"a": [{"step": 1, "train/loss": 1.0}]}, "loss"), "~/picture.png")
    assert (home / "picture.png").is_file() and (home / "picture.csv").is_file()


def test_data_take_it(home):
    """A folder of images, prepared and read with its indices at home."""
    png = cv2.imencode(".png", np.zeros((8, 8, 3), np.uint8))[1].tobytes()
    for name in ("train/a/1.png", "train/b/2.png"):
        (home / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        (home / "images" / name).write_bytes(png)
    data = DataConfig(dataset="folder", data_dir="~/images", index_dir="~/indices")
    assert len(open_source(data, "train", image_shape=(8, 8, 3), num_classes=2)) == 2
    found = prepare("~/images", "~/tfds", name="two")
    assert found["data_dir"] == f"{home}/tfds" and (home / "tfds/two").is_dir()
    data = DataConfig(dataset="two", data_dir="~/tfds")
    assert len(open_source(data, "train", image_shape=(8, 8, 3), num_classes=2)) == 2


def test_a_run_is_where_it_should_be(home):
    """As far as that is known before anything is computed."""
    config = TrainConfig()
    config.data.dataset, config.data.data_dir = "folder", "~/nothing"
    with pytest.raises(FileNotFoundError, match=f"existing directory; got {home}/nothing"):
        set_up(config, "train")


def test_caches(home, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_folder() == f"{home}/.cache/crate_jax"
    monkeypatch.setenv("CRATE_JAX_CACHE", "~/big")
    assert cache_folder() == f"{home}/big"
    monkeypatch.delenv("CRATE_JAX_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "~/cache")
    assert cache_folder() == f"{home}/cache/crate_jax"
    for given, start in ((None, f"{home}/cache/crate_jax/"), ("~/jax", f"{home}/jax")):
        assert compiled_into(given)["jax_compilation_cache_dir"].startswith(start)


def compiled_into(folder):
    """JAX's settings after a folder for compiled programs was named; they are as before then."""
    names = (
        "jax_compilation_cache_dir",
        "jax_enable_compilation_cache",
        "jax_persistent_cache_min_compile_time_secs",
        "jax_persistent_cache_min_entry_size_bytes",
    )
    before = {name: jax.config.values[name] for name in names}
    try:
        jax.config.update("jax_compilation_cache_dir", folder)
        enable_compilation_cache()
        return {name: jax.config.values[name] for name in names}
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


def test_a_cache_that_takes_nothing_is_told_once(tmp_path, monkeypatch, capsys):
    """JAX would warn of every program that it cannot read or keep."""
    found = compiled_into("/dev/null/cache")
    assert not found["jax_enable_compilation_cache"]
    assert capsys.readouterr().err == (
        "compiled programs are not kept: there can be no folder /dev/null/cache (Not a directory). "
        "JAX_COMPILATION_CACHE_DIR names another.\n"
    )
    # One that may be read gives what it has, and gets nothing.
    monkeypatch.setattr("os.access", lambda path, mode: False)
    found = compiled_into(str(tmp_path))
    assert found["jax_enable_compilation_cache"]
    assert found["jax_persistent_cache_min_compile_time_secs"] == float("inf")
    assert compiled_into("gs://bucket/cache")["jax_persistent_cache_min_compile_time_secs"] == 0.5
    assert capsys.readouterr().err == ""

"""Files that must not be loaded: one line says why, and what was there stays."""

import errno
import io
import json
import os
import pickle

import numpy as np
import pytest
from flax import serialization
from weights import MODEL, random_params, random_state

from crate_jax import Crate, create_model, load_weights, save_weights
from crate_jax.cli import main as cli
from crate_jax.models.zoo import architecture

KWARGS = ["--model=crate_tiny_patch16_224", "--model-kwargs"]
KWARGS += ["image_size=8", "patch_size=4", "num_classes=5", "width=6", "depth=3", "num_heads=2"]


class Payload:
    """Unpickling it makes a folder."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.fixture
def refuse(tmp_path, capsys):
    """A function: `convert` from a file must fail; its one line, with the target untouched."""
    target = tmp_path / "target.safetensors"
    target.write_text("before")

    def check(path, *arguments):
        arguments = arguments or KWARGS
        status = cli.main(["convert", f"--from={path}", f"--to={target}", *arguments])
        captured = capsys.readouterr()
        assert status == 2 and captured.out == ""
        assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
        assert target.read_text() == "before"
        assert not list(tmp_path.glob(".target*"))
        return captured.err

    return check


def test_the_fixture_would_notice_a_success(tmp_path, capsys):
    np.savez(tmp_path / "w.npz", **random_state(MODEL))
    target = tmp_path / "target.safetensors"
    status = cli.main(["convert", f"--from={tmp_path / 'w.npz'}", f"--to={target}", *KWARGS])
    assert status == 0 and '"fitted": []' in capsys.readouterr().out
    assert target.is_file()


@pytest.mark.parametrize("name", ["w.pth", "w.t7", "w.pth.tar"])
def test_a_pytorch_file_that_would_run_code(tmp_path, refuse, name):
    torch = pytest.importorskip("torch")
    state = {key: torch.tensor(value) for key, value in random_state(MODEL).items()}
    torch.save({"state_dict": state, "extra": Payload(tmp_path / "ran")}, tmp_path / name)
    line = refuse(tmp_path / name)
    assert "must hold tensors alone; it asks to run or build posix.mkdir, which is refused" in line
    assert not (tmp_path / "ran").exists()
    torch.load(tmp_path / name, weights_only=False)  # it was a real one
    assert (tmp_path / "ran").exists()


def test_a_bare_pickle_that_would_run_code(tmp_path, refuse):
    pytest.importorskip("torch")
    for name in ("w.pth", "w.npz"):
        (tmp_path / name).write_bytes(pickle.dumps(Payload(tmp_path / "ran")))
        assert f"{name} must be a whole PyTorch file" in refuse(tmp_path / name)
    assert not (tmp_path / "ran").exists()


def test_an_archive_with_a_pickle_in_it(tmp_path, refuse):
    objects = np.array([Payload(tmp_path / "ran")], dtype=object)
    np.savez(tmp_path / "w.npz", **random_state(MODEL), extra=objects)
    assert "it holds a pickle, which could run code" in refuse(tmp_path / "w.npz")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("suffix", ["npz", "safetensors", "pth"])
def test_a_truncated_file(tmp_path, refuse, suffix):
    if suffix == "pth":
        pytest.importorskip("torch")
    whole = tmp_path / f"whole.{suffix}"
    save_weights(whole, random_params(MODEL), MODEL)
    size = whole.stat().st_size
    for length in (0, 5, 100, size // 2, size - 1):
        path = tmp_path / f"w.{suffix}"
        path.write_bytes(whole.read_bytes()[:length])
        line = refuse(path)
        assert "must be a whole" in line or "must hold named arrays" in line, line
        assert f"w.{suffix}" in line


@pytest.mark.parametrize(
    ("suffix", "reader"),
    [
        ("npz", "numpy.load"),
        ("safetensors", "safetensors.safe_open"),
        ("msgpack", "flax.serialization.msgpack_restore"),
        ("pth", "torch.load"),
    ],
)
def test_a_failing_disk_is_no_truncated_file(tmp_path, refuse, monkeypatch, suffix, reader):
    if suffix == "pth":
        pytest.importorskip("torch")
    path = tmp_path / f"w.{suffix}"
    if suffix == "msgpack":
        path.write_bytes(serialization.to_bytes(random_params(MODEL)))
    else:
        save_weights(path, random_params(MODEL), MODEL)

    def fail(*args, **kwargs):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(reader, fail)
    assert f"w.{suffix} must be readable; reading it ended in: Input/output err" in refuse(path)


@pytest.mark.parametrize("suffix", ["npz", "safetensors", "pth"])
def test_a_file_of_another_kind(tmp_path, refuse, suffix):
    if suffix == "pth":
        pytest.importorskip("torch")
    (tmp_path / f"w.{suffix}").write_text("These are no weights.\n" * 20)
    assert f"w.{suffix} must " in refuse(tmp_path / f"w.{suffix}")
    one_array = io.BytesIO()
    np.save(one_array, np.zeros(3))
    (tmp_path / f"w.{suffix}").write_bytes(one_array.getvalue())
    assert f"w.{suffix} must " in refuse(tmp_path / f"w.{suffix}")


def changed(**changes):
    """The official state dict of the model with entries replaced, or left out (None)."""
    state = random_state(MODEL) | {key.replace("__", "."): v for key, v in changes.items()}
    return {key: value for key, value in state.items() if value is not None}


def with_value(key, value):
    array = random_state(MODEL)[key].copy()
    array.flat[2] = value
    return {key.replace(".", "__"): array}


MISMATCHES = {
    "a missing entry": (
        changed(transformer__layers__1__0__norm__bias=None),
        "missing: transformer.layers.1.0.norm.bias. ",
    ),
    "entries besides": (
        changed(fc__weight=np.ones(3, "f4"), extra=np.ones(2, "f4")),
        "unknown: fc.weight, extra. ",
    ),
    "more layers": (
        random_state(MODEL.clone(depth=5)),
        "depth 5 where the model has 3; unknown: transformer.layers.{3-4}.1.fn.weight, ",
    ),
    "another width": (
        random_state(Crate(8, 4, 5, width=10, depth=3, num_heads=2)),
        "width 10 where the model has 6, num_heads x head_dim 10 where the model has 6. Build",
    ),
    "other classes": (
        random_state(MODEL.clone(num_classes=9)),
        "num_classes 9 where the model has 5. Build the model with these sizes, or ask to fit: "
        "head.",
    ),
    "another image size": (
        random_state(MODEL.clone(image_size=16)),
        "positions 17 where the model has 5. Build the model with these sizes, or ask to fit: "
        "image_size.",
    ),
    "another patch size": (
        random_state(MODEL.clone(patch_size=2, image_size=4)),
        "pixels of a patch 12 where the model has 48. Build the model with these sizes, or ask "
        "to fit: patch_size, in_channels.",
    ),
    "one ill-shaped array": (
        changed(mlp_head__0__bias=np.ones(7, "f4")),
        "nothing else; of another shape: mlp_head.0.bias (7,) instead of (6,). ",
    ),
    "a number that is none": (
        changed(**with_value("transformer.layers.2.1.fn.weight", np.nan)),
        "blocks/ista/D must be finite; got 1 values of NaN",
    ),
    "integers": (
        changed(mlp_head__1__bias=np.arange(5)),
        "mlp_head.1.bias must be of floats; got int64",
    ),
    "another architecture": (
        {"conv1.weight": np.ones((3, 3), "f4"), "fc.bias": np.ones(4, "f4")},
        "it holds no weights of a Crate; missing: ",
    ),
    "nothing": ({}, "it holds no weights of a Crate; missing: "),
}


@pytest.mark.parametrize("mismatch", MISMATCHES)
def test_weights_of_another_model(tmp_path, refuse, mismatch):
    state, message = MISMATCHES[mismatch]
    np.savez(tmp_path / "w.npz", **state)
    assert message in refuse(tmp_path / "w.npz"), refuse(tmp_path / "w.npz")


def test_our_own_names_of_another_model(tmp_path, refuse):
    params = random_params(MODEL)
    del params["head"]["bias"]
    params["head"]["scale"] = np.ones(3, "f4")
    flat = {f"{g}/{k}": v for g in ("head", "head_norm") for k, v in params[g].items()}
    np.savez(tmp_path / "w.npz", **flat)
    line = refuse(tmp_path / "w.npz")
    assert "missing: blocks/ista/D, " in line and "unknown: head/scale. " in line


def test_the_nearest_model_is_suggested(tmp_path):
    """As if of CRATE-S, without its megabytes: shapes alone are compared."""
    from crate_jax.interop.layouts.crate import OFFICIAL
    from crate_jax.interop.tree import tree_of

    entries = OFFICIAL.entries(tree_of(create_model("crate_small_patch16_224")))
    zeros = {k: np.broadcast_to(np.float16(0), e.official) for k, e in entries.items()}
    np.savez(tmp_path / "w.npz", **zeros)
    with pytest.raises(
        ValueError,
        match=r"these weights are crate_small_patch16_224's: width 576 where the model has 384, "
        r"num_heads x head_dim 576 where the model has 384\. Build",
    ):
        load_weights(tmp_path / "w.npz", create_model("crate_tiny_patch16_224"))


def test_what_is_no_weights_file(tmp_path, refuse):
    (tmp_path / "w.bin").touch()
    assert "w.bin must be a whole PyTorch, safetensors or .npz file" in refuse(tmp_path / "w.bin")
    (tmp_path / "folder").mkdir()
    assert "is a folder without checkpoints/ in it" in refuse(tmp_path / "folder")
    (tmp_path / "folder" / "checkpoints").mkdir()
    assert "must hold a checkpoint" in refuse(tmp_path / "folder")
    assert "not there" in refuse(tmp_path / "nowhere.npz")
    assert "weights must be written as" in refuse_target(tmp_path, refuse)


def refuse_target(tmp_path, refuse):
    """A good source and a target of an unknown kind (the last --to counts)."""
    np.savez(tmp_path / "good.npz", **random_state(MODEL))
    line = refuse(tmp_path / "good.npz", f"--to={tmp_path / 'w.tar'}", *KWARGS)
    assert not (tmp_path / "w.tar").exists()
    return line


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        ("{", "must be a whole safetensors file"),
        ("[1, 2]", "must be stated by image_size, "),
        ('{"width": 6, "future": 1}', "must be stated by image_size, "),
        (json.dumps(architecture(MODEL) | {"width": "6"}), "model.width must be a whole number"),
        (
            json.dumps(architecture(MODEL) | {"eta": None}),
            "model.eta must be a number > 0; got None",
        ),
        (
            json.dumps(architecture(MODEL) | {"image_size": [8, 0]}),
            "model.image_size must be >= 1; got",
        ),
    ],
)
def test_a_model_stated_wrongly(tmp_path, refuse, stated, message):
    from safetensors.numpy import save_file

    save_file(random_state(MODEL), tmp_path / "w.safetensors", metadata={"crate_jax": stated})
    for arguments in (KWARGS, ["--fit=eta"]):
        line = refuse(tmp_path / "w.safetensors", *arguments)
        assert message in line


@pytest.mark.parametrize(
    ("kwarg", "message"),
    [
        ("width=abc", "model.width must be a whole number >= 1; got 'abc'"),
        ("depth=1.5", "model.depth must be a whole number >= 1; got 1.5"),
        ("image_size=1,2,3", "model.image_size must be 1 or 2 whole numbers >= 1; got (1, 2, 3)"),
        ("eta=big", "model.eta must be a number > 0; got 'big'"),
        ("widht=6", "Did you mean width?"),
        ("pool=max", "model.pool must be one of cls, mean; got max"),
    ],
)
def test_a_model_asked_for_wrongly(tmp_path, refuse, kwarg, message):
    np.savez(tmp_path / "w.npz", **random_state(MODEL))
    assert message in refuse(tmp_path / "w.npz", *KWARGS, kwarg)


def test_a_full_disk_leaves_the_old_file(tmp_path, refuse, monkeypatch):
    from crate_jax.interop import safetensors

    def write(path, arrays, fields, class_names):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    np.savez(tmp_path / "good.npz", **random_state(MODEL))
    monkeypatch.setattr(safetensors, "write", write)
    assert "No space left on device" in refuse(tmp_path / "good.npz")

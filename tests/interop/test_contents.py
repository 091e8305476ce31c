"""Files are known by their content; what is no weights is left aside, and the report says so."""

import shutil
import zipfile

import jax.numpy as jnp
import numpy as np
import pytest
from weights import MODEL, assert_equal_trees, random_params, random_state

from crate_jax import load_weights, save_weights
from crate_jax.interop import load_fitted
from crate_jax.interop.contents import kind_of, left_aside
from crate_jax.interop.convert import find_layout, foreign_family
from crate_jax.interop.layouts.crate import OFFICIAL
from crate_jax.interop.layouts.vit import TIMM


@pytest.fixture
def torch():
    return pytest.importorskip("torch")


@pytest.mark.parametrize("name", ["w", "w.bin", "w.npz", "w.safetensors", "w.pth"])
@pytest.mark.parametrize("kind", ["torch", "npz", "safetensors"])
def test_the_suffix_counts_for_nothing(tmp_path, kind, name):
    suffix = {"torch": "pth"}.get(kind, kind)
    if kind == "torch":
        pytest.importorskip("torch")
    save_weights(tmp_path / f"written.{suffix}", random_params(MODEL), MODEL)
    shutil.move(tmp_path / f"written.{suffix}", tmp_path / name)
    assert kind_of(tmp_path / name) == kind
    assert_equal_trees(load_weights(tmp_path / name, MODEL), random_params(MODEL))


@pytest.mark.parametrize("begins", [b"\x80\x01", b"PK"])
def test_a_safetensors_header_whose_length_looks_like_another_kind(tmp_path, begins):
    (tmp_path / "w").write_bytes(begins.ljust(8, b"\0") + b'{"head/bias": ')
    assert kind_of(tmp_path / "w") == "safetensors"


def test_a_pytorch_file_of_before_the_archives(torch, tmp_path):
    state = {key: torch.tensor(value) for key, value in random_state(MODEL).items()}
    torch.save({"net": state}, tmp_path / "old", _use_new_zipfile_serialization=False)
    assert_equal_trees(load_weights(tmp_path / "old", MODEL), random_params(MODEL))


def test_an_archive_of_something_else(tmp_path):
    with zipfile.ZipFile(tmp_path / "w.npz", "w") as archive:
        archive.writestr("readme.txt", "no weights")
    with pytest.raises(ValueError, match=r"w\.npz must be a whole PyTorch, safetensors or \.npz"):
        load_weights(tmp_path / "w.npz", MODEL)


@pytest.mark.parametrize("names", ["own", "official"])
def test_the_state_of_a_training_run_is_left_aside(tmp_path, names, caplog):
    params = random_params(MODEL)
    save_weights(tmp_path / "w.npz", params, MODEL, layout=None if names == "own" else names)
    with np.load(tmp_path / "w.npz") as file:
        beside = {f"params/{key}": value for key, value in file.items()}
    beside |= {"opt/0/mu/head/bias": np.ones(5, jnp.bfloat16), "chrono/accum_train_time": 7.0}
    beside["opt/0/count"] = np.int32(3)
    np.savez(tmp_path / "run.npz", **beside)
    loaded = load_fitted(tmp_path / "run.npz", MODEL)
    assert_equal_trees(loaded.params, params)
    assert loaded.report == ["left aside opt (2), chrono (1): the state of a training run"]
    with caplog.at_level("INFO", logger="crate_jax"):
        load_weights(tmp_path / "run.npz", MODEL)
    assert caplog.messages == [f"{tmp_path / 'run.npz'}: {loaded.report[0]}"]
    np.savez(tmp_path / "more.npz", **beside, **{"extra/x": np.ones(2, "f4")})
    with pytest.raises(ValueError, match=r"unknown: extra/x\."):
        load_weights(tmp_path / "more.npz", MODEL)


def test_left_aside_in_words():
    names = ["transformer.a", "transformer.b", "logit_scale", "opt/0"]
    assert left_aside(names) == "left aside transformer (2), logit_scale (1), opt (1)"


def test_a_layout_by_its_name():
    assert find_layout(MODEL) is find_layout(MODEL, "official", torch=True) is OFFICIAL
    with pytest.raises(ValueError, match=r"must be one of official, .* for Crate; got timm"):
        find_layout(MODEL, "timm")
    with pytest.raises(ValueError, match=r"model\.stem must be patches for weights"):
        find_layout(MODEL.clone(stem="convolutions", attention="mhsa"))


def test_a_family_without_a_layout(monkeypatch, tmp_path):
    monkeypatch.delitem(find_layout.__globals__["LAYOUTS"], "crate")
    with pytest.raises(ValueError, match="Crate must have an official layout; it has none"):
        find_layout(MODEL)
    save_weights(tmp_path / "w.npz", random_params(MODEL), MODEL)  # our own names need none
    assert_equal_trees(load_weights(tmp_path / "w.npz", MODEL), random_params(MODEL))


def test_names_of_another_family(tmp_path):
    state = {name.replace("{i}", "0"): np.ones(2, "f4") for name, _ in TIMM.table.values()}
    np.savez(tmp_path / "w.npz", **state)
    with pytest.raises(ValueError, match="its names are those of the family vit; missing: tr"):
        load_weights(tmp_path / "w.npz", MODEL)
    assert foreign_family(random_state(MODEL), MODEL) == ""

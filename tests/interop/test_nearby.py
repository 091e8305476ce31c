"""Weights in a bucket are read as those on disk."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from crate_jax import (
    Preprocessing,
    load_pretrained,
    load_weights,
    preprocessing,
    save_weights,
)
from crate_jax.files import located, written_aside
from crate_jax.interop import download
from crate_jax.interop.contents import read_class_names
from crate_jax.interop.tree import flatten

NAMES = tuple("abcdefg")


def assert_same(found, expected):
    jax.tree.map(np.testing.assert_array_equal, found, jax.device_get(expected))


@pytest.mark.parametrize("suffix", ["npz", "safetensors"])
def test_what_is_written_there_comes_back(bucket, suffix, tiny_model, tiny_params):
    path = f"{bucket}/w.{suffix}"
    save_weights(path, tiny_params, tiny_model, class_names=NAMES)
    assert_same(load_weights(path, tiny_model), tiny_params)
    assert read_class_names(path) == NAMES
    other = jax.tree.map(lambda x: x + 1, tiny_params)
    save_weights(path, other, tiny_model)  # written again, and not remembered
    assert_same(load_weights(path, tiny_model), other)
    assert read_class_names(path) == ()


def test_a_folder_of_pieces(bucket, tiny_model, tiny_params):
    arrays = {name: np.asarray(leaf) for name, leaf in flatten(tiny_params).items()}
    index = {}
    for number in (0, 1):
        piece = f"model-0000{number + 1}-of-00002.safetensors"
        part = dict(list(arrays.items())[number::2])
        index |= dict.fromkeys(part, piece)
        with written_aside(f"{bucket}/{piece}") as aside:
            save_file(part, aside)
    folder = located(bucket, "weights")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    assert_same(load_weights(bucket, tiny_model), tiny_params)


def test_errors_name_the_path_that_was_asked_for(bucket, tiny_model):
    folder = located(bucket, "weights")
    (folder / "w.npz").write_bytes(b"PK\x03\x04 and no more")
    (folder / "page").write_text("<html>")
    for name, said in (("w.npz", "it is a zip archive"), ("page", "it is a web page")):
        with pytest.raises(ValueError, match=rf"^{bucket}/{name} must be a whole .*; {said}"):
            load_weights(f"{bucket}/{name}", tiny_model)
    with pytest.raises(ValueError, match=rf"{bucket} is a folder without checkpoints/ in it"):
        load_weights(bucket, tiny_model)
    with pytest.raises(FileNotFoundError, match=rf"got {bucket}/none, not there"):
        load_weights(f"{bucket}/none", tiny_model)


@pytest.fixture
def pieces(monkeypatch):
    """Where each piece of an object begins that is fetched; a thousand bytes each."""
    starts, fetch = [], download.read_piece

    def read(path, start, end):
        starts.append(start)
        return fetch(path, start, end)

    monkeypatch.setattr(download, "AT_ONCE", 1000)
    monkeypatch.setattr(download, "read_piece", read)
    return starts


def test_an_object_is_fetched_once(bucket, tiny_model, tiny_params, pieces, tmp_path):
    path = f"{bucket}/w.npz"
    save_weights(path, tiny_params, tiny_model, class_names=NAMES)
    load_weights(path, tiny_model)
    (kept,) = (tmp_path / "cache").rglob("w.npz")
    size = kept.stat().st_size
    assert pieces == list(range(0, size, 1000)) and len(pieces) > 3
    pieces.clear()
    assert_same(load_weights(path, tiny_model), tiny_params)
    assert pieces == []
    save_weights(path, tiny_params, tiny_model)
    load_weights(path, tiny_model)
    assert len(pieces) > 3
    (again,) = (tmp_path / "cache").rglob("w.npz")  # the older version has gone
    assert again != kept


def test_an_interrupted_copy_goes_on_where_it_ended(
    bucket, tiny_model, tiny_params, pieces, tmp_path, monkeypatch
):
    path, read = f"{bucket}/w.npz", download.read_piece
    save_weights(path, tiny_params, tiny_model)

    def broken(path, start, end):
        if start >= 3000:
            raise ConnectionResetError("the connection broke")
        return read(path, start, end)

    with monkeypatch.context() as patch:
        patch.setattr(download, "read_piece", broken)
        with pytest.raises(ConnectionResetError):
            load_weights(path, tiny_model)
    assert list((tmp_path / "cache").rglob("w.npz")) == []
    pieces.clear()
    assert_same(load_weights(path, tiny_model), tiny_params)
    assert pieces[0] == 3000


def test_a_cache_that_cannot_be_written(bucket, tiny_model, tiny_params, tmp_path, monkeypatch):
    save_weights(f"{bucket}/w.npz", tiny_params, tiny_model)
    (tmp_path / "file").touch()
    monkeypatch.setenv("CRATE_JAX_CACHE", str(tmp_path / "file/cache"))
    with pytest.raises(OSError, match=r"^the cache must be a folder .* Set CRATE_JAX_CACHE to a"):
        load_weights(f"{bucket}/w.npz", tiny_model)


def test_a_folder_for_the_hub(bucket, tiny_model, tiny_params):
    prepared = Preprocessing((16, 16), (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), None)
    save_weights(f"{bucket}/mine/", tiny_params, tiny_model, preprocessing=prepared)
    _, params = load_pretrained(f"{bucket}/mine")
    assert_same(params, tiny_params)
    assert preprocessing(f"{bucket}/mine/") == prepared

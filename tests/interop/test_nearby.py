"""Weights in a bucket are read as those on disk."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from crate_jax import load_weights, save_weights
from crate_jax.files import located, written_aside
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

"""Folders and pieces that other programs wrote, and files that hold no weights."""

import json
import tarfile
import zipfile

import numpy as np
import pytest
from safetensors.numpy import save_file
from weights import MODEL, assert_equal_trees, random_params, random_state

from crate_jax import load_weights, save_weights
from crate_jax.interop import load_fitted

PARAMS, STATE = random_params(MODEL), random_state(MODEL)


@pytest.fixture
def torch():
    return pytest.importorskip("torch")


def refuse(path, line):
    with pytest.raises((ValueError, OSError), match=line):
        load_weights(path, MODEL)


def write_pieces(folder, write, name, index):
    """The weights in two files, and an index of them."""
    names = list(STATE)
    files = {n: name.format(1 + (i > 8)) for i, n in enumerate(names)}
    for file in sorted(set(files.values())):
        write({f"model.{n}": STATE[n] for n in names if files[n] == file}, folder / file)
    (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": files}))


def test_a_folder_of_pieces(tmp_path):
    index = "model.safetensors.index.json"
    write_pieces(tmp_path, save_file, "model-0000{}-of-00002.safetensors", index)
    (tmp_path / "optimizer.bin").touch()
    for path in (tmp_path, tmp_path / index):
        assert_equal_trees(load_weights(path, MODEL), PARAMS)
    second = tmp_path / "model-00002-of-00002.safetensors"
    refuse(second, r"it is one of 2 pieces\. Name their folder, or the file that ends in \.index")
    first = tmp_path / "model-00001-of-00002.safetensors"
    save_file({"cls_token": STATE["cls_token"]}, first)
    save_file({"net.cls_token": STATE["cls_token"]}, second)
    refuse(tmp_path, "once; got cls_token twice, in two pieces")
    second.unlink()
    refuse(tmp_path, r"beside it; model-00002-of-00002\.safetensors is not there\. Fetch every")
    for content in ('{"weight_map": {"a": "../w.safetensors"}}', "{}", '{"weight_map": [1]}', "{"):
        (tmp_path / index).write_text(content)
        refuse(tmp_path, "must name files beside it|must be an index of files with a weight_map")


def test_a_folder_of_pytorch_pieces(torch, tmp_path):
    def write(state, path):
        torch.save({name: torch.tensor(array) for name, array in state.items()}, path)

    write_pieces(
        tmp_path, write, "pytorch_model-0000{}-of-00002.bin", "pytorch_model.bin.index.json"
    )
    assert_equal_trees(load_weights(tmp_path, MODEL), PARAMS)


def test_a_folder_with_one_file_of_a_known_name(torch, tmp_path):
    save_weights(tmp_path / "pytorch_model.bin", PARAMS, MODEL)
    assert_equal_trees(load_weights(tmp_path, MODEL), PARAMS)
    zeros = {name: np.zeros_like(array) for name, array in STATE.items()}
    save_file(zeros, tmp_path / "model.safetensors")  # the first of the known names
    assert not load_weights(tmp_path, MODEL)["head"]["kernel"].any()


def test_another_folder_is_said_to_hold_what_it_holds(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "last.pth").touch()
    refuse(tmp_path, r"is a folder without checkpoints/ in it, and holds last\.pth, sub/\. Name")
    refuse(tmp_path / "sub", "and holds nothing")


OTHERS = {
    "w.pth": (b"version https://git-lfs.github.com/spec/v1\noid sha256:ab", "a pointer of Git LFS"),
    "w.safetensors": (b"\n<!DOCTYPE html><html>", "a web page. Download the file itself"),
    "w.bin": (b"", "it is empty. It may be truncated"),
    "w.pth.tar.gz": (b"\x1f\x8b\x08xx", "compressed by gzip. Decompress it: gunzip"),
    "w.zip": (b"7z\xbc\xaf\x27\x1c", "a compressed archive"),
    "w.h5": (b"\x89HDF\r\n\x1a\n", "an HDF5 file"),
    "config.json": (b'{"a": 1}', "JSON text. Name the file of weights"),
    "w.npy": (b"\x93NUMPY\x01\x00", "one array of NumPy"),
    "w.x": (b"\x01\x02\x03", "its 3 bytes are none of these"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_file_that_holds_no_weights_is_said_to_be_what_it_is(tmp_path, name):
    content, line = OTHERS[name]
    (tmp_path / name).write_bytes(content)
    refuse(tmp_path / name, line.replace(".", r"\."))


def test_archives_of_other_things(torch, tmp_path):
    (tmp_path / "x.txt").write_text("x")
    with tarfile.open(tmp_path / "w.pth.tar", "w") as archive:
        archive.add(tmp_path / "x.txt", "x.txt")
    refuse(tmp_path / "w.pth.tar", "it is a tar archive")
    with zipfile.ZipFile(tmp_path / "w.zip", "w") as archive:
        archive.write(tmp_path / "x.txt", "x.txt")
    refuse(tmp_path / "w.zip", r"a zip archive of x\.txt\. Unpack it")
    with zipfile.ZipFile(tmp_path / "w.pt", "w") as archive:  # as torch.jit.save lays it out
        for name in ("w/data.pkl", "w/constants.pkl", "w/code/__torch__.py"):
            archive.writestr(name, "")
    refuse(tmp_path / "w.pt", "it is a TorchScript archive, which is a program")


def test_a_file_that_is_still_being_downloaded(torch, tmp_path):
    save_weights(tmp_path / "w.pth", PARAMS, MODEL)
    half = (tmp_path / "w.pth").read_bytes()[:1000]
    (tmp_path / "w.pth.part").write_bytes(half)
    refuse(tmp_path / "w.pth.part", "It is still being downloaded: wait")
    (tmp_path / "w.pth").write_bytes(half)
    refuse(tmp_path / "w.pth", "It is still being downloaded: wait")
    (tmp_path / "w.pth.part").unlink()
    refuse(tmp_path / "w.pth", "It may be truncated: copy it again")


def test_a_path_at_which_there_is_nothing(tmp_path):
    (tmp_path / "crate_small.pth.tar").touch()
    (tmp_path / "link.pth").symlink_to(tmp_path / "gone.pth")
    refuse(tmp_path / "crate_smal.pth.tar", r"Did you mean crate_small\.pth\.tar\?")
    refuse(tmp_path / "xyz", r"not there\. Check the path\.")
    refuse(tmp_path / "none" / "w.pth", "There is no folder .*none")
    refuse(tmp_path / "link.pth", r"It is a link to .*gone\.pth, which is gone")
    refuse("ftp://example.org/w.pth", "Addresses of other kinds are not read: download")


def test_a_file_that_may_not_be_read(tmp_path, monkeypatch):
    np.savez(tmp_path / "w.npz", **STATE)

    def denied(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.open", denied)
    refuse(tmp_path / "w.npz", r"w\.npz must be readable; .* Permission denied\. Check who may")


def test_one_name_to_fit(tmp_path):
    np.savez(tmp_path / "w.npz", **STATE)
    loaded = load_fitted(tmp_path / "w.npz", MODEL.clone(num_classes=3), fit="head")
    assert loaded.report == ["head: new, for 3 classes"]
    with pytest.raises(ValueError, match=r"fit must be among head, .*; got heads\."):
        load_weights(tmp_path / "w.npz", MODEL, fit="heads")

"""Weights from the network: a server of this machine has small files of the released layout."""

import dataclasses
import hashlib
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import hub_server
import numpy as np
import pytest
from command import ROOT
from weights import assert_equal_trees

import crate_jax
from crate_jax import CrateAlpha, load_weights, save_weights
from crate_jax.interop import download, hub, read_class_names
from crate_jax.interop.addresses import fetched
from crate_jax.models import released, variants
from crate_jax.models.zoo import architecture

GOLDEN = ROOT / "tests/golden/crate_alpha_jax.npz"
MODEL = CrateAlpha(32, 8, 10, width=32, depth=2, num_heads=4)
REPO, FILE = "UCSC-VLAA/CRATE-alpha", "jax/crate_alpha_B16_in1k.npz"
ADDRESS = f"hf://{REPO}/{FILE}"


@pytest.fixture
def server(tmp_path, monkeypatch):
    """The hub of this machine, with one released file, and empty caches."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("CRATE_JAX_CACHE", str(tmp_path / "ours"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda _: None)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)  # of 10 MiB, which are kept at once
    with hub_server.running() as running:
        monkeypatch.setenv("HF_ENDPOINT", running.url)
        running.add(REPO, FILE, GOLDEN)
        yield running


@pytest.fixture
def row(monkeypatch):
    """The file's row in the table, of a model of its size."""
    content = GOLDEN.read_bytes()
    fields = dict(image_size=32, patch_size=8, width=32, depth=2, num_heads=4)
    monkeypatch.setitem(variants.VARIANTS, "toy", variants.Variant("crate_alpha", fields))
    digest = hashlib.sha256(content).hexdigest()[:8]
    row = released.Released("toy", "in1k", ADDRESS, "Apache-2.0", 10, len(content), digest)
    monkeypatch.setattr(released, "RELEASED", (row,))
    return row


@pytest.fixture(scope="module")
def expected():
    return load_weights(GOLDEN, MODEL)


def refuse(path, line, kind=(ValueError, OSError)):
    with pytest.raises(kind, match=line) as caught:
        load_weights(path, MODEL)
    assert "\n" not in str(caught.value)


def left(tmp_path):
    """Files below the caches, without locks and marks of the hub's client."""
    found = [p for p in tmp_path.rglob("*") if p.is_file() and p.suffix not in (".lock", ".TAG")]
    return sorted(p.name for p in found if "refs" not in p.parts and p.name != ".gitignore")


def test_a_file_of_the_hub_is_fetched_once(server, row, expected, caplog):
    assert_equal_trees(load_weights(ADDRESS, MODEL), expected)
    assert server.gets == [("crate_alpha_B16_in1k.npz", "")]
    url = f"{server.url}/{REPO}/resolve/main/{FILE}"
    assert caplog.messages == [f"fetched {ADDRESS} from {url}; licence: Apache-2.0"]
    assert caplog.records[0].levelno == logging.WARNING
    server.requests.clear()
    assert_equal_trees(load_weights(ADDRESS, MODEL), expected)
    assert read_class_names(ADDRESS) == ()
    assert server.requests == [] and len(caplog.messages) == 1
    from huggingface_hub import hf_hub_download

    path = hf_hub_download(REPO, FILE, local_files_only=True)  # the hub's own client finds it
    assert Path(path).read_bytes() == GOLDEN.read_bytes()


def test_one_call_gives_the_model_that_the_authors_have(server, row):
    """Logits of the official code on the same weights and images."""
    model, params = crate_jax.load_pretrained("toy")
    with np.load(ROOT / "tests/golden/crate_alpha.npz") as golden:
        images, logits = golden["images_nchw"].transpose(0, 2, 3, 1), golden["logits"]
    found = model.apply({"params": params}, images, train=False)
    np.testing.assert_allclose(found, logits, atol=1e-5)
    assert [name for name, _ in server.gets] == ["crate_alpha_B16_in1k.npz"]


def test_a_revision(server, row, expected):
    load_weights(ADDRESS, MODEL)
    server.requests.clear()
    for address in (f"{ADDRESS}@v1", f"hf://{REPO}@v1/{FILE}"):
        assert_equal_trees(load_weights(address, MODEL), expected)
    assert {path for _, path, _ in server.requests} == {f"/{REPO}/resolve/v1/{FILE}"}
    assert server.gets == []  # the content is that of main, and lies in the cache


def test_an_interrupted_download_goes_on_where_it_ended(server, row, expected, tmp_path):
    server.cut_after = 50_000
    # The client goes on by itself while something comes.
    assert_equal_trees(load_weights(ADDRESS, MODEL), expected)
    assert [asked for _, asked in server.gets] == ["", "bytes=50000-", "bytes=100000-"]
    for path in (tmp_path / "hub").rglob("*"):
        if path.is_file() or path.is_symlink():
            path.unlink()
    server.requests.clear()
    server.cut_after = 0
    digest = hashlib.sha256(GOLDEN.read_bytes()).hexdigest()
    folder = tmp_path / "hub/models--UCSC-VLAA--CRATE-alpha/blobs"
    refuse(ADDRESS, r"must be reachable; it is not \(RemoteProtocolError: .*run again, or fetch")
    (part,) = folder.glob("*.part")
    part.write_bytes(GOLDEN.read_bytes()[:70_000])
    assert list(folder.glob(digest)) == []  # nothing that would be taken for the file
    server.cut_after = None
    server.requests.clear()
    assert_equal_trees(load_weights(ADDRESS, MODEL), expected)
    assert server.gets == [("crate_alpha_B16_in1k.npz", "bytes=70000-")]
    assert list(folder.glob("*.part")) == []


def test_a_process_that_is_killed_leaves_what_it_has(server, tmp_path, expected):
    """Another one goes on from there, as no memory of the first is left."""
    program = """
import os, sys
from huggingface_hub import file_download
def killed(url, file, **_):
    file.write(b"x")  # what the next one must keep, and must not fetch
    file.flush()
    os._exit(9)
file_download.http_get = killed
import crate_jax
from crate_jax.interop.addresses import fetched
fetched(sys.argv[1])
"""
    environment = os.environ | {"HF_HUB_CACHE": str(tmp_path / "hub")}
    server.add("me/mine", "w.npz", GOLDEN)
    address = "hf://me/mine/w.npz"
    done = subprocess.run([sys.executable, "-c", program, address], cwd=ROOT, env=environment)
    assert done.returncode == 9
    server.requests.clear()
    refuse(address, r"must have a SHA-256 that begins with .*What came was removed")
    assert [asked for _, asked in server.gets] == ["bytes=1-"]
    assert_equal_trees(load_weights(address, MODEL), expected)


def test_a_wrong_checksum_is_refused_and_nothing_is_kept(server, row, tmp_path):
    content = GOLDEN.read_bytes()
    server.lie = content[:-1] + bytes([content[-1] ^ 1])
    refuse(ADDRESS, r"^http://.* must have a SHA-256 that begins with \w{12}; got", ValueError)
    assert left(tmp_path) == []
    server.lie = b""
    load_weights(ADDRESS, MODEL)


def test_a_file_that_its_owner_has_changed_is_refused(server, row, tmp_path):
    server.files[REPO, FILE] += b"x"
    refuse(ADDRESS, rf"^{ADDRESS} must have 119,384 bytes .*Its owner has changed it", ValueError)
    server.tag = "of-no-digest"
    refuse(
        ADDRESS, rf"^{ADDRESS} must have 119,384 bytes .*the server has 119385 bytes", ValueError
    )
    assert server.gets == [] and left(tmp_path) == []
    server.files[REPO, FILE] = b"x" + GOLDEN.read_bytes()[1:]  # of the same size
    refuse(ADDRESS, rf"must have a SHA-256 that begins with {row.sha256}; got", ValueError)
    assert left(tmp_path) == []


def test_a_file_put_there_by_hand(server, row, expected, tmp_path):
    server.refuse = 503
    place = tmp_path / "ours/weights/hf" / REPO / FILE
    refuse(ADDRESS, rf"must be reachable; .* and put the file at {place}\.", OSError)
    place.parent.mkdir(parents=True)
    place.write_bytes(GOLDEN.read_bytes())
    server.requests.clear()
    assert_equal_trees(load_weights(ADDRESS, MODEL), expected)
    assert server.requests == []
    place.write_bytes(GOLDEN.read_bytes()[:-1])
    refuse(ADDRESS, rf"^{place} must be {ADDRESS} of 119,384 bytes; got 119,383\. Remove it")
    damaged = bytearray(GOLDEN.read_bytes())
    damaged[-1] ^= 1
    place.write_bytes(damaged)
    refuse(ADDRESS, rf"^{place} must be {ADDRESS}, with a SHA-256 that begins with {row.sha256}")


def test_a_server_that_ends_idle_connections(server, row, expected, tmp_path):
    server.hang_up = True
    server.files["", "/a/w.npz"] = GOLDEN.read_bytes()
    save_weights(f"{tmp_path}/written/", expected, MODEL)
    for file in (tmp_path / "written").iterdir():
        server.add("me/mine", file.name, file)
    for address in (f"{server.url}/a/w.npz", ADDRESS, f"{server.url}/a/w.npz?b=1", "hf://me/mine"):
        assert_equal_trees(load_weights(address, MODEL), expected)


def test_no_network(server, row, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    place = tmp_path / "ours/weights/hf" / REPO / FILE
    url = f"http://127.0.0.1:1/{REPO}/resolve/main/{FILE}"
    line = (
        rf"^{ADDRESS} must be reachable; .* or fetch {url} elsewhere and put the file at {place}\."
    )
    refuse(ADDRESS, line, OSError)
    refuse(f"hf://{REPO}", r"must be reachable; it is not \(ConnectError", OSError)
    assert capfd.readouterr().err == ""


def test_offline(server, row, expected, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refuse(ADDRESS, "must be in the cache while HF_HUB_OFFLINE is set; it is not. Unset it, or")
    refuse(f"{server.url}/w.npz", "must be in the cache while HF_HUB_OFFLINE is set")
    assert server.requests == []
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    load_weights(ADDRESS, MODEL)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert_equal_trees(load_weights(ADDRESS, MODEL), expected)


def test_a_cache_that_cannot_be_written(server, row, tmp_path, monkeypatch):
    from huggingface_hub import constants

    (tmp_path / "file").touch()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "file/hub"))
    monkeypatch.setenv("CRATE_JAX_CACHE", str(tmp_path / "file/ours"))
    server.files["", "/w.npz"] = GOLDEN.read_bytes()
    line = (
        r"^the cache must be a folder that takes files; .*file/{}.* is not \(Not a dir.* Set {} to"
    )
    refuse(ADDRESS, line.format("hub", "HF_HOME"), OSError)
    refuse(f"{server.url}/w.npz", line.format("ours", "CRATE_JAX_CACHE"), OSError)


@pytest.mark.parametrize(
    ("address", "status", "line"),
    [
        (f"hf://{REPO}/other.npz", 0, "must name a file that the server has; it has none"),
        ("hf://nobody/nothing/w.npz", 0, "must be open to you; the server answers 404"),
        (ADDRESS, 403, "must be open to you; the server answers 403. Check its name; for what"),
        ("hf://only", 0, r"weights must be hf://OWNER/REPOSITORY, with /PATH and @REVISION"),
        ("hf://a/b@x/c@y", 0, r"weights must be hf://OWNER/REPOSITORY"),
        ("hf://a/b/../c", 0, r"weights must be hf://OWNER/REPOSITORY"),
        (f"hf://{REPO}", 0, r"must hold model\.safetensors, .*; it holds jax/crate_alpha_B16"),
        ("https://", 0, "weights must be https://HOST/PATH of a file"),
        (Path("hf://a/b"), 0, "weights must have two slashes after hf:; got hf:/a/b, as pathlib"),
    ],
)
def test_an_address_that_leads_nowhere(server, address, status, line):
    server.refuse = status
    refuse(address, line)


def test_a_file_of_the_web(server, expected, tmp_path, caplog):
    server.files["", "/a/w.npz"] = GOLDEN.read_bytes()
    url = f"{server.url}/a/w.npz"
    server.cut_after = 50_000
    assert_equal_trees(load_weights(url, MODEL), expected)
    assert [asked for _, asked in server.gets] == ["", "bytes=50000-", "bytes=100000-"]
    server.requests.clear()
    assert_equal_trees(load_weights(url, MODEL), expected)
    assert server.requests == []
    assert caplog.messages == [f"fetched {url}; its owner states its licence there"]
    refuse(f"{server.url}/none.npz", "must name a file that the server has; it has none")
    refuse("http://127.0.0.1:1/w.npz", r"must be reachable; it is not .* put the file at .*/w\.npz")
    server.no_head = True  # then nothing is known beforehand, and nothing is continued
    assert_equal_trees(load_weights(f"{url}?c=1", MODEL), expected)
    server.files["", "/a/w.npz"] = b"<html>"
    refuse(f"{url}?b=1", "it is a web page. Download the file itself")


def test_a_repository_as_save_weights_writes_it(server, tmp_path, expected, caplog):
    names = tuple("abcdefghij")
    prepared = crate_jax.Preprocessing((32, 32), (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), None, "bicubic")
    folder = tmp_path / "written"
    save_weights(f"{folder}/", expected, MODEL, class_names=names, preprocessing=prepared)
    for file in folder.iterdir():
        server.add("me/mine", file.name, file)
    model, params = crate_jax.load_pretrained("hf://me/mine")
    assert architecture(model) == architecture(MODEL)
    assert_equal_trees(params, expected)
    assert crate_jax.preprocessing("hf://me/mine") == prepared
    assert read_class_names("hf://me/mine") == names
    said = f"fetched hf://me/mine from {server.url}/me/mine/tree/main; licence: stated there"
    assert caplog.messages == [said]
    assert "README.md" not in [name for name, _ in server.gets]
    server.requests.clear()
    assert_equal_trees(load_weights("hf://me/mine", MODEL), expected)
    assert server.requests == []


def test_a_repository_of_pieces(server, tmp_path, expected):
    from safetensors.numpy import save_file

    from crate_jax.interop.tree import flatten

    arrays, index = {k: np.asarray(v) for k, v in flatten(expected).items()}, {}
    for number in (0, 1):
        piece = f"model-0000{number + 1}-of-00002.safetensors"
        part = dict(list(arrays.items())[number::2])
        index |= dict.fromkeys(part, piece)
        save_file(part, tmp_path / piece)
        server.add("me/pieces", piece, tmp_path / piece)
    content = json.dumps({"weight_map": index}).encode()
    server.files["me/pieces", "model.safetensors.index.json"] = content
    server.cut_after = 0
    with pytest.raises(OSError, match="must be reachable"):
        load_weights("hf://me/pieces", MODEL)
    server.cut_after = None
    assert_equal_trees(load_weights("hf://me/pieces", MODEL), expected)
    server.requests.clear()
    assert_equal_trees(load_weights("hf://me/pieces", MODEL), expected)
    assert server.requests == []
    gone = fetched("hf://me/pieces") / piece  # as where a process was killed before the last one
    gone.resolve().unlink()
    gone.unlink()
    assert_equal_trees(load_weights("hf://me/pieces", MODEL), expected)
    assert server.gets == [("main", ""), (piece, "")]  # the listing, and what is not there


def test_a_bar_on_a_terminal_alone(server, row, monkeypatch, capsys):
    monkeypatch.setattr(download, "BAR_AFTER_S", 0)
    load_weights(ADDRESS, MODEL)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    path = fetched(ADDRESS)
    path.resolve().unlink()
    path.unlink()
    load_weights(ADDRESS, MODEL)
    assert "\rcrate_alpha_B16_in1k.npz:   0%|" in capsys.readouterr().err


def test_the_clients_are_needed_where_they_are_used(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    refuse(ADDRESS, rf"^{ADDRESS} must have huggingface_hub, which is missing\. Install it: pip")


def test_the_table_is_of_files_that_exist_once():
    names = [row.name for row in released.RELEASED]
    assert len(names) == len(set(names))
    assert {row.by_program for row in released.RELEASED} == {True, False}
    for row in released.RELEASED:
        assert row.model in variants.VARIANTS
        if row.by_program:
            assert hub.parse(row.file).revision == "main"
    assert dataclasses.is_dataclass(released.Released)

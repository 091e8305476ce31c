"""The same photographs from every kind of storage; each format's own ways; writing one."""

import io
import json
import os
import shutil
import tarfile
import types
from pathlib import Path

import numpy as np
import pytest
from stored import (
    convert,
    encode_crops,
    tar_bytes,
    tfrecord_bytes,
    write_array_record,
    write_folder,
    write_tar,
)

from crate_jax.config import DataConfig
from crate_jax.data.images.labelled import LabelledImages
from crate_jax.data.images.pipeline import make_pipeline
from crate_jax.data.stores import storage, tfds, tfrecord
from crate_jax.data.stores.prepare import FINGERPRINT, prepare
from crate_jax.data.stores.sources import open_source
from crate_jax.data.stores.tars import imagenet_classes

COUNT = 23


def open_split(dataset, data_dir, split="train", **options):
    config = DataConfig(dataset=dataset, data_dir=str(data_dir), **options)
    return open_source(config, split, image_shape=(1, 1, 3), num_classes=1)


@pytest.fixture(scope="module")
def files(photographs):
    """{"class/name": JPEG}, of three classes."""
    crops = encode_crops(photographs, COUNT)
    names = ("ant", "bee", "cat")
    return {f"{names[i % 3]}/{i:03d}.jpg": crop for i, crop in enumerate(crops)}


@pytest.fixture(scope="module")
def stored(files, tmp_path_factory):
    """Where each kind of storage is: {kind: (dataset, data_dir)}."""
    root = tmp_path_factory.mktemp("stored")
    write_folder(root / "folder", "train", files)
    write_folder(root / "folder", "val", dict(list(files.items())[:6]))
    write_tar(root / "tar", "train", dict(reversed(files.items())))
    prepared = write_array_record(
        root / "folder", root / "array_record", "photos", shard_examples=5
    )
    convert(prepared, root / "tfrecord", "tfrecord")
    convert(prepared, root / "parquet", "parquet")
    names = {"folder": "folder", "tar": "tar"}
    kinds = ("folder", "tar", "array_record", "tfrecord", "parquet")
    return {kind: (names.get(kind, "photos"), root / kind) for kind in kinds}


def everything(source):
    """{file name: (pixels, label)} of a source, through the pipeline of an evaluation."""
    data = DataConfig(eval_transforms="resize((40, 50))")
    rows = LabelledImages(source, make_pipeline(data, (40, 50, 3), train=False))
    found = {}
    for i in range(len(source)):
        example = rows.row(i, np.random.default_rng(0))
        name = Path(source.examples[i]["name"]).name
        found[name] = (example["image"], int(example["label"]))
    assert len(found) == len(source)
    return found


def test_every_format_gives_the_same_pixels_and_labels(stored, files):
    expected = everything(open_split(*stored["folder"]))
    assert {name: label for name, (_, label) in expected.items()} == {
        name.split("/")[1]: ("ant", "bee", "cat").index(name.split("/")[0]) for name in files
    }
    for kind in ("tar", "array_record", "tfrecord", "parquet"):
        source = open_split(*stored[kind])
        assert (len(source), source.num_classes) == (COUNT, 3), kind
        assert source.class_names == ("ant", "bee", "cat"), kind
        ending = "names and labels" if kind == "tar" else "version and shards"
        assert source.listing.endswith(f" of {ending}"), kind
        found = everything(source)
        assert found.keys() == expected.keys(), kind
        for name, (pixels, label) in found.items():
            np.testing.assert_array_equal(pixels, expected[name][0])
            assert label == expected[name][1]


# --- TFRecord -------------------------------------------------------------------------------------

# Three records, b"first", b"" and b"0123456789" twice, as TensorFlow 2.21 wrote them.
BY_TENSORFLOW = bytes.fromhex(
    "0500000000000000eab2043e666972737455ff23e5000000000000000029039807d8ea82a2"
    "14000000000000005e3d2915303132333435363738393031323334353637383996ffc02b"
)
RECORDS = [b"first", b"", b"0123456789" * 2]


def test_a_path_that_tfds_takes_for_a_pattern_is_told(stored, tmp_path):
    """TFDS looks for prepared files by a pattern, and finds none below such a folder."""
    shutil.copytree(stored["array_record"][1], tmp_path / "a[b]")
    with pytest.raises(FileNotFoundError, match=r"TFDS takes the \[ in its path for a pattern"):
        open_split("photos", tmp_path / "a[b]")


def test_framing_is_tensorflows(tmp_path):
    assert tfrecord_bytes(RECORDS) == BY_TENSORFLOW
    path = tmp_path / "x"
    path.write_bytes(BY_TENSORFLOW)
    index = tfrecord.index_records(str(path))
    assert index.tolist() == [[12, 5], [33, 0], [49, 20]]
    for (offset, length), record in zip(index.tolist(), RECORDS, strict=True):
        assert tfrecord.read_record(str(path), offset, length, check_crc=True) == record


@pytest.mark.parametrize("cut", range(1, len(BY_TENSORFLOW), 7))
def test_index_ends_where_the_file_does(tmp_path, cut):
    (tmp_path / "x").write_bytes(BY_TENSORFLOW[:cut])
    whole = sum(cut >= end for end in (21, 37, 73))
    assert len(tfrecord.index_records(str(tmp_path / "x"))) == whole


def test_index_ends_at_a_length_that_is_damaged(tmp_path):
    damaged = bytearray(BY_TENSORFLOW)
    damaged[21] ^= 1  # the second record's length
    (tmp_path / "x").write_bytes(damaged)
    assert len(tfrecord.index_records(str(tmp_path / "x"))) == 1


def test_checksum_is_verified_on_request(tmp_path):
    damaged = bytearray(BY_TENSORFLOW)
    damaged[50] ^= 1
    (tmp_path / "x").write_bytes(damaged)
    path = str(tmp_path / "x")
    assert tfrecord.read_record(path, 49, 20, check_crc=False) != RECORDS[2]
    with pytest.raises(ValueError, match=r"x is damaged: the checksum at byte 49 does not match"):
        tfrecord.read_record(path, 49, 20, check_crc=True)


def test_check_crc_reaches_the_reader(stored, tmp_path):
    dataset, _ = stored["tfrecord"]
    copy = convert(stored["array_record"][1] / "photos/1.0.0", tmp_path, "tfrecord")
    path = sorted(copy.glob("*train*"))[0]
    index, data = tfrecord.index_records(str(path)), bytearray(path.read_bytes())
    last = len(index) - 1
    data[index[last].sum() - index[last, 1] // 2] ^= 1  # within the last record's image
    path.write_bytes(data)
    open_split(dataset, tmp_path).examples[last]
    with pytest.raises(ValueError, match=r"is damaged: the checksum at byte"):
        open_split(dataset, tmp_path, check_crc=True).examples[last]


def test_parts_of_a_tfrecord_split(stored):
    whole = open_split(*stored["tfrecord"])
    names = [whole.examples[i]["name"] for i in range(COUNT)]
    for split, part in (("train[3:17]", names[3:17]), ("train[-4:]", names[-4:])):
        source = open_split(*stored["tfrecord"], split)
        assert [source.examples[i]["name"] for i in range(len(source))] == part
    both = open_split(*stored["tfrecord"], "train[:2]+val")
    assert len(both) == 8
    # The index of these files, made in that order, serves any order.
    again = open_split(*stored["tfrecord"], "val+train[:2]")
    found = [[source.examples[i]["name"] for i in range(8)] for source in (both, again)]
    assert found[1] == found[0][2:] + found[0][:2]


def test_tfrecord_index_is_kept_and_found_out_again_when_files_change(stored, tmp_path):
    dataset, root = stored["tfrecord"]
    folder = tmp_path / "indices"
    folder.mkdir()
    first = open_split(dataset, root, index_dir=str(folder))
    (kept,) = folder.iterdir()
    before = kept.stat().st_mtime_ns
    again = open_split(dataset, root, index_dir=str(folder))
    assert kept.stat().st_mtime_ns == before
    assert again.examples[7]["image"] == first.examples[7]["image"]
    kept.write_bytes(kept.read_bytes()[:100])  # damaged: found out again
    assert open_split(dataset, root, index_dir=str(folder)).examples[7] == first.examples[7]
    assert len(kept.read_bytes()) > 100
    kept.write_bytes(b"")
    assert open_split(dataset, root, index_dir=str(folder)).examples[7] == first.examples[7]


def test_index_is_of_the_files_as_they_are(tmp_path):
    paths, built = [str(tmp_path / name) for name in "ab"], []
    for path in paths:
        Path(path).write_bytes(b"12345")

    def build():
        built.append(1)
        return {"x": np.arange(len(built))}

    def index(files):
        return storage.cached_index(files, str(tmp_path), None, build)["x"]

    assert len(index(paths)) == len(index(paths[::-1])) == 1
    Path(paths[1]).write_bytes(b"123456")
    assert len(index(paths)) == 2
    os.utime(paths[1], ns=(0, 0))  # written again at the same size
    assert len(index(paths)) == len(index(paths)) == 3
    assert len(list(tmp_path.iterdir())) == 3  # what is out of date has been replaced


@pytest.mark.parametrize("damage", ["short", "empty", "no zip", "other keys", "flipped"])
def test_damaged_index_is_made_again(tmp_path, damage):
    (tmp_path / "a").write_bytes(b"12345")
    arguments = ([str(tmp_path / "a")], str(tmp_path), None)
    storage.cached_index(*arguments, lambda: {"x": np.arange(3)})
    (kept,) = tmp_path.glob(".crate_jax_index_*")
    data = bytearray(kept.read_bytes())
    data[len(data) // 2] ^= 1
    other = io.BytesIO()
    np.savez(other, y=np.arange(2))
    kept.write_bytes(
        {
            "short": bytes(data[:100]),
            "empty": b"",
            "no zip": b"text" * 99,
            "other keys": other.getvalue(),
            "flipped": bytes(data),
        }[damage]
    )
    found = storage.cached_index(*arguments, lambda: {"x": np.arange(4)})
    assert found["x"].tolist() in ([0, 1, 2, 3], [0, 1, 2])
    assert found.keys() == {"x"}
    assert damage == "flipped" or len(found["x"]) == 4
    assert storage.cached_index(*arguments, lambda: {})["x"].tolist() == found["x"].tolist()


def test_index_goes_where_it_may(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "a").write_bytes(b"12345")
    missing = tmp_path / "nowhere"  # no folder to write to, whoever runs the tests
    storage.cached_index([str(tmp_path / "a")], str(missing), None, lambda: {"x": np.arange(3)})
    (kept,) = (tmp_path / "cache/crate_jax/indices").iterdir()
    assert kept.name.startswith(".crate_jax_index_")
    assert not missing.exists()
    with pytest.raises(
        ValueError, match=r"data\.index_dir must be a local folder; got gs://b/i\. "
    ):
        storage.cached_index([], str(tmp_path), "gs://b/i", dict)
    with pytest.raises(OSError, match="a/i"):  # a file is in the way
        storage.cached_index([], str(tmp_path), str(tmp_path / "a/i"), dict)


def test_file_of_a_bucket_that_is_written_again_has_another_state():
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.pipe("/state/x", b"12345")
    first = storage.file_state("memory://state/x")
    assert first == storage.file_state("memory://state/x") and first[0] == 5
    memory.rm("/state/x")
    memory.pipe("/state/x", b"54321")
    assert storage.file_state("memory://state/x") != first


# --- tar files ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def imagenet(photographs, tmp_path_factory):
    """ImageNet's two tar files, with three classes of four images, and five to validate."""
    crops = encode_crops(photographs, 12)
    root, synsets = tmp_path_factory.mktemp("imagenet"), imagenet_classes()
    train = {}
    for k, label in enumerate((999, 0, 417)):
        members = {
            f"{synsets[label]}_{i}.JPEG": crop for i, crop in enumerate(crops[4 * k : 4 * k + 4])
        }
        train[f"{synsets[label]}.tar"] = tar_bytes(members)
    (root / "ILSVRC2012_img_train.tar").write_bytes(tar_bytes(train))
    val = {f"ILSVRC2012_val_{i:08d}.JPEG": crops[i] for i in (5, 1, 4, 2, 3)}
    (root / "ILSVRC2012_img_val.tar").write_bytes(tar_bytes(val))
    return root, crops


def test_imagenets_own_tar_files(imagenet):
    root, crops = imagenet
    train = open_split("tar", root, "train")
    assert (len(train), train.num_classes) == (12, 1000)
    found = [train.examples[i] for i in range(12)]
    assert [e["label"] for e in found] == [0] * 4 + [417] * 4 + [999] * 4
    assert [e["image"] for e in found] == [*crops[4:8], *crops[8:], *crops[:4]]
    assert found[0]["name"] == "n01440764/n01440764_0.JPEG"
    val = open_split("tar", root, "validation")
    # The first five labels of ILSVRC 2012's validation: sea snake, Alp, Shetland dog, bowl, sheep.
    assert [val.examples[i]["label"] for i in range(5)] == [65, 970, 230, 809, 516]
    assert [val.examples[i]["image"] for i in range(5)] == crops[1:6]


def test_tar_layouts(tmp_path, photographs):
    (jpeg,) = encode_crops(photographs, 1)
    write_tar(tmp_path, "around", {"all/ant/deep/1.jpg": jpeg, "all/bee/2.JPG": jpeg, "all/x": b""})
    write_tar(tmp_path, "plain", {"./bee/2.jpg": jpeg, "./ant/1.jpg": jpeg})
    for split in ("around", "plain"):
        source = open_split("tar", tmp_path, split)
        assert source.class_names == ("ant", "bee")
        assert [source.examples[i]["label"] for i in range(2)] == [0, 1]
    write_tar(tmp_path, "flat", {"1.jpg": jpeg})
    with pytest.raises(ValueError, match=r"flat\.tar must hold class/image files; got 1\.jpg\."):
        open_split("tar", tmp_path, "flat")
    (tmp_path / "text.tar").write_text("no tar file at all" * 100)
    with pytest.raises(ValueError, match=r"text\.tar must be an uncompressed tar file; .* Unpack"):
        open_split("tar", tmp_path, "text")
    with pytest.raises(FileNotFoundError, match=r"got plane\. Did you mean plain\?"):
        open_split("tar", tmp_path, "plane")
    with pytest.raises(ValueError, match=r"data\.data_dir must be set for a tar\. Set --config"):
        open_source(DataConfig(dataset="tar"), "train", image_shape=(1, 1, 3), num_classes=1)


def member(tar, name, data=b"", **fields):
    """Add a member; without data a folder or link, by its ``type``."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for key, value in fields.items():
        setattr(info, key, value)
    tar.addfile(info, io.BytesIO(data))


def write_members(path, *members):
    with tarfile.open(path, "w") as tar:
        for name, *rest in members:
            fields = rest.pop() if rest and isinstance(rest[-1], dict) else {}
            member(tar, name, *rest, **fields)


def contents(root, split="train"):
    """{name: (bytes, label)} and the classes of a tar file."""
    source = open_split("tar", root, split)
    found = [source.examples[i] for i in range(len(source))]
    return {e["name"]: (e["image"], e["label"]) for e in found}, source.class_names


def test_links_in_a_tar_are_followed(tmp_path):
    hard, symbolic = {"type": tarfile.LNKTYPE}, {"type": tarfile.SYMTYPE}
    write_members(
        tmp_path / "train.tar",
        ("ant/1.jpg", b"one"),
        ("ant/.cache", symbolic | {"linkname": "/tmp"}),  # hidden
        ("bee/2.jpg", hard | {"linkname": "ant/1.jpg"}),
        ("bee/3.jpg", symbolic | {"linkname": "../ant/./1.jpg"}),
        ("bee/4.jpg", symbolic | {"linkname": "3.jpg"}),
    )
    found, classes = contents(tmp_path)
    assert found == {
        "ant/1.jpg": (b"one", 0),
        "bee/2.jpg": (b"one", 1),
        "bee/3.jpg": (b"one", 1),
        "bee/4.jpg": (b"one", 1),
    }
    assert classes == ("ant", "bee")


@pytest.mark.parametrize(
    "name, target",
    [("bee/2.jpg", "nowhere.jpg"), ("bee/2.jpg", "2.jpg"), ("bee", "ant"), ("bee", "data/bee")],
)
def test_link_in_a_tar_that_leads_to_no_file(tmp_path, name, target):
    link = {"type": tarfile.SYMTYPE, "linkname": target}
    write_members(tmp_path / "train.tar", ("ant/1.jpg", b"one"), (name, link))
    message = (
        rf"train\.tar must hold the files that its links lead to; {name} leads to .*{target}\."
    )
    with pytest.raises(ValueError, match=message):
        open_split("tar", tmp_path)


def test_tar_is_read_as_it_would_be_unpacked(tmp_path):
    """Of two members of a name the last counts; absolute names are not; hidden ones do not."""
    write_members(
        tmp_path / "train.tar",
        ("cat/", {"type": tarfile.DIRTYPE}),
        ("ant/1.jpg", b"old"),
        ("ant/1.jpg", b"new"),
        ("/bee//2.jpg", b"two"),
        ("./bee/._2.jpg", b"AppleDouble"),
        (".ipynb_checkpoints/3.jpg", b"hidden"),
    )
    found, classes = contents(tmp_path)
    assert found == {"ant/1.jpg": (b"new", 0), "bee/2.jpg": (b"two", 1)}
    assert classes == ("ant", "bee", "cat")  # an empty folder is a class, as in a folder
    write_members(tmp_path / "out.tar", ("../ant/1.jpg", b"x"))
    with pytest.raises(ValueError, match=r"\.\./ant/1\.jpg must lie within the tar file\."):
        open_split("tar", tmp_path, "out")


def test_tars_within_a_tar(tmp_path):
    one, two = (tar_bytes({f"{n}.jpg": b"x"}) for n in (1, 2))
    write_tar(tmp_path, "twice", {"ant.tar": one, "bee.tar": one, "./ant.tar": two})
    assert set(contents(tmp_path, "twice")[0]) == {"ant/2.jpg", "bee/1.jpg"}  # the last counts
    write_tar(tmp_path, "both", {"ant/3.jpg": b"x", "ant.tar": one, "bee.tar": two})
    assert set(contents(tmp_path, "both")[0]) == {"ant/1.jpg", "ant/3.jpg", "bee/2.jpg"}
    write_tar(tmp_path, "packed", {"ant.tar": one, "bee.tar.gz": b"x"})
    with pytest.raises(ValueError, match=r"bee\.tar\.gz must be an uncompressed tar file\. Unpack"):
        open_split("tar", tmp_path, "packed")
    write_members(
        tmp_path / "linked.tar",
        ("ant.tar", one),
        ("bee.tar", {"type": tarfile.SYMTYPE, "linkname": "ant.tar"}),
    )
    with pytest.raises(
        ValueError, match=r"bee\.tar leads to ant\.tar\. Pack it with --dereference"
    ):
        open_split("tar", tmp_path, "linked")


def test_two_tar_files_of_one_split(tmp_path):
    for name in ("train", "ILSVRC2012_img_train"):
        write_tar(tmp_path, name, {"ant/1.jpg": b"x"})
    message = r"must hold one tar file for train; got .*ILSVRC2012_img_train\.tar and train\.tar\."
    with pytest.raises(ValueError, match=message):
        open_split("tar", tmp_path)


def test_index_is_of_where_the_files_are(tmp_path, monkeypatch):
    """Two data sets of one relative name, size and time, and one folder for indices."""
    for place, other in (("one", "b"), ("two", "z")):
        write_tar(tmp_path / place / "data", "train", {"a/1.jpg": b"x", f"{other}/1.jpg": b"x"})
        os.utime(tmp_path / place / "data/train.tar", ns=(1, 1))
        monkeypatch.chdir(tmp_path / place)
        source = open_split("tar", "data", index_dir=str(tmp_path / "indices"))
        assert source.class_names == ("a", other)


def test_one_stray_image_does_not_make_one_class_of_all(tmp_path):
    write_members(
        tmp_path / "train.tar",
        ("all/ant/1.jpg", b"1"),
        ("all/bee/2.jpg", b"2"),
        ("all/3.jpg", b"3"),
    )
    with pytest.raises(ValueError, match=r"train\.tar must hold class/image files; got all/3\.jpg"):
        open_split("tar", tmp_path)


@pytest.mark.parametrize("damage", ["header", "hole", "zeros", "cut", "cut in a header", "no end"])
@pytest.mark.parametrize("within", [False, True])
def test_damaged_tar_does_not_pass_for_a_shorter_one(tmp_path, damage, within):
    names = [f"{c}/{i}.jpg" for c in "abc" for i in range(3)]
    if within:  # of three members, the tar files of the classes; the second is damaged
        data = bytearray(tar_bytes({n[2:]: b"x" * 700 for n in names[:3]}))
    else:
        data = bytearray(tar_bytes({n: b"x" * 700 for n in names}))
    second = 512 + 1024  # where the second member's header begins
    if damage == "header":
        data[second : second + 512] = b"\xff" * 512
    elif damage in ("hole", "zeros"):
        end = second + 512 if damage == "hole" else len(data)
        data[second:end] = bytes(end - second)
        data += bytes(2**20)
    elif damage == "no end":
        data = data[: data.rindex(b"x") + 1 + 324]
    else:
        data = data[: second + 100 * (damage != "cut")]
    if within:
        whole = tar_bytes({"1.jpg": b"x"})
        data = bytearray(tar_bytes({"a.tar": whole, "b.tar": bytes(data), "c.tar": whole}))
    (tmp_path / "train.tar").write_bytes(data)
    with pytest.raises(ValueError, match=r"train\.tar must be whole; it ends after \d+ images\."):
        open_split("tar", tmp_path)
    found = open_split("tar", tmp_path, on_bad_example="skip")
    if within:
        assert found.class_names == ("a", "b", "c")  # what is whole around the damage is read


def test_folder_around_all_has_none_beside_it(tmp_path):
    write_members(
        tmp_path / "train.tar",
        ("meta/", {"type": tarfile.DIRTYPE}),
        ("all/ant/1.jpg", b"1"),
        ("all/bee/2.jpg", b"2"),
    )
    with pytest.raises(
        ValueError, match=r"train\.tar must hold .*; all are below all, beside other"
    ):
        open_split("tar", tmp_path)


def test_tar_that_is_written_again_at_its_size(tmp_path):
    write_members(tmp_path / "train.tar", ("ant/1.jpg", b"one"), ("bee/2.jpg", b"two"))
    assert contents(tmp_path)[0]["bee/2.jpg"] == (b"two", 1)
    size = (tmp_path / "train.tar").stat().st_size
    write_members(tmp_path / "train.tar", ("ant/2.jpg", b"two"), ("bee/1.jpg", b"one"))
    os.utime(tmp_path / "train.tar", ns=(1, 1))
    assert (tmp_path / "train.tar").stat().st_size == size
    assert contents(tmp_path)[0] == {"ant/2.jpg": (b"two", 0), "bee/1.jpg": (b"one", 1)}


@pytest.mark.parametrize(
    "name",
    ["extra.JPEG", "ILSVRC2012_val_00050001.JPEG", "ILSVRC2012_val_00000000.JPEG", "bee/1.JPEG"],
)
def test_what_is_not_imagenets_in_its_tar(tmp_path, name):
    write_tar(tmp_path, "ILSVRC2012_img_val", {"ILSVRC2012_val_00000001.JPEG": b"x", name: b"x"})
    message = rf"img_val\.tar must hold the images of ILSVRC 2012; got {name}\. Name it otherwise"
    with pytest.raises(ValueError, match=message):
        open_split("tar", tmp_path, "validation")


def test_imagenets_validation_images_in_a_folder(tmp_path):
    names = {f"val/ILSVRC2012_val_0000000{i}.JPEG": b"x" for i in (1, 2)}
    write_tar(tmp_path, "ILSVRC2012_img_val", names)
    source = open_split("tar", tmp_path, "validation")
    assert [source.examples[i]["label"] for i in range(2)] == [65, 970]


def test_compressed_tar_is_refused(tmp_path, photographs):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        info = tarfile.TarInfo("ant/1.jpg")
        info.size = 5
        tar.addfile(info, io.BytesIO(b"12345"))
    (tmp_path / "train.tar").write_bytes(buffer.getvalue())
    with pytest.raises(ValueError, match=r"train\.tar must be an uncompressed tar file; .* Unpack"):
        open_split("tar", tmp_path)


# --- prepare --------------------------------------------------------------------------------------


def test_prepared_folder_is_a_tfds_data_set(stored, files):
    import tensorflow_datasets as tfds

    _, root = stored["array_record"]
    builder = tfds.builder("photos", data_dir=root)
    assert {k: s.num_examples for k, s in builder.info.splits.items()} == {"train": 23, "val": 6}
    assert builder.info.features["label"].names == ["ant", "bee", "cat"]
    example = builder.as_data_source("train")[0]  # decoded by TFDS itself
    assert example["image"].shape == (64, 80, 3)
    name = example["file_name"].decode()
    assert builder.info.features["label"].int2str(int(example["label"])) + "/" + name in files
    labels = [builder.as_data_source("train[:40%]")[i]["label"] for i in range(9)]
    assert set(labels) == {0, 1, 2}  # a part has all classes: the order is not the folder's


def test_prepare_goes_on_after_its_last_whole_file(stored, tmp_path):
    source = str(stored["folder"][1])
    said = []
    whole = prepare(source, str(tmp_path / "a"), name="x", shard_examples=5, say=said.append)
    assert (whole["files"], whole["written"], whole["splits"]) == (7, 7, {"train": 23, "val": 6})
    assert said[4] == "train: file 5 of 5, x-train.array_record-00004-of-00005"
    stopped = []

    def stop(line):
        stopped.append(line)
        if len(stopped) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(source, str(tmp_path / "b"), name="x", shard_examples=5, say=stop)
    assert not (tmp_path / "b/x/1.0.0/dataset_info.json").exists()
    again = prepare(source, str(tmp_path / "b"), name="x", shard_examples=5)
    assert (again["files"], again["written"]) == (7, 4)
    for path in (tmp_path / "a/x/1.0.0").iterdir():
        assert (tmp_path / "b/x/1.0.0" / path.name).read_bytes() == path.read_bytes(), path.name
    assert prepare(source, str(tmp_path / "b"), name="x", shard_examples=5)["written"] == 0
    with pytest.raises(
        ValueError, match=r"x/1\.0\.0 must hold nothing else; got x-train.*-of-00005"
    ):
        prepare(source, str(tmp_path / "b"), name="x", shard_examples=9)


@pytest.mark.parametrize("change", ["label", "file", "size", "shards", "no record"])
def test_prepare_does_not_go_on_with_another_source(tmp_path, photographs, change):
    crops = encode_crops(photographs, 6)
    files = {f"{'ab'[i % 2]}/{i}.jpg": crop for i, crop in enumerate(crops)}
    write_folder(tmp_path / "from", "train", files)

    def run(shard_examples=2):
        said = []
        prepare(
            str(tmp_path / "from"), str(tmp_path / "to"), name="x", shard_examples=shard_examples,
            say=said.append,
        )  # fmt: skip
        return said

    run()
    folder = tmp_path / "to/x/1.0.0"
    next(folder.glob("*-00001-of-*")).unlink()  # as if it had been stopped
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    if change == "label":
        (tmp_path / "from/train/a/0.jpg").rename(tmp_path / "from/train/b/0.jpg")
    elif change == "file":
        (tmp_path / "from/train/a/0.jpg").rename(tmp_path / "from/train/a/7.jpg")
    elif change == "size":
        (tmp_path / "from/train/a/0.jpg").write_bytes(crops[0] + b"more")
    elif change == "no record":
        (folder / FINGERPRINT).unlink()
        del before[FINGERPRINT]
    message = r"x/1\.0\.0 must hold files of this source; they were prepared from another\."
    if change == "shards":
        message = r"x/1\.0\.0 must hold nothing else; got x-train"
    with pytest.raises(ValueError, match=message):
        run(shard_examples=3 if change == "shards" else 2)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("name", ["ant ", " ant", "an\nt", "an\x85t", os.fsdecode(b"\xff")])
def test_class_that_a_list_of_names_cannot_hold(tmp_path, photographs, name):
    (jpeg,) = encode_crops(photographs, 1)
    write_folder(tmp_path / "from", "train", {f"{name}/1.jpg": jpeg, "bee/1.jpg": jpeg})
    with pytest.raises(ValueError, match=r"classes must have names that are a line of text") as e:
        prepare(str(tmp_path / "from"), str(tmp_path / "to"), name="x")
    assert "\n" not in str(e.value) and str(e.value).isprintable()
    assert not (tmp_path / "to").exists()


def test_prepared_imagenet_is_read_under_tfdss_own_name(imagenet, tmp_path):
    root, _ = imagenet
    found = prepare(str(root), str(tmp_path))
    assert found["dataset"] == "imagenet2012"
    for split in ("train", "validation"):
        by_tar, by_tfds = (
            open_split("tar", root, split),
            open_split("imagenet2012", tmp_path, split),
        )
        assert by_tfds.num_classes == 1000
        expected = {
            Path(e["name"]).name: (e["image"], e["label"])
            for e in (by_tar.examples[i] for i in range(len(by_tar)))
        }
        got = {
            e["name"]: (e["image"], e["label"])
            for e in (by_tfds.examples[i] for i in range(len(by_tfds)))
        }
        assert got == expected


@pytest.mark.parametrize(
    "name, message",
    [
        (None, r"--name must be a name of your own, .*; got none\. TFDS reads imagenet2012 with"),
        ("imagenet2012", r"--name must be a name of your own, .*; got imagenet2012\. TFDS reads"),
        ("cifar10", r"--name must be a name of your own, .*; got cifar10\."),
        ("my photos", r"--name must be a name of your own, .*; got my photos\."),
        ("Photos", r"--name must be a name of your own, .*; got Photos\."),
        ("_x", r"--name must be a name of your own, .*; got _x\."),
        ("synthetic", r"--name must be a name of your own, .*; got synthetic\."),
        ("x:1", r"--name's version must be of three numbers; got 1\. Write 1\.0\.0\."),
        ("x:1.0.x", r"--name's version must be of three numbers; got 1\.0\.x\."),
        ("x:01.0.0", r"--name's version must be of three numbers; got 01\.0\.0\."),
    ],
)
def test_names_that_do_not_fit(stored, tmp_path, name, message):
    with pytest.raises(ValueError, match=message):
        prepare(str(stored["folder"][1]), str(tmp_path), name=name)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("split", ["my split", "a+b", "train[1]", "all", "é", "train.v2"])
def test_splits_that_tfds_could_not_name(tmp_path, photographs, split):
    (jpeg,) = encode_crops(photographs, 1)
    write_folder(tmp_path / "from", split, {"ant/1.jpg": jpeg})
    with pytest.raises(ValueError, match=r"splits must be named by letters, digits, _ and -, and"):
        prepare(str(tmp_path / "from"), str(tmp_path / "to"), name="x")
    assert not (tmp_path / "to").exists()


def test_folders_beside_tar_files_are_not_left_out(tmp_path):
    write_folder(tmp_path, "train", {"ant/1.jpg": b"x"})
    write_tar(tmp_path, "test", {"ant/1.jpg": b"x"})
    message = (
        r"--from must hold folders or tar files, not both; got train beside the tar file of test"
    )
    with pytest.raises(ValueError, match=message):
        prepare(str(tmp_path), str(tmp_path / "to"), name="x")


def test_nothing_to_prepare(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"--from must be an existing folder; got"):
        prepare(str(tmp_path / "none"), str(tmp_path / "to"), name="x")
    with pytest.raises(ValueError, match=r"--from must hold a folder or a tar file for each split"):
        prepare(str(tmp_path), str(tmp_path / "to"), name="x")


def test_buckets_are_not_written_to(stored):
    with pytest.raises(ValueError, match=r"--to must be a local folder; got gs://b/x\. Copy the"):
        prepare(str(stored["folder"][1]), "gs://b/x", name="x")


def test_splits_with_other_classes_are_refused(tmp_path, photographs):
    (jpeg,) = encode_crops(photographs, 1)
    write_folder(tmp_path / "from", "train", {"ant/1.jpg": jpeg, "bee/1.jpg": jpeg})
    write_folder(tmp_path / "from", "val", {"ant/1.jpg": jpeg})
    message = (
        r"val must have the 2 classes of .*train; it has 1, bee … are not in both\. Add an emp"
    )
    with pytest.raises(ValueError, match=message):
        prepare(str(tmp_path / "from"), str(tmp_path / "to"), name="x")


# --- buckets --------------------------------------------------------------------------------------


def test_files_of_a_bucket_are_read_as_local_ones(stored, files):
    """fsspec's file system in memory stands in for a bucket."""
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.put(str(stored["folder"][1]), "/bucket/folder", recursive=True)
    memory.put(str(stored["tar"][1]), "/bucket/tar", recursive=True)
    for kind in ("folder", "tar"):
        here, there = open_split(*stored[kind]), open_split(kind, f"memory://bucket/{kind}")
        assert (len(there), there.class_names) == (COUNT, here.class_names)
        for i in range(COUNT):
            assert there.examples[i]["image"] == here.examples[i]["image"]
            assert there.examples[i]["label"] == here.examples[i]["label"]
    path = sorted(stored["tfrecord"][1].rglob("*tfrecord*"))[0]
    memory.put(str(path), "/bucket/records")
    found = tfrecord.index_records("memory://bucket/records")
    np.testing.assert_array_equal(found, tfrecord.index_records(str(path)))
    offset, length = found[1].tolist()
    assert tfrecord.read_record("memory://bucket/records", offset, length, check_crc=True) == (
        tfrecord.read_record(str(path), offset, length, check_crc=True)
    )


def test_buckets_of_no_known_kind():
    with pytest.raises(ValueError, match=r"nope:// must be reachable; .* Use gs://, s3:// or"):
        open_split("folder", "nope://bucket/x")


@pytest.mark.parametrize("kind", ["array_record", "parquet"])
def test_formats_that_no_bucket_can_serve(kind):
    builder = types.SimpleNamespace(data_path="s3://bucket/photos/1.0.0")
    message = rf"x/train must be local: {kind} files cannot be read from s3://bucket/photos/1\.0\.0"
    with pytest.raises(ValueError, match=message + r"\. Mount the bucket as a folder, or prepare"):
        tfds._as_data_source(builder, "train", None, "x/train", kind)


def test_missing_package_is_named(monkeypatch):
    import fsspec

    def missing(protocol, **options):
        raise ImportError("Install gcsfs to access Google Storage")

    monkeypatch.setattr(fsspec, "filesystem", missing)
    with pytest.raises(ValueError, match=r"gs:// must be reachable; .* pip install gcsfs\."):
        storage.filesystem.__wrapped__("gs")


def test_description_is_of_an_array_record_set(stored):
    info = json.loads((stored["array_record"][1] / "photos/1.0.0/dataset_info.json").read_text())
    assert info["fileFormat"] == "array_record"
    assert info["splits"][0]["shardLengths"] == ["5", "5", "5", "4", "4"]

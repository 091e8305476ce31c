"""A system that fails is waited for, and then named; nothing good is taken for damaged."""

import errno
import io
import itertools
import os
from contextlib import closing

import cv2
import numpy as np
import pytest
from stored import write_folder

from crate_jax.config import DataConfig
from crate_jax.data import rows as rows_module
from crate_jax.data.images.labelled import LabelledImages, open_labelled_images
from crate_jax.data.images.pipeline import make_pipeline
from crate_jax.data.loader import eval_batches, train_batches
from crate_jax.data.rows import FailingSystemError
from crate_jax.data.stores import storage
from crate_jax.data.stores.prepare import prepare
from crate_jax.data.stores.sources import Source

SHAPE, COUNT, FAILING = (8, 8, 3), 12, 5
PNG = [cv2.imencode(".png", np.full(SHAPE, i, np.uint8))[1].tobytes() for i in range(COUNT)]
SKIP = {"on_bad_example": "skip", "max_bad_share": 0.5, "num_threads": 1}

ERRORS = {
    "EIO": OSError(errno.EIO, "Input/output error"),
    "ESTALE": OSError(errno.ESTALE, "Stale file handle"),
    "EMFILE": OSError(errno.EMFILE, "Too many open files"),
    "ENFILE": OSError(errno.ENFILE, "Too many open files in system"),
    "ENOMEM": OSError(errno.ENOMEM, "Cannot allocate memory"),
    "EACCES": PermissionError(errno.EACCES, "Permission denied"),
    "ETIMEDOUT": TimeoutError(errno.ETIMEDOUT, "Connection timed out"),
    "reset": ConnectionResetError("Connection lost"),
    "memory": MemoryError(),
}
REMEDIES = {"EMFILE": "ulimit -n", "ENFILE": "fs.file-max", "ENOMEM": "Lower data.num_workers"}
REMEDIES |= {"EACCES": "Let this user read it", "memory": "out of memory, in"}


class Examples:
    """Images of a level each; reading one fails, the first so many times."""

    def __init__(self, error, times, patience=None):
        self.error, self.times, self.patience = error, times, patience

    def __len__(self):
        return COUNT

    def __getitem__(self, index):
        if self.patience is not None:  # in a worker, which imports the constant anew
            rows_module.PATIENCE_S = self.patience
        if index == FAILING and self.times:
            self.times -= 1
            raise self.error
        return {"image": PNG[index], "label": index}


@pytest.fixture
def pauses(monkeypatch):
    """The pauses that are made, which take no time."""
    made = []
    monkeypatch.setattr(rows_module.time, "sleep", made.append)
    rows_module._say.cache_clear()
    return made


def labelled(error, times, data, **options):
    source = Source("mine/train", Examples(error, times, **options), COUNT)
    return LabelledImages(source, make_pipeline(data, SHAPE, train=True))


def first_batches(rows, data, count=3):
    with closing(train_batches(rows, data, batch_size=4, seed=1)) as stream:
        return list(itertools.islice(stream, count)), stream.skipped


@pytest.mark.parametrize("kind", ERRORS)
def test_a_failure_that_passes_changes_nothing(kind, pauses, caplog):
    data = DataConfig(train_transforms="random_flip()|random_erasing()", **SKIP)
    expected, _ = first_batches(labelled(None, 0, data), data)
    found, skipped = first_batches(labelled(ERRORS[kind], 3, data), data)
    assert skipped == 0 and pauses == [0.25, 0.5, 1.0]
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a["image"], b["image"])
        np.testing.assert_array_equal(a["label"], b["label"])
    (line,) = [r.getMessage() for r in caplog.records]  # on the first attempt alone
    assert line.startswith(
        f"mine/train[{FAILING}] cannot be read now ({type(ERRORS[kind]).__name__}"
    )


@pytest.mark.parametrize("kind", ERRORS)
def test_a_failure_that_stays_stops_with_its_cause(kind, pauses):
    data = DataConfig(**SKIP)
    with pytest.raises(FailingSystemError) as caught:
        first_batches(labelled(ERRORS[kind], 99, data), data)
    message = str(caught.value)
    name = type(ERRORS[kind]).__name__
    assert message.startswith(f"mine/train[{FAILING}] must be readable; got {name}: "), message
    assert REMEDIES.get(kind, "Mend the disk or the network, then start again.") in message
    assert "in 7 attempts over 16 s" in message and pauses[:6] == [0.25, 0.5, 1, 2, 4, 8]
    assert not isinstance(caught.value, ValueError)


def test_evaluation_leaves_out_no_good_example(pauses):
    data = DataConfig(**SKIP)
    rows = labelled(ERRORS["EIO"], 99, data)
    with (
        closing(eval_batches(rows, data, batch_size=4)) as stream,
        pytest.raises(FailingSystemError, match=r"mine/train\[5\] must be readable"),
    ):
        list(stream)


def test_a_failure_in_a_worker_reaches_the_program():
    data = DataConfig(num_workers=1, **SKIP)
    rows = labelled(ERRORS["ESTALE"], 99, data, patience=())
    with pytest.raises(
        FailingSystemError, match=r"mine/train\[5\] .* OSError: .*Stale file handle"
    ):
        first_batches(rows, data)


def test_too_little_memory_to_decode_is_no_damage(pauses, monkeypatch):
    """Random numbers that were drawn before are drawn again."""

    def decode(*arguments):
        if times:
            raise times.pop()
        return imdecode(*arguments)

    error, imdecode, times = cv2.error("Failed to allocate 50331648 bytes"), cv2.imdecode, []
    error.code, error.err = cv2.Error.StsNoMem, "Failed to allocate 50331648 bytes"
    monkeypatch.setattr(cv2, "imdecode", decode)
    data = DataConfig(train_transforms="random_resized_crop((8, 8))|random_erasing(1.0)", **SKIP)
    rows = labelled(None, 0, data)
    expected = rows.row(3, np.random.default_rng(0))["image"]
    assert len(np.unique(expected)) > 1  # erased in part
    times[:] = [error] * 2
    np.testing.assert_array_equal(rows.row(3, np.random.default_rng(0))["image"], expected)
    assert times == []
    times[:] = [error] * 9
    with pytest.raises(FailingSystemError, match=r"MemoryError: Failed to allocate .* Lower data"):
        rows.row(3, np.random.default_rng(0))


# --- files ----------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    write_folder(tmp_path, "train", {f"{'ab'[i % 2]}/{i:02d}.png": PNG[i] for i in range(COUNT)})
    return tmp_path


def unreadable(path):
    """Let reading a file fail as a broken disk does; nobody may read this address."""
    path.unlink()
    path.symlink_to("/proc/self/mem")


@pytest.mark.skipif(not os.path.exists("/proc/self/mem"), reason="a file of Linux")
def test_the_line_names_the_file(folder, pauses):
    unreadable(folder / "train/a/00.png")
    data = DataConfig(dataset="folder", data_dir=str(folder), **SKIP)
    message = rf"train\[0\] must be readable; got OSError: \[Errno 5\] .*'{folder}/train/a/00\.png'"
    with pytest.raises(FailingSystemError, match=message):
        open_labelled_images(data, "train", train=True, image_shape=SHAPE, num_classes=None)
    with pytest.raises(FailingSystemError, match=message):
        prepare(str(folder), str(folder / "to"), name="x")


def test_a_disk_that_is_gone_is_no_damaged_image(folder, pauses):
    data = DataConfig(dataset="folder", data_dir=str(folder), **SKIP)
    rows = open_labelled_images(data, "train", train=True, image_shape=SHAPE, num_classes=None)
    (folder / "train").rename(folder / "unmounted")
    with pytest.raises(FailingSystemError, match=r"its folder is gone: '.*/train/[ab]'"):
        first_batches(rows, data)


def test_whatever_a_bucket_raises_is_the_systems(monkeypatch, pauses):
    class HttpError(Exception):
        """As gcsfs has it, which is no OSError."""

    class Bucket:
        def cat_file(self, path, start, end):
            raise HttpError("503 Service Unavailable")

    monkeypatch.setattr(storage, "_remote", lambda path: Bucket())
    with pytest.raises(OSError, match=r"HttpError: 503 Service Unavailable: 'gs://b/x'"):
        storage.read_bytes("gs://b/x")


def test_a_disk_that_gives_a_part_at_a_time(tmp_path, monkeypatch):
    class Part(io.FileIO):
        def read(self, size=-1):
            return super().read(min(size, 3))

    path = tmp_path / "file"
    path.write_bytes(b"0123456789")
    monkeypatch.setattr(storage, "open", lambda path, *_, **__: Part(path), raising=False)
    assert storage.read_bytes(str(path), 1, 8) == b"12345678"
    assert storage.read_bytes(str(path), 5, 9) == b"56789"


@pytest.mark.parametrize("bug", [ImportError("no reader"), NameError("x"), AssertionError()])
def test_a_bug_or_a_missing_package_is_no_damaged_image(bug):
    rows = LabelledImages(
        Source("mine", Examples(bug, 1), COUNT), make_pipeline(DataConfig(), SHAPE, train=True)
    )
    with pytest.raises(type(bug)):
        rows.row(FAILING, np.random.default_rng(0))

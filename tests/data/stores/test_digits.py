"""The digits builder against scikit-learn's own arrays, in both file formats."""

import json
import subprocess
import sys

import numpy as np
import pytest
from command import LIMIT_S, ROOT

from crate_jax.config import DataConfig
from crate_jax.data.images.decode import decode_image
from crate_jax.data.stores.sources import open_source

COUNTS = {"train": 1500, "test": 297}


def open_digits(split, data_dir=None):
    config = DataConfig(dataset="digits", data_dir=data_dir and str(data_dir))
    return open_source(config, split, image_shape=(8, 8, 1), num_classes=10)


def pixels(example):
    return decode_image(example["image"], channels=1)[:, :, 0]


def as_rows(examples):
    """A row an example, the label last, sorted: TFDS stores the examples of a split shuffled."""
    rows = np.array([[*pixels(e).ravel(), e["label"]] for e in examples], np.int64)
    return rows[np.lexsort(rows.T)]


@pytest.fixture(scope="module")
def scans():
    """scikit-learn's scans, 0 … 16, and labels: the first 1,500 and the rest."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    cut = {"train": slice(0, 1500), "test": slice(1500, 1797)}
    return {name: (digits.images[rows], digits.target[rows]) for name, rows in cut.items()}


@pytest.mark.parametrize("split", COUNTS)
def test_split_holds_the_scans(split, scans):
    source = open_digits(split)
    assert (len(source), source.num_classes, source.name) == (COUNTS[split], 10, f"digits/{split}")
    images, labels = scans[split]
    assert len(images) == COUNTS[split]
    # round(scan · 255 / 16) in integers; of the one tie, 127.5, the even side is also the upper.
    expected = (2 * 255 * images.astype(np.int64) + 16) // 32
    rows = np.column_stack([expected.reshape(len(images), 64), labels])
    np.testing.assert_array_equal(as_rows(source.examples), rows[np.lexsort(rows.T)])
    assert (expected.min(), expected.max(), expected[images == 8].max()) == (0, 255, 128)


@pytest.mark.parametrize(
    "split, count",
    [("train[:50%]", 750), ("train[50%:]", 750), ("test[-7:]", 7), ("train+test", 1797)],
)
def test_split_syntax(split, count):
    assert len(open_digits(split)) == count


def test_parts_of_a_split_are_its_examples_in_order():
    whole, first, second = (
        [(e["image"], e["label"]) for e in open_digits(split).examples]
        for split in ("train", "train[:40%]", "train[40%:]")
    )
    assert (len(first), len(second)) == (600, 900)
    assert first + second == whole


def test_prepared_digits_are_not_prepared_again(monkeypatch):
    from crate_jax.data.stores.digits import Digits

    before = [e["label"] for e in open_digits("test").examples]

    def prepare_again(self, rows):
        raise AssertionError("prepared a second time")

    monkeypatch.setattr(Digits, "_generate_examples", prepare_again)
    assert [e["label"] for e in open_digits("test").examples] == before


PREPARE = """
import json, os, sys
from crate_jax.config import DataConfig
from crate_jax.data.images.decode import decode_image
from crate_jax.data.stores.sources import open_source
config = DataConfig(dataset="digits", data_dir=sys.argv[1])
source = open_source(config, "test", image_shape=(8, 8, 1), num_classes=10)
first = decode_image(source.examples[0]["image"], channels=1)
print(json.dumps({
    "tensorflow": "tensorflow" in sys.modules,
    "examples": len(source),
    "first": first.ravel().tolist(),
}))
"""


def test_prepared_elsewhere_without_tensorflow_and_in_the_same_order(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", PREPARE, str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
        timeout=LIMIT_S,
        cwd=ROOT,
    )
    seen = json.loads(done.stdout.splitlines()[-1])
    assert (seen["tensorflow"], seen["examples"]) == (False, 297)
    assert seen["first"] == pixels(open_digits("test").examples[0]).ravel().tolist()
    stored = sorted(p.name for p in (tmp_path / "digits/1.0.0").iterdir())
    assert "digits-train.array_record-00000-of-00001" in stored


@pytest.fixture(scope="module")
def parquet_dir(tmp_path_factory):
    """Digits prepared as parquet; TFDS 4.9's own writer loses two thirds of the training split."""
    pytest.importorskip("pyarrow")
    from crate_jax.data.stores.digits import Digits

    root = tmp_path_factory.mktemp("parquet")
    Digits(data_dir=root, file_format="parquet").download_and_prepare()
    return root


def rewrite_parquet(folder, split):
    """Write a parquet file that holds every example of a split, as TFDS lays one out."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    import tensorflow_datasets as tfds

    from crate_jax.data.stores.digits import Digits

    open_digits(split)  # prepares it where this has not been done
    raw = tfds.decode.DeserializeMethod.RAW_BYTES
    records = Digits().as_data_source(split, deserialize_method=raw)
    table = pa.table({"data": pa.array([bytes(r) for r in records], pa.binary())})
    pq.write_table(table, folder / f"digits-{split}.parquet-00000-of-00001")


def test_parquet_is_read(parquet_dir):
    rewrite_parquet(parquet_dir / "digits/1.0.0", "test")
    source = open_digits("test", parquet_dir)
    assert len(source) == 297
    assert [(e["image"], e["label"]) for e in source.examples] == [
        (e["image"], e["label"]) for e in open_digits("test").examples
    ]


def test_part_of_a_parquet_split_is_refused(parquet_dir):
    # TFDS reads the whole file then, so that parts that should be apart would overlap.
    rewrite_parquet(parquet_dir / "digits/1.0.0", "test")
    with pytest.raises(ValueError, match=r"digits/test\[:100\] must hold 100 examples; TFDS reads"):
        open_digits("test[:100]", parquet_dir)


def test_parquet_that_lost_examples_is_refused(parquet_dir):
    import pyarrow.parquet as pq

    path = parquet_dir / "digits/1.0.0/digits-train.parquet-00000-of-00001"
    pq.write_table(pq.read_table(path).slice(0, 500), path)
    with pytest.raises(ValueError, match=r"digits/train must hold 1500 examples; TFDS reads 500 "):
        open_digits("train", parquet_dir)

"""Small data sets of real photographs in every on-disk format that the project reads."""

import io
import json
import shutil
import struct
import tarfile
from pathlib import Path

import cv2
import numpy as np

from crate_jax.data.stores.prepare import prepare
from crate_jax.data.stores.tfrecord import masked_crc


def encode_crops(photographs, count, size=(64, 80), suffix=".jpg"):
    """Different crops of the photographs, encoded."""
    rng, crops = np.random.default_rng(0), []
    for i in range(count):
        image = photographs[i % len(photographs)]
        top, left = (int(rng.integers(n - s)) for n, s in zip(image.shape, size, strict=False))
        crop = image[top : top + size[0], left : left + size[1], ::-1]
        crops.append(cv2.imencode(suffix, np.ascontiguousarray(crop))[1].tobytes())
    return crops


def write_folder(root, split, files):
    """Files {"class/name": bytes} below root/split."""
    for name, data in files.items():
        path = Path(root) / split / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def tar_bytes(files):
    """A tar of {"name": bytes}, in that order."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def write_tar(root, split, files):
    """The same as `write_folder`, as root/split.tar."""
    Path(root).mkdir(parents=True, exist_ok=True)
    (Path(root) / f"{split}.tar").write_bytes(tar_bytes(files))


def write_array_record(source_root, root, name, **options):
    """A folder's splits as a TFDS data set; returns its directory."""
    found = prepare(str(source_root), str(root), name=name, **options)
    return Path(found["path"])


def tfrecord_bytes(records):
    """Records framed as TFRecord."""
    framed = b""
    for record in records:
        head = struct.pack("<Q", len(record))
        framed += head + struct.pack("<I", masked_crc(head))
        framed += record + struct.pack("<I", masked_crc(record))
    return framed


def convert(dataset_dir, root, kind, name=None):
    """An array_record data set as "tfrecord" or "parquet", shard by shard; returns its directory.

    TFDS cannot write the one without TensorFlow and loses examples when it writes the other.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq
    from array_record.python.array_record_module import ArrayRecordReader

    old_name, version = dataset_dir.parent.name, dataset_dir.name
    name = name or old_name
    target = Path(root) / name / version
    target.mkdir(parents=True)
    for path in dataset_dir.iterdir():
        new = target / path.name.replace(f"{old_name}-", f"{name}-").replace("array_record", kind)
        if "array_record" not in path.name:
            shutil.copy(path, new)
            continue
        reader = ArrayRecordReader(str(path))
        records = reader.read_all()
        reader.close()
        if kind == "tfrecord":
            new.write_bytes(tfrecord_bytes(records))
        else:
            pq.write_table(pa.table({"data": pa.array(records, pa.binary())}), new)
    info = json.loads((target / "dataset_info.json").read_text())
    info |= {"name": name, "fileFormat": kind}
    (target / "dataset_info.json").write_text(json.dumps(info))
    return target


def write_tfds(root, name, version, features, splits):
    """A TFDS data set of TFRecord files, one for each split, of {split: [example]}."""
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.example_serializer import ExampleSerializer

    folder = Path(root) / name / version
    folder.mkdir(parents=True)
    serializer = ExampleSerializer(features.get_serialized_info())
    infos = []
    for split, examples in splits.items():
        data = tfrecord_bytes([serializer.serialize_example(e) for e in examples])
        (folder / f"{name}-{split}.tfrecord-00000-of-00001").write_bytes(data)
        infos.append(
            tfds.core.SplitInfo(name=split, shard_lengths=[len(examples)], num_bytes=len(data))
        )
    tfds.folder_dataset.write_metadata(
        data_dir=str(folder),
        features=features,
        split_infos=infos,
        version=version,
        check_data=False,
    )

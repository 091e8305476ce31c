"""TFRecord files with random access and without TensorFlow.

A record is its length (8 bytes, little-endian), a checksum of these, the bytes, a checksum of the
bytes; checksums are CRC-32C, masked. Lengths are read once, for an index; then each record is one
read.
"""

import dataclasses
import struct
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import numpy as np

from crate_jax.data.rows import patiently
from crate_jax.data.stores import storage
from crate_jax.data.stores.examples import Example
from crate_jax.waiting import counted

_HEAD, _FOOT = 12, 4  # bytes before and after those of a record


class FileInstruction(Protocol):
    """The records of a file that belong to a split, as TFDS states them."""

    filename: str
    skip: int
    take: int


@dataclasses.dataclass(frozen=True)
class TFRecordExamples:
    """The examples of one split, by index.

    Attributes:
        paths: the paths of the shards.
        shard: (n,) int32, which shard an example is in.
        offset: (n,) int64, where its bytes begin; −1: the shard ends before.
        length: (n,) int64, of its bytes.
        parse: from the bytes of a record to its example.
        check_crc: whether the checksum of an example is verified when it is read.
    """

    paths: tuple[str, ...]
    shard: np.ndarray
    offset: np.ndarray
    length: np.ndarray
    parse: Callable[[bytes], Example]
    check_crc: bool

    def __len__(self) -> int:
        return len(self.shard)

    def __getitem__(self, index: int) -> Example:
        path, offset = self.paths[self.shard[index]], int(self.offset[index])
        if offset < 0:
            raise ValueError(f"{path} ends before this example")
        record = read_record(path, offset, int(self.length[index]), check_crc=self.check_crc)
        return self.parse(record)

    @property
    def missing(self) -> list[str]:
        """The shards that end before their last example."""
        return [self.paths[i] for i in np.unique(self.shard[self.offset < 0])]


def open_tfrecords(
    instructions: Sequence[FileInstruction],
    parse: Callable[[bytes], Example],
    *,
    folder: str,
    index_dir: str | None,
    check_crc: bool,
) -> TFRecordExamples:
    """The examples that TFDS's file instructions name.

    Args:
        instructions: the instructions of ``split_info.file_instructions``: each a file, how many
            records of it are left out and how many taken.
        parse: from the bytes of a record to its example.
        folder: the folder of the data set; the index is kept there if it can.
        index_dir: where it is kept instead.
        check_crc: verify each example's checksum when it is read.
    """
    paths = tuple(str(i.filename) for i in instructions)
    files = sorted(set(paths))  # one index serves every order of the same files

    def build() -> dict[str, np.ndarray]:
        with ThreadPoolExecutor(16) as pool:
            each = pool.map(lambda f: patiently(lambda: index_records(f), f), files)
            found = list(counted(each, "index", len(files), "files"))
        counts = np.array([len(f) for f in found], np.int64)
        return {"records": np.concatenate(found), "counts": counts}

    arrays = storage.cached_index(files, folder, index_dir, build)
    parts = np.split(arrays["records"], np.cumsum(arrays["counts"])[:-1])
    records = dict(zip(files, parts, strict=True))
    taken = []
    for path, instruction in zip(paths, instructions, strict=True):
        there = records[path][instruction.skip :][: instruction.take]
        missing = ((0, instruction.take - len(there)), (0, 0))
        taken.append(np.pad(there, missing, constant_values=-1))
    offset, length = np.concatenate(taken).T
    shard = np.repeat(np.arange(len(paths), dtype=np.int32), [len(t) for t in taken])
    return TFRecordExamples(paths, shard, offset, length, parse, check_crc)


def index_records(path: str) -> np.ndarray:
    """Find the first byte and the length of each record: (n, 2) int64.

    Ends where the file does, or where a length is not what its checksum says.
    """
    found, place, size = [], 0, storage.file_size(path)
    with storage.open_binary(path) as file:
        while place + _HEAD <= size:
            file.seek(place)
            head = file.read(_HEAD)
            (length,) = struct.unpack("<Q", head[:8])
            whole = place + _HEAD + length + _FOOT <= size
            if not whole or struct.unpack("<I", head[8:])[0] != masked_crc(head[:8]):
                break
            found.append((place + _HEAD, length))
            place += _HEAD + length + _FOOT
    return np.array(found, np.int64).reshape(-1, 2)


def read_record(path: str, offset: int, length: int, *, check_crc: bool) -> bytes:
    """The bytes of one record.

    Raises:
        ValueError: the file ends before, or, if asked for, the bytes are not what their checksum
            says.
    """
    data = storage.read_bytes(path, offset, length + _FOOT)
    record, foot = data[:length], data[length:]
    if len(foot) < _FOOT:
        raise ValueError(f"{path} ends in the middle of a record")
    if check_crc and struct.unpack("<I", foot)[0] != masked_crc(record):
        raise ValueError(f"{path} is damaged: the checksum at byte {offset} does not match")
    return record


def masked_crc(data: bytes) -> int:
    """CRC-32C, rotated by 15 bits and shifted by a constant, as TFRecord stores it."""
    import google_crc32c

    crc = google_crc32c.value(data)
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF

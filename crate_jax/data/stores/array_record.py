"""array_record files with random access and a limited number of open files."""

import collections
import dataclasses
import errno
import os
import re
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from crate_jax.data.stores.examples import Example
from crate_jax.data.stores.tfrecord import FileInstruction
from crate_jax.files import check_open_files, raise_open_files

# Readers of a split, as a part of the files that may be open: a run opens two splits, and more.
PART = 3
# Fewer open files would leave a program of many files too few for all else.
FEWEST_OPEN_FILES = 160

# Errors of the system by their text: array_record has no numbers for them.
_CODES = {os.strerror(code): code for code in errno.errorcode}


@dataclasses.dataclass(frozen=True)
class ArrayRecordExamples:
    """The examples of one split, by index.

    Attributes:
        paths: the paths of the files.
        first: (n,) int64, the record of each file that is its first example.
        end: (n,) int64, how many examples there are up to the end of each file.
        parse: from the bytes of a record to its example.
        readers: the readers of the files.
    """

    paths: tuple[str, ...]
    first: np.ndarray
    end: np.ndarray
    parse: Callable[[bytes], Example]
    readers: "Readers"

    def __len__(self) -> int:
        return int(self.end[-1])

    def __getitem__(self, index: int) -> Example:
        file = int(np.searchsorted(self.end, index, side="right"))
        before = int(self.end[file - 1]) if file else 0
        position = int(self.first[file]) + index - before
        return self.parse(self.readers.read(self.paths[file], position))


def open_array_records(
    instructions: Sequence[FileInstruction], parse: Callable[[bytes], Example], *, name: str
) -> ArrayRecordExamples:
    """The examples that TFDS's file instructions name; no file is opened.

    Args:
        instructions: the instructions of ``split_info.file_instructions``: each a file, how many
            records of it are left out and how many taken.
        parse: from the bytes of a record to its example.
        name: of the split, for errors.

    Raises:
        OSError: the system lets too few files be open.
    """
    paths = tuple(str(i.filename) for i in instructions)
    if len(paths) > raise_open_files() // PART:
        check_open_files(FEWEST_OPEN_FILES, f"to read the {len(paths)} files of {name}")
    first = np.array([i.skip for i in instructions], np.int64)
    end = np.cumsum(np.array([i.take for i in instructions], np.int64))
    return ArrayRecordExamples(paths, first, end, parse, Readers())


class Readers:
    """Readers of files, by path. The file of the reader that was used least lately is closed.

    Threads may share them. A copy in another process has readers of its own.

    Args:
        most: how many are kept; None: a part of the files that this process may open.
    """

    def __init__(self, most: int | None = None):
        self._most = most or max(1, raise_open_files() // PART)
        self._readers: collections.OrderedDict[str, Any] = collections.OrderedDict()
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type["Readers"], tuple[()]]:
        return Readers, ()

    def read(self, path: str, position: int) -> bytes:
        """One record of a file.

        Raises:
            OSError: the system fails, or the file is not there.
            ValueError: the file is damaged, or ends before this record.
        """
        try:
            return self._reader(path).read([position])[0]
        except RuntimeError as error:
            with self._lock:  # one that failed to open would fail for ever
                self._readers.pop(path, None)
            raise _explained(error, path) from error

    def _reader(self, path: str) -> Any:
        """The reader of a file, which becomes the one that was used last."""
        from array_record.python.array_record_module import ArrayRecordReader

        with self._lock:
            if path in self._readers:
                self._readers.move_to_end(path)
                return self._readers[path]
        # Outside of the lock: a network disk takes its time. The options are those of Grain's
        # advice for random access.
        reader = ArrayRecordReader(
            path, options="readahead_buffer_size:0", file_reader_buffer_size=2**15
        )
        with self._lock:
            reader = self._readers.setdefault(path, reader)
            while len(self._readers) > self._most:
                self._readers.popitem(last=False)  # closed when no thread reads from it
        return reader


def _explained(error: RuntimeError, path: str) -> OSError | ValueError:
    """Turn an error of array_record into an error of the system or of the file's contents."""
    text = (str(error).splitlines() or ["no reason"])[0]
    if found := re.match(r"\w+\(\) failed: ([^;]*)", text):
        return OSError(_CODES.get(found[1], errno.EIO), found[1], path)
    return ValueError(f"{path} is damaged: {text}")

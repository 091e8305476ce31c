"""A folder of this machine that appears in a bucket.

An object cannot grow, as files of metrics do. They grow here, and are stored whole: before every
checkpoint, at the end, and in between from time to time. What a killed run had not stored yet is of
steps after its last checkpoint, and the resumed run writes it again.
"""

import contextlib
import tempfile
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from crate_jax.buckets import answered, fetch, is_remote

# Seconds between two uploads, and how many times as long as the last one took.
EVERY_S, TIMES = 30.0, 20


class Mirror:
    """Files that this process writes into a workdir.

    Args:
        workdir: local, which is then the folder itself; or in a bucket.

    Attributes:
        folder: where to write, on this machine.
    """

    def __init__(self, workdir: Path):
        self._workdir, self._temporary = workdir, None
        self.folder = workdir
        if is_remote(workdir):
            self._temporary = tempfile.TemporaryDirectory(prefix="crate_jax_")
            self.folder = Path(self._temporary.name)
            self._pool = ThreadPoolExecutor(1, thread_name_prefix="crate_jax mirror")
            self._under_way: Future[None] | None = None
            self._stored: dict[Path, tuple[int, int]] = {}
            self._due = time.monotonic() + EVERY_S

    def fetch(self, name: str) -> None:
        """Copy a file of the workdir into the folder, if there is one.

        Raises:
            OSError: the bucket's service fails.
        """
        if self._temporary:
            with contextlib.suppress(FileNotFoundError):
                fetch(self._workdir / name, self.folder / name)

    def changed(self) -> None:
        """Store the changed files in the background if that is due; `flush` reports failures."""
        if not self._temporary or time.monotonic() < self._due:
            return
        if self._under_way is None or self._under_way.done():
            self._under_way = self._pool.submit(self._store)

    def flush(self) -> None:
        """Store the changes, and wait for it.

        Raises:
            OSError: the bucket does not take it.
        """
        if self._temporary:
            self._pool.submit(self._store).result()

    def close(self) -> None:
        """Store the changes, and remove the folder.

        Raises:
            OSError: the bucket does not take it.
        """
        if self._temporary:
            try:
                self.flush()
            finally:
                self._pool.shutdown()
                self._temporary.cleanup()

    def _store(self) -> None:
        """Store every file that is not as it was when it was stored last."""
        start = time.monotonic()
        try:
            for file in sorted(path for path in self.folder.rglob("*") if path.is_file()):
                stat = file.stat()
                state = (stat.st_size, stat.st_mtime_ns)
                if self._stored.get(file) != state:
                    target = self._workdir / file.relative_to(self.folder)
                    with answered(target):
                        target.write_bytes(file.read_bytes())
                    self._stored[file] = state
        finally:
            end = time.monotonic()
            self._due = end + max(EVERY_S, TIMES * (end - start))

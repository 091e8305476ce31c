"""The owner of a run's folder in a bucket: the process that has taken the highest number.

No store of objects has locks. It can write an object only where there is none, and so decide who of
several has a number: ``.owner/7.json`` names the seventh owner of a run. An owner writes its object
again every few seconds. One that is silent for a minute, or whose process is known to have ended,
is followed by the next number; if it wakes up, it finds that number and writes no checkpoint more.
No clock of any machine is compared with another's.
"""

import contextlib
import datetime
import json
import logging
import os
import secrets
import socket
import threading
import time
from pathlib import Path
from typing import Any

from crate_jax.buckets import ServiceError, answered, create, read
from crate_jax.files import Json

FOLDER = ".owner"  # below the run's workdir
# Seconds: between signs of life; without one until an owner counts as dead; between two looks at
# it; for an owner that lives and may be about to end.
BEAT_S, STALE_S, LOOK_S, WAIT_S = 10.0, 60.0, 1.0, 5.0

_log = logging.getLogger("crate_jax")


class Lease:
    """The ownership of a workdir in a bucket by this process, until `release` or its end.

    Args:
        workdir: the run's folder in a bucket.

    Raises:
        OSError: another process owns it, and goes on to; or it cannot be written to.
    """

    def __init__(self, workdir: Path):
        self._folder = workdir / FOLDER
        self._ended = threading.Event()
        try:
            with answered(workdir):
                self._number, self._note = _take(workdir, self._folder)
        except ServiceError as error:
            raise OSError(
                f"workdir must be writable; {workdir} is not ({error.said}). Check who may write "
                "into the bucket, or choose another --workdir."
            ) from error
        self._beats = threading.Thread(target=self._beat, daemon=True, name="crate_jax lease")
        self._beats.start()

    def check(self) -> None:
        """Refuse to go on if another process has followed this one.

        Raises:
            ValueError: one has.
            OSError: the bucket does not say.
        """
        with answered(self._folder):
            number, note = _newest(self._folder)
        if number != self._number or note.get("key") != self._note["key"]:
            raise ValueError(
                f"workdir must have one owner at a time; {self._folder.parent} belongs to "
                f"{described(note)}: this process gave no sign of life for {STALE_S:g} s. "
                "Choose another --workdir, or stop that process and run again."
            )

    def release(self) -> None:
        """Let others in."""
        if self._ended.is_set():
            return
        self._ended.set()
        self._beats.join()
        with contextlib.suppress(Exception):  # then the next owner waits for this one's signs
            _path(self._folder, self._number).write_text(json.dumps(self._note | {"ended": True}))

    def _beat(self) -> None:
        """Signs of life until the end; one that fails may be followed by one that does not."""
        while not self._ended.wait(BEAT_S):
            with contextlib.suppress(Exception):
                self._note["beat"] += 1
                _path(self._folder, self._number).write_text(json.dumps(self._note))


def introduction() -> Json:
    """A description of this process, as it signs."""
    now = datetime.datetime.now().astimezone().isoformat(" ", "seconds")
    return {"process": os.getpid(), "host": socket.gethostname(), "since": now}


def described(note: Any) -> str:
    """A description of the process that signed; it may have had no time to sign."""
    try:
        return f"process {note['process']} on {note['host']} since {note['since']}"
    except (KeyError, TypeError):
        return "another process"


def taken(workdir: Path, note: Any, also: str = "") -> OSError:
    """The error of a process that finds an owner."""
    return OSError(
        f"workdir must have one owner at a time; {workdir} belongs to {described(note)}. "
        f"Stop that process or wait for its end, or choose another --workdir.{also}"
    )


def _take(workdir: Path, folder: Path) -> tuple[int, Json]:
    """The next number, and the note that this process has put there."""
    while True:
        number, note = _newest(folder)
        if number and not _is_over(note):
            number = _wait_for_its_end(workdir, folder, number, note)
        own = introduction() | {"beat": 0, "key": secrets.token_hex(8), **_place()}
        path = _path(folder, number + 1)
        # Read back: there are services that know no condition, and say nothing.
        if create(path, json.dumps(own).encode()) and _read(path) == own:
            for before in _numbers(folder):
                if before <= number:
                    with contextlib.suppress(Exception):
                        _path(folder, before).unlink()
            return number + 1, own


def _wait_for_its_end(workdir: Path, folder: Path, number: int, note: Json) -> int:
    """The number of an owner once it has ended or is silent for too long."""
    _log.warning(
        "%s belongs to %s; looking for signs of life, up to %g s", workdir, described(note), STALE_S
    )
    start, seen = time.monotonic(), (number, note)
    while True:
        time.sleep(LOOK_S)
        number, note = _newest(folder)
        waited_s = time.monotonic() - start
        if _is_over(note) or ((number, note) == seen and waited_s >= STALE_S):
            return number
        if (number, note) != seen and waited_s >= WAIT_S:
            raise taken(workdir, note)


def _newest(folder: Path) -> tuple[int, Json]:
    """The highest number and its note; 0 and {} where there is none."""
    number = max(_numbers(folder), default=0)
    return number, _read(_path(folder, number)) if number else {}


def _numbers(folder: Path) -> list[int]:
    names = [path.name for path in folder.iterdir()] if folder.exists() else []
    return [int(stem) for name in names if (stem := name.removesuffix(".json")).isdigit()]


def _path(folder: Path, number: int) -> Path:
    return folder / f"{number}.json"


def _read(path: Path) -> Json:
    """A note; {} where it is damaged or gone."""
    try:
        found = json.loads(read(path))
    except (ValueError, FileNotFoundError):
        return {}
    return found if isinstance(found, dict) else {}


def _is_over(note: Json) -> bool:
    """True if an owner has ended, by its own word or as this machine sees its processes."""
    if note.get("ended"):
        return True
    where = _place().get("where")
    if where is None or note.get("where") != where:
        return False
    return note.get("started") != _started(note.get("process"))


def _place() -> Json:
    """The processes that this one can see, and its start time; {} if the system does not say."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return {"where": f"{boot} {os.readlink('/proc/self/ns/pid')}", "started": _started("self")}
    except OSError:
        return {}


def _started(process: object) -> str | None:
    """The start of a process of this machine, in ticks since its boot; None if it has ended."""
    try:
        # Behind the program's name, which may hold spaces.
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else fields[19]

"""What happens to machines, done to a run of train.py: killed, damaged, the disk full."""

import contextlib
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from frame import ROOT

from crate_jax.checkpoint.folder import FOLDER, unfinished
from crate_jax.cli.running import TRY_AGAIN

PATIENCE_S = 300  # for whatever a process is waited for
MISTAKE = 2  # train.py's exit status for what its user can mend, such as a full disk


class NotSurvivedError(Exception):
    """A run did not do what it has to."""


class Training:
    """One process of train.py. It is killed at the end of its block, whatever happens.

    Args:
        workdir: of the run; local, or in a bucket.
        compiled: folder of compiled programs.
        arguments: its other flags.
    """

    def __init__(self, workdir: Path, compiled: Path, *arguments: str):
        self.workdir = workdir
        self.said: list[str] = []  # the lines of stderr
        self._start = time.monotonic()
        self.process = subprocess.Popen(
            [sys.executable, "train.py", f"--workdir={workdir}", *arguments],
            cwd=ROOT,
            env=os.environ
            | {"JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(compiled)}
            | {"PYTHONPATH": str(ROOT)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,  # a pipe is never full, as a file might be
            text=True,
        )
        self._reader = threading.Thread(target=lambda: self.said.extend(self.process.stderr or ()))
        self._reader.start()

    def __enter__(self) -> "Training":
        return self

    def __exit__(self, *exc: object) -> None:
        self.process.kill()
        self.process.wait()
        self._reader.join()

    @property
    def age_s(self) -> float:
        """Seconds since the process was started."""
        return time.monotonic() - self._start

    @property
    def has_stepped(self) -> bool:
        """Whether the process has said that a step is done: its start-up is over."""
        return any(line.startswith("step ") for line in self.said)

    @property
    def step(self) -> int:
        """The last step that the process has said is done; 0: none."""
        steps = (re.match(r"step (\d+)/", line) for line in reversed(self.said))
        return next((int(step[1]) for step in steps if step), 0)

    @property
    def resumed_from(self) -> int | None:
        """The step that the process went on from; None if it ended before it said so."""
        resuming = re.search(r"^resuming .* after step (\d+) of", "".join(self.said), re.M)
        return int(resuming[1]) if resuming else 0 if self.has_stepped else None

    def wait_until(self, seen: Callable[[], bool]) -> None:
        """Wait for something to be seen; the process must not end before."""
        deadline = time.monotonic() + PATIENCE_S
        while True:
            ended = self.process.poll() is not None  # before looking: it may end in between
            if seen():
                return
            if ended:
                raise self._failure(f"exit status {self.process.returncode} too early")
            if time.monotonic() > deadline:
                raise self._failure(f"hung for {PATIENCE_S} s")
            time.sleep(0.002)

    def end(self, *expected: int) -> int:
        """Wait for the process; its exit status must be an expected one."""
        self.wait_until(lambda: self.process.poll() is not None)
        self._reader.join()
        if self.process.returncode not in expected:
            raise self._failure(f"exit status {self.process.returncode}")
        return self.process.returncode

    def _failure(self, what: str) -> NotSurvivedError:
        return NotSurvivedError(f"{what}; it said {(self.said or ['nothing'])[-1].strip()[:300]}")


def is_saving(workdir: Path) -> bool:
    """Whether there is a checkpoint that is not completely written."""
    return any(unfinished(workdir / FOLDER, "*"))


def strike_start(rng: random.Random, run: Training, start_up_s: float) -> str:
    """SIGKILL or SIGTERM at a random moment of a start-up: as it imports, restores or compiles.

    A SIGTERM before the first step ends the process at once, or after that step, with that saved.

    Args:
        rng: for what and when.
        run: just started.
        start_up_s: how long the start-up takes, about.
    """
    what, moment_s = rng.choice((signal.SIGKILL, signal.SIGTERM)), rng.uniform(0, start_up_s)
    run.wait_until(lambda: run.age_s >= moment_s or run.has_stepped)
    age_s = run.age_s
    run.process.send_signal(what)
    status = run.end(-what, *([TRY_AGAIN] if what == signal.SIGTERM else []))
    return f"{what.name} {age_s:.2f} s into a start of {start_up_s:.2f} s: exit status {status}"


# --- the faults: each does one thing, sees the process end, and says what it did ------------------


def kill(rng: random.Random, run: Training) -> str:
    """SIGKILL."""
    run.process.kill()
    run.end(-signal.SIGKILL)
    return "in a save" if is_saving(run.workdir) else "between saves"


def terminate(rng: random.Random, run: Training) -> str:
    """SIGTERM: the run saves, and says by its exit status that it wants to be started again."""
    run.process.terminate()
    return f"exit status {run.end(TRY_AGAIN)}"


def truncate(rng: random.Random, run: Training) -> str:
    """SIGKILL, and a file of the newest checkpoint loses its end."""
    files, _ = kill_and_list(rng, run)
    path = rng.choice(files)
    size = path.stat().st_size
    os.truncate(path, rng.randrange(size))
    return f"{path.relative_to(run.workdir)}: {path.stat().st_size} of {size} bytes left"


def delete(rng: random.Random, run: Training) -> str:
    """SIGKILL, and a file of the newest checkpoint, or all of that, is gone."""
    files, newest = kill_and_list(rng, run)
    path = rng.choice((rng.choice(files), newest))
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    return f"{path.relative_to(run.workdir)} deleted"


def flip(rng: random.Random, run: Training) -> str:
    """SIGKILL, and a bit of the newest checkpoint is another; any of its bytes is as likely."""
    files, _ = kill_and_list(rng, run)
    path = rng.choices(files, [p.stat().st_size for p in files])[0]
    data = bytearray(path.read_bytes())
    at, bit = rng.randrange(len(data)), rng.randrange(8)
    data[at] ^= 1 << bit
    path.write_bytes(data)
    return f"{path.relative_to(run.workdir)}: bit {bit} of byte {at}"


def kill_and_list(rng: random.Random, run: Training) -> tuple[list[Path], Path]:
    """SIGKILL; the files of the newest checkpoint that is completely written, and its folder."""
    kill(rng, run)
    steps = [p for p in (run.workdir / FOLDER).iterdir() if p.name.isdigit()]
    newest = max(steps, key=lambda p: int(p.name))
    return sorted(p for p in newest.rglob("*") if p.is_file() and p.stat().st_size), newest


def fill_disk(rng: random.Random, run: Training) -> str:
    """The disk is full until something cannot be written."""
    refused = lambda: any("not saved" in line for line in run.said)  # noqa: E731
    with full_disk(run, leave=rng.randrange(2**17)):  # half a checkpoint at most
        run.wait_until(lambda: refused() or run.process.poll() is not None)
    if run.end(0, MISTAKE) == 0 and not refused():
        raise NotSurvivedError("the disk was never full")
    means = "tmpfs" if run.workdir.parent.is_mount() else "no file beyond 4 KiB"
    return f"{means}: {'went on without a save' if run.process.returncode == 0 else 'stopped'}"


@contextlib.contextmanager
def full_disk(run: Training, leave: int) -> Iterator[None]:
    """Only some bytes are left on the tmpfs; or else no file can grow beyond 4 KiB."""
    if (disk := run.workdir.parent).is_mount():
        ballast = disk / "ballast"
        with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(2**16))
        os.truncate(ballast, max(0, ballast.stat().st_size - leave))
        yield
        ballast.unlink()
    else:
        soft, hard = resource.prlimit(run.process.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(run.process.pid, resource.RLIMIT_FSIZE, (4096, hard))
        yield
        with contextlib.suppress(ProcessLookupError):  # it has ended
            resource.prlimit(run.process.pid, resource.RLIMIT_FSIZE, (soft, hard))

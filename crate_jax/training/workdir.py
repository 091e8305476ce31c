"""The surroundings of a run: its own directory, and the signals that stop it."""

import json
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from crate_jax.buckets import check_reachable, is_remote
from crate_jax.checkpoint.folder import check_path
from crate_jax.config import TrainConfig, differences, from_dict, to_dict
from crate_jax.files import Json, written_aside
from crate_jax.options import difference, listed


def check_workdir(config: TrainConfig, workdir: Path) -> None:
    """Refuse a workdir that another config has begun.

    Fields that are no part of a run's identity (learning rate, length, logging, loader workers, …)
    may change when it is resumed.

    Raises:
        ValueError: workdir is no directory, a bucket that cannot be reached, or a pattern, its
            config.json cannot be read, or a field that makes a run what it is differs; the field is
            named.
    """
    check_path(workdir if is_remote(workdir) else workdir.absolute())
    check_reachable(workdir, "workdir")
    if workdir.exists() and not workdir.is_dir():
        raise ValueError(f"workdir must be a directory; {workdir} is a file. Choose another.")
    path = workdir / "config.json"
    if not path.exists():
        return
    try:
        begun = from_dict(json.loads(path.read_text()))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"workdir must hold a readable config.json; {path} is not ({type(error).__name__}). "
            "Choose another --workdir."
        ) from error
    for field, (old, new) in differences(begun, config, identity=True).items():
        raise ValueError(
            f"{field} must stay {old} in {workdir}, which belongs to that config; got {new}. "
            "Choose another --workdir."
        )


def check_facts(recorded: Json, found: Json, workdir: Path) -> None:
    """Refuse rows other than those of the run's training; see `crate_jax.tasks.task.Task.facts`.

    Args:
        recorded: by the run's checkpoints; what an older version did not record is not compared.
        found: the facts of the data as it is.
        workdir: the run's directory.

    Raises:
        ValueError: they differ; both are named.
    """
    for name, old in recorded.items():
        new = found.get(name)
        if old == new:
            continue
        was, now = str(old), str(new)
        if isinstance(old, list) and isinstance(new, list):
            was, now = listed(old), f"{listed(new)} ({difference(old, new)})"
        raise ValueError(
            f"{name} of the data must stay {was} in {workdir}, which is trained on that; got "
            f"{now}. Restore the data set, or choose another --workdir."
        )


def write_config(config: TrainConfig, workdir: Path, *, enabled: bool = True) -> None:
    """Write the resolved config into the run, whole or not at all."""
    if not enabled:
        return
    if not is_remote(workdir):
        workdir.mkdir(parents=True, exist_ok=True)
    with written_aside(workdir / "config.json") as aside:
        aside.write_text(json.dumps(to_dict(config), indent=2) + "\n")


class Stopped(KeyboardInterrupt):
    """A run was told to stop. Its state is saved, and the same command continues it."""


class StopSignal:
    """Turns the first SIGINT or SIGTERM into a request to stop; a second one ends the process.

    So does a terminal's SIGHUP when it goes, unless that is ignored, as under nohup.

    Where `jax.distributed` runs, SIGTERM belongs to it: it tells all processes, and they agree on
    a step. The others are passed on to it as a SIGTERM.

    Args:
        distributed: whether it runs.
        reached_preemption: from a step to whether the processes have agreed to stop at it.
    """

    def __init__(
        self,
        distributed: bool = False,
        reached_preemption: Callable[[int], bool] | None = None,
    ):
        self._name: str | None = None
        self._reached = reached_preemption if distributed else None
        self._signals = [signal.SIGINT] if distributed else [signal.SIGINT, signal.SIGTERM]
        hangup = getattr(signal, "SIGHUP", None)  # Windows has none
        if hangup and signal.getsignal(hangup) is signal.SIG_DFL:
            self._signals.append(hangup)
        self._pass_on = distributed
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is threading.main_thread():  # elsewhere Python forbids it
            for number in self._signals:
                self._previous[number] = signal.signal(number, self._request)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def at(self, step: int) -> str | None:
        """The reason to stop after this step, or None. Every process asks after every step."""
        return "SIGTERM" if self._reached and self._reached(step) else self._name

    def _request(self, number: int, frame: FrameType | None) -> None:
        for each in self._previous:
            signal.signal(each, signal.SIG_DFL)
        if self._pass_on:
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            self._name = signal.Signals(number).name

"""Loggers for programs that collect runs: Weights & Biases, Trackio; none unless asked for.

They stand beside the run's own files, which are whole without them. A logger that cannot begin
stops a run before its first step. One that fails later is told once, and the run goes on.
"""

import contextlib
import importlib
import json
import re
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from crate_jax.buckets import is_remote
from crate_jax.config import TrainConfig, to_dict
from crate_jax.errors import first_line
from crate_jax.files import Json, written_aside
from crate_jax.options import did_you_mean
from crate_jax.training.tensorboard import as_bytes

PROJECT = "crate_jax"
_RECORD = "loggers.json"  # in the workdir: under which name the run is known elsewhere


class Logger(Protocol):
    """One program that collects runs. Any method may raise anything."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers of a step, by name."""

    def images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        """Pictures of a step, (n, H, W, c) by name; uint8, or floats in [0, 1]."""

    def close(self, summary: Mapping[str, float], *, failed: bool) -> None:
        """The run ends, with the last values of what it is judged by."""


class _Wandb:
    """Weights & Biases; WANDB_MODE=offline writes files alone, which `wandb sync` sends."""

    def __init__(self, module: Any, workdir: Path, config: Json, name: str):
        self._module = module
        self._run = module.init(
            project=PROJECT,
            id=name,
            name=name,
            config=config,
            dir=None if is_remote(workdir) else str(workdir),
            resume="allow",
            settings=module.Settings(console="off"),
        )

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        shown = {name: [*map(self._module.Image, pictures(x))] for name, x in images.items()}
        self._run.log(shown, step=step)

    def close(self, summary: Mapping[str, float], *, failed: bool) -> None:
        self._run.summary.update(dict(summary))
        self._run.finish(exit_code=int(failed))


class _Trackio:
    """Trackio: a file of this machine, which `trackio show` shows."""

    def __init__(self, module: Any, workdir: Path, config: Json, name: str):
        self._module = module
        self._run = module.init(project=PROJECT, name=name, config=config, resume="allow")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        shown = {
            f"{name}/{i}": self._module.Image(picture)
            for name, x in images.items()
            for i, picture in enumerate(pictures(x))
        }
        self._run.log(shown, step=step)

    def close(self, summary: Mapping[str, float], *, failed: bool) -> None:
        self._module.finish()


# By name of the logger, of its package and of the extra.
LOGGERS: dict[str, Callable[[Any, Path, Json, str], Logger]] = {
    "wandb": _Wandb,
    "trackio": _Trackio,
}


class Loggers:
    """The loggers of a run, together.

    Args:
        opened: by name.
        say: writes a line for whoever watches.
    """

    def __init__(self, opened: Mapping[str, Logger], say: Callable[[str], None]):
        self._opened, self._say = dict(opened), say

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers of a step, by name."""
        self._each(f"at step {step}", lambda logger: logger.scalars(step, values))

    def images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        """Pictures of a step, as of `Logger.images`."""
        self._each(f"at step {step}", lambda logger: logger.images(step, images))

    def close(self, summary: Mapping[str, float], *, failed: bool) -> None:
        """The run ends."""
        self._each("at the end", lambda logger: logger.close(summary, failed=failed))
        self._opened.clear()

    def _each(self, when: str, act: Callable[[Logger], None]) -> None:
        """Hand something to every logger; one that fails is told and left out from then on."""
        for name, logger in [*self._opened.items()]:
            try:
                with _off_stdout():
                    act(logger)
            except Exception as error:
                del self._opened[name]
                self._say(
                    f"{name} failed {when} ({type(error).__name__}: {first_line(error)}); the run "
                    "goes on without it, and its own files have everything"
                )


def check_loggers(names: Sequence[str]) -> None:
    """Refuse loggers that do not exist, or whose package is missing.

    Raises:
        ValueError: one does not, or is.
    """
    for name in names:
        if name not in LOGGERS:
            raise ValueError(
                f"loggers must be out of {', '.join(LOGGERS)}; got {name}. "
                + did_you_mean(name, LOGGERS)
            )
        try:
            with _off_stdout():
                importlib.import_module(name)
        except ImportError as error:
            raise ValueError(
                f"loggers must be installed; {name} is not. Install it: "
                f"pip install 'crate-jax[{name}]', or leave it out of --config.loggers."
            ) from error


def open_loggers(config: TrainConfig, workdir: Path, say: Callable[[str], None]) -> Loggers:
    """Begin, or go on with, a run in every program of ``config.loggers``.

    Args:
        config: the config of the run.
        workdir: the workdir of the run; it keeps under which name the run is known elsewhere.
        say: see `Loggers`.

    Raises:
        ValueError: a program does not begin, for example without a network.
        OSError: the workdir does not take the name.
    """
    check_loggers(config.loggers)
    name = _known_name(workdir, config.name) if config.loggers else ""
    opened: dict[str, Logger] = {}
    for each in config.loggers:
        try:
            with _off_stdout():
                module = importlib.import_module(each)
                opened[each] = LOGGERS[each](module, workdir, to_dict(config), name)
        except Exception as error:
            Loggers(opened, say).close({}, failed=True)
            offline = "set WANDB_MODE=offline, " if each == "wandb" else ""
            raise ValueError(
                f"loggers must begin; {each} does not ({type(error).__name__}: "
                f"{first_line(error)}). Log in or check the network, {offline}or leave it out of "
                "--config.loggers."
            ) from error
    return Loggers(opened, say)


def pictures(images: np.ndarray) -> list[np.ndarray]:
    """Pictures (n, H, W, c) as n arrays (H, W, 3) of uint8."""
    found = [as_bytes(picture) for picture in np.asarray(images)]
    return [np.repeat(x, 3, axis=-1) if x.shape[-1] == 1 else x for x in found]


def _known_name(workdir: Path, name: str) -> str:
    """Under which name the run is known elsewhere; made once."""
    path = workdir / _RECORD
    if path.exists():
        return str(json.loads(path.read_text())["name"])
    made = f"{re.sub(r'[^A-Za-z0-9_.-]', '-', name)}-{uuid.uuid4().hex[:8]}"
    with written_aside(path) as aside:
        aside.write_text(json.dumps({"name": made}) + "\n")
    return made


@contextlib.contextmanager
def _off_stdout() -> Iterator[None]:
    """Print a program's output to stderr: the last line of stdout is the command's result."""
    with contextlib.redirect_stdout(sys.stderr):
        yield

"""`evaluate --watch`: each checkpoint of a run as it comes, while another process trains."""

import argparse
import json
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING

from crate_jax.cli.detail import asks_detail
from crate_jax.cli.following import EVERY_S, follow, say
from crate_jax.cli.runs import open_trained, restored
from crate_jax.config import from_dict
from crate_jax.files import Json, check_folder, located
from crate_jax.interrupts import answered

if TYPE_CHECKING:  # imported where they are used
    from crate_jax.checkpoint.manager import Checkpointer
    from crate_jax.tasks.task import Extra, Params

NAME = "evaluations.jsonl"  # in the folder of --output, a line for each checkpoint
_MOMENT_S = 1.0  # in which a checkpoint that is being deleted is gone


def watch(args: argparse.Namespace) -> Json:
    """Evaluate every checkpoint that has no line yet, as they come; the run's last one ends it.

    An interruption ends it, too.

    Raises:
        ValueError, KeyError, OSError: a mistake that the user can correct.
        KeyboardInterrupt: nothing was evaluated yet.
    """
    _check(args)
    folder = located(args.output or f"{args.workdir}/evaluations", "--output")
    check_folder(folder, "--output" if args.output else "--workdir")
    watcher = _Watcher(args, folder)
    try:
        for step in follow(args.workdir, watcher.wanted, args.interval or EVERY_S):
            watcher.evaluate(step)
    except KeyboardInterrupt:
        if not watcher.evaluated:
            raise
        answered()
    finally:
        watcher.close()
    told = {"workdir": args.workdir, "output": str(folder / NAME)}
    told |= {"evaluated": watcher.evaluated, "deleted": watcher.deleted}
    return told | watcher.last


def _check(args: argparse.Namespace) -> None:
    """Refuse what does not go with --watch."""
    if not args.workdir or args.weights:
        raise ValueError("--watch must go with --workdir, a run. See --help.")
    if args.step or asks_detail(args):
        flag = "--step" if args.step else "--detail, --confusion and --real"
        raise ValueError(f"--watch must go without {flag}; got both. Leave one out.")
    if args.interval is not None and not (args.interval > 0 and math.isfinite(args.interval)):
        raise ValueError(f"--interval must be seconds > 0; got {args.interval:g}. Correct it.")


class _Watcher:
    """The checkpoints to evaluate, and their results.

    Args:
        args: the arguments of the command.
        folder: where lines and TensorBoard's events go.

    Attributes:
        evaluated: how many were.
        deleted: how many the training process deleted before they were read.
        last: the newest line; {} before there is any.
    """

    def __init__(self, args: argparse.Namespace, folder: Path):
        self._args, self._folder = args, folder
        self._split: _Split | None = None  # opened with the first checkpoint
        self._past: set[int] = set()  # steps that have a line, or are gone
        self.evaluated = self.deleted = 0
        self.last: Json = {}

    def wanted(self, reader: "Checkpointer") -> list[int] | None:
        """Steps without a line; None where the run is complete, and there is none."""
        steps = [step for step in reader.steps if step not in self._past]
        return None if not steps and _is_complete(reader, self._args.workdir) else steps

    def evaluate(self, step: int) -> None:
        """Evaluate a checkpoint, if it is still there."""
        try:
            if self._split is None:
                self._split = _Split(self._args, self._folder, step)
                self._past |= self._split.lines.keys()
                self.last = self._split.lines.get(max(self._past, default=0), {})
            trained = None if step in self._past else self._split.read(step)
        except (OSError, ValueError):
            time.sleep(_MOMENT_S)
            if step in _steps(self._args.workdir):
                raise
            say(f"step {step}: deleted before it was read")
            self.deleted += 1
        else:
            if trained is not None:
                self.last = self._split.evaluate(step, *trained)
                self.evaluated += 1
        self._past.add(step)

    def close(self) -> None:
        """Close the files."""
        if self._split is not None:
            self._split.close()


class _Split:
    """A run, opened on its evaluation split, and the files of what comes out.

    Args:
        args: the arguments of the command.
        folder: made here.
        step: the checkpoint that says what the run is.

    Attributes:
        lines: of this split that are in the file already, by step.
    """

    def __init__(self, args: argparse.Namespace, folder: Path, step: int):
        from crate_jax.training.mirror import Mirror
        from crate_jax.training.run import jit_sums, make_evaluate
        from crate_jax.training.tensorboard import EventWriter

        given = argparse.Namespace(**vars(args) | {"step": str(step)})
        self._opened = open_trained(given, "evaluate")
        self._workdir, run = args.workdir, self._opened.run
        self._of = {"dataset": run.config.data.dataset, "split": run.config.data.eval_split}
        self._evaluate = make_evaluate(run, jit_sums(run))
        self._mirror = Mirror(folder)
        self._mirror.folder.mkdir(parents=True, exist_ok=True)
        self._mirror.fetch(NAME)
        self._path = self._mirror.folder / NAME
        _end_line(self._path)
        self.lines = {line["step"]: line for line in _lines(self._path) if self._is_of(line)}
        self._events = EventWriter(self._mirror.folder)

    def read(self, step: int) -> "tuple[Params, Extra]":
        """Parameters and extra of a checkpoint."""
        if step == self._opened.step:
            return self._opened.params, self._opened.extra
        return restored(self._workdir, self._opened.run, step)

    def evaluate(self, step: int, params: "Params", extra: "Extra") -> Json:
        """Measure, and write the line and the events; returns the line."""
        from crate_jax.training.run import place_on_mesh

        found = self._evaluate(*place_on_mesh(self._opened.run, (params, extra)))
        line = {"step": step, **self._of, **found}
        with self._path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        self._events.write(step, {f"{self._of['split']}/{k}": v for k, v in found.items()})
        self._mirror.flush()
        shown = dict.fromkeys(("loss", self._opened.run.task.headline))
        say("  ".join([f"step {step}", *(f"{k} {found[k]:.4f}" for k in shown if k in found)]))
        return line

    def close(self) -> None:
        """Close the files."""
        self._events.close()
        self._mirror.close()

    def _is_of(self, line: Json) -> bool:
        return all(line.get(name) == value for name, value in self._of.items())


def _end_line(path: Path) -> None:
    """End a line that a crash cut off, so that the next one stands alone."""
    if path.exists() and not path.read_bytes().endswith(b"\n"):
        with path.open("a") as file:
            file.write("\n")


def _lines(path: Path) -> list[Json]:
    """Read the lines of a file; a line that a crash cut off does not count."""
    found = []
    for text in path.read_text().splitlines() if path.exists() else ():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        found += [line] if isinstance(line, dict) and isinstance(line.get("step"), int) else []
    return found


def _steps(workdir: str) -> list[int]:
    """Steps of the checkpoints that there are now."""
    from crate_jax.checkpoint.manager import Checkpointer

    try:
        reader = Checkpointer(workdir, read_only=True)
    except FileNotFoundError:
        return []
    try:
        return reader.steps
    finally:
        reader.close()


def _is_complete(reader: "Checkpointer", workdir: str) -> bool:
    """True if the newest checkpoint is that of the run's last step, as far as that is known."""
    from crate_jax.checkpoint.reading import read_facts
    from crate_jax.tasks.task import length_of

    step = reader.latest_step
    try:
        config = from_dict(reader.restore_record(step or 0)["config"])
        examples = read_facts(workdir).get("examples")
    except (OSError, ValueError):  # it is being deleted; there will be a newer one
        return False
    if config.total_steps is None and examples is None:  # an older version did not record it
        return False
    total = config.total_steps or length_of(config, range(examples or 0))[1]
    return step is not None and step >= total

"""Checkpoints of a run: a state, a JSON record beside it, and which of them are kept.

Orbax's CheckpointManager does the work, asynchronously: `save` returns once the state is copied to
the host, and a step appears under its number once it is written. Orbax restores a byte that changed
on disk without a word, so a digest of the state and a checksum of the record are saved with them.
"""

import contextlib
import functools
from collections.abc import Mapping
from pathlib import Path

import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_manager import METRIC_ITEM_NAME

from crate_jax.checkpoint import folder
from crate_jax.checkpoint.best import UNSAID, Best
from crate_jax.checkpoint.digest import changed, digest
from crate_jax.checkpoint.engine import for_reading, for_writing
from crate_jax.checkpoint.faults import DamagedStepError, damages, refusals
from crate_jax.checkpoint.owner import own_together
from crate_jax.checkpoint.record import DIGEST, best_of, is_whole, seal, unseal
from crate_jax.checkpoint.shapes import check_fits, saved_shapes
from crate_jax.errors import first_line
from crate_jax.files import Json
from crate_jax.parallel import PyTree, all_agree

# Seconds of waiting: for the others to have read a step, and for what others say that could not.
READING_S, AGREEMENT_S = 3600, 60


class Checkpointer:
    """The checkpoints of one run.

    Args:
        workdir: the run's directory; checkpoints are in its folder ``checkpoints``.
        best: by what the best are told; None: by what the records say, and for a new run by the
            highest test/top1.
        keep_latest: how many of the newest are kept.
        keep_best: how many of the best are kept besides.
        read_only: never write or delete; else this process owns the workdir until `close`.

    Raises:
        FileNotFoundError: read_only, and there is no checkpoint.
        OSError: not read_only, and another process owns the workdir, or it cannot be written to.
        ValueError: it is in a bucket that cannot be reached.
    """

    def __init__(
        self,
        workdir: str | Path,
        *,
        best: Best | None = None,
        keep_latest: int = 2,
        keep_best: int = 1,
        read_only: bool = False,
    ):
        self.directory = folder.checkpoints_of(workdir)
        self._saving: int | None = None
        self._owner = None if read_only else own_together(self.directory.parent)
        there = self.directory.is_dir()
        if read_only and not there:
            raise folder.no_checkpoint(workdir)
        self.best = best or (best_of(self.directory) if there else UNSAID)
        if read_only:
            self._manager = for_reading(self.directory, self.best)
        else:
            folder.sweep(self.directory, "*")
            self._manager = for_writing(
                self.directory, self.best, keep_latest=keep_latest, keep_best=keep_best
            )
        if read_only and not self.steps:
            raise folder.no_checkpoint(workdir)

    @property
    def steps(self) -> list[int]:
        """Steps that are completely written, ascending."""
        return sorted(self._manager.all_steps())

    @property
    def latest_step(self) -> int | None:
        """The newest step, or None."""
        return self._manager.latest_step()

    @property
    def best_step(self) -> int | None:
        """The best step, or None."""
        return self._manager.best_step()

    def resolve(self, step: str | int) -> int:
        """The number of a step given as "latest", "best" or a number.

        Raises:
            ValueError: there is no such step.
        """
        found = {"latest": self.latest_step, "best": self.best_step}.get(str(step), step)
        if found is not None and str(found).isdigit() and int(found) in self.steps:
            return int(found)
        raise ValueError(
            f"step must be latest, best or one of {', '.join(map(str, self.steps))}; got {step}. "
            f"The checkpoints are in {self.directory}."
        )

    def save(
        self, step: int, state: PyTree, record: Json, metrics: dict[str, float] | None = None
    ) -> None:
        """Start writing a step.

        Args:
            step: optimizer steps done.
            state: pytree of global arrays; it may be donated as soon as this returns.
            record: JSON values, given back by `restore`.
            metrics: the metrics of the evaluation at this very step, if there was one.

        Raises:
            FileExistsError: the step is there already.
            OSError: this save could not be started, or the one before could not be finished (this
                one is then under way). Earlier steps are intact.
            ValueError: another process has become the owner of a workdir in a bucket.
        """
        if self._owner:
            self._owner.check()
        if step in self._manager.all_steps():
            raise FileExistsError(
                f"step must be new; {self.directory} holds {step} already. Go on from that one."
            )
        failure: OSError | None = None
        try:
            self.wait()
        except OSError as error:
            failure = error
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            record=ocp.args.JsonSave(seal(record, digest(state), metrics, self.best)),
        )
        with refusals(self._unwritable):
            # force: the loop decides when; Orbax has no interval of its own to keep.
            self._manager.save(step, args=items, metrics=metrics, force=True)
        self._saving = step
        if failure is not None:
            raise failure

    def restore(self, step: int, abstract_state: PyTree) -> tuple[PyTree, Json]:
        """Read a step back.

        Args:
            step: one of `steps`.
            abstract_state: tree of `jax.ShapeDtypeStruct` with the shardings to restore onto; they
                need not be those it was saved from.

        Returns:
            The state and the record.

        Raises:
            OtherTreeError: the step holds another tree, or arrays of other shapes.
            ValueError: it cannot be read, or is not what was saved.
        """
        return self._restore(step, abstract_state, ocp.args.StandardRestore(abstract_state))

    def restore_newest(self, abstract_state: PyTree) -> tuple[PyTree, Json, list[str]]:
        """Read the newest step that is whole, and set newer ones aside.

        A damaged step is renamed, ``damaged-300``, so that its number is free again and nobody
        takes it for a checkpoint; nothing is deleted. All processes take the same step; one that
        alone cannot read it gives the others a minute to say so too.

        Args:
            abstract_state: see `restore`.

        Returns:
            The state, the record, and what is wrong with each step that was set aside.

        Raises:
            OtherTreeError: see `restore`; none is renamed, for none is known to be damaged.
            ValueError: no step can be read; none is renamed.
            jax.errors.JaxRuntimeError: this process cannot read a step, and another does not say
                whether it can: it waits for this one within Orbax, or is lost.
        """
        problems: dict[int, str] = {}
        for step in reversed(self.steps):
            found = None
            try:
                found = self.restore(step, abstract_state)
            except DamagedStepError as error:
                problems[step] = str(error)
            wait_s = AGREEMENT_S if found is None else READING_S
            if all_agree(found is not None, wait_s=wait_s) and found is not None:
                if problems:
                    folder.set_aside(self.directory, list(problems))
                    self._manager.reload()
                return *found, list(problems.values())
            problems.setdefault(step, self._damage(step, "another process cannot read it"))
        raise ValueError(next(iter(problems.values()), f"{self.directory} holds no checkpoint."))

    def restore_part(self, step: int, item: PyTree, restore_args: PyTree) -> tuple[PyTree, Json]:
        """Read some branches of a step's tree; a manager that restored a whole one cannot.

        Args:
            step: one of `steps`.
            item: those branches, as `jax.ShapeDtypeStruct` leaves.
            restore_args: of each leaf, as Orbax takes them.

        Returns:
            The branches and the record.

        Raises:
            OtherTreeError, ValueError: see `restore`.
        """
        some = ocp.args.PyTreeRestore(item=item, restore_args=restore_args, partial_restore=True)
        return self._restore(step, item, some, part=True)

    def metrics(self, step: int) -> dict[str, float]:
        """The metrics of a step; empty if it was not evaluated.

        Raises:
            ValueError: it was, and that cannot be read.
        """
        found = self._manager.metrics(step)
        if found is None and (self.directory / str(step) / METRIC_ITEM_NAME).exists():
            raise DamagedStepError(self._damage(step, "its metrics cannot be read"))
        return dict(found or {})

    def restore_record(self, step: int) -> Json:
        """The JSON record of a step, without its state."""
        return self._checked(step, {}, self._record_on_disk(step))

    def has_digest(self, step: int) -> bool:
        """True if a step's bytes can be checked. Steps of the first versions have no digest."""
        return DIGEST in self._record_on_disk(step)

    def _record_on_disk(self, step: int) -> Json:
        return self._read(step, ocp.args.Composite(record=ocp.args.JsonRestore()))["record"]

    def saved_shapes(self, step: int) -> PyTree:
        """The tree of a step's state as `jax.ShapeDtypeStruct` leaves; nothing else is read."""
        with damages(functools.partial(self._unreadable, step)):
            return saved_shapes(self.directory, step)

    def wait(self) -> None:
        """Block until the save that was started is on disk.

        Raises:
            OSError: it could not be written; earlier steps stay, and `sweep` removes its remains.
        """
        step, self._saving = self._saving, None
        with refusals(self._unwritable):
            try:
                self._manager.wait_until_finished()
            except Exception:
                folder.sweep(self.directory, step)
                self._manager.reload()  # or it would keep the failed step, and drop a good one
                raise

    def close(self) -> None:
        """Finish the saves and release the directory; failures are `wait`'s to report."""
        with contextlib.suppress(OSError):  # or it would take the place of what ended the run
            self.wait()
        try:
            self._manager.close()
        finally:
            if self._owner:
                self._owner.release()

    def reached_preemption(self, step: int) -> bool:
        """True if some process was told to end; true at the same step on all of them.

        Call it on every process after every step. Always False without `jax.distributed`.
        """
        return self._manager.reached_preemption(step)

    def _restore(
        self, step: int, wanted: PyTree, state: ocp.args.CheckpointArgs, *, part: bool = False
    ) -> tuple[PyTree, Json]:
        """The state as it is asked for, once it is known to be there, and the record."""
        with damages(functools.partial(self._unreadable, step)):
            self._manager.wait_until_finished()  # a save under way has no shapes yet
            check_fits(self.directory, step, wanted, part=part)
        found = self._read(step, ocp.args.Composite(state=state, record=ocp.args.JsonRestore()))
        return found["state"], self._checked(step, found["state"], found["record"])

    def _read(self, step: int, items: ocp.args.Composite) -> Mapping[str, PyTree]:
        with damages(functools.partial(self._unreadable, step)):
            return self._manager.restore(step, args=items)

    def _unwritable(self, error: Exception) -> OSError:
        return folder.unwritable(self.directory, self.steps, error)

    def _checked(self, step: int, tree: PyTree, record: Json) -> Json:
        """The record, once it and the tree are compared with what was saved, if that is known."""
        if not isinstance(record, dict) or not is_whole(record):
            raise DamagedStepError(self._damage(step, "its record is not what was saved"))
        if DIGEST in record and tree and (paths := changed(tree, record[DIGEST])):
            raise DamagedStepError(self._damage(step, f"{paths[0]} is not what was saved"))
        return unseal(record)

    def _unreadable(self, step: int, error: Exception) -> DamagedStepError:
        return DamagedStepError(self._damage(step, first_line(error)))

    def _damage(self, step: int, reason: str) -> str:
        return folder.damage(self.directory, step, self.steps, reason)

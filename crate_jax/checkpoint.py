"""Checkpoints of a run: a state, a JSON record beside it, and which of them are kept.

Orbax's CheckpointManager does the work, asynchronously: `save` returns once the state is copied to
the host, and a step appears under its number only when all of it is written. This module knows
pytrees and paths, and no model.
"""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

FOLDER = "checkpoints"  # below the run's workdir


class Checkpointer:
    """The checkpoints of one run.

    Args:
        workdir: the run's directory; checkpoints are in its folder ``checkpoints``.
        best_metric: name of the metric of which higher is better.
        keep_latest: how many of the newest are kept.
        keep_best: how many with the highest metric are kept besides.
        read_only: open without ever writing or deleting.

    Raises:
        FileNotFoundError: read_only, and there is no checkpoint.
    """

    def __init__(
        self,
        workdir: str | Path,
        *,
        best_metric: str = "test/top1",
        keep_latest: int = 2,
        keep_best: int = 1,
        read_only: bool = False,
    ):
        self.directory = Path(workdir).absolute() / FOLDER
        metric = lambda metrics: metrics[best_metric]  # noqa: E731
        # Orbax's max_to_keep would keep the best and delete the latest, and a resumed run go back.
        kept: list[Any] = [preservation_policy.LatestN(keep_latest)]
        if keep_best:
            kept.append(
                preservation_policy.BestN(
                    get_metric_fn=metric, n=keep_best, keep_checkpoints_without_metrics=False
                )
            )
        if read_only and not self.directory.is_dir():
            raise _no_checkpoint(self.directory)
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(read_only=True, best_fn=metric)
            if read_only
            else ocp.CheckpointManagerOptions(
                best_fn=metric,
                preservation_policy=preservation_policy.AnyPreservationPolicy(kept),
                cleanup_tmp_directories=True,  # what a killed save left behind
            ),
        )
        if read_only and not self.steps:
            raise _no_checkpoint(self.directory)

    @property
    def steps(self) -> list[int]:
        """Steps that are completely written, ascending."""
        return sorted(self._manager.all_steps())

    @property
    def latest_step(self) -> int | None:
        """The newest step, or None."""
        return self._manager.latest_step()

    def resolve(self, step: str | int) -> int:
        """The number of a step given as "latest", "best" or a number.

        Raises:
            ValueError: there is no such step.
        """
        found = {"latest": self.latest_step, "best": self._manager.best_step()}.get(str(step), step)
        if found is not None and str(found).isdigit() and int(found) in self.steps:
            return int(found)
        raise ValueError(
            f"step must be latest, best or one of {', '.join(map(str, self.steps))}; got {step}. "
            f"The checkpoints are in {self.directory}."
        )

    def save(
        self, step: int, state: Any, record: dict[str, Any], metrics: dict[str, float] | None = None
    ) -> None:
        """Start writing a step; one that exists already is left as it is.

        Args:
            step: optimizer steps done.
            state: pytree of global arrays; it may be donated as soon as this returns.
            record: JSON values, given back by `restore`.
            metrics: of the evaluation at this very step, if there was one.
        """
        if step in self._manager.all_steps():
            return
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state), record=ocp.args.JsonSave(record)
        )
        # force: the loop decides when; Orbax has no interval of its own to keep.
        self._manager.save(step, args=items, metrics=metrics, force=True)

    def restore(self, step: int, abstract_state: Any) -> tuple[Any, dict[str, Any]]:
        """Read a step back.

        Args:
            step: one of `steps`.
            abstract_state: tree of `jax.ShapeDtypeStruct` with the shardings to restore onto; they
                need not be those it was saved from.

        Returns:
            The state and the record.

        Raises:
            ValueError: the step cannot be read, or holds another tree.
        """
        items = ocp.args.Composite(
            state=ocp.args.StandardRestore(abstract_state), record=ocp.args.JsonRestore()
        )
        restored = self._read(step, items)
        return restored["state"], restored["record"]

    def restore_record(self, step: int) -> dict[str, Any]:
        """The JSON record of a step, without its state."""
        return self._read(step, ocp.args.Composite(record=ocp.args.JsonRestore()))["record"]

    def saved_shapes(self, step: int) -> Any:
        """The tree of a step's state as `jax.ShapeDtypeStruct` leaves; nothing else is read."""
        try:
            folder: Any = self.directory / str(step) / "state"
            tree = ocp.PyTreeCheckpointHandler().metadata(folder).tree
        except Exception as error:
            raise self._unreadable(step, error) from error
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)

    def wait(self) -> None:
        """Block until every started save is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Finish the saves and release the directory."""
        self._manager.close()

    def _read(self, step: int, items: ocp.args.Composite) -> Any:
        try:
            return self._manager.restore(step, args=items)
        except Exception as error:  # Orbax raises bare Exceptions, and KeyErrors and JSON errors
            raise self._unreadable(step, error) from error

    def _unreadable(self, step: int, error: Exception) -> ValueError:
        reason = str(error).strip().split("\n")[0][:200]
        return ValueError(
            f"checkpoint must be readable; step {step} in {self.directory} is not ({reason}). "
            "Move that folder away to use an earlier step."
        )


def restore_params(
    workdir: str | Path, abstract_params: Any, step: str | int = "latest"
) -> tuple[Any, int]:
    """The parameters of a run, without its optimizer state; its averaged ones if it keeps them.

    Args:
        workdir: the run's directory.
        abstract_params: tree of `jax.ShapeDtypeStruct`, with shardings to restore onto those,
            without to restore to the default device.
        step: "latest", "best" or a number.

    Returns:
        The parameters and the number of their step.

    Raises:
        FileNotFoundError: there is no checkpoint.
        ValueError: there is no such step, or it cannot be read, or it holds another tree.
    """
    reader = Checkpointer(workdir, read_only=True)
    try:
        number = reader.resolve(step)
        ema = reader.restore_record(number).get("ema", False)
        single = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        wanted = {
            "ema_params" if ema else "params": jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding or single),
                abstract_params,
            )
        }
        state = ocp.args.PyTreeRestore(
            item=wanted,
            restore_args=ocp.checkpoint_utils.construct_restore_args(wanted),
            partial_restore=True,
        )
        restored = reader._read(number, ocp.args.Composite(state=state))["state"]
        return next(iter(restored.values())), number
    finally:
        reader.close()


def read_params(workdir: str | Path, step: str | int) -> tuple[Any, dict[str, Any]]:
    """The parameters of a run whatever their shapes are; its averaged ones if it keeps them.

    Args:
        workdir: the run's directory.
        step: "latest", "best" or a number.

    Returns:
        The parameters as NumPy arrays, and the JSON record of that step.

    Raises:
        FileNotFoundError: there is no checkpoint.
        ValueError: there is no such step, or it cannot be read.
    """
    reader = Checkpointer(workdir, read_only=True)
    try:
        number = reader.resolve(step)
        record = reader.restore_record(number)
        name = "ema_params" if record.get("ema", False) else "params"
        wanted = {name: reader.saved_shapes(number)[name]}
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
        state = ocp.args.PyTreeRestore(item=wanted, restore_args=as_numpy, partial_restore=True)
        restored = reader._read(number, ocp.args.Composite(state=state))["state"]
        return restored[name], record
    finally:
        reader.close()


def _no_checkpoint(directory: Path) -> FileNotFoundError:
    return FileNotFoundError(
        f"workdir must hold a checkpoint; {directory.parent} has none. "
        f"Train first: python train.py --workdir={directory.parent}"
    )

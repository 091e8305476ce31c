"""Orbax's manager as this project uses it: the steps that it keeps, and the metrics it trusts."""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

import orbax.checkpoint as ocp
from orbax.checkpoint import options as orbax_options
from orbax.checkpoint.checkpoint_managers import preservation_policy

from crate_jax.buckets import is_remote
from crate_jax.checkpoint import s3
from crate_jax.checkpoint.best import Best
from crate_jax.checkpoint.record import METRICS, read_from_disk


class Manager(ocp.CheckpointManager):
    """Orbax's manager. Damaged metrics do not count, and it can still open their directory.

    Args:
        directory: the directory of the steps.
        best: which metric a step's metrics must hold.
        options: Orbax's.
    """

    def __init__(self, directory: Path, best: Best, options: ocp.CheckpointManagerOptions):
        s3.teach_orbax(directory)
        self._best = best  # first: Orbax reads all metrics when it is made
        self._folder = directory
        super().__init__(directory, options=options)

    def metrics(self, step: int) -> dict[str, float] | None:
        """None as well for metrics that cannot be read, or are not those in the record.

        Such a step is not among the best.
        """
        try:
            found = super().metrics(step)
            record = read_from_disk(self._folder, step)
        except (ValueError, OSError):  # of JSON and of Unicode too
            return None
        if not isinstance(found, dict) or record.get(METRICS, found) != found:
            return None
        return found if isinstance(found.get(self._best.metric), int | float) else None


def for_reading(directory: Path, best: Best) -> Manager:
    """A manager that neither writes nor deletes."""
    with _without_news_of_reading():
        options = ocp.CheckpointManagerOptions(
            read_only=True, best_fn=best.score, atomicity_options=_atomicity(directory)
        )
        return Manager(directory, best, options)


def for_writing(directory: Path, best: Best, *, keep_latest: int, keep_best: int) -> Manager:
    """A manager that keeps the newest steps, and the best besides."""
    # Orbax's max_to_keep would keep the best and delete the latest, and a resumed run go back.
    kept: list[preservation_policy.PreservationPolicy] = [preservation_policy.LatestN(keep_latest)]
    if keep_best:
        kept.append(
            preservation_policy.BestN(
                get_metric_fn=best.score, n=keep_best, keep_checkpoints_without_metrics=False
            )
        )
    policy = preservation_policy.AnyPreservationPolicy(kept)
    options = ocp.CheckpointManagerOptions(
        best_fn=best.score, preservation_policy=policy, atomicity_options=_atomicity(directory)
    )
    return Manager(directory, best, options)


@contextlib.contextmanager
def _without_news_of_reading() -> Iterator[None]:
    """Leave out Orbax's three warnings that a folder opened for reading is not written to."""

    def is_other(entry: logging.LogRecord) -> bool:
        return "read_only" not in str(entry.msg) and "read only" not in str(entry.msg)

    logger = logging.getLogger("absl")
    logger.addFilter(is_other)
    try:
        yield
    finally:
        logger.removeFilter(is_other)


def _atomicity(directory: Path) -> orbax_options.AtomicityOptions | None:
    """In a bucket the object that Orbax adds last makes a step whole; None, here: its name does."""
    if not is_remote(directory):
        return None
    return orbax_options.AtomicityOptions(mode=orbax_options.AtomicityMode.COMMIT_FILE)

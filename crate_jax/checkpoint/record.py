"""What is saved beside a state, so that damage on disk is seen: sealed with a checksum.

Orbax restores a byte that changed on disk without a word, and reads the metrics of the steps, which
decide what is kept, from files of their own. The digest of the state and the metrics are therefore
in the record as well, and the record has a checksum.
"""

import json
import zlib
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp

DIGEST, METRICS, CHECKSUM = "digest", "metrics", "checksum"


def seal(
    record: dict[str, Any], digest: dict[str, Any], metrics: dict[str, float] | None
) -> dict[str, Any]:
    """The record with the digest of the state, the metrics of the step and a checksum."""
    return _with_checksum(record | {DIGEST: digest, METRICS: metrics or {}})


def is_whole(record: dict[str, Any]) -> bool:
    """Whether a record is what was sealed; those of the first versions have no seal."""
    return CHECKSUM not in record or record == _with_checksum(record)


def unseal(record: dict[str, Any]) -> dict[str, Any]:
    """The record as it was before."""
    return {k: v for k, v in record.items() if k not in (DIGEST, METRICS, CHECKSUM)}


def _with_checksum(record: dict[str, Any]) -> dict[str, Any]:
    """The record with the CRC-32 of its other entries."""
    others = {key: value for key, value in record.items() if key != CHECKSUM}
    text = json.dumps(others, sort_keys=True)
    return others | {CHECKSUM: zlib.crc32(text.encode())}


class Manager(ocp.CheckpointManager):
    """Orbax's, but damaged metrics neither count nor keep it from opening a directory.

    Args:
        directory: of the steps.
        best_metric: what a step's metrics must hold.
        options: Orbax's.
    """

    def __init__(self, directory: Path, best_metric: str, options: ocp.CheckpointManagerOptions):
        self._best_metric = best_metric  # first: Orbax reads all metrics when it is made
        super().__init__(directory, options=options)

    def metrics(self, step: int) -> dict[str, float] | None:
        """None as well for metrics that cannot be read, or are not those in the record.

        Such a step is not among the best.
        """
        try:
            found = super().metrics(step)
            path = Path(self.directory) / str(step) / "record" / "metadata"
            record = json.loads(path.read_text()) if found and path.exists() else {}
        except (ValueError, OSError):  # of JSON and of Unicode too
            return None
        if isinstance(record, dict) and record.get(METRICS, found) != found:
            return None
        known = isinstance(found, dict) and isinstance(found.get(self._best_metric), int | float)
        return found if known else None

"""The record beside a saved state, sealed with a checksum. It makes damage on disk visible.

Orbax restores a byte that changed on disk without a word, and reads the metrics of the steps, which
decide what is kept, from files of their own. The digest of the state and the metrics are therefore
in the record as well, and the record has a checksum. It also says which metric is the best by, so
that a reader needs nothing but the run's directory.
"""

import contextlib
import dataclasses
import json
import zlib
from pathlib import Path

from crate_jax.checkpoint.best import UNSAID, Best
from crate_jax.files import Json

DIGEST, METRICS, BEST, CHECKSUM = "digest", "metrics", "best", "checksum"
FACTS = "facts"  # of outputs and data; whoever trains puts them into the record


def seal(
    record: Json, digest: dict[str, int], metrics: dict[str, float] | None, best: Best
) -> Json:
    """The record with the digest of the state, the metrics of the step and a checksum."""
    added = {DIGEST: digest, METRICS: metrics or {}, BEST: dataclasses.asdict(best)}
    return _with_checksum(record | added)


def is_whole(record: Json) -> bool:
    """True if a record is as it was sealed. Records of the first versions have no seal."""
    return CHECKSUM not in record or record == _with_checksum(record)


def unseal(record: Json) -> Json:
    """The record as it was before."""
    return {k: v for k, v in record.items() if k not in (DIGEST, METRICS, BEST, CHECKSUM)}


def read_from_disk(directory: Path, step: int | str) -> Json:
    """The sealed record of a step; empty if it has none.

    Raises:
        ValueError, OSError: it cannot be read.
    """
    path = directory / str(step) / "record" / "metadata"
    record = json.loads(path.read_text()) if path.exists() else {}
    return record if isinstance(record, dict) else {}


def best_of(directory: Path) -> Best:
    """The metric that the best checkpoint is chosen by, from a run's newest record."""
    found = newest(directory, BEST)
    return UNSAID if found is None else Best(**found)


def newest(directory: Path, entry: str) -> Json | None:
    """An entry of the newest record that has it, or None; a damaged record does not count."""
    steps = sorted((int(p.name) for p in directory.iterdir() if p.name.isdigit()), reverse=True)
    for step in steps:
        with contextlib.suppress(ValueError, OSError):
            record = read_from_disk(directory, step)
            if entry in record and is_whole(record):
                return record[entry]
    return None


def _with_checksum(record: Json) -> Json:
    """The record with the CRC-32 of its other entries."""
    others = {key: value for key, value in record.items() if key != CHECKSUM}
    text = json.dumps(others, sort_keys=True)
    return others | {CHECKSUM: zlib.crc32(text.encode())}

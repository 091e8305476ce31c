"""Orbax in ``s3://…``: it knows ``gs://…`` itself, but not tensorstore's driver of S3.

Everything else that Orbax does in a bucket of Google it does in any bucket that epath knows.
"""

import functools
import os
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

_SCHEME = "s3:/"  # epath's paths have lost a slash where Orbax has normalised them


def teach_orbax(path: Path) -> None:
    """Let Orbax find arrays in S3 by tensorstore's driver; nothing else changes.

    It has one function that says where arrays are, which takes no path but local ones and Google's.

    Raises:
        ValueError: this version of Orbax has no such function.
    """
    if not os.fspath(path).startswith(_SCHEME):
        return
    try:
        _teach()
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"orbax-checkpoint must be a version that can store arrays in s3://; got "
            f"{version('orbax-checkpoint')}. Install 0.12.8, or use gs:// or a folder."
        ) from error


@functools.cache
def _teach() -> None:
    from orbax.checkpoint._src.serialization import tensorstore_utils

    tensorstore_utils.build_kvstore_tspec = _also_s3(tensorstore_utils.build_kvstore_tspec)


def _also_s3(build: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """Orbax's function, for S3 with the answer for the same path in a bucket of Google."""

    @functools.wraps(build)
    def build_kvstore_tspec(directory: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        if not os.fspath(directory).startswith(_SCHEME):
            return build(directory, *args, **kwargs)
        google = "gs://" + os.fspath(directory).removeprefix(_SCHEME).lstrip("/")
        return _in_s3(build(google, *args, **kwargs))

    return build_kvstore_tspec


def _in_s3(spec: Any) -> Any:
    """A specification of tensorstore in which every store of Google is one of S3."""
    if not isinstance(spec, dict):
        return spec
    found = {key: _in_s3(value) for key, value in spec.items()}
    if str(found.get("driver")).startswith("gcs"):
        found |= {"driver": "s3", **_settings()}
    return found


def _settings() -> dict[str, Any]:
    """The settings that botocore takes from the environment and tensorstore does not."""
    names = {
        "endpoint": ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"),
        "aws_region": ("AWS_REGION", "AWS_DEFAULT_REGION"),
    }
    found: dict[str, Any] = {
        key: value
        for key, variables in names.items()
        if (value := next(filter(None, map(os.environ.get, variables)), None))
    }
    if os.environ.get("AWS_ACCESS_KEY_ID"):  # else tensorstore complains of profiles it misses
        found["aws_credentials"] = {"type": "environment"}
    return found

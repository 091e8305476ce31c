"""`doctor`: what is installed here, which extras are missing, and whether training works."""

import argparse
import os
import platform
import sys
import tempfile
import textwrap
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import jax

from crate_jax.cli.arguments import Subparsers
from crate_jax.cli.extras import PACKAGE, USES, missing, version
from crate_jax.cli.flags import parse_config
from crate_jax.cli.running import enable_compilation_cache
from crate_jax.errors import first_line
from crate_jax.files import Json, cache_folder
from crate_jax.machine import explained
from crate_jax.streams import tolerant

# Each of them decides about what works; in the order in which they depend on each other.
_PACKAGES = (
    *(PACKAGE, "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain"),
    *("tensorflow-datasets", "numpy", "opencv-python-headless", "scikit-learn", "torch"),
)
_EXTRAS = f"Extras: pip install '{PACKAGE}[NAME]' adds one"
_STEPS = 20
_COUNTING_S = 3.0  # for the size of one folder
_WIDTH = 79


def add_doctor(subparsers: Subparsers) -> None:
    """The flags of `doctor`."""
    parser = subparsers.add_parser(
        "doctor",
        help="what is installed and what is missing; does training work",
        epilog="doctor",
    )
    parser.add_argument(
        "--no-training", action="store_true", help="leave out the short training at the end"
    )
    parser.set_defaults(function=doctor)


def doctor(args: argparse.Namespace) -> Json:
    """Look at versions, devices, caches and extras, and train for a moment."""
    out = tolerant(sys.stdout)
    versions: Json = {"python": platform.python_version()}
    versions |= {name: version(name) for name in _PACKAGES}
    out.write(_table("Versions", [(k, v or "not installed") for k, v in versions.items()]))
    enable_compilation_cache()
    devices = _devices()
    out.write(_table("Devices", [(d["kind"], _described(d)) for d in devices]))
    out.write(_table("Caches", list(_caches().items())))
    lacking = {extra: found for extra in USES if (found := missing(extra))}
    out.write(_table(_EXTRAS, [(x, f"{_state(x in lacking)}  {USES[x]}") for x in USES]))
    result: Json = {"versions": versions, "devices": devices, "missing": lacking}
    if not args.no_training:
        result |= _try_training()
        said = (
            f"works: {_STEPS} steps in {result['training_s']} s, with all that surrounds them"
            if result["works"]
            else f"fails: {result['error']}"
        )
        out.write(_table("Training", [("a tiny CRATE", said)]))
    return result


def _devices() -> list[Json]:
    """The kinds of devices that JAX sees, how many of each, and the memory of one in GiB."""
    found: dict[str, Json] = {}
    for device in jax.devices():
        row = found.setdefault(
            f"{device.platform} {device.device_kind}".strip(),
            {"kind": device.device_kind, "platform": device.platform, "count": 0},
        )
        row["count"] += 1
        limit = (device.memory_stats() or {}).get("bytes_limit")
        row["memory_gib"] = round(limit / 2**30, 1) if limit else None
    return list(found.values())


def _described(device: Json) -> str:
    memory = f", {device['memory_gib']} GiB each" if device["memory_gib"] else ""
    return f"{device['count']} x {device['platform']}{memory}"


def _caches() -> dict[str, str]:
    """The folders of programs, indices, weights and data sets, and their sizes."""
    folders = {
        "compiled programs": jax.config.values["jax_compilation_cache_dir"],
        "indices of data, weights": cache_folder(),
        "weights of hf://": _hub_folder(),
        "data sets (TFDS)": os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets"),
    }
    return {
        name: f"{folder}, {_size(Path(folder).expanduser())}"
        for name, folder in folders.items()
        if folder
    }


def _hub_folder() -> str:
    """The folder of the hub's client, which other programs use too; "" without the client."""
    if find_spec("huggingface_hub") is None:
        return ""
    from huggingface_hub import constants

    return str(constants.HF_HUB_CACHE)


def _size(folder: Path) -> str:
    """The size of a folder, in MiB; files that vanish meanwhile count as nothing.

    Of a folder that takes too long, with very many files or far away, what was counted so far.
    """
    if not folder.is_dir():
        return "empty"
    total, end = 0, time.monotonic() + _COUNTING_S
    for parent, _, names in os.walk(folder):
        for name in names:
            if time.monotonic() > end:
                return f"more than {total / 2**20:,.0f} MiB"
            try:
                total += os.lstat(os.path.join(parent, name)).st_size
            except OSError:
                continue
    return f"{total / 2**20:,.0f} MiB"


def _state(lacks: bool) -> str:
    return "missing  " if lacks else "installed"


def _try_training() -> Json:
    """Train a tiny model on digits in a folder that goes again: data, step, test, checkpoint."""
    from crate_jax.training.loop import train
    from crate_jax.training.workdir import Stopped

    batch = 16 * jax.device_count()
    with tempfile.TemporaryDirectory(prefix="crate_jax_") as folder:
        config = parse_config(
            "digits",
            [
                *(f"--config.data.data_dir={folder}", f"--config.total_steps={_STEPS}"),
                *(f"--config.batch_size={batch}", f"--config.eval_batch_size={batch}"),
                *("--config.optim.warmup_epochs=0", "--config.log_objective_every_steps=0"),
                *("--config.model.depth=1", "--config.model.width=24"),
            ],
        )
        start = time.perf_counter()
        try:
            train(config, f"{folder}/run")
        except Stopped:  # its checkpoint goes with the folder
            raise KeyboardInterrupt from None
        except Exception as error:  # whatever it is, it is what one asked the doctor for
            return {"works": False, "error": explained(error) or first_line(error)}
        return {"works": True, "training_s": round(time.perf_counter() - start, 1)}


def _table(title: str, rows: Sequence[tuple[str, str]]) -> str:
    """Rows of two columns under a title, wrapped to the width of a terminal."""
    left = max(len(name) for name, _ in rows)
    lines = [title]
    for name, text in rows:
        space = " " * (left + 4)
        wrapped = textwrap.wrap(text, _WIDTH - len(space), break_on_hyphens=False) or [""]
        lines.append(f"  {name:<{left}}  {wrapped[0]}")
        lines += [space + line for line in wrapped[1:]]
    return "\n".join(lines) + "\n\n"

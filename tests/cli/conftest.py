"""What tests of commands share."""

import json
import os
from pathlib import Path

import pytest
from command import TINY
from filelock import FileLock

from crate_jax.cli.flags import parse_config
from crate_jax.cli.main import main
from crate_jax.training.loop import train


@pytest.fixture
def call(capsys):
    """Status, the JSON of a command (None after a mistake), and its lines on stderr."""

    def call(*arguments):
        capsys.readouterr()
        try:
            status = main([str(argument) for argument in arguments])
        except SystemExit as end:
            status = end.code
        out, err = capsys.readouterr()
        return status, json.loads(out.splitlines()[-1]) if out else None, err

    return call


@pytest.fixture(scope="session")
def tiny_run():
    """A run of two steps, made by the first of the tests' processes that asks for it."""
    folder = Path(os.environ["CRATE_JAX_TESTS_SCRATCH"], "interrupts")
    with FileLock(f"{folder}.lock"):
        if not (folder / "run").exists():
            flags = ["--config.total_steps=2", "--config.parallel.mesh=data:8"]
            train(parse_config("digits", [*TINY, *flags]), folder / "making")
            (folder / "making").rename(folder / "run")
    return folder / "run"

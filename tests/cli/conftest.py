"""What tests of commands share."""

import json

import pytest

from crate_jax.cli.main import main


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

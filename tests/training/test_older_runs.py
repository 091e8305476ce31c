"""Runs that older code began go on."""

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest

from crate_jax.checkpoint.best import Best
from crate_jax.checkpoint.manager import Checkpointer
from crate_jax.checkpoint.reading import read_facts
from crate_jax.config import from_dict
from crate_jax.training.loop import train

RUN = Path(__file__).parents[1] / "golden" / "run_before_tasks.tar.gz"
CLOCK = ("images_per_s", "examples_per_s", "data_wait_share")


def lines_of(workdir):
    found = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in CLOCK} for line in found]


def test_a_run_begun_before_states_had_an_extra_ends_as_it_would_have(tmp_path, capsys):
    """It says that it did not say what it was trained on; its next checkpoint does."""
    with tarfile.open(RUN) as tar:
        tar.extractall(tmp_path, filter="data")
    workdir = tmp_path / "run_before_tasks"
    expected = lines_of(workdir)
    reader = Checkpointer(workdir, read_only=True)
    assert (reader.steps, reader.best) == ([4], Best("test/top1", higher=True))
    reader.close()
    config = from_dict(json.loads((workdir / "config.json").read_text()))
    assert read_facts(workdir) == {}
    assert train(config, workdir)["step"] == 8
    said = "do not say what they were trained on (classes, examples, listing); from now on they"
    assert said in capsys.readouterr().err
    facts = read_facts(workdir)
    assert (facts["classes"], facts["examples"]) == ([*"0123456789"], 1500)
    assert facts["listing"].endswith(" of version and shards")
    found = lines_of(workdir)
    later = [line for line in found if line["step"] > 4]
    assert len(later) == 6  # four of training, one of the objective, one of evaluation
    assert [line.keys() for line in found] == [line.keys() for line in expected]
    for ours, theirs in zip(found, expected, strict=True):
        for name, value in theirs.items():
            np.testing.assert_allclose(ours[name], value, rtol=1e-5, err_msg=name)
    if len(set(map(str, found))) < len(found):
        pytest.fail("a line was written twice")

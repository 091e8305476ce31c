"""docs/extend.md, run as it is written: a new model, its name, and what it can do."""

import re

import pytest
from command import ROOT

from crate_jax.cli.main import main
from crate_jax.config import ModelConfig
from crate_jax.models.fields import FAMILIES
from crate_jax.models.variants import VARIANTS
from crate_jax.models.zoo import CLASSES, build_model

BLOCKS = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs/extend.md").read_text(), re.M | re.S)


@pytest.fixture
def registered(tmp_path, monkeypatch):
    """What the page defines, with its rows in the tables as long as the test runs."""
    monkeypatch.chdir(tmp_path)
    found = {"__name__": "extend"}
    for block in BLOCKS:
        exec(compile(block, "docs/extend.md", "exec"), found)
    yield found
    for table in (FAMILIES, CLASSES, VARIANTS):
        table.pop("mean_crate", None)
        table.pop("mean_crate_tiny", None)


def test_the_model_of_the_page_is_one_of_thirty_lines(registered, capsys):
    lines = [line for line in BLOCKS[0].splitlines() if line.strip()]
    assert len(lines) <= 30
    update = registered["seen"]["towards_mean"]
    assert abs(update.mean(axis=2)).max() < 1e-6  # the updates of all tokens cancel
    section = ModelConfig(name="mean_crate_tiny", image_size=(32, 32), num_classes=3, share=0.125)
    assert build_model(section).share == 0.125
    with pytest.raises(ValueError, match=r"model\.share must be > 0; got 0\."):
        build_model(ModelConfig(name="mean_crate_tiny", share=0.0))
    assert main(["summary", "mean_crate_tiny"]) == 2  # it has no row in operator_cost.py
    message = "error: towards_mean must have a formula of its cost; it has none. Add it to"
    assert capsys.readouterr().err.startswith(message)


def test_the_tables_are_as_they_were():
    assert not {"mean_crate", "mean_crate_tiny"} & {*FAMILIES, *CLASSES, *VARIANTS}

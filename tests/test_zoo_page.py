"""docs/zoo.md is what its program writes, and the table that it is made from names real models."""

import sys

import pytest
from command import ROOT

from crate_jax import list_models
from crate_jax.models.released import RELEASED
from crate_jax.models.sources import RESULTS, SOURCES, source_of
from crate_jax.models.zoo import create_model

sys.path.append(str(ROOT / "benchmarks"))

import zoo
import zoo_page

RUNS = [{"top1": 0.5, "steps": 60, "seconds_per_step": 0.02} for _ in range(3)]


def contender(*top1s):
    runs = [run | {"top1": top1} for run, top1 in zip(RUNS, top1s, strict=True)]
    return {"rate": 0.002, "by_steps": runs, "by_seconds": runs[::-1]}


def test_the_page_is_up_to_date():
    assert zoo_page.PAGE.read_text() == zoo_page.page(), "run python benchmarks/zoo_page.py"


def test_every_model_has_one_source_and_every_row_a_model():
    names = set(list_models())
    found = {name: source_of(name) for name in names}
    assert set(found.values()) == set(SOURCES)
    assert set(RESULTS) <= names and {file.model for file in RELEASED} <= names
    with pytest.raises(KeyError, match=r"got resnet\. Add a row to SOURCES"):
        source_of("resnet")


def test_released_bytes_fit_the_model():
    """A file of training holds ten bytes a parameter, and headers."""
    from crate_jax.models.cost import count_parameters

    sized = [file for file in RELEASED if file.bytes]
    assert len(sized) == 4
    for file in sized:
        parameters = count_parameters(create_model(file.model, num_classes=file.classes))
        assert 0 <= file.bytes - 10 * parameters < 300_000, file.file


def test_the_contest_says_who_wins_and_who_is_too_close():
    result = {
        "seeds": 3,
        "rounds": 7,
        "epochs": 4,
        "seconds_a_step": {"crate": 0.02, "alpha": 0.05, "vit": 0.04},
        "contenders": {
            "vit": contender(0.94, 0.95, 0.96),
            "alpha": contender(0.5, 0.5, 0.5),
            "crate": contender(0.95, 0.96, 0.97),
        },
    }
    lines = zoo.report(result)
    assert "| crate | 0.002 | 20.0 | 60 | 96.0 ± 1.0 | 60 | 96.0 ± 1.0 |" in lines
    assert "At equal steps: crate wins, 96.0 %; too close to tell apart: vit." in lines
    start = "At equal seconds (1.2 s of training steps, as many as crate takes): crate wins"
    assert lines[-1].startswith(start)
    assert {form for form, _ in zoo.CONTENDERS.values()} == set(forms())


def forms():
    import runpy

    return runpy.run_path(str(ROOT / "configs/digits.py"))["CLASSIFIERS"]

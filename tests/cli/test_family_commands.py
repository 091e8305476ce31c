"""Every cell of the matrix in docs/zoo.md: its command, run on a tiny model of its family."""

import functools
import json
import sys
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from command import ROOT
from sizes import sizes_of
from weights import assert_equal_trees

from crate_jax import create_model, load_variables, save_weights
from crate_jax.analysis import layerwise, taps
from crate_jax.cli.main import main
from crate_jax.interop.convert import layouts_of
from crate_jax.interop.tree import tree_of
from crate_jax.models.cost import abstract_variables
from crate_jax.models.fields import FAMILIES as KINDS
from crate_jax.models.variants import find

sys.path.append(str(ROOT / "benchmarks"))

from family_commands import FAMILIES, MEASURES, REFUSALS, YES

DEPTH = 2


class Tiny(NamedTuple):
    """A tiny model of a family, its fields, and variables that are off their start."""

    name: str
    fields: dict[str, Any]
    model: Any
    variables: dict[str, Any]

    @property
    def parameters(self):
        return sum(leaf.size for leaf in jax.tree.leaves(self.variables["params"]))


@functools.cache
def tiny(family):
    name, own, _ = FAMILIES[family]
    fields = sizes_of(find(name).family) | {"depth": DEPTH} | own
    model, rng = create_model(name, **fields), np.random.default_rng(1)
    zeros = {path for layout in layouts_of(model) for path in layout.zeros}

    def fill(path, leaf):
        values = 0.3 * rng.normal(size=leaf.shape)
        values *= "/".join(key.key for key in path[1:]) not in zeros
        values = {"scale": 1 + values, "var": 1 + np.abs(values)}.get(path[-1].key, values)
        return np.asarray(values, leaf.dtype)

    return Tiny(name, fields, model, jax.tree.map_with_path(fill, abstract_variables(model)))


@functools.cache
def looked_inside(family):
    """What `taps` and `layerwise` give for two examples, in one program."""
    _, fields, model, variables = tiny(family)
    rng, shape = np.random.default_rng(2), (2, *model.sample_input().shape[1:])
    if "vocab_size" in fields:
        inputs = rng.integers(2, fields["vocab_size"], shape, dtype=np.int32)  # 1 is padding
    else:
        inputs = rng.normal(size=shape).astype(np.float32)
    look = jax.jit(lambda v, x: (taps(model, v, x)[1], layerwise(model, v, x)))
    return jax.device_get(look(variables, inputs))


def cells(command):
    """The rows of a column, for a test with their cells."""
    found = [pytest.param(f, row.cells[command], id=f) for f, row in FAMILIES.items()]
    return pytest.mark.parametrize(("family", "cell"), found)


@pytest.fixture
def run(capsys):
    """A command to the end that its cell tells of: its result, or None after the right line."""

    def run(cell, *arguments):
        status = main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        if cell in REFUSALS:
            assert (status, out) == (2, "")
            (line,) = err.splitlines()
            assert line.startswith("error: ") and REFUSALS[cell].words in line
            return None
        assert status == 0, err
        return json.loads(out.splitlines()[-1])

    return run


@pytest.fixture
def weights(family, tmp_path):
    """A file that states its model."""
    _, _, model, variables = tiny(family)
    save_weights(tmp_path / "w.safetensors", variables, model)
    return tmp_path / "w.safetensors"


def test_the_matrix_has_every_family_and_every_reason():
    assert {find(row.model).family for row in FAMILIES.values()} == set(KINDS)
    assert set(REFUSALS) <= {cell for row in FAMILIES.values() for cell in row.cells.values()}


@cells("taps")
def test_taps(family, cell):
    seen, _ = looked_inside(family)
    assert cell == YES and set(seen) == set(tiny(family).model.tap_names)
    for name, array in seen.items():
        assert array.shape[:2] == (DEPTH, 2) and np.isfinite(array).all(), name


@cells("layerwise")
def test_layerwise(family, cell):
    _, measured = looked_inside(family)
    assert set(measured) == set().union(*(MEASURES[quantity] for quantity in cell.split(", ")))
    for name, values in measured.items():
        assert values.shape == (DEPTH,) and np.isfinite(values).all(), name


@cells("summary")
def test_summary(family, cell, run):
    name, fields, *_ = tiny(family)
    kwargs = [f"{field}={value}" for field, value in fields.items()]
    found = run(cell, "summary", name, "--model-kwargs", *kwargs)
    assert found["parameters"] == tiny(family).parameters
    assert found["tokens"] == looked_inside(family)[0]["out"].shape[2]


@pytest.mark.slow
@cells("plan")
def test_plan(family, cell, run):
    """The gradients that eight devices add up, by formula and in the compiled step."""
    name, fields, _, variables = tiny(family)
    fields = {"name": name, **fields} | ({"in_channels": 3} if "image_size" in fields else {})
    flags = [f"--config.model.{field}={value}" for field, value in fields.items()]
    mesh = ["--mesh=data:8", "--config.batch_size=16"]
    recipe = "digits:mae" if fields.get("decoder_depth") else "digits"
    recipe = "text" if "vocab_size" in fields else recipe
    found = run(cell, "plan", f"--config={recipe}", *mesh, *flags)
    if found:
        assert found["parameters"] == tiny(family).parameters
        compiled = found["compiled"]
        sent = compiled["collectives"]["all-reduce"]["bytes"]
        # BatchNorms add up their statistics too, which in a model this small shows.
        within = 0.12 if "batch_stats" in variables else 0.02
        assert sent == pytest.approx(compiled["gradient_bytes_by_formula"], rel=within)


@cells("convert")
def test_convert(family, cell, weights, run):
    target = weights.with_name("w.npz")
    found = run(cell, "convert", f"--from={weights}", f"--to={target}")
    assert found["parameters"] == tiny(family).parameters and found["fitted"] == []
    assert_equal_trees(load_variables(target, tiny(family).model), tiny(family).variables)


@cells("official names")
def test_official_names(family, cell, weights, run):
    _, _, model, variables = tiny(family)
    for layout in ["official"] if cell in REFUSALS else cell.split(", "):
        target = weights.with_name(f"{layout}.npz")
        if run(cell, "convert", f"--from={weights}", f"--to={target}", f"--layout={layout}"):
            with np.load(target) as file:
                assert not set(tree_of(model).shapes) <= set(file)
            assert_equal_trees(load_variables(target, model), variables)
        else:
            assert not target.exists()


@pytest.mark.slow
@cells("compare")
def test_compare(family, cell, weights, run):
    pytest.importorskip("torch")
    arguments = ["--batch_size=2", "--train-steps=0"]
    found = run(cell, "compare", f"--weights={weights}", *arguments)
    if found:
        layers = [value for name, value in found["relative"].items() if name.startswith("layer")]
        assert layers and max(layers) <= 1e-5 and found["within_tolerance"]

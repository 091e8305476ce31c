"""What commands print for people fits 80 columns."""

import pytest

from crate_jax.cli import main as cli
from crate_jax.parity import comparison
from crate_jax.planning.report import table

COLUMNS = 80


def lines(capsys, *arguments):
    """The lines that a command prints before its result."""
    assert cli.main([str(argument) for argument in arguments]) in (0, 1)
    *found, last = capsys.readouterr().out.splitlines()
    assert last.startswith("{") and len(found) > 1
    return found


def check(found):
    assert max(map(len, found)) <= COLUMNS, [line for line in found if len(line) > COLUMNS]


def test_checkpoints(tiny_run, capsys):
    found = lines(capsys, "checkpoints", tiny_run)
    check(found)
    assert found[0].startswith("step        2 ") and found[0].endswith(" MiB  intact  best")
    assert found[1].startswith("  test/examples 297.0000, test/loss ")


def test_layerwise(tiny_run, capsys):
    found = lines(capsys, "layerwise", f"--workdir={tiny_run}", "--images=8", "--geometry")
    check(found)
    assert found[0].startswith("  layer  ")


@pytest.mark.slow
def test_compare(tiny_run, capsys):
    pytest.importorskip("torch")
    found = lines(capsys, "compare", f"--weights={tiny_run}", "--train-steps=1")
    check(found)
    heads = found[1].split()
    assert heads == ["max", "abs", "relative", "cosine", "tolerance"]
    # Numbers stand below their names.
    assert found[2][: found[1].index("relative") + 8].rstrip()[-4:-2] == "e-"


def test_a_name_that_is_too_long_gives_its_end():
    numbers = ("1.0e-06", "1.0e-06", "0.999999999", "1e-05", "PyTorch 1.0e-03 OUT")
    told = comparison._lines([comparison.HEADER, ("/a" * 30 + "/end", *numbers), ("x", *numbers)])
    check(told)
    assert told[1].startswith("…") and "/end  1.0e-06" in told[1] and len(told[1]) == COLUMNS


def test_plan():
    times = dict.fromkeys(("compute_s", "memory_s", "links_s", "network_s"), 12.34567)
    operation = {"bytes": 10**9, "trips": 12, "name": "n" * 50, "source": "/a/long/path" * 20}
    sizes = dict.fromkeys(("memory", "memory_by_formula"), 2**40)
    sums = (f"{name}_bytes{by}" for name in ("gradient", "gathered") for by in ("", "_by_formula"))
    compiled = {
        **{"topology": "v5p:16x16x16", "dtype": "bfloat16", "copies": 3, "moved": 10**9},
        **{"moved_by_opcode": {"dynamic-update-slice": 10**9}, "moved_by": [operation]},
        **{"collectives": {"reduce-scatter": {"count": 1234, "bytes": 1e12, "overlapping": 12}}},
        **sizes,
        **dict.fromkeys(sums, 10**12),
    }
    chip = {**times, "step_s": (123.4567, 234.5678), "fits": False, "bound_by": "network"}
    found = {
        **{"parameters": 10**10, "memory": {"activations between the layers": 2**40}},
        **{"gradient_bytes": 1e12, "gathered_bytes": 1e12, "compiled": compiled},
        "chips": {"h100": chip},
    }
    told = table(found).splitlines()
    check(told)
    heads, row = told[-2:]
    for name, cell in (("compute", "12345.67"), ("step", "123457-234568"), ("fits", "NO")):
        assert heads.index(name) + len(name) == row.index(cell) + len(cell)
    refused = {**compiled, "refused": "RESOURCE_EXHAUSTED: it does not fit, " * 10}
    check(table(found | {"compiled": refused, "chips": {}}).splitlines())

"""What commands print for people fits 80 columns."""

import json

import pytest

from crate_jax.cli import detail, frozen
from crate_jax.cli import main as cli
from crate_jax.columns import in_columns
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
    told = in_columns([comparison.HEADER, ("/a" * 30 + "/end", *numbers), ("x", *numbers)])
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


def test_summary(capsys):
    found = lines(capsys, "summary", "crate_base_patch16_224")
    check(found)
    assert found[0] == "crate_base_patch16_224"
    told = [(line[:40].strip(), line[40:].strip()) for line in found[1:]]
    assert told == [
        ("image, pixels", "224 x 224"),
        ("tokens", "197"),
        ("parameters", "22,796,008"),
        ("multiply-adds of a forward pass, 10⁹", "6.409"),
        ("activations of one image, MiB", "50.5"),
    ]
    found = lines(capsys, "summary", "crate_causal_base")
    check(found)
    assert "activations of one text, MiB" in found[-1] and found[1].split()[-1] == "1,024"


def test_probe(tiny_run, capsys):
    flags = ["--classifiers=subspace", "--baselines", "pixels", "random", "--seeds", "0", "1"]
    assert cli.main(["probe", f"--workdir={tiny_run}", *flags]) == 0
    *found, last = capsys.readouterr().out.splitlines()
    check(found)
    answer = json.loads(last)
    heading = "digits: features of train, tested on test; mean ± standard deviation over the seeds"
    assert " ".join(" ".join(found).split()).startswith(f"{heading} 0 1 model")
    heads, top1, components = found[-3:]
    assert heads.split() == ["model", "pixels", "random"]
    assert top1.split()[0] == "subspace/top1" and components.split()[0] == "subspace/components"
    assert top1.split()[1:3] == [f"{answer[f'{x}subspace/top1']:.4f}" for x in ("", "pixels/")]
    low, high = sorted(answer["random/subspace/top1_by_seed"])
    mean, deviation = (low + high) / 2, (high - low) / 2**0.5
    assert top1.split()[3:] == [f"{mean:.4f}", "±", f"{deviation:.4f}"]
    told = components.split()[1:]
    assert told[0] == str(answer["subspace/components_by_seed"][0])


def test_a_wide_table_of_probes():
    name = "fewshot/shots_10/l2_1024/top1"
    by_name = {name: [0.25, 0.75], "linear/C": [0.01, 10.0]}
    by_source = {"model": by_name, "pixels": by_name, "random": {name: [0.5, 0.5]}}
    stated = {"dataset": "digits", "train_split": "train", "split": "test", "seeds": [0, 1]}
    told = frozen.table(stated, by_source).splitlines()
    check(told)
    assert told[-2].split() == [name, *2 * ["0.5000", "±", "0.3536"], "0.5000"]
    assert told[-1].split() == ["linear/C", *2 * ["0.01", "to", "10"]]


def test_knn(tiny_run, capsys):
    assert cli.main(["knn", f"--workdir={tiny_run}", "--k", "5"]) == 0
    *found, last = capsys.readouterr().out.splitlines()
    answer = json.loads(last)
    assert found[0] == "digits: features of train, tested on test"
    assert [line.split() for line in found[1:]] == [
        ["model"],
        *([name, f"{answer[name]:.4f}"] for name in ("k5/top1", "k5/top5")),
    ]


def test_evaluate_detail(tiny_run, capsys):
    assert cli.main(["evaluate", f"--workdir={tiny_run}", "--detail"]) == 0
    *found, last = capsys.readouterr().out.splitlines()
    check(found)
    answer = json.loads(last)
    names = ("top1", "top5", "loss", "ece")
    of = ", ".join(f"{name} {answer[name]:.4f}" for name in names)
    assert found[0] == f"digits, test: {of}, 297 images"
    assert found[2].split() == ["class", "accuracy", "images"] and not found[1]
    by_class = answer["by_class"]
    for line, *cells in zip(found[3:13], *by_class.values(), strict=True):
        assert line.split() == [cells[0], f"{cells[1]:.4f}", str(cells[2])]
    assert found[14].split() == ["confidence", "accuracy", "images"]
    bins = [line.split() for line in found[15:]]
    assert sum(int(count) for *_, count in bins) == 297 and all(int(n) for *_, n in bins)


def test_of_many_classes_the_worst_are_told():
    many = [f"class {number}" for number in range(99)] + ["n" * 90]
    accuracy = [number / 100 for number in range(98)] + [None, 0.005]
    found = {
        **{"dataset": "d", "split": "s", "examples": 400.0, "top1": 0.5, "loss": 1.0, "ece": 0.1},
        "by_class": {"classes": many, "accuracy": accuracy, "examples": [4] * 98 + [0, 8]},
        "calibration": {"confidence": [0.0], "accuracy": [0.0], "examples": [0]},
    }
    told = detail.table(found).splitlines()
    check(told)
    assert told[0] == "d, s: top1 0.5000, loss 1.0000, ece 0.1000, 400 images"
    assert told[2].startswith("class, the 20 worst of 100  ")
    assert told[3].split() == ["class", "0", "0.0000", "4"]
    assert told[4].startswith("…nnn") and told[4].split()[1:] == ["0.0050", "8"]
    assert told[22].split() == ["class", "18", "0.1800", "4"] and told[23] == ""


def test_plain_evaluate_prints_its_result_alone(tiny_run, capsys):
    assert cli.main(["evaluate", f"--workdir={tiny_run}"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1

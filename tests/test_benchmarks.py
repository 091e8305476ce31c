"""What `benchmarks/` makes of results, on small made-up ones; nothing is measured."""

import json
import math
import re
import sys

import numpy as np
import pytest
from command import ROOT, run

# Where they look for each other, as they do when one of them is run.
sys.path.append(str(ROOT / "benchmarks"))

import fault_injection
import frame
import frozen_digits
import growth
import slices

from crate_jax.cli.flags import parse_config
from crate_jax.cli.recipes import load_recipe
from crate_jax.config import validate
from crate_jax.tasks import TASKS

RESULT = {
    "a/forward/ratio_eager": 1.5,
    "a/forward/lowest_ratio_eager": 1.2,
    "a/forward/highest_ratio_eager": 1.625,
    "a/forward/images_per_s": 400.0,
    "a/forward/share_of_peak": 0.25,
    "a/train/ratio_compile": 0.8,
    "a/train/memory_bytes_ours": 2_000_000,
    "peak_flops_per_s": 2e11,
    "copy_bytes_per_s": 3e10,
    "hardware": {
        "device": "cpu",
        "cpu": "2 x Z80",
        "load_average_before": 0.5,
        "omp_wait_policy": "passive",
    },
    "versions": {"jax": "0.10.2"},
    "command": "python benchmarks/step.py",
    "batch_sizes": {"a": 8},
    "dtype": "float32",
    "rounds": 7,
    "omitted": {"a/forward/ratio_compile": "InvalidCxxCompiler: none"},
}


def test_table():
    pytest.importorskip("torch")  # against which it measures
    import step

    lines = [*step.report(RESULT), *frame.measured_on(RESULT)]
    forward = "| a | 8 | forward | 400 | - | - | 1.50 (1.20 to 1.62) | - | - / - / - |"
    assert lines[2] == forward + " - / - / - | 25% |"
    assert "| 0.80 (- to -) | 2 / - / - |" in lines[3]
    assert {line.count("|") for line in lines[:4]} == {12}
    hardware = "device cpu; cpu 2 x Z80; load average before 0.5; omp wait policy passive"
    assert f"- Hardware: {hardware}" in lines
    assert "200 GFLOP/s in a large matrix product, 30 GB/s in a copy" in "".join(lines)
    assert "- Left out: a/forward/ratio_compile: InvalidCxxCompiler: none" in lines


@pytest.fixture
def check(tmp_path):
    """A function: exit status and output of `check.py` for two results, or texts of files."""

    def call(new, committed=RESULT):
        paths = [tmp_path / "new.json", tmp_path / "committed.json"]
        for path, content in zip(paths, (new, committed), strict=True):
            path.write_text(content if isinstance(content, str) else json.dumps(content))
        status, out, err = run("benchmarks/check.py", *paths)
        return status, (out + err).replace(f"{tmp_path}/", "").strip()

    return call


@pytest.mark.parametrize(
    ("changes", "status", "says"),
    [
        ({}, 0, "3 figures, none moved by 10%."),
        ({"a/forward/images_per_s": 4.0}, 0, "3 figures, none moved by 10%."),
        ({"a/train/ratio_compile": 0.73}, 0, "3 figures, none moved by 10%."),
        (
            {"a/train/ratio_compile": 0.71},
            1,
            "a/train/ratio_compile: slower, 0.8 -> 0.71 (-11%)",
        ),
        (
            {"a/forward/ratio_eager": 1.8},
            0,
            "a/forward/ratio_eager: faster, 1.5 -> 1.8 (+20%)",
        ),
        (
            {"a/train/memory_bytes_ours": 3_000_000},
            1,
            "a/train/memory_bytes_ours: larger, 2,000,000 -> 3,000,000 (+50%)",
        ),
        (
            {"a/train/memory_bytes_ours": 1_000_000},
            0,
            "a/train/memory_bytes_ours: smaller, 2,000,000 -> 1,000,000 (-50%)",
        ),
        (
            {"hardware": {"device": "gpu"}},
            0,
            "Not measured on the same hardware: ratios carry over only in part.\n"
            "3 figures, none moved by 10%.",
        ),
        ({"dtype": "bfloat16"}, 1, "The dtype must be the same in both; got bfloat16 and float32."),
        (
            {"batch_sizes": {"a": 9}},
            1,
            "The batch size of a must be the same in both; got 9 and 8.",
        ),
    ],
)
def test_what_moved(check, changes, status, says):
    assert check(RESULT | changes) == (status, says)


def test_what_is_missing_fails_beside_what_is_faster(check):
    new = RESULT | {"a/train/ratio_compile": 1.6}
    del new["a/forward/ratio_eager"]
    says = "a/forward/ratio_eager: missing, was 1.5\n"
    assert check(new) == (1, says + "a/train/ratio_compile: faster, 0.8 -> 1.6 (+100%)")


@pytest.mark.parametrize(
    "text", ["", "[1]", "{}", json.dumps(RESULT | {"a/forward/ratio_eager": 0}), '"a/ratio_eager"']
)
def test_a_file_that_is_no_result(check, text):
    for new, old, name in ((text, RESULT, "new.json"), (RESULT, text, "committed.json")):
        status, out = check(new, old)
        assert status == 1 and out.startswith(f"{name} must be a ")
        assert out.count("\n") == 0


def test_a_file_that_is_not_there_and_one_that_is_the_other():
    status, _, error = run("benchmarks/check.py", "no/such.json")
    assert status == 1 and error.startswith("no/such.json must be a JSON file; got [Errno 2]")
    committed = "benchmarks/results/step_cpu_2core.json"
    status, _, error = run("benchmarks/check.py", committed)
    assert status == 1 and error.startswith(f"{committed} must not be compared with itself.")


def test_the_committed_result_can_be_compared_with(check):
    committed = json.loads((ROOT / "benchmarks/results/step_cpu_2core.json").read_text())
    status, out = check(committed, committed)
    assert status == 0 and out.endswith("figures, none moved by 10%.")


def test_models_that_were_not_measured_again_are_said_and_do_not_fail(check):
    committed = RESULT | {"b/train/ratio_eager": 1.2, "batch_sizes": {"a": 8, "b": 4}}
    assert check(RESULT, committed) == (0, "b: not measured")


def test_growth_is_by_the_middle_case_and_by_round():
    # One second, and two of each layer; the machine is half as fast in the second round.
    times = [[7.0, 14.0, 7.0], [13.0, 26.0, 13.0], [25.0, 50.0, 26.0]]
    small, middle, large = growth.growth(times, [30, 60, 120])
    assert set(middle.values()) == {1.0}
    assert small["quotient"] == pytest.approx(14 / 13) and small["growth_by_formula"] == 0.5
    assert large["growth"] == large["lowest_growth"] == pytest.approx(25 / 13)
    assert large["highest_growth"] == 2.0
    assert growth.seconds_each([3, 6, 12], times) == [2.0, pytest.approx(13 / 6)]


def test_slices_say_what_does_not_fit_what_is_far_off_and_what_is_left():
    compiled = {"memory": 2**31, "memory_by_formula": 2**31 + 2**28, "moved": 12_340_000}
    compiled |= {"copies": 3, "collectives": {"all-reduce": {"count": 2, "overlapping": 1}}}
    row = {"recipe": "a", "topology": "v5e:2x2", "spec": "data:-1", "batch_size": 32}
    row |= {"mesh": {"data": 4, "fsdp": 1}, "compiled": compiled}
    row |= {"chips": {"v5e": {"step_s": [0.00123, 0.00456], "bound_by": "memory"}}}
    large = row | {"recipe": "b", "compiled": {"memory_by_formula": 2**35, "refused": "No."}}
    head, rule, first, second, _, far, _, left = slices.report(
        {"rows": [row, large], "left": ["c on v4:2x2x1, data:-1"]}
    )
    shared = "v5e:2x2 | data:-1 | 8 |"
    assert first == (
        f"| a | {shared} 2 | 2.25 | +12.5% | 0.0123 | 3 | 2 all-reduce (1 overlap) | "
        "1.23 to 4.56 | memory |"
    )
    assert second.startswith(f"| b | {shared} does not fit | 32 |")
    assert {line.count("|") for line in (head, rule, first, second)} == {13}
    assert far == "Off by more than 10%: a on v5e:2x2, data:-1."
    assert left == "Not compiled yet: c on v4:2x2x1, data:-1."


def test_faults_are_injected_into_every_task():
    """By .ci/run, at least three times into each, with flags that its config takes."""
    command = r"fault_injection\.py --rounds (\d+)(?: --recipes (\S+))?"
    found = re.findall(command, (ROOT / ".ci/run").read_text())
    struck = {recipe: int(n) for n, names in found for recipe in (names or "digits").split(",")}
    assert {load_recipe(recipe).task for recipe in struck} == TASKS.keys()
    assert min(struck.values()) >= 3
    for recipe in struck:
        flag, *fields = fault_injection.flags_of(recipe)
        config = parse_config(recipe, fields)
        validate(config)
        assert flag == f"--config={recipe}" and config.total_steps == fault_injection.STEPS


def test_faults_are_injected_into_known_recipes_alone(monkeypatch):
    status, _, error = run("benchmarks/fault_injection.py", "--recipes", "digitz")
    assert status == 2 and "error: --config must be a known recipe; got digitz." in error
    monkeypatch.delitem(fault_injection.SMALL, "classify")
    with pytest.raises(ValueError, match=r"^the task of digits must be among masked_autoencoding"):
        fault_injection.flags_of("digits")


def test_the_error_of_frozen_features_is_a_share_of_that_of_random_weights():
    runs = [
        {f"{source}{kind}": value for kind in frozen_digits.KINDS for source, value in row.items()}
        for row in (
            {"": 0.9, "pixels/": 0.85, "random/": 0.7},
            {"": 0.96, "pixels/": 0.87, "random/": 0.8},
        )
    ]
    found = frozen_digits.summary(runs)
    assert found["linear/top1"] == pytest.approx(0.93)
    assert found["pixels/k20/top1"] == pytest.approx(0.86)
    assert found["linear/top1/error_of_random"] == pytest.approx(0.07 / 0.25)


def test_counts_of_letters_tell_text_as_they_should():
    import text_baselines

    train, test = (np.random.default_rng(seed).integers(0, 3, 200) for seed in (0, 1))
    for order in (1, 2):
        found = text_baselines.counts([train], order, 4)
        bits = 0.0
        for i in range(1, len(test)):
            pairs = [(train[j - 1], train[j]) for j in range(1, len(train))]
            seen = [b for a, b in pairs if order == 1 or a == test[i - 1]]
            bits -= math.log2((seen.count(test[i]) + 0.5) / (len(seen) + 4 * 0.5))
        assert text_baselines.bits(found, 0.5, [test]) == pytest.approx(bits)
    # Text that is all noise is told best by counting little, one that repeats itself by the counts.
    coins = np.random.default_rng(2).integers(0, 2, 2000)
    noise = text_baselines.baseline(coins[:-200], coins[-200:], 2, 4, 20)
    told = text_baselines.baseline(np.arange(200) % 4, np.arange(50) % 4, 2, 4, 20)
    assert noise["bits"] == pytest.approx(199, abs=4) and told["bits"] < 0.1
    assert told["k"] == min(text_baselines.SMOOTHING)

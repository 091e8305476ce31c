"""A profile of some steps, and the share of a device's peak."""

import json

import jax
import pytest

from crate_jax import create_model
from crate_jax.models.cost import multiply_adds
from crate_jax.planning.chips import CHIPS, share_of_peak
from crate_jax.tasks import Classify
from crate_jax.training import loop
from crate_jax.training.loop import train
from crate_jax.training.profile import Profile


class Device:
    def __init__(self, device_kind):
        self.device_kind = device_kind


def traces(workdir):
    return sorted((workdir / "plugins" / "profile").rglob("*.xplane.pb"))


def events_of_steps(trace):
    """How many events of a trace are of the step's program."""
    data = jax.profiler.ProfileData.from_file(str(trace))
    names = [e.name for plane in data.planes for line in plane.lines for e in line.events]
    return sum("train_step" in name for name in names)


@pytest.fixture
def recorded(monkeypatch):
    """What was started and stopped, and before or after which step."""
    seen = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: seen.append(f"start {folder}"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: seen.append("stop"))
    return seen


@pytest.mark.parametrize(
    ("steps", "run", "expected"),
    [
        ("2:3", range(1, 6), ["1", "start w", "2", "3", "stop", "4", "5"]),
        ("1:1", range(1, 3), ["start w", "1", "stop", "2"]),
        ("2:9", range(1, 4), ["1", "start w", "2", "3", "stop"]),  # the run ends first
        ("2:4", range(3, 6), ["start w", "3", "4", "stop", "5"]),  # resumed in the midst
        ("2:4", range(5, 7), ["5", "6"]),
        (None, range(1, 3), ["1", "2"]),
    ],
)
def test_the_steps_that_are_recorded(recorded, steps, run, expected):
    profile = Profile(steps)
    with profile.into("w"):
        for step in run:
            profile.before(step)
            recorded.append(str(step))
            profile.after(step, ())
    assert recorded == expected


def test_other_processes_record_nothing(recorded, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    profile = Profile("1:2")
    with profile.into("w"):
        profile.before(1)
        profile.after(1, ())
    assert recorded == []


def test_a_run_that_fails_ends_its_trace(recorded):
    profile = Profile("1:5")
    with pytest.raises(KeyError), profile.into("w"):
        profile.before(1)
        raise KeyError
    assert recorded == ["start w", "stop"]


@pytest.mark.parametrize("steps", ["", "5", "3:2", "0:5", "a:b", "1:2:3", "-1:4", "1 : 2"])
def test_steps_that_are_no_range_are_refused_before_anything_is_written(
    steps, tiny_config, tmp_path
):
    with pytest.raises(ValueError, match=r"profile_steps must be first:last, from step 1 on; got"):
        train(tiny_config(profile_steps=steps), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_run_writes_a_trace_that_is_read_and_its_share_of_the_peak(
    tiny_config, tmp_path, monkeypatch
):
    """The share is the formula's operations a second by the peak, here of a made-up device."""
    asked = []

    def share(flops, devices):
        asked.append(flops)
        return flops / 1e9

    monkeypatch.setattr(loop, "share_of_peak", share)
    config = tiny_config(total_steps=4, profile_steps="2:3", log_every_steps=1)
    train(config, tmp_path)
    (trace,) = traces(tmp_path)
    assert events_of_steps(trace) >= 2
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "train/loss" in line]
    assert len(steps) == 4 and all(line["train/grad_norm"] > 0 for line in steps)
    for line in steps:
        share = line["examples_per_s"] * asked[0] / 1e9
        assert line["flops_share"] == pytest.approx(share, rel=0.02, abs=1e-4)


def test_the_peak_of_devices_by_what_jax_calls_them():
    kinds = {
        "NVIDIA H100 80GB HBM3": "h100",
        "NVIDIA H200": "h200",
        "TPU v5 lite": "v5e",
        "TPU v5": "v5p",
        "TPU v5p": "v5p",
        "TPU v6 lite": "v6e",
    }
    for kind, chip in kinds.items():
        two = [Device(kind)] * 2
        assert share_of_peak(CHIPS[chip].flops, two) == pytest.approx(0.5)
    assert share_of_peak(1e12, [Device("cpu")]) == 0.0
    assert share_of_peak(1e12, [Device("NVIDIA H200"), Device("cpu")]) == 0.0
    assert share_of_peak(1e12, [Device("NVIDIA H100 PCIe")]) == 0.0  # which has another peak
    assert share_of_peak(1e12, []) == 0.0


def test_a_model_without_a_formula_has_no_share():
    class Other:
        num_classes, input_shape = 2, (4, 4, 1)

    assert Classify(Other()).step_flops() == 0.0
    model = create_model("crate_tiny_patch16_224")
    assert Classify(model).step_flops() == 6 * multiply_adds(model) > 0
    full = model.clone(remat="full")  # what is computed again does not count
    assert Classify(full).step_flops() == 6 * multiply_adds(model)

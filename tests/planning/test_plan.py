"""Formulas of memory and communication, against programs compiled for eight virtual devices."""

import dataclasses
import importlib.util
import json
from pathlib import Path

import pytest
from command import run

from crate_jax.config import ModelConfig
from crate_jax.planning.chips import CHIPS
from crate_jax.planning.collectives import Collective, collectives
from crate_jax.planning.plan import plan
from crate_jax.planning.report import table

CONFIGS = Path(__file__).parents[2] / "configs"


# The passes that tests leave out change what memory is set aside.
pytestmark = pytest.mark.usefixtures("optimised")


def recipe(name, arg, **changes):
    spec = importlib.util.spec_from_file_location(name, CONFIGS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config(arg)
    for path, value in changes.items():
        section, _, field = path.rpartition("__")
        setattr(getattr(config, section) if section else config, field, value)
    return config


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arg", "mesh", "changes"),
    [
        ("tiny", "data:8", dict(batch_size=256)),
        ("base", "data:2,fsdp:4", dict(batch_size=64)),
        ("large", "fsdp:8", dict(batch_size=128, model__remat="full", optim__ema_decay=0.99)),
        ("base", "data:8", dict(batch_size=128, optim__accumulate_steps=4, model__remat="dots")),
        ("tiny", "data:2,fsdp:4", dict(batch_size=64, optim__accumulate_steps=2)),
        ("base", "data:8", dict(batch_size=64, model__remat="full", model__scan_unroll=3)),
        ("base", "data:8", dict(batch_size=8, model__remat="full", optim__optimizer="adamw")),
    ],
)
def test_memory_and_bytes_are_those_of_the_compiled_step(arg, mesh, changes):
    found = plan(recipe("imagenet1k", arg, **changes), mesh)
    assert found["dtype"] == "bfloat16"  # the recipes'
    compiled = found["compiled"]
    assert compiled["memory_by_formula"] == pytest.approx(compiled["memory"], rel=0.1)
    sent = {kind: of["bytes"] for kind, of in compiled["collectives"].items()}
    added = compiled["gradient_bytes_by_formula"]
    assert sent["all-reduce"] == pytest.approx(added, rel=0.05)
    if "fsdp" in mesh:
        gathered = compiled["gathered_bytes_by_formula"]
        assert sent["all-gather"] == pytest.approx(gathered, rel=0.05)
        assert gathered == 2 * found["gathered_bytes"]  # float32 against bfloat16
    assert set(sent) == ({"all-reduce", "all-gather"} if "fsdp" in mesh else {"all-reduce"})
    # Half precision halves what is computed in it, and nothing of the state.
    memory = found["memory"]
    parts = sum(value for name, value in memory.items() if name != "total")
    assert memory["total"] == parts < compiled["memory_by_formula"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("crate_alpha_tiny_patch32_224", {}),
        ("crate_alpha_tiny_patch32_224", {"model__decoupled": False}),
        ("hyperset_patch16_224", {"model__depth": 3}),
    ],
)
def test_gradients_of_the_other_families_are_those_of_the_compiled_step(name, changes):
    """A dictionary that is in three or four products sends its gradient in as many parts.

    Where all layers share one set of parameters, each layer sends a part.
    """
    config = recipe("imagenet1k", "tiny", batch_size=32)
    config.model = ModelConfig(name=name, num_classes=1000, depth=2)
    for path, value in changes.items():
        setattr(config.model, path.partition("__")[2], value)
    compiled = plan(config, "data:8")["compiled"]
    sent = compiled["collectives"]["all-reduce"]["bytes"]
    assert sent == pytest.approx(compiled["gradient_bytes_by_formula"], rel=0.05)


@pytest.mark.slow
def test_accumulated_gradients_are_added_up_over_data_once():
    """Four micro-batches send what one does: less, as the parts of D's gradient are added first."""
    at_once, in_four = (
        plan(recipe("imagenet1k", "tiny", **SMALL, optim__accumulate_steps=n), "data:8")
        for n in (1, 4)
    )
    assert in_four["compiled"]["collectives"]["all-reduce"]["count"] == 1
    once, four = (f["compiled"]["gradient_bytes_by_formula"] for f in (at_once, in_four))
    assert four == 4 * in_four["parameters"] < once
    # In half precision one micro-batch sends half, and four still float32.
    assert at_once["gradient_bytes"] < in_four["gradient_bytes"] == four


SMALL = dict(
    model__image_size=(32, 32), model__patch_size=(8, 8), model__num_classes=10, batch_size=64
)


@pytest.mark.slow
@pytest.mark.parametrize("axis", ["data", "fsdp"])
def test_the_number_of_collectives_does_not_grow_with_the_devices(axis):
    found = [plan(recipe("imagenet1k", "tiny", **SMALL), f"{axis}:{n}") for n in (2, 8)]
    first, other = (f["compiled"]["collectives"] for f in found)
    depth = 12
    assert first["all-reduce"]["count"] <= depth + 2  # one a layer, the rest, and norms
    if axis == "fsdp":
        assert first["all-gather"]["count"] == 6 * depth + 3
    assert other == first


def test_one_device_sends_nothing():
    found = plan(recipe("imagenet1k", "tiny", **SMALL), "data:1")
    assert found["compiled"]["collectives"] == {}
    assert (found["gradient_bytes"], found["gathered_bytes"]) == (0, 0)
    assert all(chip["links_s"] == 0 and "network_s" not in chip for chip in found["chips"].values())


def test_times_follow_from_peaks_and_sizes():
    found = plan(recipe("imagenet1k", "tiny", **SMALL), "fsdp:8")
    seconds, chip = found["chips"]["h100"], CHIPS["h100"]
    assert seconds["compute_s"] == pytest.approx(found["flops"] / 8 / chip.flops)
    # What is split is scattered, and the rest, a few vectors, goes round the ring twice.
    sent = 7 / 8 * (found["gradient_bytes"] + found["gathered_bytes"])
    assert sent / chip.link < seconds["links_s"] < 1.02 * sent / chip.link
    assert seconds["bound_by"] == "links"
    low, high = seconds["step_s"]
    limits = [seconds[f"{name}_s"] for name in ("compute", "memory", "links")]
    assert (low, high) == pytest.approx((max(limits), sum(limits)))
    # By hand: 3 · 2 operations for each of the multiply-adds of a forward pass.
    N, d, L = 17, 384, 12
    forward = 16 * 192 * d + L * (4 * N * d * d + 2 * N * N * d) + d * 10
    # Attention's backward pass has four products (N, N) by (N, p), twice those of the forward.
    assert found["flops"] == 6 * forward * 64


def test_a_chip_that_is_too_small_gets_a_remedy(monkeypatch):
    room = 0.6 * plan(recipe("imagenet1k", "tiny", **SMALL), "data:1")["memory"]["total"]
    small = dataclasses.replace(CHIPS["v5e"], memory=room)
    monkeypatch.setitem(CHIPS, "v5e", small)
    found = plan(recipe("imagenet1k", "tiny", **SMALL), "data:1")
    steps = found["chips"]["v5e"]["accumulate_steps"]
    assert not found["chips"]["v5e"]["fits"] and "accumulate_steps" not in found["chips"]["v4"]
    assert f"v5e: it would fit with --config.optim.accumulate_steps={steps}\n" in table(found)
    for other, fits in ((steps, True), (steps // 2, False)):
        config = recipe("imagenet1k", "tiny", **SMALL, optim__accumulate_steps=other)
        assert plan(config, "data:1")["chips"]["v5e"]["fits"] is fits


@pytest.mark.parametrize(
    ("changes", "mesh", "message"),
    [
        ({}, "data:-1", r"--mesh must name every size; got data:-1\. Write data:256,fsdp:8\."),
        ({"batch_size": 100}, "data:8", r"batch_size must be a multiple of 8"),
        ({}, "data:0", r"parallel\.mesh must be axis:size,… with sizes > 0 or -1; got data:0"),
        ({}, "data:²", r"parallel\.mesh must be axis:size,… with sizes > 0 or -1; got data:²"),
        ({}, "model:8", r"parallel\.mesh must name axes out of data, fsdp; got model:8"),
    ],
)
def test_plans_that_cannot_be(changes, mesh, message):
    with pytest.raises((ValueError, KeyError), match=message):
        plan(recipe("imagenet1k", "tiny", **SMALL | changes), mesh)


def test_the_command():
    """In a process of its own: it sets the number of devices."""
    arguments = ["-m", "crate_jax", "plan", "--config=configs/imagenet1k.py:tiny"]
    small = ["--config.model.image_size=32,32", "--config.model.patch_size=8,8"]
    small += ["--config.batch_size=64", "--config.model.depth=2"]
    status, out, err = run(*arguments, "--mesh=data:8,fsdp:4", *small)
    assert status == 0, err
    *table, last = out.splitlines()
    found = json.loads(last)
    assert found["mesh"] == {"data": 8, "fsdp": 4}
    assert found["compiled"]["collectives"]["all-gather"]["count"]
    assert any(line.split()[0] == "v5e" for line in table if line)


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--confg.batch_size=2", "got --confg.batch_size. Did you mean --config?"),
        ("--config.batchsize=2", "Did you mean batch_size?"),
    ],
)
def test_flags_that_do_not_exist(flag, message):
    status, out, err = run(
        "-m", "crate_jax", "plan", "--config=configs/imagenet1k.py", "--mesh=data:2", flag
    )
    assert (status, out) == (2, "") and message in err and len(err.splitlines()) == 1


def test_a_plan_does_not_depend_on_the_schedule():
    long, short = (recipe("imagenet1k", "tiny", **SMALL, optim__warmup_epochs=n) for n in (100, 1))
    assert plan(long, "data:2") == plan(short, "data:2")


def test_a_config_that_is_no_recipe():
    status, _, err = run("-m", "crate_jax", "plan", "--config=README.md", "--mesh=data:2")
    assert status == 2 and err.startswith("error: --config must be a recipe; README.md is none (")
    assert len(err.splitlines()) == 1


PROGRAM = """
%body.1 (p: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %g = (bf16[4,8]{1,0}, f32[3]{0}) all-gather(%a), replica_groups=[2,4]<=[8], dimensions={0}
}
%cond.1 (p: f32[]) -> pred[] {
}
%inner (p: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %x = f32[] parameter(1)
  %w = f32[] while(%x), condition=%cond.1, body=%body.1, backend_config={"known_trip_count":{"n":"3"}}
  %s = f32[2,2]{1,0} reduce-scatter(%a), replica_groups={{0,1},{2,3}}, dimensions={0}
}
%all-reduce-scatter.4 (p: bf16[64]) -> bf16[16] {
  %q = bf16[64]{0} all-reduce(%p), channel_id=7, replica_groups={{0,2,4,6},{1,3,5,7}}, to_apply=%add
  ROOT %d = bf16[16]{0} dynamic-slice(%q), dynamic_slice_sizes={16}
}
%begin (p: f32[8]) -> f32[64] {
  ROOT %h = f32[64]{0} all-gather(%p), channel_id=8, replica_groups=[1,8]<=[8], frontend_attributes={chain_id="0"}
}
%proceed (p: f32[8]) -> f32[64] {
  ROOT %h = f32[64]{0} all-gather(%p), channel_id=8, replica_groups=[1,8]<=[8], frontend_attributes={chain_id="0"}
}
%other (p: f32[]) -> f32[] {
}
ENTRY %main (p: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %x = f32[] parameter(1)
  %v = f32[] while(%x), condition=%cond.1, body=%inner, backend_config={"known_trip_count":{"n":"5"}}
  %r = f32[10]{0} all-reduce-start(%a), replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}, to_apply=%add
  %m = f32[8]{0} fusion(%a), kind=kLoop, calls=%other
  %n = f32[10]{0} all-reduce-done(%r)
  %o = f32[9]{0} all-reduce-start(%a), replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add
  %p = f32[9]{0} all-reduce-done(%o)
  %b = bf16[16]{0} fusion(%a), kind=kCustom, calls=%all-reduce-scatter.4
  %i = f32[64]{0} fusion(%a), kind=kCustom, calls=%begin
  %j = f32[64]{0} fusion(%a), kind=kOutput, calls=%proceed
  %t = f32[7]{0} all-to-all(%a)
}
"""  # noqa: E501


def test_collectives_count_as_often_as_their_loops_run():
    assert collectives(PROGRAM, devices=8) == {
        Collective("all-gather", 4 * 8 * 2 + 3 * 4, 4): 15,
        Collective("reduce-scatter", 16, 2): 5,
        Collective("all-reduce", 40, 4, stride=2, overlaps=True): 1,
        Collective("all-reduce", 36, 8): 1,
        # A sum that is cut up at once, and a gathering in parts beside other work.
        Collective("reduce-scatter", 32, 4, stride=2): 1,
        Collective("all-gather", 256, 8, overlaps=True): 1,
        Collective("all-to-all", 28, 8): 1,
    }

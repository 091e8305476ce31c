"""Plans by the compilers of TPUs and GPUs; most need the compilers, and none needs a device."""

import dataclasses
import importlib.util
import json
import math
import time
import types
from pathlib import Path

import jax
import pytest
from command import run

from crate_jax.cli.recipes import load_recipe
from crate_jax.parallel import make_mesh
from crate_jax.planning import topology
from crate_jax.planning.chips import CHIPS
from crate_jax.planning.compiling import Compiled, compile_for
from crate_jax.planning.plan import plan_on
from crate_jax.planning.report import table
from crate_jax.planning.topology import SLICES, find_topology

SMALL = [
    *("--config.model.image_size=32,32", "--config.model.patch_size=8,8"),
    *("--config.model.depth=2", "--config.batch_size=64"),
]


def plan(*arguments, recipe="imagenet1k:tiny"):
    status, out, err = run("-m", "crate_jax", "plan", f"--config={recipe}", *arguments, *SMALL)
    return status, out, err


@pytest.fixture
def libtpu():
    pytest.importorskip("libtpu", reason="needs pip install 'crate-jax[tpu-compiler]'")


@pytest.fixture
def cuda():
    for module in ("jax_plugins.xla_cuda13", "nvidia.cu13"):
        try:
            found = importlib.util.find_spec(module)
        except ModuleNotFoundError:
            found = None
        if found is None:
            pytest.skip("needs pip install 'crate-jax[cuda-compiler]'")


@pytest.mark.parametrize(
    "name", ["v5e", "v5e:", "v5e:4by4", "v9:2x2", "h100:0", "h100:9", "a100", "", "v5e:4x4:2"]
)
def test_unknown_topologies_are_refused_and_the_known_listed(name):
    with pytest.raises(KeyError) as caught:
        find_topology(name)
    message = caught.value.args[0]
    assert message.startswith(f"--topology must be a slice of TPUs or a GPU that the compilers know; got {name}")  # fmt: skip  # noqa: E501
    assert all(f"{family}:{largest}" in message for family, largest in SLICES.items())
    assert "h100 to h100:8" in message


@pytest.mark.parametrize(
    ("name", "module", "extra"),
    [("v5e:4x4", "libtpu", "tpu-compiler"), ("h100", "jax_plugins.xla_cuda13", "cuda-compiler")],
)
def test_without_the_compiler_one_line_says_what_to_install(monkeypatch, name, module, extra):
    monkeypatch.setattr(topology.importlib.util, "find_spec", lambda name: None)
    message = rf"--topology={name} must have its compiler; {module} is not installed\. pip install "
    with pytest.raises(ValueError, match=message + rf"'crate-jax\[{extra}\]'\."):
        find_topology(name)


def test_without_the_assembler_one_line_says_what_to_install(monkeypatch, tmp_path):
    toolkit = types.SimpleNamespace(__path__=[str(tmp_path)])
    monkeypatch.setattr(topology.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(topology.importlib, "import_module", lambda name: toolkit)
    message = r"--topology=h100:2 must have its compiler; ptxas is not installed\. pip install "
    with pytest.raises(ValueError, match=message + r"'crate-jax\[cuda-compiler\]'\."):
        find_topology("h100:2")


def test_a_plan_needs_a_mesh_or_a_topology():
    status, out, err = plan()
    assert (status, out) == (2, "")
    assert err == "error: plan must get --mesh, --topology or both. See --help.\n"


@pytest.mark.parametrize("family", sorted(SLICES.keys() & CHIPS.keys()))
def test_libtpu_knows_the_largest_slices(libtpu, family):
    found = find_topology(f"{family}:{SLICES[family]}")
    assert found.chip == CHIPS[family]
    assert len(found.devices) == math.prod(map(int, SLICES[family].split("x")))
    assert make_mesh("data:-1", found.devices[:4]).devices.shape == (4, 1)
    assert len(found.devices) <= found.chip.domain


def test_libtpu_refuses_what_is_no_slice(libtpu):
    with pytest.raises(KeyError, match=r"got v5e:3x3 \(INVALID_ARGUMENT: .*\)\. Known: one chip"):
        find_topology("v5e:3x3")


def test_a_mesh_that_does_not_fill_the_topology(libtpu):
    status, out, err = plan("--topology=v5e:4x4", "--mesh=data:4")
    assert (status, out) == (2, "")
    assert err.splitlines()[-1] == (
        "error: parallel.mesh must multiply to the 16 devices; got data:4. Give one axis the size "
        "-1."
    )


@pytest.mark.slow
def test_the_program_of_a_slice_of_tpus(libtpu, tmp_path, monkeypatch):
    """Split weights are gathered beside other work, and their gradients scattered."""
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path))
    arguments = ("--topology=v5e:2x4", "--mesh=data:2,fsdp:4")
    status, out, err = plan(*arguments)
    assert status == 0, err
    assert "compiling for v5e:2x4 with libtpu" in err
    *table, last = out.splitlines()
    found = json.loads(last)
    compiled = found["compiled"]
    assert (compiled["topology"], compiled["dtype"]) == ("v5e:2x4", "bfloat16")
    kinds, depth = compiled["collectives"], 2
    assert kinds["all-gather"]["count"] == 6 * depth + 3
    assert kinds["all-gather"]["overlapping"] >= 4 * depth
    # One of all matrices of a layer; and those of the patches' projection and of the head.
    assert kinds["reduce-scatter"]["count"] == depth + 2
    assert compiled["gathered_bytes"] == pytest.approx(found["gathered_bytes"], rel=0.05)
    assert compiled["gradient_bytes"] == pytest.approx(found["gradient_bytes"], rel=0.05)
    assert compiled["moved"] > sum(x["bytes"] for x in compiled["moved_by"]) > 0
    assert compiled["moved"] == sum(compiled["moved_by_opcode"].values())
    seconds = found["chips"]["v5e"]
    assert seconds["memory_s"] == pytest.approx(compiled["moved"] / CHIPS["v5e"].memory_bandwidth)
    assert seconds["fits"] and any("overlapping" in line for line in table)
    # The second time nothing is compiled.
    status, again, err = plan(*arguments)
    assert (status, err) == (0, "") and json.loads(again.splitlines()[-1]) == found


@pytest.mark.slow
def test_the_program_of_gpus_has_their_kernels_and_no_loop(cuda, tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path))
    status, out, err = plan("--topology=h100:2")
    assert status == 0, err
    found = json.loads(out.splitlines()[-1])
    compiled = found["compiled"]
    assert set(compiled["collectives"]) == {"all-reduce"} and list(found["chips"]) == ["h100"]
    assert {x["trips"] for x in compiled["moved_by"]} == {1}
    assert any("triton" in opcode for opcode in compiled["moved_by_opcode"])


@pytest.fixture
def here(tmp_path):
    """Two devices of this machine, as if they were a topology, and an empty cache."""
    before = jax.config.values["jax_compilation_cache_dir"]
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    devices = jax.devices()[:2]
    yield topology.Topology("v5e:2", "cpu", devices, CHIPS["v5e"], "this compiler", {}, (0,))
    jax.config.update("jax_compilation_cache_dir", before)


def test_programs_are_kept_in_the_cache_of_the_project(monkeypatch, here, tmp_path):
    jax.config.update("jax_compilation_cache_dir", None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    compile_for(here, Refused())  # type: ignore[arg-type]
    (kept,) = tmp_path.rglob("*.gz")
    assert kept.parent == tmp_path / "crate_jax" / "planned"


def small_recipe():
    config = load_recipe("imagenet1k:tiny")
    config.model.image_size, config.model.patch_size = (32, 32), (8, 8)
    config.model.depth, config.batch_size = 2, 8
    return config


def test_what_a_plan_says_of_a_program(here):
    said = []
    found = plan_on(small_recipe(), "data:-1", here, said.append)
    compiled, seconds = found["compiled"], found["chips"]["v5e"]
    assert (compiled["topology"], compiled["compiler"]) == ("v5e:2", "this compiler")
    assert list(compiled["collectives"]) == ["all-reduce"]
    assert compiled["memory"] > 4 * 2 * found["parameters"]  # with Lion's moment
    assert compiled["moved"] > compiled["memory"] / 2
    limits = {name: seconds[f"{name}_s"] for name in ("compute", "memory", "links")}
    assert seconds["bound_by"] == max(limits, key=limits.get)
    assert seconds["compute_s"] == found["flops"] / 2 / CHIPS["v5e"].flops
    text = table(found)
    assert "compiled for v5e:2 in bfloat16" in text and "at peak, of the program (ms)" in text
    assert plan_on(small_recipe(), "data:-1", here, said.append) == found
    assert len([line for line in said if line.startswith("compiling for")]) == 1
    unknown = dataclasses.replace(here, chip=None)
    found = plan_on(small_recipe(), "data:-1", unknown)
    assert found["chips"] == {} and "no time: the peaks are unknown\n" in table(found)


def test_a_plan_of_what_does_not_fit(here, monkeypatch):
    refused = Compiled("", 0, 1.0, "RESOURCE_EXHAUSTED: Used 20G of 15.75G hbm.")
    monkeypatch.setattr("crate_jax.planning.plan.compile_for", lambda *_: refused)
    found = plan_on(small_recipe(), "data:-1", here)
    assert found["compiled"]["refused"] == refused.refused and found["chips"] == {}
    assert f"  does not fit: {refused.refused}\n" in table(found)
    assert "no time: the program does not fit\n" in table(found)
    config = small_recipe()
    config.batch_size, totals = 256, {}
    for config.optim.accumulate_steps in (1, 2, 4):
        totals[config.optim.accumulate_steps] = plan_on(config, "data:-1", here)["memory"]["total"]
    assert totals[1] > totals[2] > totals[4]
    config.optim.accumulate_steps = 1
    for room, steps in ((totals[2], 2), (totals[4], 4), (0, None)):
        small = dataclasses.replace(here, chip=dataclasses.replace(CHIPS["v5e"], memory=room))
        found = plan_on(config, "data:-1", small)
        assert found["compiled"]["accumulate_steps"] == steps
    assert "v5e:2: no optim.accumulate_steps is enough" in table(found)
    unknown = dataclasses.replace(here, chip=None)
    assert "accumulate_steps" not in plan_on(config, "data:-1", unknown)["compiled"]
    # Its loss is no mean over rows.
    whole = load_recipe("digits:mcr2")
    assert plan_on(whole, "data:-1", here)["compiled"]["accumulate_steps"] is None


def test_the_compiler_for_tpus_knows_what_fits(here, monkeypatch):
    """A v5e has more than the 16 GB that are published; its compiler refuses what is too large."""
    program = jax.jit(lambda x: x * x).lower(2.0).compile()
    made = Compiled(program.as_text(), int(CHIPS["v5e"].memory) + 1, 1.0)
    monkeypatch.setattr("crate_jax.planning.plan.compile_for", lambda *_: made)
    for platform, fits in (("tpu", True), ("gpu", False)):
        on = dataclasses.replace(here, platform=platform)
        found = plan_on(small_recipe(), "data:-1", on)
        assert found["chips"]["v5e"]["fits"] is fits
        assert ("accumulate_steps" in found["compiled"]) is not fits


class Refused:
    """A program that its compiler finds too large."""

    def as_text(self):
        return "module @too_large"

    def compile(self, compiler_options):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Used 20G of 15.75G hbm.\nMore.")


def test_what_the_compiler_finds_too_large_is_told_and_kept(here):
    said = []
    for _ in range(2):
        made = compile_for(here, Refused(), said.append)  # type: ignore[arg-type]
        assert (made.text, made.refused) == ("", "RESOURCE_EXHAUSTED: Used 20G of 15.75G hbm.")
    assert said == ["compiling for v5e:2 with this compiler; this takes a minute or several"]


class Reported:
    """A program whose compiler writes a report of its memory, as libtpu does."""

    def __init__(self, report):
        self.report = report

    def as_text(self):
        return f"module @reported {self.report}"

    def compile(self, compiler_options):
        name = "module_0000.jit_train_step.cl_1.after_optimizations-memory-usage-report.txt"
        (Path(compiler_options["xla_dump_to"]) / name).write_text(self.report)
        return types.SimpleNamespace(as_text=lambda: "HloModule jit_train_step")


def test_the_memory_of_a_tpu_is_what_its_compiler_reports(here):
    """Of its memories the large one counts."""
    tpu = dataclasses.replace(here, platform="tpu")
    spaces = [("default (color=0)", "5457408 (5.20MiB)"), ("vmem (color=1)", "7 (7B)")]
    report = "\n\n".join(f"Memory Space: {name}\nTotal bytes: {size}" for name, size in spaces)
    made = compile_for(tpu, Reported(report))  # type: ignore[arg-type]
    assert (made.memory, made.text) == (5457408, "HloModule jit_train_step")
    message = r"--topology=v5e:2 must have a compiler that reports the memory of a program; this co"
    with pytest.raises(ValueError, match=message):
        compile_for(tpu, Reported("Memory: much"))  # type: ignore[arg-type]


def test_another_failure_of_the_compiler_is_no_answer(here, tmp_path):
    class Broken(Refused):
        def compile(self, compiler_options):
            raise jax.errors.JaxRuntimeError("INTERNAL: a bug")

    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL: a bug"):
        compile_for(here, Broken())  # type: ignore[arg-type]
    assert not list(tmp_path.rglob("*.gz"))


def test_a_compiler_that_is_slow_is_said_to_be_at_work(here, monkeypatch):
    class Slow(Refused):
        def compile(self, compiler_options):
            time.sleep(0.3)
            return super().compile(compiler_options)

    monkeypatch.setattr("crate_jax.planning.compiling._SAY_EVERY_S", 0.1)
    said = []
    compile_for(here, Slow(), said.append)  # type: ignore[arg-type]
    assert said[1:] and all(line.startswith("compiling, ") for line in said[1:])


def test_half_a_file_in_the_cache_is_made_anew(here, tmp_path):
    compile_for(here, Refused())  # type: ignore[arg-type]
    (kept,) = tmp_path.rglob("*.gz")
    whole = kept.read_bytes()
    kept.write_bytes(whole[:20])
    compile_for(here, Refused())  # type: ignore[arg-type]
    assert kept.stat().st_size >= len(whole) - 2  # but for the time that it took

"""Plan a run on hardware that you do not have: memory, computation, communication, time.

Two sources that check each other. Formulas say what the state, the activations and the collectives
of a step must come to. And the step itself is compiled, and asked: by the compiler of the hardware
where it is installed, or for as many virtual CPU devices as the mesh has. Thousands take no longer
than a few, as every device runs the same program.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.stages import Lowered

from crate_jax.config import ParallelConfig, TrainConfig
from crate_jax.files import Json
from crate_jax.models.classifier import ImageClassifier
from crate_jax.models.cost import step_flops
from crate_jax.parallel import batch_sharding, parse_mesh
from crate_jax.planning import formulas
from crate_jax.planning.chips import CHIPS, Joined, least_seconds, traffic
from crate_jax.planning.collectives import KINDS, Collective, collectives
from crate_jax.planning.compiling import compile_for
from crate_jax.planning.program import Operation, account, copies
from crate_jax.planning.topology import Topology
from crate_jax.tasks.task import Batch
from crate_jax.training.run import Run, jit_train_step, set_up
from crate_jax.training.state import TrainState, abstract_state

_SHOWN = 20  # operations of a program, those that move most


def plan(config: TrainConfig, spec: str) -> Json:
    """Compile the training step of a config for a mesh of CPU devices, and say what it needs.

    Needs as many devices as the mesh has: set ``jax_num_cpu_devices`` before JAX is used.

    Args:
        config: the config of a recipe; its data set is not opened, its mesh not used.
        spec: a mesh without a size of -1, see `crate_jax.parallel.make_mesh`.

    Returns:
        By formula ``memory``, bytes a device of each kind and their ``total``; ``gradient_bytes``
        and ``gathered_bytes`` of a step; ``flops`` of a step over all devices. ``chips``: for each
        of `CHIPS` what `least_seconds` says; where the step does not fit also
        ``accumulate_steps``, see `formulas.micro_batches_that_fit`. ``compiled``: the program's
        ``collectives``, ``count`` and ``bytes`` of each kind, ``gradient_bytes``,
        ``gathered_bytes`` and ``memory``, next to what the formulas give for them. It is compiled
        in float32, ``dtype``: a CPU computes nothing else.

    Raises:
        ValueError, KeyError: the config breaks a rule, or it and the mesh do not fit together.
    """
    run = _run(config, spec, jax.devices()[: mesh_size(spec)])
    model: Any = run.task.model
    twin = model.clone(dtype=jnp.dtype("float32"))
    state, batch, lowered = _lower(run, twin)
    need = formulas.need(run, model, state, batch, platform="gpu")
    chips = {
        name: least_seconds(
            chip,
            step_flops(model) * config.batch_size / run.mesh.devices.size,
            traffic(need.memory),
            need.joined,
            sum(need.memory.values()),
        )
        for name, chip in CHIPS.items()
    }
    for name, seconds in chips.items():
        if not seconds["fits"]:
            seconds["accumulate_steps"] = formulas.micro_batches_that_fit(
                run, model, state, batch, CHIPS[name].memory, platform="gpu"
            )
    compiled: Any = lowered.compile()
    held = compiled.memory_analysis()
    found = collectives(compiled.as_text(), run.mesh.devices.size)
    return _by_formula(run, model, state, need) | {
        "chips": chips,
        "compiled": {"dtype": "float32"}
        | _beside(formulas.need(run, twin, state, batch, platform="cpu"))
        | {
            "memory": held.argument_size_in_bytes + held.temp_size_in_bytes,
            **_sent(found),
        },
    }


def plan_on(
    config: TrainConfig,
    spec: str,
    topology: Topology,
    say: Callable[[str], None] = lambda text: None,
) -> Json:
    """Compile the training step of a config for devices that are not here, and say what it needs.

    Args:
        config: the config of a recipe; its data set is not opened, its mesh not used.
        spec: a mesh of all devices of the topology, see `crate_jax.parallel.make_mesh`.
        topology: what to compile for.
        say: is told that the compiler is at work.

    Returns:
        By formula what `plan` gives. ``compiled``, of the program: ``topology``, ``compiler``,
        ``seconds`` that compiling took, ``dtype``, ``memory``,
        ``collectives``, ``count``, ``bytes`` and ``overlapping`` (how many of the count) of each
        kind; ``gradient_bytes`` and ``gathered_bytes``; ``moved``, bytes through the memory of a
        device by the static account of `crate_jax.planning.program`; ``moved_by``, the operations
        that move most, and ``moved_by_opcode``, what all of a kind move; ``copies`` of arrays as
        large as the tokens of a device. ``chips``: for the chip, if `CHIPS` has it, what
        `least_seconds` says of the program, with operations by formula.
        Where the compiler refuses it for want of memory, ``refused`` stands for most of this.
        Where it does not fit into a chip of `CHIPS`, ``compiled`` has ``accumulate_steps``, see
        `formulas.micro_batches_that_fit`.

    Raises:
        ValueError, KeyError: the config breaks a rule, or it and the mesh do not fit together.
    """
    step = lower_step(config, spec, topology)
    run, model = step.run, step.model
    need = formulas.need(
        run, model, step.state, step.batch, platform=topology.platform, chip=topology.chip
    )
    made = compile_for(topology, step.lowered, say)
    compiled: Json = {
        "topology": topology.name,
        "compiler": topology.compiler,
        "seconds": made.seconds,
        "dtype": jnp.dtype(model.dtype).name,
    } | _beside(need)
    found = _by_formula(run, model, step.state, need) | {"compiled": compiled, "chips": {}}
    chip = topology.chip
    # The compiler for TPUs knows what a chip holds: 15.75 GiB of a v5e, above the published 16 GB.
    fits = not made.refused and (
        topology.platform == "tpu" or not chip or made.memory <= chip.memory
    )
    if chip and not fits:
        compiled["accumulate_steps"] = formulas.micro_batches_that_fit(
            run, model, step.state, step.batch, chip.memory, platform=topology.platform, chip=chip
        )
    if made.refused:
        compiled["refused"] = made.refused
        return found
    sent = collectives(made.text, run.mesh.devices.size)
    operations = account(made.text, spaces=topology.spaces)
    tokens = run.config.batch_size * model.num_tokens * model.width // run.mesh.devices.size
    through = _moved(operations, tokens // run.config.optim.accumulate_steps)
    compiled |= {"memory": made.memory, **_sent(sent), **through}
    if chip:
        seconds = least_seconds(
            chip,
            step_flops(model) * config.batch_size / run.mesh.devices.size,
            through["moved"],
            _joined(sent),
            made.memory,
        )
        found["chips"][topology.name.partition(":")[0]] = seconds | {"fits": fits}
    return found


def _moved(operations: list[Operation], tokens: int) -> Json:
    """What a program moves through the memory of a device; copies of so many numbers at least."""
    by_opcode: Counter[str] = Counter()
    for operation in operations:
        by_opcode[operation.opcode] += operation.bytes
    most = sorted(operations, key=lambda x: -x.bytes)[:_SHOWN]
    return {
        "moved": by_opcode.total(),
        "moved_by": [
            {name: getattr(x, name) for name in ("name", "opcode", "source", "bytes", "trips")}
            for x in most
        ],
        "moved_by_opcode": dict(by_opcode.most_common()),
        "copies": copies(operations, tokens),
    }


class Step(NamedTuple):
    """A training step that waits for a compiler.

    Attributes:
        run: of which it is the step.
        model: of its task.
        state: shapes with shardings.
        batch: likewise.
        lowered: what a compiler takes.
    """

    run: Run
    model: Any
    state: TrainState
    batch: Batch
    lowered: Lowered


def lower_step(config: TrainConfig, spec: str, topology: Topology) -> Step:
    """The training step of a config, for devices that are not here.

    Args:
        config: see `plan_on`.
        spec: see `plan_on`.
        topology: whose devices they are.

    Raises:
        ValueError, KeyError: see `plan_on`.
    """
    run = _run(config, spec, topology.devices)
    model: Any = run.task.model
    return Step(run, model, *_lower(run, model))


def _run(config: TrainConfig, spec: str, devices: Any) -> Run:
    config = dataclasses.replace(config, parallel=ParallelConfig(mesh=spec))
    return set_up(config, devices=devices)


def _lower(run: Run, model: ImageClassifier) -> tuple[TrainState, Batch, Lowered]:
    """The training step of a model in place of the run's: state and batch by shape, and program."""
    state, shardings = abstract_state(run.task, run.tx, run.key, run.mesh, ema=run.ema)
    rows = batch_sharding(run.mesh)
    batch: Any = {
        name: jax.ShapeDtypeStruct(
            (run.config.batch_size, *row.shape[1:]), row.dtype, sharding=rows
        )
        for name, row in run.task.blank().items()
    }
    task: Any = dataclasses.replace(run.task, model=model)  # type: ignore[type-var]
    program: Any = jit_train_step(dataclasses.replace(run, task=task), shardings)
    key = jax.eval_shape(lambda: run.key)
    return state, batch, program.lower(state, batch, key)


def _by_formula(run: Run, model: ImageClassifier, state: TrainState, need: formulas.Need) -> Json:
    """The part of a plan that no compiler was asked for."""
    return {
        "model": run.config.model.name,
        "mesh": dict(run.mesh.shape),
        "batch_size": run.config.batch_size,
        "dtype": jnp.dtype(model.dtype).name,
        "parameters": formulas.values(state.params),
        "memory": need.memory | {"total": sum(need.memory.values())},
        "flops": step_flops(model) * run.config.batch_size,
        "gradient_bytes": need.gradient_bytes,
        "gathered_bytes": need.gathered_bytes,
    }


def _beside(need: formulas.Need) -> Json:
    """The results of the formulas for a program that was compiled."""
    return {
        "memory_by_formula": sum(need.memory.values()),
        "gradient_bytes_by_formula": need.gradient_bytes,
        "gathered_bytes_by_formula": need.gathered_bytes,
    }


def _sent(found: Counter[Collective]) -> Json:
    """Count and bytes of each kind of collective; what is added up, and what is gathered."""
    kinds: Json = {}
    for kind in KINDS:
        these = {c: n for c, n in found.items() if c.kind == kind}
        if these:
            kinds[kind] = {
                "count": sum(these.values()),
                "bytes": sum(n * c.bytes for c, n in these.items()),
                "overlapping": sum(n for c, n in these.items() if c.overlaps),
            }
    whole: Counter[str] = Counter()
    for joined in _joined(found):
        whole[joined.kind] += joined.whole
    return {
        "collectives": kinds,
        "gradient_bytes": whole["all-reduce"] + whole["reduce-scatter"],
        "gathered_bytes": whole["all-gather"],
    }


def _joined(found: Counter[Collective]) -> list[Joined]:
    return [Joined(c.kind, n * c.bytes, c.group, c.stride) for c, n in found.items()]


def mesh_size(spec: str) -> int:
    """The number of devices that a mesh names.

    Raises:
        KeyError, ValueError: it is malformed, or one of its sizes is left open.
    """
    sizes = parse_mesh(spec).values()
    if -1 in sizes:
        raise ValueError(f"--mesh must name every size; got {spec}. Write data:256,fsdp:8.")
    return math.prod(sizes)

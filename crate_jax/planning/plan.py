"""What a run would need on machines that are not here: memory, computation, communication, time.

Two sources that check each other. Formulas say what the state, the activations and the collectives
of a step must come to. And the step itself is compiled for as many virtual CPU devices as the mesh
has (thousands take seconds: every device runs the same program), and asked.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.stages import Compiled

from crate_jax.config import OptimConfig, ParallelConfig, TrainConfig
from crate_jax.files import Json
from crate_jax.models.classifier import ImageClassifier
from crate_jax.models.cost import activation_bytes, gradient_parts, step_flops
from crate_jax.parallel import PyTree, batch_sharding, parse_mesh
from crate_jax.planning.chips import CHIPS, Joined, least_seconds
from crate_jax.planning.collectives import KINDS, collectives
from crate_jax.tasks.task import Batch
from crate_jax.training.run import Run, jit_train_step, set_up
from crate_jax.training.state import TrainState, abstract_state

# What a backward pass holds for a moment, beside the activations of the layer under way: so many
# float32 arrays of tokens, and of the patches' pixels. Fitted to programs compiled for CPU devices.
_WORKING_TOKENS, _WORKING_PATCHES = 2, 6


def plan(config: TrainConfig, spec: str) -> Json:
    """Compile the training step of a config for a mesh, and say what it needs.

    Needs as many devices as the mesh has: set ``jax_num_cpu_devices`` before JAX is used.

    Args:
        config: of a recipe; its data set is not opened, its mesh not used.
        spec: a mesh without a size of -1, see `crate_jax.parallel.make_mesh`.

    Returns:
        By formula ``memory``, bytes a device of each kind and their ``total``; ``gradient_bytes``
        and ``gathered_bytes`` of a step; ``flops`` of a step over all devices. ``chips``: for each
        of `CHIPS` the seconds that each of its limits asks for, ``step_s``, the largest of these
        and their sum, and whether it ``fits`` into the memory. ``compiled``: the program's
        ``collectives``, ``count`` and ``bytes`` of each kind, and its ``memory``, next to what the
        formulas give for it. It is compiled in float32, ``dtype``: a CPU computes nothing else.

    Raises:
        ValueError, KeyError: the config breaks a rule, or it and the mesh do not fit together.
    """
    config = dataclasses.replace(config, parallel=ParallelConfig(mesh=spec))
    run = set_up(config, devices=jax.devices()[: mesh_size(spec)])
    model: Any = run.task.model
    twin = model.clone(dtype=jnp.dtype("float32"))
    state, batch, compiled = _compile(run, twin)
    need, need_of_twin = (_by_formula(run, of, state, batch) for of in (model, twin))
    memory, devices = need.memory, run.mesh.devices.size
    flops = step_flops(model) * config.batch_size
    return {
        "model": config.model.name,
        "mesh": dict(run.mesh.shape),
        "batch_size": config.batch_size,
        "dtype": jnp.dtype(model.dtype).name,
        "parameters": _values(state.params),
        "memory": memory | {"total": sum(memory.values())},
        "flops": flops,
        "gradient_bytes": need.gradient_bytes,
        "gathered_bytes": need.gathered_bytes,
        "chips": {
            name: least_seconds(chip, flops / devices, memory, need.joined)
            for name, chip in CHIPS.items()
        },
        "compiled": {
            "dtype": "float32",
            "memory_by_formula": sum(need_of_twin.memory.values()),
            "gradient_bytes_by_formula": need_of_twin.gradient_bytes,
            "gathered_bytes_by_formula": need_of_twin.gathered_bytes,
        }
        | _found(compiled, devices),
    }


@dataclasses.dataclass(frozen=True)
class _Need:
    """What the formulas give: bytes, and what is sent."""

    memory: dict[str, int]
    gradient_bytes: int
    gathered_bytes: int
    joined: list[Joined]


def _by_formula(run: Run, model: ImageClassifier, state: TrainState, batch: Batch) -> _Need:
    """What a model needs in place of the run's."""
    optim = run.config.optim
    sums = gradient_sums(model, state, run.mesh, optim.accumulate_steps)
    gathered = gathered_bytes(model, state, optim.accumulate_steps)
    return _Need(
        memory=memory_bytes(model, state, batch, optim),
        gradient_bytes=sum(part.size for part in sums),
        gathered_bytes=gathered,
        joined=[*sums, Joined("all-gather", gathered, run.mesh.shape["fsdp"])],
    )


def _compile(run: Run, twin: ImageClassifier) -> tuple[TrainState, Batch, Compiled]:
    """The training step of a model in place of the run's: state and batch by shape, and program."""
    state, shardings = abstract_state(run.task, run.tx, run.key, run.mesh, ema=run.ema)
    rows = batch_sharding(run.mesh)
    batch: Any = {
        name: jax.ShapeDtypeStruct(
            (run.config.batch_size, *row.shape[1:]), row.dtype, sharding=rows
        )
        for name, row in run.task.blank().items()
    }
    task: Any = dataclasses.replace(run.task, model=twin)  # type: ignore[type-var]
    program: Any = jit_train_step(dataclasses.replace(run, task=task), shardings)
    key = jax.eval_shape(lambda: run.key)
    return state, batch, program.lower(state, batch, key).compile()


def _found(compiled: Any, devices: int) -> Json:
    """Memory and collectives of a compiled program."""
    set_aside = compiled.memory_analysis()
    counts = collectives(compiled.as_text(), devices)
    of_kind = {
        kind: {
            "count": sum(n for c, n in counts.items() if c.kind == kind),
            "bytes": sum(n * c.bytes for c, n in counts.items() if c.kind == kind),
        }
        for kind in KINDS
    }
    return {
        "memory": set_aside.argument_size_in_bytes + set_aside.temp_size_in_bytes,
        "collectives": {kind: of for kind, of in of_kind.items() if of["count"]},
    }


def table(found: Json) -> str:
    """What `plan` found, for people."""
    compiled = found["compiled"]
    lines = [f"{found['parameters']:,} parameters", "", "memory of a device                 GiB"]
    lines += [f"  {name:<28}{size / 2**30:>10.3f}" for name, size in found["memory"].items()]
    lines += ["", f"added up in a step, MB        {found['gradient_bytes'] / 1e6:>10.1f}"]
    lines += [f"gathered in a step, MB        {found['gathered_bytes'] / 1e6:>10.1f}"]
    lines += ["", f"compiled in {compiled['dtype']}          count  compiled   formula"]
    memory = [compiled[name] / 2**30 for name in ("memory", "memory_by_formula")]
    lines.append(f"  {'memory, GiB':<20}{'':>7}" + "".join(f"{size:>10.3f}" for size in memory))
    formulas = {"all-reduce": "gradient_bytes", "all-gather": "gathered_bytes"}
    for kind, of in compiled["collectives"].items():
        line = f"  {kind + ', MB':<20}{of['count']:>7}{of['bytes'] / 1e6:>10.1f}"
        if kind in formulas:
            line += f"{compiled[formulas[kind] + '_by_formula'] / 1e6:>10.1f}"
        lines.append(line)
    lines += ["", "at peak (ms)  compute    memory     links   network      step      fits"]
    for chip, seconds in found["chips"].items():
        cells = [
            f"{1e3 * seconds[f'{name}_s']:.2f}" if f"{name}_s" in seconds else ""
            for name in ("compute", "memory", "links", "network")
        ]
        low, high = (1e3 * s for s in seconds["step_s"])
        cells += [f"{low:.1f}-{high:.1f}", "yes" if seconds["fits"] else "NO"]
        lines.append(f"  {chip:<10}" + "".join(f"{cell:>10}" for cell in cells))
    return "\n".join(lines) + "\n"


def mesh_size(spec: str) -> int:
    """The number of devices that a mesh names.

    Raises:
        KeyError, ValueError: it is malformed, or one of its sizes is left open.
    """
    sizes = parse_mesh(spec).values()
    if -1 in sizes:
        raise ValueError(f"--mesh must name every size; got {spec}. Write data:256,fsdp:8.")
    return math.prod(sizes)


def memory_bytes(
    model: ImageClassifier, state: TrainState, batch: Batch, optim: OptimConfig
) -> dict[str, int]:
    """Bytes that one device holds at the height of a training step, by kind.

    Args:
        model: reads its sizes, backward, dtype, remat and scan_unroll.
        state: shapes with shardings.
        batch: likewise.
        optim: reads optimizer and accumulate_steps.

    Returns:
        ``parameters``, ``optimizer`` (with the average, if any), ``gradients``, ``activations``
        (what the backward pass keeps of all layers), ``working`` (what it holds of one layer for a
        moment, or of those that scan_unroll joins), ``copies`` (of what XLA overwrites while it is
        still read) and ``batch``. ``working`` and ``copies`` are fitted to programs for CPUs.
    """
    micro_batches = optim.accumulate_steps
    any_of_batch = jax.tree.leaves(batch)[0]
    rows = any_of_batch.sharding.shard_shape(any_of_batch.shape)[0] // micro_batches
    params = _bytes(state.params, per_device=True)
    layers = model.layers_at_once * activation_bytes(model.clone(remat="none")) // model.depth
    values = _WORKING_TOKENS * model.num_tokens * model.width
    values += _WORKING_PATCHES * math.prod(model.input_shape)
    working = rows * (layers + 4 * values)
    # Lion's moment makes both the update and the next moment; with more micro-batches the second
    # set of gradients is free by then.
    copies = params if optim.optimizer == "lion" and micro_batches == 1 else 0
    if params < _bytes(state.params, per_device=False):
        # The weights of a layer, gathered, and their gradients; and the shards of all layers.
        working += 2 * _bytes(state.params["blocks"], per_device=False) // model.depth
        copies += _bytes(state.params["blocks"], per_device=True)
    return {
        "parameters": params,
        "optimizer": _bytes(state, per_device=True) - params,
        "gradients": params * (2 if micro_batches > 1 else 1),
        "activations": rows * activation_bytes(model),
        "working": working,
        "copies": copies,
        "batch": _bytes(batch, per_device=True),
    }


def gradient_sums(
    model: ImageClassifier, state: TrainState, mesh: Mesh, micro_batches: int
) -> list[Joined]:
    """The gradients that devices add up in a step, float32.

    Those of all parameters over all devices. Those of a weight in several products come in parts,
    D's from Y Dᵀ and E D, and each part is added up over the devices before the parts are. With
    gradient accumulation that is done over ``fsdp`` for every micro-batch, and over ``data``, where
    each device has but its share of the whole, at the end.
    """
    data, fsdp = mesh.shape["data"], mesh.shape["fsdp"]
    size = 4 * (_values(state.params) + gradient_parts(model))
    if micro_batches == 1:
        return [Joined("all-reduce", size, data * fsdp)] if data * fsdp > 1 else []
    sums = [Joined("all-reduce", micro_batches * size, fsdp)] if fsdp > 1 else []
    if data > 1:
        sums.append(Joined("all-reduce", _bytes(state.params, per_device=True), data, stride=fsdp))
    return sums


def gathered_bytes(model: ImageClassifier, state: TrainState, micro_batches: int) -> int:
    """Bytes of the weights that ``fsdp`` gathers in a step.

    For every micro-batch those of every layer twice, for the forward and for the backward pass, in
    the dtype of the computation; once in a step patch projection, positions and head.
    """
    layers, all_split = _split_values(state.params["blocks"]), _split_values(state.params)
    values = 2 * micro_batches * layers + all_split - layers
    return jnp.dtype(model.dtype).itemsize * values


def _split_values(tree: PyTree) -> int:
    """How many values the leaves have that no device holds whole."""
    leaves = jax.tree.leaves(tree)
    return sum(x.size for x in leaves if x.sharding.shard_shape(x.shape) != x.shape)


def _values(tree: PyTree) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def _bytes(tree: PyTree, *, per_device: bool) -> int:
    """Bytes of all leaves, or of one device's share of them."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        shape = leaf.sharding.shard_shape(leaf.shape) if per_device else leaf.shape
        total += math.prod(shape) * leaf.dtype.itemsize
    return total

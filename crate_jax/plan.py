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
import optax

from crate_jax.collectives import KINDS, collectives
from crate_jax.config import TrainConfig
from crate_jax.models.cost import activation_bytes, multiply_adds, num_tokens
from crate_jax.models.crate import Crate, pair
from crate_jax.models.zoo import build_model
from crate_jax.parallel import batch_sharding, check_batch_size, make_mesh, parse_mesh
from crate_jax.training.optimizer import make_optimizer
from crate_jax.training.programs import jit_train_step
from crate_jax.training.state import TrainState, abstract_state


@dataclasses.dataclass(frozen=True)
class Chip:
    """Published peaks of an accelerator.

    Attributes:
        flops: dense bfloat16 operations a second.
        memory: bytes.
        memory_bandwidth: bytes a second.
        link: bytes a second that a chip sends to its neighbours, one way: half of what is quoted
            for both ways.
        domain: how many chips those links join.
        network: bytes a second a chip beyond that.
        source: where the figures are from.
    """

    flops: float
    memory: float
    memory_bandwidth: float
    link: float
    domain: int
    network: float
    source: str


_GOOGLE, _NVIDIA = "docs.cloud.google.com/tpu/docs/", "NVIDIA's data sheets of "
CHIPS = {
    "v5e": Chip(197e12, 16e9, 819e9, 200e9, 256, 6.4e12 / 8 / 256, _GOOGLE + "v5e"),
    "v5p": Chip(459e12, 95 * 2**30, 2765e9, 600e9, 6144, 50e9 / 8, _GOOGLE + "v5p"),
    "v6e": Chip(918e12, 32e9, 1600e9, 400e9, 256, 25.6e12 / 8 / 256, _GOOGLE + "v6e"),
    "h100": Chip(989e12, 80e9, 3.35e12, 450e9, 8, 50e9, _NVIDIA + "H100 SXM and DGX H100"),
    "h200": Chip(989e12, 141e9, 4.8e12, 450e9, 8, 50e9, _NVIDIA + "H200 SXM and DGX H200"),
}

# Gradients of the layer under way, and what else a layer's backward pass holds for a moment beside
# its own activations: so many arrays (N, d) of float32, as the compiled programs have it.
_WORKING_ARRAYS = 16


def plan(config: TrainConfig, spec: str) -> dict[str, Any]:
    """Compile the training step of a config for a mesh, and say what it needs.

    Needs as many devices as the mesh has: set ``jax_num_cpu_devices`` before JAX is used.

    Args:
        config: of a recipe; its data set is not opened, its mesh not used.
        spec: a mesh without a size of -1, see `crate_jax.parallel.make_mesh`.

    Returns:
        ``memory``: bytes a device of each kind by formula, their ``total``, and what XLA set aside,
        ``compiled``. ``collectives``: ``count`` and ``bytes`` of each kind in a step, compiled, and
        ``gradient_bytes`` and ``gathered_bytes`` by formula. ``flops`` of a step over all devices.
        ``chips``: for each of `CHIPS` the seconds that each of its limits asks for, ``step_s``, the
        largest of these and their sum, and whether it ``fits`` into the memory.

    Raises:
        ValueError: config and mesh do not fit together, or the recipe does not say the number of
            classes.
    """
    mesh = make_mesh(spec, jax.devices()[: mesh_size(spec)])
    devices, micro_batches = mesh.devices.size, config.optim.accumulate_steps
    check_batch_size("batch_size", config.batch_size, devices * micro_batches)
    model = build_model(config.model)
    schedule = optax.constant_schedule(1.0)  # which one it is costs nothing
    tx = make_optimizer(config.optim, schedule)
    key = jax.random.key(0)
    state, shardings = abstract_state(model, tx, key, mesh, ema=config.optim.ema_decay > 0)
    rows = batch_sharding(mesh)
    shape = (config.batch_size, *pair(model.image_size), model.in_channels)
    batch = {
        "image": jax.ShapeDtypeStruct(shape, jnp.uint8, sharding=rows),
        "label": jax.ShapeDtypeStruct(shape[:1], jnp.int32, sharding=rows),
    }
    program = jit_train_step(config, model, tx, schedule, mesh, shardings)
    compiled = program.lower(state, batch, jax.eval_shape(lambda: key)).compile()
    found = collectives(compiled.as_text(), devices)
    flops = step_flops(model) * config.batch_size
    memory = memory_bytes(model, state, batch, micro_batches)
    set_aside: Any = compiled.memory_analysis()
    in_use = set_aside.argument_size_in_bytes + set_aside.temp_size_in_bytes
    of_kind = {
        kind: {
            "count": sum(n for c, n in found.items() if c.kind == kind),
            "bytes": sum(n * c.bytes for c, n in found.items() if c.kind == kind),
        }
        for kind in KINDS
    }
    gradients = micro_batches * gradient_bytes(model, state) if devices > 1 else 0
    gathered = micro_batches * gathered_bytes(model, state)
    joined = [("all-reduce", gradients, devices), ("all-gather", gathered, mesh.shape["fsdp"])]
    return {
        "model": config.model.name,
        "mesh": dict(mesh.shape),
        "batch_size": config.batch_size,
        "dtype": config.model.dtype,
        "parameters": _values(state.params),
        "memory": memory | {"total": sum(memory.values()), "compiled": in_use},
        "flops": flops,
        "collectives": {kind: of for kind, of in of_kind.items() if of["count"]},
        "gradient_bytes": gradients,
        "gathered_bytes": gathered,
        "chips": {name: _seconds(c, flops / devices, memory, joined) for name, c in CHIPS.items()},
    }


def table(found: dict[str, Any]) -> str:
    """What `plan` found, for people."""
    memory, lines = found["memory"], [f"{found['parameters']:,} parameters", ""]
    lines.append("memory of a device                 GiB")
    lines += [f"  {name:<28}{size / 2**30:>10.3f}" for name, size in memory.items()]
    lines += ["", "collectives of a step, compiled  count        MB"]
    for kind, of in found["collectives"].items():
        lines.append(f"  {kind:<28}{of['count']:>8}{of['bytes'] / 1e6:>10.1f}")
    for name in ("gradient_bytes", "gathered_bytes"):
        lines.append(f"  {name + ', by formula':<36}{found[name] / 1e6:>10.1f}")
    if found["dtype"] != "float32":
        lines.append(f"compiled for CPUs, which compute {found['dtype']} products in float32")
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
    model: Crate, state: TrainState, batch: dict[str, Any], micro_batches: int
) -> dict[str, int]:
    """Bytes that one device holds at the height of a training step, by kind.

    Args:
        model: its remat and dtype count.
        state: shapes with shardings.
        batch: likewise.
        micro_batches: of gradient accumulation.

    Returns:
        ``parameters``, ``optimizer`` (with the average, if any), ``gradients``, ``activations``
        (what the backward pass keeps of all layers), ``working`` (what it holds of one layer for a
        moment) and ``batch``.
    """
    own = sum(batch["image"].sharding.shard_shape(batch["image"].shape)[:1])
    rows = own // micro_batches
    params = _bytes(state.params, per_device=True)
    layer = activation_bytes(model.clone(remat="none")) // model.depth
    working = rows * (layer + _WORKING_ARRAYS * 4 * num_tokens(model) * model.width)
    if params < _bytes(state.params, per_device=False):
        # The weights of a layer, gathered, and their gradients.
        working += 2 * _bytes(state.params["blocks"], per_device=False) // model.depth
    return {
        "parameters": params,
        "optimizer": _bytes(state, per_device=True) - params,
        "gradients": params * (2 if micro_batches > 1 else 1),
        "activations": rows * activation_bytes(model),
        "working": working,
        "batch": _bytes(batch, per_device=True),
    }


def step_flops(model: Crate) -> int:
    """Operations of the matrix products of a training step, for one image.

    Two for each multiply-add; the backward pass takes twice the forward pass, less one of the four
    products of attention if it is the derived one. What remat computes again is counted: all of
    it, or with "dots" the attention.
    """
    forward = 2 * multiply_adds(model)
    N, K, p = num_tokens(model), model.num_heads, model.subspace_dim
    product = 2 * model.depth * N * N * K * p
    again = {"none": 0, "dots": 2 * product, "full": forward}[model.remat]
    return 3 * forward + again - (product if model.backward == "derived" else 0)


def gradient_bytes(model: Crate, state: TrainState) -> int:
    """Bytes of the gradients that the devices add up, for one (micro-)batch.

    Those of all parameters, in float32; those of D twice, because Y Dᵀ and R D each give a part,
    and each part is added up over the devices before the two are added.
    """
    return 4 * (_values(state.params) + model.depth * model.width**2)


def gathered_bytes(model: Crate, state: TrainState) -> int:
    """Bytes of the weights that ``fsdp`` gathers, for one (micro-)batch.

    Those of every layer twice, for the forward and for the backward pass, in the dtype of the
    computation; patch projection, positions and head once.
    """
    split = lambda leaf: leaf.sharding.shard_shape(leaf.shape) != leaf.shape  # noqa: E731
    whole = [leaf for leaf in jax.tree.leaves(state.params) if split(leaf)]
    blocks = [leaf for leaf in jax.tree.leaves(state.params["blocks"]) if split(leaf)]
    layers, outside = sum(x.size for x in blocks), sum(x.size for x in whole)
    return jnp.dtype(model.dtype).itemsize * (2 * layers + outside - layers)


def _seconds(
    chip: Chip, flops: float, memory: dict[str, int], joined: list[tuple[str, int, int]]
) -> dict[str, Any]:
    """The least that a step can take on a chip, by each of its limits.

    Memory is written and read once for all that a step holds. A collective over more chips than the
    links join goes by the links first; each chip then takes its share of the result to the network.
    """
    traffic = 2 * sum(memory[k] for k in ("parameters", "optimizer", "gradients", "activations"))
    link = network = 0.0
    for kind, size, group in joined:
        inside = min(group, chip.domain)
        link += _sent(kind, size, inside)
        network += _sent(kind, size / inside, math.ceil(group / inside))
    seconds: dict[str, Any] = {
        "compute_s": flops / chip.flops,
        "memory_s": traffic / chip.memory_bandwidth,
        "links_s": link / chip.link,
    }
    if network:
        seconds["network_s"] = network / chip.network
    # At best everything overlaps, at worst nothing does.
    seconds["step_s"] = [max(seconds.values()), sum(seconds.values())]
    seconds["fits"] = sum(memory.values()) <= chip.memory
    return seconds


def _sent(kind: str, size: float, group: int) -> float:
    """Bytes that each of a group sends in a ring: the least for a result of so many bytes."""
    return {"all-reduce": 2, "all-gather": 1}[kind] * size * (group - 1) / group


def _values(tree: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def _bytes(tree: Any, *, per_device: bool) -> int:
    """Bytes of all leaves, or of one device's share of them."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        shape = leaf.sharding.shard_shape(leaf.shape) if per_device else leaf.shape
        total += math.prod(shape) * leaf.dtype.itemsize
    return total

"""The processes of a run, the mesh of their devices, and the rule that lays arrays out on it."""

import functools
import itertools
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, Sharding
from jax.typing import ArrayLike

from crate_jax.config import ParallelConfig
from crate_jax.placement import share_of_fsdp

AXES = ("data", "fsdp")

Devices = Sequence[Any]  # of `jax.Device`, which type checkers take for a variable
PyTree = Any  # arrays, or their shapes, in whatever nested containers
Shardings = Any  # a PyTree with a `NamedSharding` in place of each array

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")

_QUESTIONS = itertools.count()  # of `all_agree`


class LostProcess(RuntimeError):
    """A run of several processes has lost one of them. It stops, and can be started again."""


def start_processes(config: ParallelConfig) -> bool:
    """Join the processes of a run; every one calls this before it touches a device.

    The engine is `jax.distributed`. Where no coordinator is configured, the environment may name
    one: JAX_COORDINATOR_ADDRESS, with JAX_NUM_PROCESSES and JAX_PROCESS_ID.

    Args:
        config: reads coordinator, num_processes, process_id and heartbeat_timeout_seconds.

    Returns:
        Whether this run has more processes than this one, or was started as if it had.

    Raises:
        ValueError: the address, the number of processes or the own number is missing or impossible,
            or nobody answers at the address.
    """
    address = config.coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS")
    if address is None or jax.distributed.is_initialized():
        return jax.distributed.is_initialized()
    given: dict[str, Any] = {"heartbeat_timeout_seconds": config.heartbeat_timeout_seconds}
    if address != "auto":
        count = _number("num_processes", config.num_processes)
        own = _number("process_id", config.process_id)
        if not 0 <= own < count or not address.rpartition(":")[2].isdigit():
            raise ValueError(
                "parallel must have process_id < num_processes and a coordinator host:port; got "
                f"{own}, {count} and {address}. Start processes 0 … {count - 1}, each by its own."
            )
        given |= {"coordinator_address": address, "num_processes": count, "process_id": own}
    try:
        jax.distributed.initialize(**given)
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        raise ValueError(
            f"parallel.coordinator must be reachable; {address} is not ({reason}). Start all "
            "processes with the same address, that of process 0."
        ) from error
    return True


def _number(name: str, value: int | None) -> int:
    """A number of the config, or else of the environment."""
    text = str(value) if value is not None else os.environ.get(f"JAX_{name.upper()}", "")
    if not text.isdigit():
        raise ValueError(
            f"parallel.{name} must be set with a coordinator; got {text or 'none'}. Set "
            f"--config.parallel.{name} or JAX_{name.upper()}, or use --config.parallel.coordinator="
            "auto on a TPU pod or under SLURM."
        )
    return int(text)


def all_agree(ok: bool, *, wait_s: float) -> bool:
    """True if a statement holds on every process of a run, asked without a collective.

    Collectives wait for every process; one that is stuck in another of them would never come. All
    processes ask the same questions in the same order.

    Args:
        ok: whether it is so on this one.
        wait_s: seconds to wait for the others to say.

    Raises:
        jax.errors.JaxRuntimeError: another did not say in time.
    """
    if jax.process_count() == 1:
        return ok
    from orbax.checkpoint import multihost

    client = multihost.get_jax_distributed_client()
    question = next(_QUESTIONS)
    client.key_value_set(f"crate_jax/{question}/{jax.process_index()}", str(int(ok)))
    keys = [f"crate_jax/{question}/{i}" for i in range(jax.process_count())]
    return all(client.blocking_key_value_get(key, int(1000 * wait_s)) == "1" for key in keys)


def parse_mesh(spec: str) -> dict[str, int]:
    """The sizes that "axis:size,…" names; -1, for one of them, stands for what is left.

    Raises:
        KeyError: an axis that does not exist.
        ValueError: a size is malformed, an axis is named twice, or two sizes are -1.
    """
    sizes: dict[str, int] = {}
    for item in spec.split(","):
        axis, _, size = item.strip().partition(":")
        if axis not in AXES:
            raise KeyError(f"parallel.mesh must name axes out of {', '.join(AXES)}; got {spec}.")
        if not re.fullmatch(r"-1|0*[1-9][0-9]*", size):
            raise ValueError(f"parallel.mesh must be axis:size,… with sizes > 0 or -1; got {spec}.")
        if axis in sizes or (size == "-1" and -1 in sizes.values()):
            raise ValueError(
                f"parallel.mesh must name an axis once and -1 once; got {spec}. Leave one out."
            )
        sizes[axis] = int(size)
    return sizes


def make_mesh(spec: str = "data:-1", devices: Devices | None = None) -> Mesh:
    """Lay all devices out on the axes ``data`` and ``fsdp``.

    Args:
        spec: "axis:size,…"; an axis left out has size 1, and one size may be -1 for what is left.
        devices: the devices to use; None: every device of every process.

    Returns:
        A mesh with both axes, of Auto type, as Flax linen needs.

    Raises:
        KeyError: an axis that does not exist.
        ValueError: a size is malformed, the sizes do not multiply to the number of devices, or
            slices differ in size.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = dict.fromkeys(AXES, 1) | parse_mesh(spec)
    fixed = math.prod(size for size in sizes.values() if size > 0)
    if list(sizes.values()).count(-1) == 1 and len(devices) % fixed == 0:
        sizes = {axis: len(devices) // fixed if n == -1 else n for axis, n in sizes.items()}
    if math.prod(sizes.values()) != len(devices):
        raise ValueError(
            f"parallel.mesh must multiply to the {len(devices)} devices; got {spec}. "
            "Give one axis the size -1."
        )
    # Explicit axes, JAX's default, make linen's products raise on sharded kernels.
    types = (AxisType.Auto,) * len(AXES)
    slices = Counter(getattr(device, "slice_index", 0) for device in devices)
    if len(set(slices.values())) > 1:
        if sizes["fsdp"] > 1:
            raise ValueError(
                "devices must be equally many on every slice or host for fsdp; got "
                f"{sorted(slices.values())}. Start as many on each."
            )
        return Mesh(np.array(devices).reshape(-1, 1), AXES, types)
    if len(slices) > 1:
        return Mesh(_across_slices(tuple(sizes.values()), devices, len(slices)), AXES, types)
    # jax.make_mesh splits the axes of one kind of TPU's torus: a 4 x 4 slice of another could have
    # no fsdp of 2 or 8.
    layout = mesh_utils.create_device_mesh(
        tuple(sizes.values()), devices, allow_split_physical_axes=True
    )
    return Mesh(layout, AXES, types)


def _across_slices(sizes: tuple[int, ...], devices: Devices, slices: int) -> np.ndarray:
    """The devices of several TPU slices, or GPU hosts, as an array of the mesh's shape.

    Between them the network is slower, so they divide ``data``, along which least is sent; and
    ``fsdp`` only as far as ``data`` is too small for it.
    """
    across_data = math.gcd(sizes[0], slices)
    outer = (across_data, slices // across_data)
    inner = [size // count for size, count in zip(sizes, outer, strict=True)]
    return mesh_utils.create_hybrid_device_mesh(
        inner, outer, devices, allow_split_physical_axes=True
    )


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding in which every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding that spreads examples, on axis 0, over all devices."""
    return NamedSharding(mesh, PartitionSpec(AXES))


def on_mesh(mesh: Mesh, function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """A function to jit, in which weights that the axis ``fsdp`` shares are gathered at their use.

    See `crate_jax.models.parameters.read`.
    """

    @functools.wraps(function)
    def run(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*args, **kwargs)

    return run


def place(array: ArrayLike, sharding: Sharding) -> jax.Array:
    """Turn an array that every process has whole into one global array.

    Args:
        array: equal on all processes, on the host or a local device.
        sharding: over any devices, those of other processes too.
    """
    host = np.asarray(array)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def check_batch_size(name: str, size: int, shards: int) -> None:
    """Refuse a batch that cannot be dealt out evenly.

    Raises:
        ValueError: the size is not a multiple of the shards; the nearest that is, is suggested.
    """
    if size % shards:
        nearest = max(1, round(size / shards)) * shards
        raise ValueError(
            f"{name} must be a multiple of {shards}, the devices (times optim.accumulate_steps); "
            f"got {size}. Nearest: {nearest}."
        )


def state_shardings(abstract_state: PyTree, mesh: Mesh) -> Shardings:
    """Shardings of a training state by one rule of paths and shapes.

    A leaf is split over ``fsdp`` as `crate_jax.placement.share_of_fsdp` says. Axis 0 of what lies
    below ``blocks`` is the layer: it is not counted, and never split.

    Args:
        abstract_state: tree of arrays or `jax.ShapeDtypeStruct`.
        mesh: the mesh of `make_mesh`.

    Returns:
        Tree of `NamedSharding`, same structure.
    """
    n = mesh.shape["fsdp"]

    def spec(path: jax.tree_util.KeyPath, leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        first = 1 if "blocks" in name else 0
        share = share_of_fsdp(name.rpartition("/")[2], leaf.shape[first:], n)
        return NamedSharding(mesh, PartitionSpec(*[None] * first, *share) if share else share)

    return jax.tree_util.tree_map_with_path(spec, abstract_state)


def check_shares(abstract_state: PyTree, shardings: Shardings, mesh: Mesh) -> None:
    """Refuse an ``fsdp`` that splits only little of a state.

    Raises:
        ValueError: a device would hold a tenth of the whole more than 1/fsdp of it.
    """
    n = mesh.shape["fsdp"]
    own = sum(jax.tree.leaves(jax.tree.map(_size_of_shard, abstract_state, shardings)))
    whole = sum(leaf.size for leaf in jax.tree.leaves(abstract_state))
    if own > (1 / n + 0.1) * whole:
        raise ValueError(
            "parallel.mesh must have an fsdp that divides the widths of the model; with "
            f"fsdp:{n} a device would hold {own / whole:.0%} of the state. Choose another."
        )


def _size_of_shard(leaf: jax.ShapeDtypeStruct, sharding: NamedSharding) -> int:
    """The number of values of a leaf that one device holds."""
    return math.prod(sharding.shard_shape(leaf.shape))

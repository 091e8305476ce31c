"""The needs of a training step, by formula: memory, and the communication of its devices."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from crate_jax.models.classifier import ImageClassifier
from crate_jax.models.cost import gradient_parts
from crate_jax.parallel import PyTree
from crate_jax.planning.chips import Chip, Joined
from crate_jax.planning.memory import layers_of, memory_bytes
from crate_jax.tasks.task import Batch
from crate_jax.training.run import Run
from crate_jax.training.state import TrainState


@dataclasses.dataclass(frozen=True)
class Need:
    """The results of the formulas for a step.

    Attributes:
        memory: bytes of a device by kind, see `crate_jax.planning.memory.memory_bytes`.
        joined: what devices add up and gather.
    """

    memory: dict[str, int]
    joined: list[Joined]

    @property
    def gradient_bytes(self) -> int:
        """Bytes that are added up; of what is scattered those of the whole."""
        return sum(part.whole for part in self.joined if part.kind != "all-gather")

    @property
    def gathered_bytes(self) -> int:
        """Bytes that are gathered."""
        return sum(part.whole for part in self.joined if part.kind == "all-gather")


def need(
    run: Run,
    model: ImageClassifier,
    state: TrainState,
    batch: Batch,
    *,
    platform: str,
    chip: Chip | None = None,
) -> Need:
    """Compute the needs of a step of a run with a model in place of its own.

    Args:
        run: reads its mesh and the optimizer's config.
        model: see `crate_jax.planning.memory.memory_bytes`.
        state: shapes with shardings.
        batch: likewise.
        platform: whose compiler. That for a "cpu" adds the gradient of a weight in several products
            up over the devices product by product: D's from Y Dᵀ and E D.
        chip: see `crate_jax.planning.memory.memory_bytes`.
    """
    optim = run.config.optim
    parts = gradient_parts(model) if platform == "cpu" else 0
    sums = gradient_sums(model, state, run.mesh, optim.accumulate_steps, parts)
    gathered = gathered_bytes(model, state, optim.accumulate_steps)
    if gathered:
        sums.append(Joined("all-gather", gathered, run.mesh.shape["fsdp"]))
    memory = memory_bytes(run, model, state, batch, platform=platform, chip=chip)
    return Need(memory, sums)


def micro_batches_that_fit(
    run: Run,
    model: ImageClassifier,
    state: TrainState,
    batch: Batch,
    room: float,
    *,
    platform: str,
    chip: Chip | None = None,
) -> int | None:
    """The fewest micro-batches with which a step that does not fit would fit, by formula.

    Args:
        run: reads its task, its mesh and the optimizer's config.
        model: see `need`.
        state: see `need`.
        batch: see `need`.
        room: bytes of memory of a device.
        platform: see `need`.
        chip: see `need`.

    Returns:
        A number above the run's own that divides the rows of a device. None: not even one row at a
        time fits, or the loss of the task is no mean over rows.
    """
    optim = run.config.optim
    any_of_batch = jax.tree.leaves(batch)[0]
    rows = any_of_batch.sharding.shard_shape(any_of_batch.shape)[0]
    most = rows if run.task.by_row else 0
    for steps in range(optim.accumulate_steps + 1, most + 1):
        if rows % steps:
            continue
        fewer = dataclasses.replace(optim, accumulate_steps=steps)
        config = dataclasses.replace(run.config, optim=fewer)
        changed = dataclasses.replace(run, config=config)
        memory = memory_bytes(changed, model, state, batch, platform=platform, chip=chip)
        if sum(memory.values()) <= room:
            return steps
    return None


def gradient_sums(
    model: ImageClassifier, state: TrainState, mesh: Mesh, micro_batches: int, parts: int = 0
) -> list[Joined]:
    """The gradients that devices add up in a step, in the dtype that they are computed in.

    A gradient of what ``fsdp`` splits is scattered over it, and each share is then added up over
    ``data``. Any other is added up over all devices. With gradient accumulation that is done over
    ``fsdp`` for every micro-batch; over ``data``, where each device has but its share of the whole,
    it is done at the end, in float32.

    Args:
        model: reads its dtype.
        state: shapes with shardings.
        mesh: the mesh of the run.
        micro_batches: of a step.
        parts: values of split weights whose gradients are added up once more.
    """
    data, fsdp = mesh.shape["data"], mesh.shape["fsdp"]
    split, other = _gradient_bytes(state.params, model)
    parts *= jnp.dtype(model.dtype).itemsize
    split, other = (split + parts, other) if split else (split, other + parts)
    shares, sums = split // fsdp, []
    if micro_batches > 1:
        if fsdp > 1:
            sums.append(Joined("reduce-scatter", micro_batches * shares, fsdp))
            sums.append(Joined("all-reduce", micro_batches * other, fsdp))
        leaves = jax.tree.leaves(state.params)
        shares, other = 4 * sum(math.prod(x.sharding.shard_shape(x.shape)) for x in leaves), 0
    elif split:
        sums.append(Joined("reduce-scatter", shares, fsdp))
    sums.append(Joined("all-reduce", shares, data, stride=fsdp))
    sums.append(Joined("all-reduce", other, data * fsdp))
    return [part for part in sums if part.group > 1 and part.size]


def _gradient_bytes(params: PyTree, model: ImageClassifier) -> tuple[int, int]:
    """Bytes of the gradients of what is split, and of the rest.

    Norms, factors and the head are computed in float32.
    """
    found = {True: 0, False: 0}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name.split("/")[0] in model.WITHOUT_EXAMPLES:
            continue
        exact = any(word in name for word in ("norm", "scale", "head"))
        itemsize = 4 if exact else jnp.dtype(model.dtype).itemsize
        found[leaf.sharding.shard_shape(leaf.shape) != leaf.shape] += itemsize * leaf.size
    return found[True], found[False]


def gathered_bytes(model: ImageClassifier, state: TrainState, micro_batches: int) -> int:
    """Bytes of the weights that ``fsdp`` gathers in a step.

    For every micro-batch those of every layer twice, for the forward and for the backward pass, in
    the dtype of the computation; once in a step patch projection, positions and head.
    """
    stacked, _ = layers_of(model, state.params)
    layers, all_split = _split_values(stacked), _split_values(state.params)
    values = 2 * micro_batches * layers + all_split - layers
    return jnp.dtype(model.dtype).itemsize * values


def _split_values(tree: PyTree) -> int:
    """Count the values of the leaves that no device holds whole."""
    leaves = jax.tree.leaves(tree)
    return sum(x.size for x in leaves if x.sharding.shard_shape(x.shape) != x.shape)


def values(tree: PyTree) -> int:
    """Count the values of all leaves together."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))

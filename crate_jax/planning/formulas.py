"""What a training step needs, by formula: memory, and what its devices send each other."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from crate_jax.config import OptimConfig
from crate_jax.models.classifier import ImageClassifier
from crate_jax.models.cost import activation_bytes, gradient_parts
from crate_jax.parallel import PyTree
from crate_jax.planning.chips import Joined
from crate_jax.tasks.task import Batch
from crate_jax.training.run import Run
from crate_jax.training.state import TrainState

# What a backward pass holds for a moment, beside the activations of the layer under way: so many
# float32 arrays of tokens, and of the patches' pixels. Fitted to programs compiled for CPU devices,
# and to those for accelerators, which fuse more and overwrite in place.
_WORKING_ON_CPU, _WORKING = (2, 6), (1, 0)


@dataclasses.dataclass(frozen=True)
class Need:
    """What the formulas give for a step.

    Attributes:
        memory: bytes of a device by kind, see `memory_bytes`.
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
    run: Run, model: ImageClassifier, state: TrainState, batch: Batch, *, on_cpu: bool = False
) -> Need:
    """What a step of a run needs with a model in place of its own.

    Args:
        run: reads its mesh and the optimizer's config.
        model: see `memory_bytes`.
        state: shapes with shardings.
        batch: likewise.
        on_cpu: whether the compiler is that for CPUs. It adds the gradient of a weight in several
            products up over the devices product by product: D's from Y Dᵀ and E D.
    """
    optim = run.config.optim
    parts = gradient_parts(model) if on_cpu else 0
    sums = gradient_sums(model, state, run.mesh, optim.accumulate_steps, parts)
    gathered = gathered_bytes(model, state, optim.accumulate_steps)
    if gathered:
        sums.append(Joined("all-gather", gathered, run.mesh.shape["fsdp"]))
    return Need(memory_bytes(model, state, batch, optim, on_cpu=on_cpu), sums)


def memory_bytes(
    model: ImageClassifier,
    state: TrainState,
    batch: Batch,
    optim: OptimConfig,
    *,
    on_cpu: bool = False,
) -> dict[str, int]:
    """Bytes that one device holds at the height of a training step, by kind.

    Args:
        model: reads its sizes, backward, dtype, remat and scan_unroll.
        state: shapes with shardings.
        batch: likewise.
        optim: reads optimizer and accumulate_steps.
        on_cpu: whether the program is compiled for CPUs.

    Returns:
        ``parameters``, ``optimizer`` (with the average, if any), ``gradients``, ``activations``
        (what the backward pass keeps of all layers), ``working`` (what it holds of one layer for a
        moment, or of those that scan_unroll joins and remat computes again), ``copies`` (of what
        XLA for CPUs overwrites while it is still read) and ``batch``. ``working`` and ``copies``
        are fitted to compiled programs.
    """
    micro_batches = optim.accumulate_steps
    any_of_batch = jax.tree.leaves(batch)[0]
    rows = any_of_batch.sharding.shard_shape(any_of_batch.shape)[0] // micro_batches
    params = _bytes(state.params, per_device=True)
    at_once = 1 if model.remat == "none" else model.layers_at_once
    layers = at_once * activation_bytes(model.clone(remat="none")) // model.depth
    of_tokens, of_patches = _WORKING_ON_CPU if on_cpu else _WORKING
    values = of_tokens * model.num_tokens * model.width
    values += of_patches * math.prod(model.input_shape)
    working = rows * (layers + 4 * values)
    # Lion's moment makes both the update and the next moment; with more micro-batches the second
    # set of gradients is free by then.
    copies = params if on_cpu and optim.optimizer == "lion" and micro_batches == 1 else 0
    if params < _bytes(state.params, per_device=False):
        # The weights of a layer, gathered, and their gradients; and the shards of all layers.
        stacked, many = _layers_of(model, state.params)
        working += 2 * _bytes(stacked, per_device=False) // many
        copies += _bytes(stacked, per_device=True) if on_cpu else 0
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
        mesh: of the run.
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
        shares, other = _bytes(state.params, per_device=True), 0
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
        exact = any(word in name for word in ("norm", "scale", "head"))
        itemsize = 4 if exact else jnp.dtype(model.dtype).itemsize
        found[leaf.sharding.shard_shape(leaf.shape) != leaf.shape] += itemsize * leaf.size
    return found[True], found[False]


def gathered_bytes(model: ImageClassifier, state: TrainState, micro_batches: int) -> int:
    """Bytes of the weights that ``fsdp`` gathers in a step.

    For every micro-batch those of every layer twice, for the forward and for the backward pass, in
    the dtype of the computation; once in a step patch projection, positions and head.
    """
    stacked, _ = _layers_of(model, state.params)
    layers, all_split = _split_values(stacked), _split_values(state.params)
    values = 2 * micro_batches * layers + all_split - layers
    return jnp.dtype(model.dtype).itemsize * values


def _layers_of(model: ImageClassifier, params: PyTree) -> tuple[PyTree, int]:
    """The parameters of the layers, and of how many layers; of one where all share them."""
    return (params["block"], 1) if model.SHARED else (params["blocks"], model.depth)


def _split_values(tree: PyTree) -> int:
    """How many values the leaves have that no device holds whole."""
    leaves = jax.tree.leaves(tree)
    return sum(x.size for x in leaves if x.sharding.shard_shape(x.shape) != x.shape)


def values(tree: PyTree) -> int:
    """How many values all leaves have together."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def _bytes(tree: PyTree, *, per_device: bool) -> int:
    """Bytes of all leaves, or of one device's share of them."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        shape = leaf.sharding.shard_shape(leaf.shape) if per_device else leaf.shape
        total += math.prod(shape) * leaf.dtype.itemsize
    return total

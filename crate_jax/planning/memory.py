"""The memory of a device at the height of a training step, by formula.

The height is in the backward pass: the activations of all layers are still there, and the gradients
of all layers have their room already. What comes besides is known of programs that XLA's compilers
made, and differs between them; the figures here that are fitted to such programs are said to be.
"""

import math
from collections.abc import Iterable

import jax
import jax.numpy as jnp

from crate_jax.config import OptimConfig
from crate_jax.models.attention import has_kernel
from crate_jax.models.cost import activation_bytes, layer_bytes
from crate_jax.models.language import LanguageModel
from crate_jax.models.stacked import BlockModel
from crate_jax.parallel import PyTree, on_mesh
from crate_jax.planning.chips import Chip
from crate_jax.tasks.task import Batch
from crate_jax.training.run import Run
from crate_jax.training.state import TrainState

# Fitted, for CPUs and for GPUs: what a backward pass holds for a moment beside the activations of
# the layer under way, in float32 arrays of tokens and of the patches' pixels.
_TOKENS_AND_PIXELS = {"cpu": (2, 6), "gpu": (1, 0)}
# Fitted, for TPUs: arrays of tokens in the dtype of the computation; the share of the memory inside
# the chip that holds whole arrays of a step; and the tables of addresses that a program has.
_TOKENS, _SHARE_INSIDE, _TABLES = 6, 9 / 16, 3 * 2**20
_LOGITS = 2  # arrays of a text's logits in float32: themselves and their gradient
_SCORES = 3  # arrays of a layer in float32 without a kernel: A, dA and dS
_LANES = 128  # values in a row of a TPU's memory


def memory_bytes(
    run: Run,
    model: BlockModel,
    state: TrainState,
    batch: Batch,
    *,
    platform: str,
    chip: Chip | None = None,
) -> dict[str, int]:
    """Bytes that one device holds at the height of a training step, by kind.

    Args:
        run: reads its mesh and the optimizer's config.
        model: reads its sizes, backward, dtype, remat and scan_unroll.
        state: shapes with shardings.
        batch: likewise.
        platform: "cpu", "gpu" or "tpu": whose compiler.
        chip: reads how much memory a TPU has inside.

    Returns:
        ``parameters``, ``optimizer`` (with the average, if any), ``gradients``, ``activations``
        (what the backward pass keeps of all layers, and of a stem and class attention),
        ``working`` (what it holds of one layer for a moment, or of those that scan_unroll joins and
        remat computes again), ``copies`` (of all weights, see `_copies`) and ``batch``. Of TPUs
        also ``inside``, less than zero: what of all this lies in the memory inside the chip. Of
        joined layers that are computed again jaxlib 0.11 for CPUs holds fewer at a time: the
        formula says more than it needs.
    """
    optim, on_tpu = run.config.optim, platform == "tpu"
    any_of_batch = jax.tree.leaves(batch)[0]
    rows = any_of_batch.sharding.shard_shape(any_of_batch.shape)[0] // optim.accumulate_steps
    # With more micro-batches there is their sum besides.
    sets = 2 if optim.accumulate_steps > 1 else 1
    params = _bytes(state.params, tiled=on_tpu)
    found = {
        "parameters": params,
        "optimizer": _bytes(state, tiled=on_tpu) - params,
        "gradients": params * sets,
        "activations": rows * activation_bytes(model),
        "working": _working(run, model, rows, platform),
        "copies": _copies(optim, model, state, platform),
        "batch": _bytes(batch),
    }
    if _is_split(state):
        # The weights of a layer, gathered, and their gradients.
        stacked, many = layers_of(model, state.params)
        whole = sum(leaf.size for leaf in jax.tree.leaves(stacked)) // many
        found["working"] += 2 * whole * (jnp.dtype(model.dtype).itemsize if on_tpu else 4)
    if on_tpu:
        # The compiler lays tokens out along the width, or along the examples.
        fill = _filled_up((model.width, rows))
        found["activations"] = round(found["activations"] * fill)
        found["working"] += _TABLES
        computed = sum(found[k] for k in ("gradients", "activations", "working", "copies"))
        inside = round(_SHARE_INSIDE * chip.inside) if chip else 0
        found["inside"] = -min(inside, computed - _TABLES)
    return found


def _working(run: Run, model: BlockModel, rows: int, platform: str) -> int:
    """Bytes that the layer under way and the patches take for a moment, or the logits of a text."""
    tokens = model.num_tokens * model.width
    pixels = math.prod(jax.eval_shape(model.sample_input).shape)
    again = 0 if model.remat == "none" else model.layers_at_once
    if platform == "tpu":
        # Its compiler overwrites in place, and so has no second layer beside the kept ones. Pixels
        # are float32 until the patches' gradient is there.
        itemsize = jnp.dtype(model.dtype).itemsize
        values = round(_TOKENS * itemsize * tokens * _filled_up((model.width, rows))) + 4 * pixels
        if not _has_kernel(run, model):
            N = model.num_tokens
            values += round(4 * _SCORES * model.num_heads * N * N * _filled_up((N,)))
    else:
        again = again or 1
        of_tokens, of_pixels = _TOKENS_AND_PIXELS[platform]
        values = 4 * (of_tokens * tokens + of_pixels * pixels)
    layers = again * layer_bytes(model.clone(remat="none"))
    logits = model.num_tokens * model.vocab_size if isinstance(model, LanguageModel) else 0
    return rows * max(layers + values, 4 * _LOGITS * logits)


def _copies(optim: OptimConfig, model: BlockModel, state: TrainState, platform: str) -> int:
    """Bytes of copies of all weights.

    The compiler for TPUs casts those of all layers before their loop. That for CPUs copies what it
    overwrites while it is still read: Lion's moment makes both the update and the next moment; with
    more micro-batches the second set of gradients is free by then. And the shards of all layers.
    """
    blocks, _ = layers_of(model, state.params)
    if platform == "tpu":
        itemsize = jnp.dtype(model.dtype).itemsize
        return _bytes(blocks, tiled=True) * itemsize // 4 if itemsize < 4 else 0
    if platform != "cpu":
        return 0
    once = optim.optimizer == "lion" and optim.accumulate_steps == 1
    shards = _bytes(blocks) if _is_split(state) else 0
    return (_bytes(state.params) if once else 0) + shards


def _has_kernel(run: Run, model: BlockModel) -> bool:
    """True if a kernel for TPUs computes the attention, so that no score lies in memory."""
    if model.attention_part.name != "mssa" or model.backward != "derived":
        return False
    if isinstance(model, LanguageModel):  # no kernel knows a mask
        return False
    found: list[bool] = []

    def ask(V_BxNxKxp: jax.Array) -> None:
        found.append(has_kernel("tpu", V_BxNxKxp, getattr(model, "attention_kernel", "auto")))

    shape = (run.config.batch_size, model.num_tokens, model.num_heads, model.subspace_dim)
    jax.eval_shape(on_mesh(run.mesh, ask), jax.ShapeDtypeStruct(shape, jnp.dtype(model.dtype)))
    return found[0]


def _is_split(state: TrainState) -> bool:
    """True if a device holds only a part of the parameters."""
    leaves = jax.tree.leaves(state.params)
    return any(x.sharding.shard_shape(x.shape) != x.shape for x in leaves)


def _bytes(tree: PyTree, *, tiled: bool = False) -> int:
    """Bytes of one device's share of all leaves.

    Args:
        tree: shapes with shardings.
        tiled: whether they lie in a TPU's memory, whose rows are filled up.
    """
    total = 0
    for leaf in jax.tree.leaves(tree):
        shape = leaf.sharding.shard_shape(leaf.shape)
        fill = _filled_up(shape) if tiled and len(shape) > 1 else 1
        total += round(math.prod(shape) * fill) * leaf.dtype.itemsize
    return total


def _filled_up(shape: Iterable[int]) -> float:
    """By how much an array grows in a TPU's memory along the axis where it grows least."""
    return min(-(-n // _LANES) * _LANES / n for n in shape)


def layers_of(model: BlockModel, params: PyTree) -> tuple[PyTree, int]:
    """The parameters of the layers, and of how many layers; of one where all share them."""
    return (params["block"], 1) if model.SHARED else (params["blocks"], model.depth)

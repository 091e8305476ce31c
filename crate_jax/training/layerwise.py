"""Rules of the optimizer for single tensors and layers: clipping, and rates.

Names of the parameter tree decide. Layers that are stacked on axis 0 of a leaf below ``blocks``, or
below a name that ends in it, count as so many tensors.
"""

import itertools
from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from crate_jax.parallel import PyTree

EMBEDDING, BLOCKS = "embedding", "blocks"  # a group with both of them is a backbone
TOKENS = ("mask_token", "register_tokens")  # of a backbone that lie outside its embedding
# The parts that turn pixels into tokens, below the embedding: no class token, no positions.
PATCH_PARTS = ("patch_norm", "projection", "token_norm", "stem")

Path = tuple[str, ...]


def clip_each(clip: float) -> optax.GradientTransformation:
    """Scale the gradient of every tensor so that its norm is at most ``clip``.

    g ← g · min(1, clip / (‖g‖ + 10⁻⁶)), with the norm of one parameter of one layer. It is
    computed in float32.
    Source: the official implementation of arXiv 2502.10385, which clips as arXiv 2104.14294's does.

    Args:
        clip: the largest norm.
    """

    def scaled(path: tuple[object, ...], g: Array) -> Array:
        axes = tuple(range(1 if _is_stacked(_names(path)) else 0, g.ndim))
        wide = g.astype(jnp.float32)
        norm = jnp.sqrt(jnp.sum(jnp.square(wide), axis=axes, keepdims=True))
        return (wide * jnp.minimum(1, clip / (norm + 1e-6))).astype(g.dtype)

    def update(updates: PyTree, params: PyTree | None) -> PyTree:
        del params
        return jax.tree.map_with_path(scaled, updates)

    return optax.stateless(update)


def scale_by_layer(layer_decay: float, patch_scale: float = 1.0) -> optax.GradientTransformation:
    """Multiply updates by the factors of `layer_rates`. Chain it behind the learning rate.

    Raises:
        ValueError: of the parameters; see `layer_rates`.
    """

    def init(params: PyTree) -> optax.EmptyState:
        layer_rates(params, layer_decay, patch_scale)  # what is wrong is told before the first step
        return optax.EmptyState()

    def update(
        updates: PyTree, state: PyTree, params: PyTree | None = None
    ) -> tuple[PyTree, PyTree]:
        del params
        rates = layer_rates(updates, layer_decay, patch_scale)
        return jax.tree.map(lambda u, rate: u * rate.astype(u.dtype), updates, rates), state

    return optax.GradientTransformation(init, update)


def layer_rates(params: PyTree, layer_decay: float, patch_scale: float = 1.0) -> PyTree:
    """The factor of the learning rate of every parameter, decay^(L + 1 − i) in layer i.

    The embedding is layer 0, with patches, positions and class token, and so are tokens for masks
    and registers. Block i, counted from 1, is layer i of L. All else has the factor 1: the last
    LayerNorm, the head, a decoder. The patches' own parameters have ``patch_scale`` too.
    Source: the official implementation of arXiv 2304.07193.

    Args:
        params: parameters, or what lies as they do. A backbone in them is a group that has both
            ``embedding`` and ``blocks``; it may be the whole tree, or lie deeper.
        layer_decay: of a layer, towards the images.
        patch_scale: of the linear map, or the convolutions, of the patches and their LayerNorms.

    Returns:
        NumPy arrays (L, 1, …) of stacked leaves, with as many axes as the leaf, and (1, …) of
        others.

    Raises:
        ValueError: no backbone is there for a decay, or no patches for a scale.
    """
    leaves, treedef = jax.tree.flatten_with_path(params)
    paths = [_names(path) for path, _ in leaves]
    backbones = _roots(paths, EMBEDDING) & _roots(paths, BLOCKS)
    if layer_decay != 1 and not backbones:
        raise ValueError(
            f"optim.layer_decay must be 1 for parameters without {EMBEDDING} and {BLOCKS}, whose "
            f"layers have none of their own; got {layer_decay}. Leave it unset."
        )
    if patch_scale != 1 and not any(_of_patches(path) for path in paths):
        raise ValueError(
            "optim.patch_lr_scale must be 1 for parameters without patches "
            f"({EMBEDDING}/{', '.join(PATCH_PARTS)}); got {patch_scale}. Leave it unset."
        )
    depths = {root: _depth(leaves, paths, root) for root in backbones}
    rates = []
    for path, (_, leaf) in zip(paths, leaves, strict=True):
        exponents = np.zeros(1)
        for root, depth in depths.items():
            below = path[len(root)] if path[: len(root)] == root else ""
            if below == EMBEDDING or (below and path[-1] in TOKENS):
                exponents = np.full(1, depth + 1)
            elif below == BLOCKS:
                exponents = depth - np.arange(depth)
        rate = layer_decay**exponents * (patch_scale if _of_patches(path) else 1)
        rates.append(rate.reshape(-1, *[1] * (leaf.ndim - 1)) if leaf.ndim else rate[0])
    return jax.tree.unflatten(treedef, rates)


def _names(path: tuple[object, ...]) -> Path:
    return tuple(jax.tree_util.keystr(path, simple=True, separator="/").split("/"))


def _is_stacked(path: Path) -> bool:
    """True if the leaf has layers on axis 0."""
    return any(part == BLOCKS or part.endswith(f"_{BLOCKS}") for part in path[:-1])


def _roots(paths: Iterable[Path], group: str) -> set[Path]:
    """The groups that have this group in them."""
    return {path[: path.index(group)] for path in paths if group in path[:-1]}


def _depth(leaves: Sequence[tuple[object, PyTree]], paths: Sequence[Path], root: Path) -> int:
    """L of the blocks below a group."""
    place = next(i for i, path in enumerate(paths) if path[: len(root) + 1] == (*root, BLOCKS))
    return leaves[place][1].shape[0]


def _of_patches(path: Path) -> bool:
    return any(
        part == EMBEDDING and below in PATCH_PARTS for part, below in itertools.pairwise(path)
    )

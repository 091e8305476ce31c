"""Parameters that stay orthonormal: each optimizer step ends with a projection."""

import jax
import jax.numpy as jnp
import optax
from jax import Array

from crate_jax import placement
from crate_jax.options import did_you_mean
from crate_jax.parallel import PyTree

_STACKED, _SHARED = 1, 2  # whether a parameter has the layers on axis 0, or all have the one


def orthonormal(names: tuple[str, ...]) -> optax.GradientTransformation:
    """Project the updated parameters onto orthonormal columns. Chain it last.

    A parameter (L, d, …) is a matrix (d, m) for each layer, its last axes side by side. So are the
    first ones of W_out (L, K, p, d), whose last is the longest: (K p, d). A parameter that all
    layers share, below ``block``, has no axis L. The update
    X → X + ΔX becomes X → P(X + ΔX). P is the nearest matrix with orthonormal columns, or rows
    where m > d: P(X) = A Bᵀ for the singular value decomposition X = A Σ Bᵀ. A step costs these
    decompositions.

    Args:
        names: the names of the parameters, the last part of their paths.

    Raises:
        KeyError: a name that no parameter of three axes or more has; of two, where layers share it.
    """

    def project(updates: PyTree, params: PyTree | None) -> PyTree:
        if params is None:
            raise ValueError("update must be given params; got None. Hand them in.")
        chosen, treedef = jax.tree.flatten(_chosen(params, names))
        leaves = zip(treedef.flatten_up_to(params), treedef.flatten_up_to(updates), strict=True)
        moved, before = [], None
        for of, (x, dx) in zip(chosen, leaves, strict=True):
            if of:
                X = x + dx if before is None else placement.after(x + dx, before)
                before = nearest(X) if of == _STACKED else nearest(X[None])[0]
                dx = before - x
            moved.append(dx)
        return treedef.unflatten(moved)

    return optax.stateless(project)


def nearest(X: Array) -> Array:
    """The nearest array to X whose matrices, as `orthonormal` says, have orthonormal columns."""
    L, *axes = X.shape
    sides = (axes[0], -1) if axes[0] >= axes[-1] or len(axes) == 2 else (-1, axes[-1])
    left, _, right = jnp.linalg.svd(X.reshape(L, *sides), full_matrices=False)
    found = jnp.einsum("ldr,lrm->ldm", left, right, precision="highest")
    return found.reshape(X.shape).astype(X.dtype)


def _chosen(params: PyTree, names: tuple[str, ...]) -> PyTree:
    """Mark the leaves that have one of the names: 0, `_STACKED` or `_SHARED`."""
    leaves, treedef = jax.tree.flatten_with_path(params)
    names_of = (jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves)
    kinds = [_SHARED if "block" in name.split("/") else _STACKED for name in names_of]
    ends = [
        jax.tree_util.keystr(path[-1:], simple=True) if leaf.ndim + (kind == _SHARED) > 2 else ""
        for (path, leaf), kind in zip(leaves, kinds, strict=True)
    ]
    for name in names:
        if name not in ends:
            known = {end for end in ends if end}
            raise KeyError(
                f"optim.orthonormal must name parameters of three axes or more; got {name}. "
                + did_you_mean(name, known)
            )
    pairs = zip(ends, kinds, strict=True)
    return jax.tree.unflatten(treedef, [kind * (end in names) for end, kind in pairs])

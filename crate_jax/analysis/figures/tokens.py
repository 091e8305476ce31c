"""Pictures of a layer's parts and of its output: tokens, subspaces and atoms."""

import numpy as np

from crate_jax.analysis.figures.canvas import (
    Picture,
    cells,
    drawing,
    grid_of_axes,
    long_table,
    number,
    show_matrix,
)

SHOWN_TOKENS, SHOWN_ATOMS = 50, 64
_ACROSS = 4  # panels in a row


@drawing
def token_maps(Z_LxNxd: np.ndarray) -> Picture:
    """Tokens of one example after every layer, columns as in the paper: Z^ℓ is d x N.

    At most 50 tokens and 50 of their entries are drawn, evenly chosen, and each layer by its own
    largest value. Source: the figures of arXiv 2306.01129, which draw 50 x 50 of them.

    Args:
        Z_LxNxd: output of every layer.
    """
    L, N, d = Z_LxNxd.shape
    tokens, entries = (np.linspace(0, n - 1, min(n, SHOWN_TOKENS)).astype(int) for n in (N, d))
    shown_LxExT = Z_LxNxd[:, tokens][:, :, entries].swapaxes(1, 2)
    figure, panels = _panels(L)
    for layer, axes in enumerate(panels[:L]):
        show_matrix(axes, shown_LxExT[layer])
        axes.set_title(f"ℓ = {layer + 1}")
    zeros_L = (Z_LxNxd == 0).mean(axis=(1, 2))
    alt = (
        f"Tokens of one example as heat maps, {len(entries)} of {d} entries down and "
        f"{len(tokens)} of {N} tokens across, after each of {L} layers. The share of entries that "
        f"are zero is {number(zeros_L[0])} after layer 1 and {number(zeros_L[-1])} after layer {L}."
    )
    return Picture(figure, alt, long_table(("layer", "entry", "token", "value"), shown_LxExT))


@drawing
def subspace_grams(U_LxdxKxp: np.ndarray) -> Picture:
    """U_[K]ᵀ U_[K] of every layer, with U_[K] = [U_1, …, U_K] and columns of length one.

    Bases that are orthonormal, in subspaces that share no direction, would make the unit matrix.
    What is more than 96 wide is averaged over cells, its absolute values.
    Differs from the paper's figure: columns have length one, so that layers can be compared.

    Args:
        U_LxdxKxp: bases of the subspaces.
    """
    L, d, K, p = U_LxdxKxp.shape
    figure, panels = _panels(L)
    reduced, within, between = [], [], []
    for layer, axes in enumerate(panels[:L]):
        gram, pairs = _cosines(U_LxdxKxp[layer].reshape(d, K * p))
        own = np.kron(np.eye(K, dtype=bool), np.ones((p, p), bool))
        within.append(_mean(pairs[own & ~np.eye(K * p, dtype=bool)]))
        between.append(_mean(pairs[~own]))
        shown, n = cells(gram if K * p <= 96 else pairs)
        show_matrix(axes, shown, largest=1.0 if n == 1 else None)
        for k in range(1, K):
            at = k * p / n - 0.5
            axes.axhline(at, color="gray", linewidth=0.4)
            axes.axvline(at, color="gray", linewidth=0.4)
        axes.set_title(f"ℓ = {layer + 1}")
        reduced.append(shown)
    alt = (
        f"Cosines between the columns of {K} bases of {p} columns in each of {L} layers. Within a "
        f"subspace their mean absolute value is {number(within[0])} in layer 1 and "
        f"{number(within[-1])} in layer {L}"
    )
    if K > 1:
        alt += f"; between subspaces it is {number(between[0])} and {number(between[-1])}"
    table = long_table(("layer", "row", "column", "cosine"), np.stack(reduced))
    return Picture(figure, alt + ".", table)


@drawing
def dictionary_gram(D_LxdxN: np.ndarray) -> Picture:
    """Cosines between the atoms of the dictionary of every layer: Dᵀ D with atoms of length one.

    Args:
        D_LxdxN: dictionaries, atoms as columns.
    """
    L, d, m = D_LxdxN.shape
    figure, panels = _panels(L)
    reduced, means, largest = [], [], []
    for layer, axes in enumerate(panels[:L]):
        gram, pairs = _cosines(D_LxdxN[layer])
        others = pairs[~np.eye(m, dtype=bool)]
        means.append(_mean(others))
        largest.append(others.max(initial=0.0))
        shown, n = cells(gram if m <= 96 else pairs)
        show_matrix(axes, shown, largest=1.0 if n == 1 else None)
        axes.set_title(f"ℓ = {layer + 1}")
        reduced.append(shown)
    alt = (
        f"Cosines between the {m} atoms of {d} entries in each of {L} layers. The mean absolute "
        f"value of two different atoms is {number(means[0])} in layer 1 and {number(means[-1])} in "
        f"layer {L}; the largest are {number(largest[0])} and {number(largest[-1])}."
    )
    table = long_table(("layer", "row", "column", "cosine"), np.stack(reduced))
    return Picture(figure, alt, table)


@drawing
def atoms_as_patches(D_dxm: np.ndarray, W_hxwxcxd: np.ndarray) -> Picture:
    """Atoms of the first layer's dictionary as patches of an image: W a, scaled to its largest.

    Of all patches of one length W a is the one whose linear map lies most along the atom a, where
    the embedding maps a patch x to Wᵀ x. Norms and positions are left out of this. At most 64
    atoms, the longest ones, are drawn.

    Args:
        D_dxm: dictionary of the first layer, atoms as columns.
        W_hxwxcxd: the linear map of a patch.
    """
    h, w, c, _ = W_hxwxcxd.shape
    lengths_m = np.linalg.norm(D_dxm, axis=0)
    shown = np.argsort(-lengths_m, kind="stable")[:SHOWN_ATOMS]
    patches_mxhxwxc = np.einsum("hwcd,dm->mhwc", W_hxwxcxd, D_dxm[:, shown])
    columns = min(8, len(shown))
    figure, panels = grid_of_axes(-(-len(shown) // columns), columns, side=0.62, top=0.06)
    for axes, patch in zip(panels.flat, patches_mxhxwxc, strict=False):
        most = np.abs(patch).max() or 1.0
        if c == 3:
            axes.imshow(0.5 + patch / (2 * most))
        else:
            show_matrix(axes, patch.mean(axis=-1), largest=float(most))
    alt = (
        f"{len(shown)} of {D_dxm.shape[1]} atoms of the first layer's dictionary as patches of "
        f"{h} x {w} pixels, the longest first. Their lengths are {number(lengths_m[shown[0]])} to "
        f"{number(lengths_m[shown[-1]])}."
    )
    table = long_table(("place", "row", "column", "channel", "value"), patches_mxhxwxc)
    return Picture(figure, alt, {"atom": np.repeat(shown + 1, h * w * c)} | table)


def _panels(count: int):
    """A figure of so many panels, and these in a row."""
    columns = min(_ACROSS, count)
    figure, panels = grid_of_axes(-(-count // columns), columns, side=1.75)
    return figure, list(panels.flat)


def _cosines(columns_dxn: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cosines between columns (n, n), and their absolute values; a zero column has none."""
    lengths = np.linalg.norm(columns_dxn, axis=0)
    unit = columns_dxn / np.where(lengths > 0, lengths, 1)
    gram = unit.T @ unit
    return gram, np.abs(gram)


def _mean(values: np.ndarray) -> float:
    """The mean; of nothing 0."""
    return float(values.mean()) if values.size else 0.0

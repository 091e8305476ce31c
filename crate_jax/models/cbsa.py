"""Contract-and-broadcast self-attention (CBSA): all tokens are moved by way of a few.

A few representatives gather what the tokens are, settle it among themselves as MSSA would, and hand
it back. That costs N m p a subspace for m representatives where MSSA costs N² p. The letters are
those of `crate_jax.models.layers`, and R are the representatives, m of them.
"""

import dataclasses
import math
from collections.abc import Callable, Collection
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name as keep
from jax.nn import initializers as init

from crate_jax import placement
from crate_jax.models.attention import keep_merged
from crate_jax.models.derivatives import attend, wide
from crate_jax.models.layers import Attended
from crate_jax.models.parameters import SubspaceMaps, parameter, read_bases, read_output
from crate_jax.models.subspaces import into_subspaces, out_of_subspaces

Pool = Callable[[Array], Array]


def contract_and_broadcast(
    V_BxNxKxp: Array, R_BxmxKxp: Array, step_r_K: Array, step_x_K: Array
) -> tuple[Array, Array]:
    """Apply CBSA to subspace tokens and their representatives: s_x Aᵀ SSA(R + s_r A V), and A.

    The contraction A = softmax(p^{-1/2} R Vᵀ) is the attention of each representative to the
    tokens. They move to what they see, attend to each other, SSA(R) = softmax(p^{-1/2} R Rᵀ) R, and
    Aᵀ broadcasts that to the tokens. Where every token is its own representative, A is MSSA's
    attention.
    Source: arXiv 2509.16875 and its code.

    Args:
        V_BxNxKxp: tokens in K subspaces.
        R_BxmxKxp: representatives in them.
        step_r_K: how far the representatives of a subspace move, s_r.
        step_x_K: how far its tokens do, s_x.

    Returns:
        The update O (B, N, K, p) and A (B, K, m, N), whose rows sum to one; both of the dtype of
        the tokens. Scores and softmax are of dtype `wide`.
    """
    V_BxKxNxp, R_BxKxmxp = V_BxNxKxp.swapaxes(1, 2), R_BxmxKxp.swapaxes(1, 2)
    S_BxKxmxN = jnp.einsum(
        "bkmp,bknp->bkmn", R_BxKxmxp, V_BxKxNxp, preferred_element_type=wide(V_BxNxKxp.dtype)
    )
    A_BxKxmxN = jax.nn.softmax(S_BxKxmxN * V_BxNxKxp.shape[-1] ** -0.5)
    A_BxKxmxN = keep(A_BxKxmxN.astype(V_BxNxKxp.dtype), "contraction")
    seen_BxKxmxp = jnp.einsum("bkmn,bknp->bkmp", A_BxKxmxN, V_BxKxNxp)
    seen_BxKxmxp = keep(seen_BxKxmxp, "representatives")
    step_r_1xKx1x1, step_x_1x1xKx1 = (
        step_r_K.astype(V_BxNxKxp.dtype)[None, :, None, None],
        step_x_K.astype(V_BxNxKxp.dtype)[None, None, :, None],
    )
    R_BxKxmxp = keep(R_BxKxmxp + step_r_1xKx1x1 * seen_BxKxmxp, "representatives")
    settled_BxKxmxp = keep(attend(R_BxKxmxp)[0], "representatives")
    O_BxKxNxp = jnp.einsum("bkmn,bkmp->bknp", A_BxKxmxN, settled_BxKxmxp)
    return step_x_1x1xKx1 * keep_merged(O_BxKxNxp.swapaxes(1, 2), "attended"), A_BxKxmxN


def average_pool(V_BxNxKxp: Array, grid: tuple[int, int], cells: tuple[int, int]) -> Array:
    """Means over the cells that cut a grid of tokens, row by row: PyTorch's adaptive pooling.

    Cell i of c along a side of n tokens holds those from ⌊i n / c⌋ to ⌈(i + 1) n / c⌉, the last one
    left out. So cells overlap where n is not a multiple of c, and repeat tokens where c > n.

    Args:
        V_BxNxKxp: tokens; the first of them fill the grid, row by row, and the others are left out.
        grid: (rows, columns) of tokens.
        cells: (rows, columns) of cells.

    Returns:
        Means (B, m, K, p), of the tokens' dtype.
    """
    B, _, K, p = V_BxNxKxp.shape
    on_grid_BxPxKxp = V_BxNxKxp[:, : math.prod(grid)]
    X_BxRxCxKxp = placement.reshape(on_grid_BxPxKxp, (B, *grid, K, p))
    for axis, (n, c) in enumerate(zip(grid, cells, strict=True), start=1):
        means = []
        for i in range(c):
            cell = jax.lax.slice_in_dim(X_BxRxCxKxp, i * n // c, -(-(i + 1) * n // c), axis=axis)
            means.append(cell.mean(axis=axis))
        X_BxRxCxKxp = jnp.stack(means, axis=axis)
    return placement.reshape(X_BxRxCxKxp, (B, math.prod(cells), K, p))


def cbsa(
    Y_BxNxd: Array,
    U_dxKxp: Array,
    step_r_K: Array,
    step_x_K: Array,
    W_out_Kxpxd: Array,
    b_out_d: Array | None = None,
    *,
    pool: Pool,
) -> Attended:
    """Contract-and-broadcast self-attention: W_out [O_1; …; O_K] + b_out of V_k = U_kᵀ Y.

    `contract_and_broadcast` makes O of V and of the representatives ``pool(V)``.
    Source: arXiv 2509.16875 and its code.

    Args:
        Y_BxNxd: tokens, normalised.
        U_dxKxp: bases of the K subspaces.
        step_r_K: s_r of each.
        step_x_K: s_x of each.
        W_out_Kxpxd: output projection.
        b_out_d: its bias; None: none.
        pool: from subspace tokens (B, N, K, p) to representatives (B, m, K, p).

    Returns:
        The update (B, N, d); seen are ``subspace_tokens`` (B, N, K, p) and ``contraction``
        (B, K, m, N), whose rows sum to one. All of the tokens' dtype, which the weights share.
    """
    V_BxNxKxp = into_subspaces(Y_BxNxd, U_dxKxp)
    O_BxNxKxp, A_BxKxmxN = contract_and_broadcast(V_BxNxKxp, pool(V_BxNxKxp), step_r_K, step_x_K)
    update_BxNxd = out_of_subspaces(O_BxNxKxp, W_out_Kxpxd, b_out_d)
    return Attended(update_BxNxd, {"subspace_tokens": V_BxNxKxp, "contraction": A_BxKxmxN})


class CBSA(SubspaceMaps, nn.Module):
    """`cbsa` with its parameters U (d, K, p), step_r and step_x (K,), W_out (K, p, d), b_out (d,).

    Its representatives are means over the cells of the grid of tokens; see `average_pool`. The
    steps start as N(0, 1).
    Differs from the paper, as the official code does: the grid is filled with the tokens from the
        first one on. So a class token takes the first place, each patch takes the place of the
        patch after it, and the last patch is in no cell.

    Attributes:
        grid: (rows, columns) of the patches.
        cells: (rows, columns) of the representatives.
    """

    TAPS: ClassVar[tuple[str, ...]] = ("subspace_tokens", "contraction")

    grid: tuple[int, int] = dataclasses.field(kw_only=True)
    cells: tuple[int, int] = dataclasses.field(kw_only=True)

    @nn.compact
    def __call__(
        self, Y_BxNxd: Array, mask: Array | None = None, taps: Collection[str] = ()
    ) -> Attended:
        """Normalised tokens (B, N, d) to their update and all taps, as `cbsa` returns them.

        Raises:
            ValueError: there is a mask.
        """
        if mask is not None:
            raise ValueError(
                "mask must be None for CBSA; got one. Its representatives see all tokens."
            )
        Y_BxNxd = Y_BxNxd.astype(self.dtype)
        d = Y_BxNxd.shape[-1]
        U_dxKxp = read_bases(self, d)
        step_r_K = parameter(self, "step_r", init.normal(1.0), (self.num_heads,))
        step_x_K = parameter(self, "step_x", init.normal(1.0), (self.num_heads,))
        W_out_Kxpxd, b_out_d = read_output(self, d)

        def pool(V_BxNxKxp: Array) -> Array:
            return average_pool(V_BxNxKxp, self.grid, self.cells)

        return cbsa(Y_BxNxd, U_dxKxp, step_r_K, step_x_K, W_out_Kxpxd, b_out_d, pool=pool)

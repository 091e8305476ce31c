"""How the tokens of a subspace attend to each other, as each kind of device does it fastest.

O = softmax(s V Vᵀ) V, s = p^{-1/2}. Nothing of size (N, N) is kept for the backward pass: it has V
and two numbers for each row of scores, and computes the scores again: the largest, and the sum of
the exponentials of what the others lie below it, in the units of whoever computed them. Only
reverse mode knows that pass; the plain function is `crate_jax.models.derivatives.attend`.
The letters are those of `crate_jax.models.layers`.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name as keep

from crate_jax import placement
from crate_jax.models import gpu
from crate_jax.models.derivatives import of_type, wide

# By whom: "auto", the kernel of the platform where it has one for the case; "xla", the compiler
# alone; "pallas", the kernel or nothing; "cudnn", NVIDIA's.
KERNELS = ("auto", "xla", "pallas", "cudnn")

_HALF = (jnp.bfloat16, jnp.float16)
_CACHED = 2**19  # scores that stay in the cache of a core


def attend_by(kernel: str, V_BxNxKxp: Array, mask: Array | None = None) -> Array:
    """O = softmax(p^{-1/2} V Vᵀ) V in every subspace.

    Scores, softmax and sums are of dtype `crate_jax.models.derivatives.wide`.

    Args:
        kernel: one of `KERNELS`.
        V_BxNxKxp: tokens in K subspaces.
        mask: as for `crate_jax.models.derivatives.attend`.

    Returns:
        O (B, N, K, p), of V's dtype.

    Raises:
        ValueError: the kernel does not run here, or not on these tokens.
    """
    _check(kernel, V_BxNxKxp, mask)
    return _cudnn(V_BxNxKxp) if kernel == "cudnn" else _attend(V_BxNxKxp, mask, kernel)


def _check(kernel: str, V_BxNxKxp: Array, mask: Array | None) -> None:
    """Refuse a kernel that is asked for and cannot run."""
    if kernel not in KERNELS:
        raise ValueError(f"attention_kernel must be one of {', '.join(KERNELS)}; got {kernel}.")
    if kernel in ("auto", "xla"):
        return
    reason = None
    if jax.default_backend() != "gpu":
        reason = f"it runs on NVIDIA's GPUs; here is a {jax.default_backend()}"
    elif V_BxNxKxp.dtype not in _HALF:
        reason = f"it takes bfloat16; these tokens are {V_BxNxKxp.dtype}"
    elif mask is not None:
        reason = "it knows no mask"
    elif V_BxNxKxp.shape[-1] > gpu.LONGEST_SUBSPACE or V_BxNxKxp.shape[-1] % 8:
        reason = (
            f"it takes subspaces of 8, 16, … {gpu.LONGEST_SUBSPACE} dimensions; these have "
            f"{V_BxNxKxp.shape[-1]}"
        )
    if reason:
        raise ValueError(f"attention_kernel={kernel} must fit; {reason}. Set it to auto.")


def _has_kernel(V_BxNxKxp: Array, mask: Array | None, kernel: str) -> bool:
    """Whether a GPU takes its kernel; how many digits a float32 product has is XLA's to know."""
    fits = V_BxNxKxp.dtype in _HALF and V_BxNxKxp.shape[-1] <= gpu.LONGEST_SUBSPACE
    return kernel != "xla" and mask is None and fits and V_BxNxKxp.size > 0


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _attend(V_BxNxKxp: Array, mask: Array | None, kernel: str) -> Array:
    return _attend_and_keep(V_BxNxKxp, mask, kernel)[0]


def _attend_and_keep(V_BxNxKxp: Array, mask: Array | None, kernel: str):
    if _has_kernel(V_BxNxKxp, mask, kernel):
        on_gpu = functools.partial(placement.by_rows, gpu.attend)
        found = jax.lax.platform_dependent(V_BxNxKxp, cuda=on_gpu, default=_attend_by_xla)
    else:
        found = _attend_by_xla(V_BxNxKxp, mask)
    O_BxNxKxp, *of_rows = found
    return keep(O_BxNxKxp, "attended"), (V_BxNxKxp, mask, *keep(of_rows, "statistics"))


def _attend_backward(
    kernel: str, kept: tuple[Array, Array | None, Array, Array], dO_BxNxKxp: Array
) -> tuple[Array, None]:
    V_BxNxKxp, mask, largest_BxKxN, total_BxKxN = kept
    by_platform: dict[str, Any] = {}
    if _has_kernel(V_BxNxKxp, mask, kernel):
        by_platform["cuda"] = functools.partial(placement.by_rows, gpu.attend_backward)
    if (images := _images_at_a_time(V_BxNxKxp, mask)) < V_BxNxKxp.shape[0]:
        by_platform["cpu"] = functools.partial(_backward_by_images, images)
    inputs = (V_BxNxKxp, largest_BxKxN, total_BxKxN, dO_BxNxKxp)
    if by_platform:
        dV = jax.lax.platform_dependent(*inputs, default=_backward_by_xla, **by_platform)
    else:
        dV = _backward_by_xla(*inputs, mask)
    return of_type(dV, V_BxNxKxp), None


_attend.defvjp(_attend_and_keep, _attend_backward)


def _attend_by_xla(V_BxNxKxp: Array, mask: Array | None = None) -> tuple[Array, Array, Array]:
    """O, and of the scores' rows the largest and the sum; O is divided by the sum at last."""
    V_BxKxNxp = V_BxNxKxp.swapaxes(1, 2)
    S_BxKxNxN = _scores(V_BxKxNxp, mask)
    largest_BxKxN = S_BxKxNxN.max(-1)
    E_BxKxNxN = jnp.exp(S_BxKxNxN - largest_BxKxN[..., None])
    total_BxKxN = E_BxKxNxN.sum(-1)
    O_BxKxNxp = _product("bknm,bkmp->bknp", E_BxKxNxN.astype(V_BxKxNxp.dtype), V_BxKxNxp)
    O_BxKxNxp = (O_BxKxNxp / total_BxKxN[..., None]).astype(V_BxKxNxp.dtype)
    return O_BxKxNxp.swapaxes(1, 2), largest_BxKxN, total_BxKxN


def _backward_by_xla(
    V_BxNxKxp: Array,
    largest_BxKxN: Array,
    total_BxKxN: Array,
    dO_BxNxKxp: Array,
    mask: Array | None = None,
) -> Array:
    """The gradient dV = Aᵀ dO + s (dS + dSᵀ) V; automatic differentiation has dS V and dSᵀ V apart.

    dS = A (dA − Σ A dA), row by row, with dA = dO Vᵀ. A is zero where the mask is, and so is dS.
    """
    V_BxKxNxp, dO_BxKxNxp = V_BxNxKxp.swapaxes(1, 2), dO_BxNxKxp.swapaxes(1, 2)
    A_BxKxNxN = jnp.exp(_scores(V_BxKxNxp, mask) - largest_BxKxN[..., None])
    A_BxKxNxN /= total_BxKxN[..., None]
    dA_BxKxNxN = _product("bknp,bkmp->bknm", dO_BxKxNxp, V_BxKxNxp)
    # In float32, so that the rows of dS sum to zero.
    dS_BxKxNxN = A_BxKxNxN * (dA_BxKxNxN - jnp.sum(A_BxKxNxN * dA_BxKxNxN, axis=-1, keepdims=True))
    both_BxKxNxN = (dS_BxKxNxN + dS_BxKxNxN.swapaxes(-1, -2)) * V_BxKxNxp.shape[-1] ** -0.5
    dtype = V_BxKxNxp.dtype
    dV_BxKxNxp = _product("bknm,bknp->bkmp", A_BxKxNxN.astype(dtype), dO_BxKxNxp)
    dV_BxKxNxp += _product("bknm,bkmp->bknp", both_BxKxNxN.astype(dtype), V_BxKxNxp)
    return dV_BxKxNxp.astype(dtype).swapaxes(1, 2)


def _scores(V_BxKxNxp: Array, mask: Array | None) -> Array:
    S_BxKxNxN = _product("bknp,bkmp->bknm", V_BxKxNxp, V_BxKxNxp) * V_BxKxNxp.shape[-1] ** -0.5
    return S_BxKxNxN if mask is None else jnp.where(mask, S_BxKxNxN, -jnp.inf)


def _product(axes: str, X: Array, Y: Array) -> Array:
    return jnp.einsum(axes, X, Y, preferred_element_type=wide(X.dtype))


def _images_at_a_time(V_BxNxKxp: Array, mask: Array | None) -> int:
    """How many images a CPU takes at a time, so that their scores stay in the cache in between."""
    B, N, K, _ = V_BxNxKxp.shape
    if mask is not None or placement.is_shared(V_BxNxKxp) or placement.axes_of_rows():
        return B
    return max((n for n in range(1, B + 1) if B % n == 0 and n * K * N * N <= _CACHED), default=1)


def _backward_by_images(images: int, *inputs: Array) -> Array:
    """`_backward_by_xla`, some images after the others."""

    def split(x: Array) -> Array:
        return x.reshape(-1, images, *x.shape[1:])

    dV = jax.lax.map(lambda some: _backward_by_xla(*some), tuple(map(split, inputs)))
    return dV.reshape(inputs[0].shape)


def _cudnn(V_BxNxKxp: Array) -> Array:
    """By cuDNN, to which tokens are queries, keys and values; it takes even numbers of them."""
    N = V_BxNxKxp.shape[1]
    even = jnp.pad(V_BxNxKxp, ((0, 0), (0, N % 2), (0, 0), (0, 0)))
    lengths = jnp.full(V_BxNxKxp.shape[0], N, jnp.int32)
    attended = jax.nn.dot_product_attention(
        even, even, even, implementation="cudnn",
        query_seq_lengths=lengths, key_value_seq_lengths=lengths,
    )  # fmt: skip
    return keep(attended[:, :N], "attended")

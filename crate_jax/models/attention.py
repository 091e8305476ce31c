"""Attention between the tokens of a subspace, by the fastest way on each kind of device.

O = softmax(S) V, S = s V Vᵀ, s = p^{-1/2}. Nothing of size (N, N) is kept for the backward pass. It
has V and two numbers for each row of scores, and computes the scores again. The numbers are the
largest score, max S, and the sum of e^(S − max S), whoever computes them: a backward pass may run
elsewhere than its forward pass did. Only reverse mode knows that pass; the plain function is
`crate_jax.models.derivatives.attend`.
The letters are those of `crate_jax.models.layers`.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name as keep

from crate_jax import placement
from crate_jax.models import gpu, tpu
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
        mask: see `crate_jax.models.derivatives.attend`.

    Returns:
        O (B, N, K, p), of V's dtype.

    Raises:
        ValueError: the kernel does not run here, or not on these tokens.
    """
    _check(kernel, V_BxNxKxp, mask)
    return _cudnn(V_BxNxKxp) if kernel == "cudnn" else _attend(V_BxNxKxp, mask, kernel)


def keep_merged(X_BxNxKxp: Array, name: str) -> Array:
    """X under a name by which the backward pass may save it, with its subspaces side by side.

    So a projection writes them. A TPU pads the last two axes of an array to 8 x 128.
    """
    if placement.is_shared(X_BxNxKxp):
        return keep(X_BxNxKxp, name)
    B, N, K, p = X_BxNxKxp.shape
    return keep(X_BxNxKxp.reshape(B, N, K * p), name).reshape(B, N, K, p)


def _check(kernel: str, V_BxNxKxp: Array, mask: Array | None) -> None:
    """Refuse a kernel that is asked for and cannot run."""
    if kernel not in KERNELS:
        raise ValueError(f"attention_kernel must be one of {', '.join(KERNELS)}; got {kernel}.")
    if kernel in ("auto", "xla"):
        return
    here, reason = placement.platform(), None
    if here not in ("gpu", "tpu") or (kernel == "cudnn" and here != "gpu"):
        makers = "NVIDIA's GPUs" if kernel == "cudnn" else "NVIDIA's GPUs and on TPUs"
        reason = f"it runs on {makers}; here is a {here}"
    elif mask is not None:
        reason = "it knows no mask"
    elif here == "tpu" and not tpu.is_new_enough():
        reason = f"it needs TPU v{tpu.OLDEST}; this one is older"
    elif here == "tpu" and not placement.may_be_of_one_device():
        reason = "without a mesh around it nothing says what several TPUs share"
    elif here == "tpu" and not tpu.takes(V_BxNxKxp):
        sizes = " x ".join(map(str, V_BxNxKxp.shape[1:]))
        reason = f"a core's memory must hold an image, in bfloat16 or float32; here are {sizes} "
        reason += f"numbers of {V_BxNxKxp.dtype}"
    elif here == "gpu":
        reason = _refused_by_gpu(kernel, V_BxNxKxp)
    uneven = bool(V_BxNxKxp.size) and placement.rows_over(V_BxNxKxp) is None
    if not reason and kernel == "pallas" and uneven:
        reason = "each device must have rows of its own, as many as the others"
    if reason:
        raise ValueError(f"attention_kernel={kernel} must fit; {reason}. Set it to auto.")


def _refused_by_gpu(kernel: str, V_BxNxKxp: Array) -> str | None:
    p = V_BxNxKxp.shape[-1]
    if V_BxNxKxp.dtype not in _HALF:
        return f"it takes bfloat16 and float16; these tokens are {V_BxNxKxp.dtype}"
    if p > gpu.LONGEST_SUBSPACE or (kernel == "cudnn" and p % 8):
        lengths = "8, 16, …" if kernel == "cudnn" else "1 to"
        return f"it takes subspaces of {lengths} {gpu.LONGEST_SUBSPACE} dimensions; here are {p}"
    if not gpu.is_new_enough():
        return f"it needs compute capability {gpu.OLDEST}; this GPU is older"
    return None


def has_kernel(platform: str, V_BxNxKxp: Array, kernel: str) -> bool:
    """True if a kernel of ours does `attend_by` on "cuda" or "tpu": no score is in memory then."""
    return platform in _with_kernel(V_BxNxKxp, None, kernel)


def _with_kernel(V_BxNxKxp: Array, mask: Array | None, kernel: str) -> frozenset[str]:
    """The platforms that take a kernel of ours, "cuda" and "tpu"; elsewhere XLA has the program."""
    if kernel == "xla" or mask is not None or not V_BxNxKxp.size:
        return frozenset()
    if placement.rows_over(V_BxNxKxp) is None:
        return frozenset()
    # XLA alone knows the precision of a float32 product on a GPU.
    on_gpu = V_BxNxKxp.dtype in _HALF and V_BxNxKxp.shape[-1] <= gpu.LONGEST_SUBSPACE
    fits = {
        "cuda": on_gpu and gpu.is_new_enough(),
        "tpu": tpu.takes(V_BxNxKxp) and tpu.is_new_enough() and placement.may_be_of_one_device(),
    }
    return frozenset(name for name in fits if fits[name])


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Way:
    """One way to compute the forward pass, and the backward pass of the same program.

    Attributes:
        kernels: the platforms that have a kernel.
    """

    kernels: frozenset[str]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _attend(V_BxNxKxp: Array, mask: Array | None, kernel: str) -> Array:
    return _attend_and_keep(V_BxNxKxp, mask, kernel)[0]


def _attend_and_keep(V_BxNxKxp: Array, mask: Array | None, kernel: str):
    way = _Way(_with_kernel(V_BxNxKxp, mask, kernel))
    found: Any = _by_platform(V_BxNxKxp, way) if way.kernels else _attend_by_xla(V_BxNxKxp, mask)
    O_BxNxKxp, *of_rows = found
    return keep_merged(O_BxNxKxp, "attended"), (V_BxNxKxp, mask, *keep(of_rows, "statistics"), way)


def _attend_backward(
    kernel: str, kept: tuple[Array, Array | None, Array, Array, _Way], dO_BxNxKxp: Array
) -> tuple[Array, None]:
    del kernel
    V_BxNxKxp, mask, largest_BxKxN, total_BxKxN, way = kept
    inputs = (V_BxNxKxp, largest_BxKxN, total_BxKxN, dO_BxNxKxp)
    if way.kernels:
        dV: Any = _backward_by_platform(*inputs, way)
    elif (images := _images_at_a_time(V_BxNxKxp, mask)) < V_BxNxKxp.shape[0]:
        by_images = functools.partial(_backward_by_images, images)
        dV = jax.lax.platform_dependent(*inputs, cpu=by_images, default=_backward_by_xla)
    else:
        dV = _backward_by_xla(*inputs, mask)
    return of_type(dV, V_BxNxKxp), None


_attend.defvjp(_attend_and_keep, _attend_backward)


_KERNELS = {
    "cuda": (gpu.attend, gpu.attend_backward),
    "tpu": (tpu.attend, tpu.attend_backward),
}


def _on_own_rows(way: _Way, direction: int) -> dict[str, Any]:
    """By platform the kernel of a direction, 0 forward and 1 backward, for `platform_dependent`."""
    kernels = {name: _KERNELS[name][direction] for name in sorted(way.kernels)}
    return {name: functools.partial(placement.by_rows, of) for name, of in kernels.items()}


# A kernel has no derivative. Where somebody differentiates a gradient, XLA's functions stand in.


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _by_platform(V_BxNxKxp: Array, way: _Way) -> tuple[Array, Array, Array]:
    branches = _on_own_rows(way, 0)
    return jax.lax.platform_dependent(V_BxNxKxp, **branches, default=_attend_by_xla)


_by_platform.defvjp(
    lambda V_BxNxKxp, way: (_by_platform(V_BxNxKxp, way), V_BxNxKxp),
    lambda way, V_BxNxKxp, of_results: jax.vjp(lambda V: _attend_by_xla(V)[0], V_BxNxKxp)[1](
        of_results[0]
    ),
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _backward_by_platform(
    V_BxNxKxp: Array, largest_BxKxN: Array, total_BxKxN: Array, dO_BxNxKxp: Array, way: _Way
) -> Array:
    inputs = (V_BxNxKxp, largest_BxKxN, total_BxKxN, dO_BxNxKxp)
    by_images = functools.partial(_backward_by_images, _images_at_a_time(V_BxNxKxp, None))
    branches = _on_own_rows(way, 1) | {"cpu": by_images}
    return jax.lax.platform_dependent(*inputs, **branches, default=_backward_by_xla)


def _second_derivative(way: _Way, kept: tuple[Array, ...], of_result: Array) -> tuple[Array, ...]:
    """Differentiate in V and dO again: the saved numbers of the scores follow from V."""
    del way
    V_BxNxKxp, largest_BxKxN, total_BxKxN, dO_BxNxKxp = kept

    def gradient(V: Array, dO: Array) -> Array:
        return _backward_by_xla(V, *_attend_by_xla(V)[1:], dO)

    dV, ddO = jax.vjp(gradient, V_BxNxKxp, dO_BxNxKxp)[1](of_result)
    return dV, jnp.zeros_like(largest_BxKxN), jnp.zeros_like(total_BxKxN), ddO


_backward_by_platform.defvjp(
    lambda *inputs: (_backward_by_platform(*inputs), inputs[:4]), _second_derivative
)


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
    """The number of images that a CPU takes at a time, so that their scores stay in the cache."""
    B, N, K, _ = V_BxNxKxp.shape
    if mask is not None or placement.is_shared(V_BxNxKxp) or placement.rows_over(V_BxNxKxp) != ():
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
    return keep_merged(attended[:, :N], "attended")

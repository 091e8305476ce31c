"""The parameters of modules: their first values, and their form in the equations."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jax.nn import initializers as init
from jax.typing import DTypeLike

from crate_jax import placement

Params = Mapping[str, Any]  # of a model: arrays, or their shapes, in nested dicts
Variables = Mapping[str, Any]  # "params", and by collection what else a model has

STATISTICS = "batch_stats"  # the collection of running statistics, as Flax calls it

# nn.Linear's defaults in PyTorch: weight and bias uniform in ±1/√fan_in.
linear_kernel_init = init.variance_scaling(1 / 3, "fan_in", "uniform")
# kaiming_uniform_ on D (d, m): uniform in ±√(6/d).
dictionary_init = init.variance_scaling(2.0, "fan_in", "uniform")


def variables_of(params: Params) -> Variables:
    """The variables of a model from its parameters alone; variables as they are.

    No model has a group of parameters that is called "params".
    """
    return params if "params" in params else {"params": params}


def uniform_init(bound: float) -> Callable[..., Array]:
    """Uniform in ± a bound."""

    def initialise(key: Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return initialise


def linear_bias_init(fan_in: int) -> Callable[..., Array]:
    """Uniform in ±1/√fan_in, as nn.Linear starts its bias; Flax's own default is zero."""
    return uniform_init(fan_in**-0.5)


def read(
    module: nn.Module,
    name: str,
    initialise: Callable[..., Array],
    shape: tuple[int, ...],
    dtype: DTypeLike,
) -> Array:
    """Read a parameter of a module for the equations: cast, and whole on every device.

    The parameter itself is float32, and devices may share it. It is gathered here because the
    compiler, left to itself, splits the product as the weight is split, and then the activations of
    the whole batch travel in every layer. No name keeps what is returned: saving it would keep a
    full copy of every layer's weights on every device.
    """
    weight = module.param(name, initialise, shape, jnp.float32).astype(dtype)
    return placement.whole_of_fsdp(name, placement.whole(weight))


@dataclasses.dataclass(eq=False, repr=False)
class SubspaceMaps:
    """Fields of a module that attends in subspaces: the maps into them, U, and out of them, W_out.

    `read_bases` and `read_output` make the parameters. They start as PyTorch's nn.Linear does,
    unless an initialiser says otherwise. A subclass says what happens between the two maps.

    Attributes:
        num_heads: K, the number of subspaces.
        head_dim: p, their dimension.
        dtype: the dtype of the computation; parameters are float32.
        bias: whether there is b_out.
        kernel_init: of U, and of W_out unless `out_init` is given; None: nn.Linear's.
        out_init: of W_out; None: `kernel_init`.
        bias_init: the initialiser of the biases; None: nn.Linear's.
    """

    num_heads: int
    head_dim: int
    dtype: DTypeLike = jnp.float32
    bias: bool = dataclasses.field(default=True, kw_only=True)
    kernel_init: Callable[..., Array] | None = dataclasses.field(default=None, kw_only=True)
    out_init: Callable[..., Array] | None = dataclasses.field(default=None, kw_only=True)
    bias_init: Callable[..., Array] | None = dataclasses.field(default=None, kw_only=True)


def read_bases(attention: Any, d: int) -> Array:
    """The bases U (d, K, p) of the subspaces of a module with the fields of `SubspaceMaps`."""
    # Without the axes Flax would take the first one for a receptive field.
    start = init.variance_scaling(1 / 3, "fan_in", "uniform", in_axis=0, out_axis=(1, 2))
    shape = (d, attention.num_heads, attention.head_dim)
    return read(attention, "U", attention.kernel_init or start, shape, attention.dtype)


def read_output(attention: Any, d: int) -> tuple[Array, Array | None]:
    """W_out (K, p, d), and with ``bias`` b_out (d,), of a module with those fields."""
    shape = (attention.num_heads, attention.head_dim, d)
    start = init.variance_scaling(1 / 3, "fan_in", "uniform", in_axis=(0, 1), out_axis=2)
    start = attention.out_init or attention.kernel_init or start
    W_out_Kxpxd = read(attention, "W_out", start, shape, attention.dtype)
    if not attention.bias:
        return W_out_Kxpxd, None
    bias_init = attention.bias_init or linear_bias_init(shape[0] * shape[1])
    return W_out_Kxpxd, read(attention, "b_out", bias_init, (d,), attention.dtype)


def parameter(
    module: nn.Module, name: str, initialise: Callable[..., Array], shape: tuple[int, ...]
) -> Array:
    """A parameter of a module as it is: float32, unless its user made another of it."""
    return placement.whole(module.param(name, initialise, shape, jnp.float32))

"""The block of the whole family, and the stack of blocks.

    Z ← Z ± g · attention(norm Z)
    Z ← [Z +] g · nonlinearity(norm Z)

The parts are handed in, each a module with its pure function: MSSA and ISTA make a CRATE. What a
model of the family is, is a choice of parts, of the sign, of the residual and of the order. The
factors g may be learned, or computed from what the block sees; then the norm may be computed too.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.core import DenyList
from jax import Array
from jax.ad_checkpoint import checkpoint_name as keep
from jax.ad_checkpoint import checkpoint_policies as policies
from jax.nn import initializers as init
from jax.typing import DTypeLike

from crate_jax import placement
from crate_jax.models.layers import LayerNorm
from crate_jax.models.modulation import Modulation, PerLayer
from crate_jax.models.parameters import parameter

# What the backward pass of a block keeps of its forward pass, besides its input; the equations give
# these names. What has none is computed again. With "none" that is casts, the gathering of weights,
# elementwise steps, and the scores where automatic differentiation asks for them. "dots" keeps
# matrix products alone, and not those of attention. "full" keeps nothing.
KEPT = (
    "statistics",  # mean and 1/σ of a LayerNorm; largest score and sum of `attend_by`
    "normalised",  # tokens after it
    "subspace_tokens",
    "attention",  # of the plain function; kernels compute it again
    "attended",
    "half",  # tokens between the halves
    "error",  # Y − D Y of ISTA, and the step that a learned η scales
    "code",  # of CRATE-α in its wide dictionary; of ISTA between two steps
    "active",  # where a ReLU lets through
    "convolved",  # images after a convolution of a stem
    "hidden",  # units of an MLP before their nonlinearity
    "moments",  # membership and second moments of TSSA
    "representatives",  # of CBSA: what they see, and where they are before and after SSA
    "contraction",  # its map
    "unscaled",  # what the factors g multiply
    "modulation",  # factors that are computed
)
REMAT = {
    "none": policies.save_only_these_names(*KEPT),
    "dots": policies.dots_with_no_batch_dims_saveable,
    "full": policies.nothing_saveable,
}


class Part(NamedTuple):
    """A part of a block.

    Attributes:
        name: in the parameter tree, and of the tap of its output.
        make: from ``name=…`` to the module. An attention takes normalised tokens (B, N, d), a mask
            and the names of the taps that it must show, and returns
            `crate_jax.models.layers.Attended`; a nonlinearity takes normalised tokens and returns
            tokens, and with taps also these, by name.
        taps: what it also shows.
    """

    name: str
    make: Callable[..., nn.Module]
    taps: tuple[str, ...] = ()


class Context(NamedTuple):
    """The arguments that all blocks of a stack share, besides the tokens.

    Attributes:
        mask: which token may see which, as `crate_jax.models.derivatives.attend` takes it.
        step_sizes: of the nonlinearity, where all layers have the same; it takes them beside the
            tokens.
        others: other tokens (B, M, d), that the tokens attend to in the place of each other. Where
            they are given, an attention takes them as one more argument.
        condition: of the examples (B, …), for `Block.modulation`.
    """

    mask: Array | None = None
    step_sizes: tuple[Any, ...] | None = None
    others: Array | None = None
    condition: Array | None = None


class Dropout(nn.Module):
    """Each entry is zero at the rate while training, and else divided by what is left of one.

    Flax's draws in double precision where that is JAX's default; the numbers are the same here.
    """

    rate: float
    train: bool

    @nn.compact
    def __call__(self, X: Array) -> Array:
        """An array of any shape; a rate above 0 needs a "dropout" key while training."""
        if not (self.train and self.rate):
            return X
        stays = 1 - float(self.rate)
        kept = jax.random.bernoulli(self.make_rng("dropout"), np.float32(stays), X.shape)
        kept = placement.beside(kept, X)
        return jax.lax.select(kept, X / stays, jnp.zeros_like(X))


class Block(nn.Module):
    """One layer of two halves; see the top of this file.

    Attributes:
        attention: the first half's operator.
        nonlinearity: the second half's; None leaves that half out.
        dtype: the dtype of the tokens, float32 or bfloat16.
        backward: of the LayerNorms, one of `crate_jax.models.derivatives.BACKWARD`.
        sign: the sign of the attention's update, +1 or −1.
        residual: whether the nonlinearity's output is added to the tokens or replaces them.
        attention_first: the order of the halves.
        layer_scale: what the learned factors g (d,) of both halves start from; None: g = 1.
        norm: "affine", LayerNorms with their parameters; "scaled", with a scale and no bias;
            "plain", without both; "none": the halves take the tokens as they are.
        epsilon: the ε of the LayerNorms.
        modulation: makes a `Modulation` for the attention and one for the nonlinearity, of the
            block's tokens, its layer's `PerLayer.condition` and the stack's `Context.condition`.
            None: nothing is computed.
        dropout: share of the entries of the attention's update that training drops.
        train: whether dropout and stochastic depth act.
        taps: what is returned of `tap_names`.
    """

    attention: Part
    nonlinearity: Part | None
    dtype: DTypeLike
    backward: str
    sign: int = 1
    residual: bool = False
    attention_first: bool = True
    layer_scale: float | None = None
    norm: str = "affine"
    epsilon: float = 1e-5
    modulation: Part | None = None
    dropout: float = 0.0
    train: bool = False
    taps: tuple[str, ...] = ()

    @nn.compact
    def __call__(
        self, Z_BxNxd: Array, per_layer: PerLayer | None, context: Context
    ) -> tuple[Array, dict[str, Array]]:
        """Tokens (B, N, d) to tokens (B, N, d), and the taps.

        Args:
            Z_BxNxd: tokens.
            per_layer: of this layer; None: nothing differs by depth.
            context: the context of the stack.
        """
        seen: dict[str, Array] = {}
        drop_path, condition = per_layer or PerLayer()
        modulations: tuple[Modulation | None, ...] = (None, None)
        if self.modulation:
            modulate = self.modulation.make(name=self.modulation.name)
            computed = modulate(Z_BxNxd, condition, context.condition)
            modulations = keep(computed, "modulation")
        others = () if context.others is None else (context.others,)
        sizes = () if context.step_sizes is None else (context.step_sizes,)
        halves = [(self.attention, modulations[0])]
        if self.nonlinearity:
            halves.append((self.nonlinearity, modulations[1]))
        for part, how in halves if self.attention_first else halves[::-1]:
            if seen:
                Z_BxNxd = seen["z_half"] = keep(Z_BxNxd, "half")
            Y_BxNxd, operator = self._norm(part, Z_BxNxd, how), part.make(name=part.name)
            if part is self.attention:
                update_BxNxd, made = operator(Y_BxNxd, context.mask, self.taps, *others)
                seen |= made | {part.name: update_BxNxd}
                update_BxNxd = Dropout(self.dropout, self.train)(update_BxNxd)
                update_BxNxd = self._gated(part, update_BxNxd, how, drop_path)
                Z_BxNxd = Z_BxNxd + update_BxNxd if self.sign > 0 else Z_BxNxd - update_BxNxd
                continue
            found = operator(Y_BxNxd, *sizes)
            update_BxNxd, made = found if part.taps else (found, {})
            seen |= made | {part.name: update_BxNxd}
            if self.residual:
                Z_BxNxd = Z_BxNxd + self._gated(part, update_BxNxd, how, drop_path)
            else:  # an example that skipped it would have no tokens left
                Z_BxNxd = self._gated(part, update_BxNxd, how, None)
        seen["out"] = Z_BxNxd
        return Z_BxNxd, {name: seen[name] for name in self.taps}

    def _norm(self, part: Part, Z_BxNxd: Array, how: Modulation | None) -> Array:
        """The tokens as a half takes them."""
        if self.norm != "none":
            made_of = (self.norm != "plain", self.norm == "affine")
            name = f"{part.name}_norm"
            norm = LayerNorm(self.dtype, self.backward, self.epsilon, *made_of, name=name)
            Z_BxNxd = norm(Z_BxNxd)
        if how is None or how.scale is None or how.shift is None:
            return Z_BxNxd
        return Z_BxNxd * (1 + how.scale) + how.shift

    def _gated(
        self, part: Part, update_BxNxd: Array, how: Modulation | None, drop_path: Array | None
    ) -> Array:
        """The update times g, and for a share of the examples nothing of it while training."""
        if self.layer_scale is not None or how is not None:
            update_BxNxd = keep(update_BxNxd, "unscaled")
        if self.layer_scale is not None:
            start = init.constant(self.layer_scale)
            g_d = parameter(self, f"{part.name}_scale", start, update_BxNxd.shape[-1:])
            update_BxNxd = update_BxNxd * g_d.astype(self.dtype)[None, None]
        if how is not None:
            update_BxNxd = update_BxNxd * how.gate
        if drop_path is None or not self.train:
            return update_BxNxd
        stays = 1 - drop_path
        kept_Bx1x1 = jax.random.bernoulli(
            self.make_rng("dropout"), stays, (update_BxNxd.shape[0], 1, 1)
        )
        return update_BxNxd * (kept_Bx1x1.astype(jnp.float32) / stays).astype(self.dtype)


def tap_names(attention: Part, nonlinearity: Part | None) -> tuple[str, ...]:
    """The names of the taps of a block of these parts, in order of computation, attention first."""
    second = () if nonlinearity is None else ("z_half", *nonlinearity.taps, nonlinearity.name)
    return (*attention.taps, attention.name, *second, "out")


def chosen_taps(names: str | Iterable[str], known: Sequence[str]) -> tuple[str, ...]:
    """Some of the known taps, each once, in the order of computation; a single text is one name.

    Raises:
        KeyError: an unknown name.
    """
    wanted = (names,) if isinstance(names, str) else tuple(names)
    for name in wanted:
        if name not in known:
            raise KeyError(f"taps must be among {', '.join(known)}; got {name}.")
    return tuple(name for name in known if name in wanted)


def stack(
    block: type[nn.Module],
    depth: int,
    *,
    remat: str,
    unroll: int = 1,
    shared: bool = False,
    name: str = "blocks",
    **fields: Any,
) -> nn.Module:
    """Blocks one after the other, as one compiled loop: the only `nn.scan` of the project.

    It is called as ``stack(…)(Z_BxNxd, per_layer, context)``. ``per_layer`` holds what differs by
    depth, a tree of arrays with the layers on axis 0, or None: for `Block` a `PerLayer`.
    ``context`` is the same for all layers. It returns the last tokens, and the taps with the layers
    on axis 0. Other collections than the parameters, such as running statistics, have them there
    too.

    Args:
        block: a module that takes (tokens, its layer of per_layer, context) and returns (tokens,
            taps).
        depth: L, the number of layers.
        remat: what the backward pass of a block computes again, a key of `REMAT`.
        unroll: layers per iteration of the compiled loop.
        shared: one set of parameters for all layers; else each has its own, on axis 0.
        name: in the parameter tree.
        **fields: of the block.
    """
    # Without a loop around it the compiler would merge what is computed again with the first time.
    apart = unroll > 1 and remat != "none"
    layers = nn.scan(
        nn.remat(block, prevent_cse=apart, policy=REMAT[remat]),
        variable_axes={DenyList("params"): 0} if shared else {True: 0},  # all collections
        variable_broadcast="params" if shared else False,
        split_rngs={"params": not shared, "dropout": True},
        in_axes=(0, nn.broadcast),  # type: ignore[arg-type]
        length=depth,
        unroll=unroll,
    )
    return layers(**fields, name=name)

"""The objective layer by layer: what a model compresses and sparsifies, measured on real images."""

import jax
import jax.numpy as jnp
from jax import Array

from crate_jax import placement
from crate_jax.analysis.measured import DEFINITIONS
from crate_jax.analysis.taps import taps
from crate_jax.models.parameters import Params, variables_of
from crate_jax.models.stacked import BlockModel
from crate_jax.objective import coding_rate, projected_coding_rate, sparsity, subspace_coding_rate

_SPARSE = ("ista", "code")  # taps of what a layer makes sparse


def layerwise(
    model: BlockModel,
    params: Params,
    images: Array,
    *,
    definition: str = "paper",
    eps: float = 0.1,
) -> dict[str, Array]:
    """Coding rates and sparsity of every layer, those that its two operators have.

    ``paper`` measures what the captions of the paper's figures name: R^c(Z^{l+1/2}; U^l),
    R(Z^{l+1/2}) and their difference on the tokens after MSSA. ``official_code`` measures what the
    released script computes: R^c of U_kᵀ LN(Z^l), each token scaled to unit length in each
    subspace. Sparsity is the share of exact zeros in both, after ISTA or in the code of a wide
    dictionary. The class token counts as a token, and so does padding. Float32 throughout, whatever
    the model's dtype, because bfloat16 moves ISTA's zeros.

    R needs tokens alone, so every model has it. R^c needs the subspaces of MSSA, TSSA or CBSA, and
    the share of zeros needs ISTA or a code: a model with other operators goes without them.

    Source: arXiv 2306.01129, section 3.1 and its code.

    Args:
        model: a model of `crate_jax.create_model`.
        params: its parameters; of a model with running statistics its variables.
        images: (B, H, W, C), normalised, B >= 1; for a model of text, token ids (B, N).
        definition: "paper" or "official_code".
        eps: quantisation precision ε; both sources use ε² = 0.01.

    Returns:
        Arrays (L,), float32. With subspaces: ``coding_rate_mean`` and ``coding_rate_std`` (R^c in
        nats, over the images, unbiased; of one image the deviation is NaN). With ISTA or a
        code: ``zero_fraction``. By the paper's definition also ``rate_mean`` (R), and with
        subspaces ``rate_reduction_mean`` (ΔR), in nats. Their gradients are finite: zero where the
        rates of all images are equal, and at a zero token, which has no direction.

    Raises:
        ValueError: an unknown definition, the official one of a model without subspaces, no image,
            or images that do not fit the model.
    """
    _check(definition, model)
    exact = model.clone(dtype=jnp.float32)
    after = "z_half" if "z_half" in model.tap_names else "out"  # of the attention
    token_tap = after if definition == "paper" else "subspace_tokens"
    names = [name for name in (token_tap, *_SPARSE) if name in model.tap_names]
    _, seen = taps(exact, params, images, names=names)
    if not len(images):
        raise ValueError(f"images must be at least one; got {images.shape}. A mean needs some.")
    values, compressed_LxB = {}, None
    if "subspace_tokens" in model.tap_names:
        blocks = variables_of(params)["params"]["blocks"]
        tokens, U = seen[token_tap], blocks[model.attention_part.name]["U"]
        compressed_LxB = _compressed(tokens, U, eps)
    if definition == "paper":
        Z_LxBxNxd = seen[after]
        if compressed_LxB is not None:
            Z_LxBxNxd = placement.after(Z_LxBxNxd, compressed_LxB)
        rate_LxB = jax.lax.map(lambda z: coding_rate(z, eps=eps), Z_LxBxNxd)
        values["rate_mean"] = rate_LxB.mean(axis=1)
        if compressed_LxB is not None:
            values["rate_reduction_mean"] = (rate_LxB - compressed_LxB).mean(axis=1)
    if compressed_LxB is not None:
        values["coding_rate_mean"] = compressed_LxB.mean(axis=1)
        values["coding_rate_std"] = _deviation(compressed_LxB)
    for name in {*_SPARSE} & seen.keys():  # a block has one of them
        values["zero_fraction"] = sparsity(seen[name]).mean(axis=1)
    return values


def layer_scalars(values: dict[str, Array]) -> dict[str, Array]:
    """The measures of `layerwise` as scalars, ``objective/<measure>/layer00`` …."""
    return {
        f"objective/{name}/layer{i:02d}": values_L[i]
        for name, values_L in values.items()
        for i in range(len(values_L))
    }


def _check(definition: str, model: BlockModel) -> None:
    """Refuse a definition that is unknown, or that the model does not have."""
    if definition not in DEFINITIONS:
        raise ValueError(f"definition must be one of {', '.join(DEFINITIONS)}; got {definition}.")
    if definition == "official_code" and "subspace_tokens" not in model.tap_names:
        raise ValueError(
            "definition must be paper for a model without MSSA, TSSA and CBSA, for it has no "
            "subspace tokens; got official_code. Leave the definition out."
        )


def _compressed(tokens: Array, U_LxdxKxp: Array, eps: float) -> Array:
    """R^c of every layer and image: of tokens (L, B, N, d), or of subspace tokens as they are."""
    if tokens.ndim == 5:
        return jax.lax.map(lambda w: projected_coding_rate(_unit_length(w), eps=eps), tokens)
    layers = (tokens, U_LxdxKxp)
    return jax.lax.map(lambda layer: subspace_coding_rate(*layer, eps=eps), layers)


def _unit_length(W_BxNxKxp: Array) -> Array:
    """Each token of each subspace scaled to length one; a zero token stays zero."""
    length = _root(jnp.square(W_BxNxKxp).sum(axis=-1, keepdims=True))
    return jnp.where(length > 0, W_BxNxKxp / jnp.maximum(length, 1e-12), 0)


def _deviation(values_LxB: Array) -> Array:
    """The unbiased standard deviation over the images (L,); NaN for one image."""
    if values_LxB.shape[1] < 2:
        return jnp.full_like(values_LxB[:, 0], jnp.nan)
    return _root(values_LxB.var(axis=1, ddof=1))


def _root(squares: Array) -> Array:
    """The square root of values >= 0, with a gradient of zero at zero, where it has none."""
    return jnp.where(squares > 0, jnp.sqrt(jnp.where(squares > 0, squares, 1)), 0)

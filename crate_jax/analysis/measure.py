"""Measure every layer's effect on the objective over a data set: means and deviations by image.

`measure` runs a model batch by batch. The device computes the layers, the products and the sums;
the host computes the determinants in double precision (`crate_jax.analysis.measures`). A layer has
two halves, and each is measured at its own objective, before and after it:

- the attention against R^c(Z; U), of the tokens that enter the layer and of those after it;
- ISTA, or the code of a wide dictionary, against the LASSO ½‖Y − D A‖² + λ‖A‖₁ that its step
  descends, at its start and at its end, with Y the normalised tokens.
"""

import functools
from collections.abc import Callable, Collection, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from crate_jax.analysis import measures, products
from crate_jax.analysis.decoder import DecoderLayers
from crate_jax.analysis.measured import DEFINITIONS, GEOMETRY, Measured, Moments, measured_of
from crate_jax.analysis.taps import taps
from crate_jax.models.derivatives import normalise
from crate_jax.models.parameters import Params, variables_of
from crate_jax.models.stacked import BlockModel


def measure(
    model: BlockModel | DecoderLayers,
    params: Params,
    batches: Array | np.ndarray | Iterable[Array | np.ndarray],
    names: Collection[str] | None = None,
    *,
    definition: str = "paper",
    eps: float = 0.1,
) -> dict[str, Measured]:
    """Measures of every layer over a data set; see the top of this file.

    Float32 forward passes whatever the model's dtype, because bfloat16 moves ISTA's zeros. Images
    may have any size that the patches fit. The class token counts as a token, and so does padding.
    Means and deviations are those of all images together, however they are cut into batches. Those
    of a coherence, which no image changes, are its value and 0.

    Sources: arXiv 2306.01129, sections 2.3, 2.4 and 3.1; reference of `official_code`: its released
    script, which measures R^c of U_kᵀ LN(Z^l), each token at unit length.

    Args:
        model: a model of `crate_jax.create_model`, or the decoder of one.
        params: its parameters; of a model with running statistics its variables.
        batches: normalised images (B, H, W, C), or token ids (B, N); one array or several.
        names: out of `measured_of`; None: all but those of the geometry, which cost more.
        definition: "paper" or "official_code".
        eps: quantisation precision ε; both sources use ε² = 0.01.

    Returns:
        By name. ``zeros`` is a share; ``l0``, ``l1`` and the LASSO are per token; ranks are numbers
        of directions, that of subspaces their mean; rates are in nats.

    Raises:
        ValueError: an unknown definition, or one that the model does not have, or no image.
        KeyError: a measure that is unknown, or that the model does not have.
    """
    if definition not in DEFINITIONS:
        raise ValueError(f"definition must be one of {', '.join(DEFINITIONS)}; got {definition}.")
    known = measured_of(model, definition=definition)
    if definition == "official_code" and "subspace_rate" not in known:
        raise ValueError(
            "definition must be paper for a model without subspace tokens; got official_code. "
            "Leave the definition out."
        )
    if names is None:
        names = [name for name in known if name not in GEOMETRY]
    for name in names:
        if name not in known:
            raise KeyError(f"names must be among {', '.join(known)} for this model; got {name}.")
    if isinstance(batches, Array | np.ndarray):
        batches = (batches,)
    layers = _Layers(model.clone(dtype=jnp.float32), frozenset(names), definition, eps)
    variables = variables_of(params)
    fixed = _coherences(model, variables, names)
    totals = {name: Moments() for name in names if name not in fixed}
    program, count = _compiled(layers), 0
    for images in batches:
        if not len(images):
            continue
        values = layers.on_host(program(variables, images))
        for name, moments in totals.items():
            moments.add(values[name])
        count += len(images)
    if not count:
        raise ValueError("images must be at least one; got none. A mean needs some.")
    found = {name: moments.result() for name, moments in totals.items()}
    found |= {name: Measured(of_L, np.zeros_like(of_L), count) for name, of_L in fixed.items()}
    return {name: found[name] for name in names}


def _coherences(model: Any, variables: Any, names: Collection[str]) -> dict[str, np.ndarray]:
    """The coherences of the bases and of the dictionary of every layer (L,)."""
    blocks = products.stacked_parameters(model, variables)
    U = blocks[model.attention_part.name].get("U", ())
    D = next((blocks[part]["D"] for part in ("ista", "odl") if part in blocks), ())
    functions: dict[str, tuple[Callable[..., tuple[float, float]], Any]] = {
        "coherence_within": (measures.coherence_within, U),
        "coherence_between": (measures.coherence_between, U),
        "dictionary_coherence": (measures.coherence, D),
    }
    return {
        name: np.array([function(of_layer)[0] for of_layer in np.asarray(layers)])
        for name, (function, layers) in functions.items()
        if name in names
    }


class _Layers(NamedTuple):
    """The measures of one batch."""

    model: Any  # a BlockModel, or DecoderLayers
    names: frozenset[str]
    definition: str
    eps: float

    def wants(self, *names: str) -> bool:
        return bool(self.names & set(names))

    def program(self, variables: Any, images: Array) -> dict[str, Array]:
        """On the device: tokens of which the host takes determinants, and sums by image (L, B)."""
        model = self.model
        sparse = next((name for name in ("ista", "code") if name in model.tap_names), None)
        if not self.wants("zeros", "l0", "l1", "lasso_before", "lasso_after", "descent"):
            sparse = None
        _, seen = taps(model, variables, images, names=self._taps(sparse))
        blocks = products.stacked_parameters(model, variables)
        found: dict[str, Array] = {}
        if self.definition == "official_code":
            found["unit"] = seen["subspace_tokens"]
        else:
            found |= self._tokens(seen, blocks)
        for tokens in {*found} - {"unit"}:
            found[f"gram_{tokens}"] = products.gram(found[tokens])
        if self.wants("token_rank", "mean_angle"):
            found["out"] = seen["out"]
        if sparse:
            A = seen[sparse]
            found["zeros"] = jnp.mean(A == 0, axis=(2, 3), dtype=jnp.float32)
            found["l1"] = jnp.abs(A).sum(axis=3).mean(axis=2)
            if self.wants("lasso_before", "lasso_after", "descent"):
                found |= self._lasso(seen["z_half"], A, blocks, variables["params"], sparse)
        if self.wants("attention_entropy"):
            found["attention_entropy"] = jax.lax.map(products.attention_entropy, seen["attention"])
        return found

    @property
    def _after(self) -> str:
        """The tap of the tokens after the attention."""
        first = self.model.block_fields().get("attention_first", True)
        return "z_half" if first and "z_half" in self.model.tap_names else "out"

    def _taps(self, sparse: str | None) -> set[str]:
        """The taps that the forward pass must return."""
        wanted = {self._after} | ({sparse, "z_half"} if sparse else set())
        if self.wants("rate_before", "subspace_rate_before", "compression"):
            wanted |= {"out", self.model.attention_part.name}
            wanted |= {"z_half"} & {*self.model.tap_names}
        if self.wants("token_rank", "mean_angle"):
            wanted.add("out")
        if self.wants("attention_entropy"):
            wanted.add("attention")
        if self.definition == "official_code":
            wanted.add("subspace_tokens")
        return {*filter(None, wanted)}

    def _tokens(self, seen: dict[str, Array], blocks: Any) -> dict[str, Array]:
        """Tokens after the attention and before it, whole and in the subspaces."""
        found, U = {}, blocks[self.model.attention_part.name].get("U")
        if self.wants("rate", "rate_reduction"):
            found["after"] = seen[self._after]
        if self.wants("subspace_rate", "rate_reduction", "compression", "effective_rank"):
            found["after_in_subspaces"] = products.projected(seen[self._after], U)
        if self.wants("rate_before", "subspace_rate_before", "compression"):
            before = self._before(seen, blocks)
            if self.wants("rate_before"):
                found["before"] = before
            if self.wants("subspace_rate_before", "compression"):
                found["before_in_subspaces"] = products.projected(before, U)
        return found

    def _before(self, seen: dict[str, Array], blocks: Any) -> Array:
        """The tokens that the attention of each layer changes.

        Where it comes first, they are those that leave the layer before. Into the first layer go
        those after its attention without the update.
        """
        fields, name = self.model.block_fields(), self.model.attention_part.name
        if not fields.get("attention_first", True):
            return seen["z_half"]
        update, after = seen[name][0], seen[self._after][0]
        if fields.get("layer_scale") is not None:
            update = update * blocks[f"{name}_scale"][0][None, None]
        first = after - update if fields.get("sign", 1) > 0 else after + update
        return jnp.concatenate([first[None], seen["out"][:-1]])

    def _lasso(
        self, half: Array, A: Array, blocks: Any, params: Any, sparse: str
    ) -> dict[str, Array]:
        """The LASSO at the start and at the end of ISTA, or of a code, per token (L, B)."""
        model: Any = self.model
        name = "ista" if sparse == "ista" else "odl"
        norm = blocks.get(f"{name}_norm")

        def of_layer(layer: Any) -> tuple[Array, Array]:
            Z, A, part, norm = layer
            Y = normalise(Z, norm["scale"], norm["bias"], jnp.float32, float(model.EPSILON))
            D, lmbda = part["D"], part.get("lmbda", jnp.float32(model.lmbda))
            start = Y if sparse == "ista" else jnp.zeros_like(A)
            return products.lasso(Y, start, D, lmbda), products.lasso(Y, A, D, lmbda)

        part = {"D": blocks[name]["D"]}
        if getattr(model, "step_sizes", "fixed") == "per_layer":
            part["lmbda"] = jnp.exp(blocks[name]["log_lmbda"])
        elif getattr(model, "step_sizes", "fixed") == "shared":
            part["lmbda"] = jnp.full(len(A), jnp.exp(params["log_lmbda"]))
        before, after = jax.lax.map(of_layer, (half, A, part, norm))
        return {"lasso_before": before, "lasso_after": after}

    def on_host(self, computed: dict[str, Array]) -> dict[str, np.ndarray]:
        """Every measure of a batch by image (L, B), float64."""
        values: dict[str, np.ndarray] = {
            name: np.asarray(array, np.float64)
            for name, array in computed.items()
            if array.ndim == 2
        }
        of = functools.partial(_by_layer, computed)
        by_gram = functools.partial(measures.rates_by_gram, eps=self.eps)
        rates = functools.partial(measures.rates, eps=self.eps)
        subspaces: dict[str, str] = {
            "after_in_subspaces": "subspace_rate",
            "before_in_subspaces": "subspace_rate_before",
        }
        for tokens, name in subspaces.items():
            if tokens in computed and (name != "subspace_rate" or self._wants_rate):
                values[name] = of(
                    tokens, lambda V, G: by_gram(G, V.swapaxes(1, 2)).sum(axis=-1), "gram_"
                )
        for tokens, name in {"after": "rate", "before": "rate_before"}.items():
            if tokens in computed:
                values[name] = of(tokens, lambda Z, G: by_gram(G, Z), "gram_")
        if "unit" in computed:
            values["subspace_rate"] = of(
                "unit", lambda W: rates(measures.unit_length(W).swapaxes(1, 2)).sum(axis=-1)
            )
        if self.wants("effective_rank"):
            values["effective_rank"] = of(
                "after_in_subspaces",
                lambda V: measures.effective_rank(V.swapaxes(1, 2)).mean(axis=-1),
            )
        if self.wants("token_rank"):
            values["token_rank"] = of("out", measures.effective_rank)
        if self.wants("mean_angle"):
            values["mean_angle"] = of("out", measures.mean_angle)
        return values | self._derived(values)

    @property
    def _wants_rate(self) -> bool:
        return self.wants("subspace_rate", "rate_reduction", "compression")

    def _derived(self, values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Differences, and what the sums of the device say."""
        found = {}
        for name, (one, other) in {
            "rate_reduction": ("rate", "subspace_rate"),
            "compression": ("subspace_rate", "subspace_rate_before"),
            "descent": ("lasso_after", "lasso_before"),
        }.items():
            if self.wants(name):
                found[name] = values[one] - values[other]
        if self.wants("l0"):
            found["l0"] = (1 - values["zeros"]) * self._code_width
        return found

    @property
    def _code_width(self) -> int:
        model: Any = self.model
        return model.width * (model.overcompleteness if "code" in model.tap_names else 1)


@functools.lru_cache(maxsize=16)
def _compiled(layers: _Layers) -> Callable[[Any, Any], dict[str, Array]]:
    """One program a model and choice of measures, however often a data set is measured."""
    return jax.jit(layers.program)


def _by_layer(
    computed: dict[str, Array], name: str, function: Callable[..., np.ndarray], *others: str
) -> np.ndarray:
    """A function of each layer's tokens (B, …), and of others of them, as (L, B)."""
    arrays = [computed[prefix + name] for prefix in ("", *others)]
    return np.stack([function(*layer) for layer in zip(*map(np.asarray, arrays), strict=True)])

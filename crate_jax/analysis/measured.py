"""The measures of a layer: their names, their titles, and those that a model has."""

from typing import NamedTuple

import numpy as np

from crate_jax.analysis.decoder import DecoderLayers
from crate_jax.models.stacked import BlockModel

OBJECTIVE = (
    *("rate", "subspace_rate", "rate_reduction"),
    *("zeros", "l0", "l1", "lasso_before", "lasso_after"),
)
HALVES = ("rate_before", "subspace_rate_before", "compression", "descent")
GEOMETRY = (
    *("effective_rank", "token_rank", "mean_angle", "attention_entropy"),
    *("coherence_within", "coherence_between", "dictionary_coherence"),  # of parameters alone
)
OFFICIAL = ("subspace_rate", "zeros")  # what the released script measures
DEFINITIONS = ("paper", "official_code")

# The names of the measures for people.
TITLES = {
    "rate": "R(Z), nats",
    "subspace_rate": "R^c(Z; U), nats",
    "rate_reduction": "ΔR = R − R^c, nats",
    "zeros": "share of zeros",
    "l0": "non-zero entries per token",
    "l1": "‖A‖₁ per token",
    "lasso_before": "LASSO per token, before",
    "lasso_after": "LASSO per token, after",
    "rate_before": "R of the tokens that enter, nats",
    "subspace_rate_before": "R^c of the tokens that enter, nats",
    "compression": "change of R^c by the attention, nats",
    "descent": "change of the LASSO by the second half, per token",
    "effective_rank": "effective rank of a subspace",
    "token_rank": "effective rank of the tokens",
    "mean_angle": "mean angle of two tokens, degrees",
    "attention_entropy": "entropy of the attention, nats",
    "coherence_within": "mean |cosine| of two columns of a U_k",
    "coherence_between": "mean |cosine| of columns of two U_k",
    "dictionary_coherence": "mean |cosine| of two atoms of D",
}


def measured_of(model: BlockModel | DecoderLayers, *, definition: str = "paper") -> tuple[str, ...]:
    """The measures that `measure` can take of a model, in the order of `TITLES`.

    R needs tokens alone, so every model has it. R^c needs subspaces, and zeros and LASSO a sparse
    code: a model with other operators goes without them.
    """
    names = set(model.tap_names)
    subspaces, sparse = "subspace_tokens" in names, bool({"ista", "code"} & names)
    lacks = {
        "subspace_rate": subspaces,
        "rate_reduction": subspaces,
        "subspace_rate_before": subspaces and has_plain_halves(model),
        "compression": subspaces and has_plain_halves(model),
        "rate_before": has_plain_halves(model),
        "effective_rank": subspaces,
        "coherence_within": subspaces,
        "coherence_between": subspaces,
        "dictionary_coherence": sparse,
        "attention_entropy": "attention" in names,
    } | dict.fromkeys(("zeros", "l0", "l1", "lasso_before", "lasso_after", "descent"), sparse)
    known = OFFICIAL if definition == "official_code" else TITLES
    return tuple(name for name in TITLES if name in known and lacks.get(name, True))


def has_plain_halves(model: BlockModel | DecoderLayers) -> bool:
    """True if the attention's update is added or subtracted as it is, or times a learned factor."""
    return "modulation" not in model.block_fields()


class Measured(NamedTuple):
    """A measure over a data set.

    Attributes:
        mean: over the images, of each layer (L,), float64.
        std: the unbiased deviation over the images (L,); NaN for one image.
        count: how many images.
    """

    mean: np.ndarray
    std: np.ndarray
    count: int

    @property
    def error(self) -> np.ndarray:
        """The standard error of the mean (L,)."""
        return self.std / np.sqrt(self.count)


class Moments:
    """Mean and sum of squared deviations, batch after batch, in float64 (Chan's update)."""

    def __init__(self) -> None:
        self.count, self.mean, self.squares = 0, np.zeros(()), np.zeros(())

    def add(self, values_LxB: np.ndarray) -> None:
        """Take in a batch: of every layer and image a number."""
        count = values_LxB.shape[1]
        mean = values_LxB.mean(axis=1)
        squares = np.square(values_LxB - mean[:, None]).sum(axis=1)
        total, delta = self.count + count, mean - self.mean
        self.squares = self.squares + squares + delta**2 * (self.count * count / total)
        self.mean = self.mean + delta * (count / total)
        self.count = total

    def result(self) -> Measured:
        """The statistics of all values that were taken in."""
        if self.count < 2:
            return Measured(self.mean, np.full_like(self.mean, np.nan), self.count)
        return Measured(self.mean, np.sqrt(self.squares / (self.count - 1)), self.count)

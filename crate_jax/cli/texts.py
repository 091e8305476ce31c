"""What `compare` takes of a model of text: random token ids, their loss, and training steps."""

import argparse
import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from jax import Array

from crate_jax.cli.compare import full_batch_steps
from crate_jax.config import OptimConfig
from crate_jax.models.parameters import Variables
from crate_jax.tasks.losses import token_cross_entropy
from crate_jax.tasks.task import Batch, Extra, Params, Scalars, Task

if TYPE_CHECKING:  # imported where it is used
    from crate_jax.models.language import LanguageModel

# Flags about images.
_OF_IMAGES = (
    *("images", "dataset", "data_dir", "split", "image_key", "label_key", "transforms"),
    "method",
)


def random_texts(
    args: argparse.Namespace, model: "LanguageModel"
) -> tuple[np.ndarray, np.ndarray, str]:
    """Token ids (B, T), the tokens that the logits are of (B, T), and what they are in words.

    T is the whole context. A causal model is asked for the next tokens, another one for the tokens
    that stand there.

    Raises:
        ValueError: a flag is about images.
    """
    for name in _OF_IMAGES:
        if (got := getattr(args, name)) is not None:
            raise ValueError(
                f"--{name} must be left out for a model of text; got {got}. compare draws token "
                "ids for it."
            )
    shape = (args.batch_size or 8, model.context_length + 1)
    ids = np.random.default_rng(0).integers(0, model.vocab_size, shape, dtype=np.int32)
    targets = ids[:, 1:] if model.causal else ids[:, :-1]
    return ids[:, :-1], targets, "seeded random token ids"


def train_steps(
    model: "LanguageModel",
    params: Params,
    tokens: Array,
    targets: Array,
    optim: OptimConfig,
    steps: int,
) -> tuple[list[float], Variables]:
    """`full_batch_steps` of a model of text; no label is smoothed."""
    batch = {"tokens": tokens, "targets": targets}
    return full_batch_steps(_Tokens(model), params, batch, optim, steps)  # type: ignore[abstract]


@dataclasses.dataclass(frozen=True)
class _Tokens(Task):
    """A token for each place, by cross-entropy: as much of a task as a training step asks for."""

    model: Any
    by_row: ClassVar[bool] = True

    def loss(
        self, params: Params, extra: Extra, batch: Batch, key: Array
    ) -> tuple[Array, tuple[Extra, Scalars]]:
        """The mean in nats a token."""
        logits_BxNxV = self.model.apply(
            {"params": params}, batch["tokens"], train=True, rngs={"dropout": key}
        )
        return token_cross_entropy(logits_BxNxV, batch["targets"]).mean(), (extra, {})

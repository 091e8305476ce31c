"""The inputs of `compare` for a model of text: random token ids."""

import argparse
from typing import TYPE_CHECKING

import numpy as np

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

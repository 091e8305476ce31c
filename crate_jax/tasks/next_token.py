"""Language: the next token of a text."""

import dataclasses
import math
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from crate_jax.analysis.layerwise import layer_scalars, layerwise
from crate_jax.config import TextConfig, TrainConfig
from crate_jax.data.rows import Rows
from crate_jax.files import Json
from crate_jax.models.language import LanguageModel
from crate_jax.models.zoo import build_model
from crate_jax.tasks.losses import token_losses
from crate_jax.tasks.task import PENALTIES, Batch, Extra, Images, Inside, Params, Scalars, Task

TOKENIZER = "tokenizer"  # which fact says how text becomes tokens


@dataclasses.dataclass(frozen=True)
class NextToken(Task):
    """The token behind each token of a text, by cross-entropy.

    A batch is {"tokens": (B, T), "targets": (B, T), "bytes": (B,)}, int32, as
    `crate_jax.data.text.rows.TextRows` makes it: a target below 0 is none. The training loss is the
    mean over texts of the mean over the targets of each; metrics are means over all targets.
    Source: arXiv 2311.13110, 2410.16443 and 2412.17810, which train their models so.
    Differs from official: there the mean is over all targets of a batch, which is another number
    only where texts have unlike numbers of them. Here every text of training is full.

    Attributes:
        model: a model of text.
        text: how text becomes tokens.
        label_smoothing: the smoothing of the training loss, in [0, 1).
    """

    model: Any
    text: TextConfig = dataclasses.field(default_factory=TextConfig, hash=False)
    label_smoothing: float = 0.0

    headline: ClassVar[str] = "loss"  # times a number it is each of the others
    higher_is_better: ClassVar[bool] = False
    by_row: ClassVar[bool] = True
    unread: ClassVar[tuple[str, ...]] = (
        *("data.mixup_alpha", "data.cutmix_alpha", "data.train_transforms", "data.eval_transforms"),
        *PENALTIES,
    )
    inspected_rows: ClassVar[int] = 16

    @classmethod
    def from_config(cls, config: TrainConfig) -> Self:
        """The task of a config.

        Raises:
            ValueError: the model takes no text, or sees the token that it is to tell.
        """
        model = build_model(config.model)
        if not (isinstance(model, LanguageModel) and model.causal):
            raise ValueError(
                "model must be a causal model of text for next_token; got a "
                f"{type(model).__name__}. Choose crate_causal_base or the like."
            )
        return cls(model, config.text, config.optim.label_smoothing)

    @classmethod
    def open(cls, config: TrainConfig, *splits: tuple[str, bool]) -> tuple[Self, tuple[Rows, ...]]:
        """Texts, in contexts as long as the model's.

        Raises:
            ValueError: the model's sizes do not fit together, or a split not the model.
            KeyError, FileNotFoundError: the config names what does not exist.
        """
        return cls.reopen(config, *splits, facts={})

    @classmethod
    def reopen(
        cls, config: TrainConfig, *splits: tuple[str, bool], facts: Json
    ) -> tuple[Self, tuple[Rows, ...]]:
        """`open`, with the tokenizer that the facts tell of.

        Raises:
            ValueError, KeyError, FileNotFoundError: see `open`, or the tokenizer is another.
        """
        # Here, because a machine that only trains on arrays has none of the libraries.
        from crate_jax.data.text.rows import open_text

        task = cls.from_config(config)
        jax.eval_shape(task.init, jax.random.key(0))
        task.tokenizer(facts)
        sizes = dict(context=task.model.context_length, vocab_size=task.model.vocab_size)
        opened = (
            open_text(config.data, config.text, split, train=train, **sizes)
            for split, train in splits
        )
        return task, tuple(opened)

    def tokenizer(self, facts: Json) -> Any:
        """The tokenizer of the config, which must be that of the facts; None if it is not known.

        Raises:
            ValueError: it is another one, or there is none of that name.
        """
        from crate_jax.data.text.rows import tokenizer_of

        found, known = tokenizer_of(self.text), facts.get(TOKENIZER)
        if found is not None and known not in (None, found.digest):
            raise ValueError(
                f"text.tokenizer must be that of the training, of digest {known}; got "
                f"{self.text.tokenizer}, of digest {found.digest}. Give that one."
            )
        return found

    def facts(self, rows: Rows) -> Json:
        """``examples``, ``listing``, ``vocabulary``; ``tokenizer`` and ``end``, where known."""
        text: Any = rows  # TextRows
        found: Json = {"listing": text.listing, "vocabulary": self.model.vocab_size}
        if (tokenizer := self.tokenizer({})) is not None:
            found |= {TOKENIZER: tokenizer.digest, "end": tokenizer.end}
        return super().facts(rows) | found

    def blank(self) -> Batch:
        """A context of the token 0, which is told to come again."""
        tokens = np.zeros((1, self.model.context_length), np.int32)
        blank = {"tokens": tokens, "targets": tokens, "bytes": np.zeros(1, np.int32)}
        return blank  # type: ignore[return-value]

    def init(self, key: Array) -> tuple[Params, Extra]:
        """The model's parameters; there is nothing else."""
        return self.model.init(key, self.model.sample_input(), train=False)["params"], ()

    def loss(
        self, params: Params, extra: Extra, batch: Batch, key: Array
    ) -> tuple[Array, tuple[Extra, Scalars]]:
        """Cross-entropy in nats a token; no other scalars."""
        logits_BxTxV = self.model.apply(
            {"params": params}, batch["tokens"], train=True, rngs={"dropout": key}
        )
        loss_BxT = token_losses(
            logits_BxTxV, batch["targets"], label_smoothing=self.label_smoothing
        )
        told_B = jnp.sum(batch["targets"] >= 0, axis=1, dtype=jnp.float32)
        loss_B = loss_BxT.sum(axis=1) / jnp.maximum(told_B, 1)
        return loss_B.mean(), (extra, {})

    def sums(self, params: Params, extra: Extra, batch: Batch) -> Scalars:
        """``loss`` in nats (no smoothing), ``tokens`` told, ``bytes`` of them, ``examples``."""
        logits_BxTxV = self.model.apply({"params": params}, batch["tokens"], train=False)
        loss_BxT = token_losses(logits_BxTxV, batch["targets"])
        real_B, told_BxT = batch["mask"] > 0, batch["targets"] >= 0
        told_B = jnp.sum(told_BxT, axis=1, dtype=jnp.float32)
        return {
            "loss": jnp.sum(loss_BxT.sum(axis=1), where=real_B),
            "tokens": jnp.sum(told_B, where=real_B),
            "bytes": jnp.sum(batch["bytes"].astype(jnp.float32), where=real_B),
            "examples": jnp.sum(batch["mask"]),
        }

    def metrics(self, totals: dict[str, float]) -> dict[str, float]:
        """``loss`` in nats a token, ``bits_per_token``; ``bits_per_byte`` where bytes are known.

        The end of a text is a token of no byte. So bits per byte count what it costs to tell it.
        """
        loss, bits = totals["loss"] / totals["tokens"], totals["loss"] / math.log(2)
        found = {"loss": loss, "bits_per_token": bits / totals["tokens"]}
        return found | ({"bits_per_byte": bits / totals["bytes"]} if totals["bytes"] else {})

    def inspect(self, params: Params, extra: Extra, batch: Batch) -> tuple[Scalars, Images]:
        """The objective by layer, ``objective/<measure>/layer00`` …, what there is of it."""
        return layer_scalars(layerwise(*self.inside(params, extra, batch))), {}

    def inside(self, params: Params, extra: Extra, batch: Batch) -> Inside:
        """All layers, of contexts."""
        return Inside(self.model, {"params": params}, batch["tokens"])

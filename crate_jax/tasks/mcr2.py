"""Maximal coding rate reduction: features that fill their space, and of each class little of it."""

import dataclasses
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
from jax import Array

from crate_jax.analysis.layerwise import layer_scalars, layerwise
from crate_jax.config import Mcr2Config, TrainConfig
from crate_jax.data.rows import Rows
from crate_jax.files import Json
from crate_jax.tasks.classify import Classify
from crate_jax.tasks.pixels import blank_image
from crate_jax.tasks.projection import Embedder, Projection
from crate_jax.tasks.rates import (
    class_sums,
    largest_regularizer,
    mcr2_loss,
    metrics_of_sums,
    picture_of_cosines,
    unit,
)
from crate_jax.tasks.task import CLASSES, Batch, Extra, Images, Inside, Params, Scalars, Task

_LABELS = "labels"  # of the facts: features are no outputs for classes
_FACTORS = ("eps", "gamma1", "gamma2", "regularizer")  # of the loss


@dataclasses.dataclass(frozen=True)
class Mcr2(Task):
    """Features by the principle of maximal coding rate reduction, MCR².

    The loss is −γ₂ R(Z; γ₁) + R^c(Z; Π), or with λ > 0 that + λ/2 ‖Z‖². Z are the features of a
    batch, of norm 1 where λ is 0. Π are memberships: of labels, or of the views of an image, which
    share a class of their own.
    A batch is {"image": (B, H, W, c) or (B, V, H, W, c) of V views, "label": (B,) int32}.
    Source: arXiv 2006.08558; with λ arXiv 2406.01909, by which every local maximum then has
    orthogonal classes.

    Attributes:
        model: a Flax module with ``input_shape`` and ``num_classes``, which is 0, so that it gives
            what a head reads.
        num_classes: labels are below it.
        mean: subtracted from pixels in [0, 1]: one value, or one a channel.
        std: then divided by; likewise.
        options: the section of the config.
    """

    model: Any
    num_classes: int
    mean: tuple[float, ...] = (0.5,)
    std: tuple[float, ...] = (0.5,)
    options: Mcr2Config = dataclasses.field(default_factory=Mcr2Config)

    headline: ClassVar[str] = "rate_reduction"
    higher_is_better: ClassVar[bool] = True
    by_row: ClassVar[bool] = False

    @classmethod
    def from_config(cls, config: TrainConfig, num_classes: int | None = None) -> Self:
        """The task of a config; `num_classes` of its data, where they are known."""
        options = config.mcr2
        labels = Classify.from_config(config, num_classes)
        task = cls(
            model=labels.model.clone(num_classes=0),
            num_classes=labels.model.num_classes,
            mean=labels.mean,
            std=labels.std,
            options=options,
        )
        classes = task.num_classes if options.mode == "supervised" else config.batch_size
        most = task._largest(config.batch_size * options.views, 1 / classes)
        if options.regularizer > most:
            raise ValueError(
                f"mcr2.regularizer must be at most {float(most):.4g} for {classes} classes in a "
                f"batch; got {options.regularizer}. Set --config.mcr2.regularizer."
            )
        return task

    @classmethod
    def open(cls, config: TrainConfig, *splits: tuple[str, bool]) -> tuple[Self, tuple[Rows, ...]]:
        """Labelled images; of training those of a row in several views, if there are several.

        Raises:
            ValueError: see `from_config` and `Classify.open`.
            KeyError, FileNotFoundError: the config names what does not exist.
        """
        return cls.reopen(config, *splits, facts={})

    @classmethod
    def reopen(
        cls, config: TrainConfig, *splits: tuple[str, bool], facts: Json
    ) -> tuple[Self, tuple[Rows, ...]]:
        """Number the labels of the rows by name, if the facts name labels."""
        # Here, because a machine that only trains on arrays has none of the libraries.
        from crate_jax.data.images.views import repeated

        named = {CLASSES: facts[_LABELS]} if _LABELS in facts else {}
        labels, opened = Classify.reopen(config, *splits, facts=named)
        rows: Any = opened  # LabelledImages
        counts = (config.mcr2.views if train else 1 for _, train in splits)
        return cls.from_config(config, labels.model.num_classes), tuple(map(repeated, rows, counts))

    def facts(self, rows: Rows) -> Json:
        """``labels``, their names in order, where they are known; ``examples``, ``listing``."""
        names = getattr(rows, "class_names", ())
        return super().facts(rows) | ({_LABELS: list(names)} if names else {})

    def step_flops(self) -> float:
        """Three times the forward pass of all views, of the models that have a formula."""
        return self.options.views * super().step_flops()

    def blank(self) -> Batch:
        """A black image, in as many views, of class 0."""
        several = (self.options.views,) if self.options.views > 1 else ()
        return blank_image((*several, *self.model.input_shape))

    def init(self, key: Array) -> tuple[Params, Extra]:
        """The model's parameters, and those of ``head``; the model's other collections, or ()."""
        return self._embed.init(key)

    def loss(
        self, params: Params, extra: Extra, batch: Batch, key: Array
    ) -> tuple[Array, tuple[Extra, Scalars]]:
        """The loss in nats, and the scalars of `mcr2_loss`.

        With λ also ``largest_regularizer``, what this batch allows.
        """
        Z_Bxp, updated = self._features(params, extra, batch, key)
        Pi_BxJ, options = self._memberships(batch), self.options
        given = {name: getattr(options, name) for name in _FACTORS}
        loss, scalars = mcr2_loss(Z_Bxp, Pi_BxJ, **given)
        if options.regularizer:
            share = Pi_BxJ.sum(axis=0).max() / len(Z_Bxp)
            scalars["largest_regularizer"] = self._largest(len(Z_Bxp), share)
        return loss, (updated, scalars)

    def sums(self, params: Params, extra: Extra, batch: Batch) -> Scalars:
        """`class_sums` by label, and ``examples``."""
        Z_Bxp, _ = self._features(params, extra, batch)
        labels_B, real_B = (jnp.repeat(batch[x], self._views(batch)) for x in ("label", "mask"))
        Pi_BxJ = jax.nn.one_hot(labels_B, self.num_classes) * real_B[:, None]
        return class_sums(Z_Bxp, Pi_BxJ) | {"examples": jnp.sum(batch["mask"])}

    def metrics(self, totals: dict[str, Any]) -> dict[str, float]:
        """`metrics_of_sums`: ``rate_reduction`` of the whole split, by label, and more."""
        return metrics_of_sums(totals, eps=self.options.eps)

    def features(self, params: Params, extra: Extra, batch: Batch) -> Array:
        """The features (B, p), of norm 1."""
        return unit(self._features(params, extra, batch)[0])

    def inspect(self, params: Params, extra: Extra, batch: Batch) -> tuple[Scalars, Images]:
        """The objective by layer, of some rows; `picture_of_cosines`."""
        few = max(2, self.inspected_rows // self._views(batch))
        batch = {name: rows[:few] for name, rows in batch.items()}
        features_Bxp, of_class = self.features(params, extra, batch), self._memberships(batch)
        pictures = {"cosines": picture_of_cosines(features_Bxp, of_class.argmax(axis=1))}
        if not getattr(self.model, "tap_names", ()):
            return {}, pictures
        return layer_scalars(layerwise(*self.inside(params, extra, batch))), pictures

    def inside(self, params: Params, extra: Extra, batch: Batch) -> Inside:
        """The model's layers, of all views."""
        images = self._embed.normalized(batch["image"])
        return Inside(self.model, self._embed.variables(params, extra), images)

    @property
    def _embed(self) -> Embedder:
        head = Projection(self.options.dimension, self.options.hidden)
        return Embedder(self.model, head, self.mean, self.std)

    @staticmethod
    def _views(batch: Batch) -> int:
        """V, how many views of an image a row has."""
        return batch["image"].shape[1] if batch["image"].ndim == 5 else 1

    def _memberships(self, batch: Batch) -> Array:
        """Π (B V, J): by label, or of several views of an image each image a class."""
        views, of_row, classes = self._views(batch), batch["label"], self.num_classes
        if views > 1 and self.options.mode == "self_supervised":
            of_row, classes = jnp.arange(len(of_row)), len(of_row)
        return jax.nn.one_hot(jnp.repeat(of_row, views), classes)

    def _features(
        self, params: Params, extra: Extra, batch: Batch, key: Array | None = None
    ) -> tuple[Array, Extra]:
        """Features as the loss takes them; the extra after a training pass."""
        Z_Bxp, updated = self._embed(params, extra, batch["image"], key)
        return Z_Bxp if self.options.regularizer else unit(Z_Bxp), updated

    def _largest(self, rows: int, share: float | Array) -> Array:
        """λ's upper bound for so many features, of whose classes the largest has a share."""
        return largest_regularizer(rows, share, p=self.options.dimension, eps=self.options.eps)

"""Classification of images."""

import dataclasses
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
from jax import Array

from crate_jax.analysis.layerwise import layer_scalars, layerwise
from crate_jax.config import TrainConfig
from crate_jax.data.rows import Rows
from crate_jax.files import Json
from crate_jax.models.classifier import of_images
from crate_jax.models.stacked import BlockModel
from crate_jax.models.zoo import build_model
from crate_jax.tasks.frozen import gives_features, pooled_token
from crate_jax.tasks.labels import labelled_rows, sums_of_labels
from crate_jax.tasks.losses import cross_entropy
from crate_jax.tasks.mixing import make_mix
from crate_jax.tasks.penalties import Penalties
from crate_jax.tasks.pixels import blank_image, normalized
from crate_jax.tasks.task import CLASSES, Batch, Extra, Images, Inside, Params, Scalars, Task


@dataclasses.dataclass(frozen=True)
class Classify(Task):
    """A class for each image, by cross-entropy.

    A batch is {"image": (B, H, W, c), "label": (B,) int32}. Images of uint8 are stored pixels,
    which are normalised here; images of floats are normalised already. Running statistics of the
    model, whatever collections hold them, are the task's extra.

    Attributes:
        model: a Flax module with ``input_shape`` and ``num_classes``, from normalised images to
            logits.
        mean: subtracted from pixels in [0, 1]: one value, or one a channel.
        std: then divided by; likewise.
        label_smoothing: the smoothing of the training loss, in [0, 1).
        mixup_alpha, cutmix_alpha, mix_switch: of `crate_jax.tasks.mixing.make_mix`.
        penalties: added to the training loss.
    """

    model: Any
    mean: tuple[float, ...] = (0.5,)
    std: tuple[float, ...] = (0.5,)
    label_smoothing: float = 0.0
    mixup_alpha: float = 0.0
    cutmix_alpha: float = 0.0
    mix_switch: float = 0.5
    penalties: Penalties = dataclasses.field(default_factory=Penalties)

    headline: ClassVar[str] = "top1"
    higher_is_better: ClassVar[bool] = True
    by_row: ClassVar[bool] = True
    unread: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        """Refuse a model of ours that takes no images, and one without classes."""
        if isinstance(self.model, BlockModel):
            of_images(self.model)
        if getattr(self.model, "num_classes", None) == 0:
            raise ValueError(
                "model.num_classes must be at least 1 for a classifier; got 0, features. Leave it "
                "unset: it is that of the data."
            )
        self.penalties.check(self.model)

    @classmethod
    def from_config(cls, config: TrainConfig, num_classes: int | None = None) -> Self:
        """The task of a config; `num_classes` of its data, where they are known."""
        model = build_model(config.model)
        unset = num_classes is None and getattr(config.model, "num_classes", None) is None
        if unset and getattr(model, "num_classes", None) == 0:  # no head, unless one is asked for
            num_classes = 1000
        return cls(
            model=model if num_classes is None else model.clone(num_classes=num_classes),
            mean=tuple(config.data.mean),
            std=tuple(config.data.std),
            label_smoothing=config.optim.label_smoothing,
            mixup_alpha=config.data.mixup_alpha,
            cutmix_alpha=config.data.cutmix_alpha,
            mix_switch=config.data.mix_switch,
            penalties=Penalties.from_config(config.penalty),
        )

    @classmethod
    def open(cls, config: TrainConfig, *splits: tuple[str, bool]) -> tuple[Self, tuple[Rows, ...]]:
        """Labelled images, and a model with as many classes as they have; see `reopen`."""
        return cls.reopen(config, *splits, facts={})

    @classmethod
    def reopen(
        cls, config: TrainConfig, *splits: tuple[str, bool], facts: Json
    ) -> tuple[Self, tuple[Rows, ...]]:
        """Take the classes that the facts name: the model has those, and names number the labels.

        A split may have them in another order, or some of them only.

        Raises:
            ValueError: the model's sizes do not fit together, or as `labelled_rows`.
            KeyError, FileNotFoundError: likewise.
        """
        task = cls.from_config(config)
        # Sizes that do not fit together fail here, before any data is read.
        jax.eval_shape(task.init, jax.random.key(0))
        named = facts.get(CLASSES, ())
        opened = labelled_rows(config, splits, image_shape=task.model.input_shape, classes=named)
        return cls.from_config(config, opened[0].num_classes), opened

    def facts(self, rows: Rows) -> Json:
        """``classes``, names in the order of the outputs, where they are known; and the others."""
        images: Any = rows  # LabelledImages
        known = super().facts(rows)
        return {CLASSES: list(images.class_names)} | known if images.class_names else known

    def blank(self) -> Batch:
        """A black image of class 0."""
        return blank_image(self.model.input_shape)

    def init(self, key: Array) -> tuple[Params, Extra]:
        """The model's parameters; its other collections, or () if it has none."""
        images = jnp.zeros((1, *self.model.input_shape), jnp.float32)
        variables = dict(self.model.init(key, images, train=False))
        return variables.pop("params"), variables or ()

    def on_device(self, batch: Batch, key: Array) -> Batch:
        """Normalised and mixed images with soft targets (B, Y); the batch as it is without mixing.

        Images that are not mixed stay uint8, so that `loss` normalises a micro-batch at a time.
        """
        alphas = dict(mixup_alpha=self.mixup_alpha, cutmix_alpha=self.cutmix_alpha)
        mix = make_mix(num_classes=self.model.num_classes, switch=self.mix_switch, **alphas)
        if mix is None:
            return batch
        images, targets = mix(key, self.normalized(batch["image"]), batch["label"])
        return {"image": images, "label": targets}

    def loss(
        self, params: Params, extra: Extra, batch: Batch, key: Array
    ) -> tuple[Array, tuple[Extra, Scalars]]:
        """Mean cross-entropy in nats, and penalties; ``top1``, of mixed images by the heavier."""
        images, targets = self.normalized(batch["image"]), batch["label"]
        labels_B = targets.argmax(axis=1) if targets.ndim == 2 else targets
        how: dict[str, Any] = dict(train=True, rngs={"dropout": key}, mutable=list(extra))
        if taps := self.penalties.taps:
            how |= {"method": "forward", "taps": taps}
        found, updated = self.model.apply({"params": params, **dict(extra)}, images, **how)
        logits_BxY, seen = found if taps else (found, {})
        loss = cross_entropy(logits_BxY, targets, label_smoothing=self.label_smoothing).mean()
        top1 = (logits_BxY.argmax(axis=1) == labels_B).mean(dtype=jnp.float32)
        penalty, penalties = self.penalties(params, seen, jax.random.fold_in(key, 1))
        return loss + penalty, (updated or (), {"top1": top1} | penalties)

    def sums(self, params: Params, extra: Extra, batch: Batch) -> Scalars:
        """``loss`` (nats, no smoothing), ``top1``, ``top5`` (of fewer classes, all), ``examples``.

        What rows of mask 0 hold makes no difference, and no logits leave their device.
        """
        return sums_of_labels(self.logits(params, extra, batch), batch["label"], batch["mask"])

    def logits(self, params: Params, extra: Extra, batch: Batch) -> Array:
        """The logits of all classes (B, Y), float32, in evaluation mode."""
        variables = {"params": params, **dict(extra)}
        return self.model.apply(variables, self.normalized(batch["image"]), train=False)

    def metrics(self, totals: dict[str, float]) -> dict[str, float]:
        """Means: ``loss`` in nats, ``top1`` and ``top5`` in [0, 1]."""
        return {name: totals[name] / totals["examples"] for name in ("loss", "top1", "top5")}

    def features(self, params: Params, extra: Extra, batch: Batch) -> Array:
        """The input of the head, (B, d): the pooled token, normalised."""
        if not gives_features(self.model):
            return super().features(params, extra, batch)
        return pooled_token(*self.inside(params, extra, batch))

    def inside(self, params: Params, extra: Extra, batch: Batch) -> Inside:
        """All layers, of the images."""
        if not getattr(self.model, "tap_names", ()):
            return super().inside(params, extra, batch)
        variables = {"params": params, **dict(extra)}
        return Inside(self.model, variables, self.normalized(batch["image"]))

    def inspect(self, params: Params, extra: Extra, batch: Batch) -> tuple[Scalars, Images]:
        """The objective by layer, ``objective/<measure>/layer00`` …, what there is of it."""
        if not getattr(self.model, "tap_names", ()):
            return {}, {}
        return layer_scalars(layerwise(*self.inside(params, extra, batch))), {}

    def normalized(self, images: Array) -> Array:
        """The input of the model: stored pixels normalised, floats as they are.

        Raises:
            ValueError: images are neither.
        """
        return normalized(images, mean=self.mean, std=self.std)

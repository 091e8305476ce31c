"""Classification of images."""

import dataclasses
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from crate_jax.analysis.layerwise import layer_scalars, layerwise
from crate_jax.config import TrainConfig
from crate_jax.data.rows import Rows
from crate_jax.files import Json
from crate_jax.models.classifier import of_images
from crate_jax.models.cost import has_formula, multiply_adds
from crate_jax.models.stacked import BlockModel
from crate_jax.models.zoo import build_model
from crate_jax.tasks.frozen import gives_features, pooled_token
from crate_jax.tasks.losses import cross_entropy
from crate_jax.tasks.mixing import make_mix
from crate_jax.tasks.penalties import Penalties
from crate_jax.tasks.pixels import normalized
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
        label_smoothing: of the training loss, in [0, 1).
        mixup_alpha: of `crate_jax.tasks.mixing.make_mix`.
        cutmix_alpha: likewise.
        mix_switch: likewise.
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
        if self.penalties.srr and "subspace_tokens" not in getattr(self.model, "tap_names", ()):
            raise ValueError(
                "penalty.srr must be 0 for a model without MSSA, TSSA and CBSA, whose layers have "
                f"no subspaces; got {self.penalties.srr}. Set it to 0."
            )

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
        """Labelled images, and a model with as many classes as they have.

        Raises:
            ValueError: the model's sizes do not fit together, model.num_classes is set and
                disagrees with the data, or the classes of two splits differ.
            KeyError, FileNotFoundError: the config names what does not exist.
        """
        return cls.reopen(config, *splits, facts={})

    @classmethod
    def reopen(
        cls, config: TrainConfig, *splits: tuple[str, bool], facts: Json
    ) -> tuple[Self, tuple[Rows, ...]]:
        """Where the facts name classes, the model has those, and labels are numbered by name.

        A split may have them in another order, or some of them only.

        Raises:
            ValueError, KeyError, FileNotFoundError: as `open`, or a class is not among those.
        """
        # Here, because a machine that only trains on arrays has none of the libraries.
        from crate_jax.data.images.labelled import open_labelled_images
        from crate_jax.data.stores.sources import check_same_classes

        task = cls.from_config(config)
        # Sizes that do not fit together fail here, before any data is read.
        jax.eval_shape(task.init, jax.random.key(0))
        shape, named = task.model.input_shape, facts.get(CLASSES, ())
        opened = []
        for split, train in splits:
            rows = open_labelled_images(
                config.data,
                split,
                train=train,
                image_shape=shape,
                num_classes=len(named) or config.model.num_classes,
                classes=named,
            )
            if config.model.num_classes not in (None, rows.num_classes):
                raise ValueError(
                    f"model.num_classes must equal the {rows.num_classes} classes of {rows.name}; "
                    f"got {config.model.num_classes}. Leave model.num_classes unset."
                )
            opened.append(rows)
            if not named:
                check_same_classes(opened[0].source, rows.source)
        return cls.from_config(config, opened[0].num_classes), tuple(opened)

    def facts(self, rows: Rows) -> Json:
        """``classes``, names in the order of the outputs; ``examples``; ``listing``: what is known.

        The listing changes with what the files are called, and with their labels; for TFDS, with
        the version and the shards.
        """
        images: Any = rows  # LabelledImages
        known = super().facts(rows)
        return {CLASSES: list(images.class_names)} | known if images.class_names else known

    def step_flops(self) -> float:
        """Three times the forward pass, of the models that have a formula."""
        return 6.0 * multiply_adds(self.model) if has_formula(self.model) else 0.0

    def blank(self) -> Batch:
        """A black image of class 0."""
        image = np.zeros((1, *self.model.input_shape), np.uint8)
        return {"image": image, "label": np.zeros(1, np.int32)}  # type: ignore[dict-item]

    def init(self, key: Array) -> tuple[Params, Extra]:
        """The model's parameters; its other collections, or () if it has none."""
        images = jnp.zeros((1, *self.model.input_shape), jnp.float32)
        variables = dict(self.model.init(key, images, train=False))
        params = variables.pop("params")
        return params, variables or ()

    def on_device(self, batch: Batch, key: Array) -> Batch:
        """Normalised and mixed images with soft targets (B, Y); the batch as it is without mixing.

        Images that are not mixed stay uint8, so that `loss` normalises a micro-batch at a time.
        """
        mix = make_mix(
            num_classes=self.model.num_classes,
            mixup_alpha=self.mixup_alpha,
            cutmix_alpha=self.cutmix_alpha,
            switch=self.mix_switch,
        )
        if mix is None:
            return batch
        images, targets = mix(key, self.normalized(batch["image"]), batch["label"])
        return {"image": images, "label": targets}

    def loss(
        self, params: Params, extra: Extra, batch: Batch, key: Array
    ) -> tuple[Array, tuple[Extra, Scalars]]:
        """Mean cross-entropy in nats, and the penalties.

        Scalars: ``top1``, of mixed images against the heavier class; each penalty.
        """
        images, targets = self.normalized(batch["image"]), batch["label"]
        labels_B = targets.argmax(axis=1) if targets.ndim == 2 else targets
        found, updated = self.model.apply(
            {"params": params, **dict(extra)},
            images,
            train=True,
            rngs={"dropout": key},
            mutable=list(extra),
            **self._asked(),
        )
        logits_BxY, seen = found if self.penalties.taps else (found, {})
        loss = cross_entropy(logits_BxY, targets, label_smoothing=self.label_smoothing).mean()
        top1 = (logits_BxY.argmax(axis=1) == labels_B).mean(dtype=jnp.float32)
        penalty, penalties = self.penalties(params, seen, jax.random.fold_in(key, 1))
        return loss + penalty, (updated or (), {"top1": top1} | penalties)

    def _asked(self) -> dict[str, Any]:
        """How the model is called where a penalty asks for taps."""
        taps = self.penalties.taps
        return {"method": "forward", "taps": taps} if taps else {}

    def sums(self, params: Params, extra: Extra, batch: Batch) -> Scalars:
        """``loss`` (nats, no smoothing), ``top1``, ``top5`` (of fewer classes, all), ``examples``.

        What rows of mask 0 hold makes no difference, and no logits leave their device.
        """
        logits_BxY = self.logits(params, extra, batch)
        labels_B, mask_B = batch["label"], batch["mask"]
        rank_B = rank_of_label(logits_BxY, labels_B)
        loss_B = optax.softmax_cross_entropy_with_integer_labels(logits_BxY, labels_B)
        return {
            "loss": jnp.sum(loss_B, where=mask_B > 0),
            "top1": jnp.sum(mask_B, where=rank_B < 1),
            "top5": jnp.sum(mask_B, where=rank_B < 5),
            "examples": jnp.sum(mask_B),
        }

    def logits(self, params: Params, extra: Extra, batch: Batch) -> Array:
        """Of all classes (B, Y), float32, in evaluation mode."""
        variables = {"params": params, **dict(extra)}
        return self.model.apply(variables, self.normalized(batch["image"]), train=False)

    def metrics(self, totals: dict[str, float]) -> dict[str, float]:
        """Means: ``loss`` in nats, ``top1`` and ``top5`` in [0, 1]."""
        return {name: totals[name] / totals["examples"] for name in ("loss", "top1", "top5")}

    def features(self, params: Params, extra: Extra, batch: Batch) -> Array:
        """What the head reads, (B, d): the pooled token, normalised."""
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
        return layer_scalars(self.layers(params, extra, batch)), {}

    def layers(self, params: Params, extra: Extra, batch: Batch) -> dict[str, Array]:
        """`crate_jax.analysis.layerwise` of a batch: arrays (L,), float32, by measure."""
        return layerwise(*self.inside(params, extra, batch))

    def normalized(self, images: Array) -> Array:
        """What the model takes: stored pixels normalised, floats as they are.

        Raises:
            ValueError: images are neither.
        """
        return normalized(images, mean=self.mean, std=self.std)


def rank_of_label(logits_BxY: Array, labels_B: Array) -> Array:
    """How many classes come before the label's: (B,) int32, 0 for a hit.

    Of equal logits the lower class comes first. One that is not a number comes before all others,
    and as the label's own is never a hit, however many count as one. It is counted, not sorted: a
    sort would gather the logits of the whole batch on every device. No class is ahead of itself. A
    compiler that computes the label's logit twice, and rounds it in two ways, may decide a tie with
    another class either way.
    """
    own_Bx1 = jnp.take_along_axis(logits_BxY, labels_B[:, None], axis=1)
    labels_Bx1 = labels_B[:, None].astype(jnp.int32)
    classes_1xY = jnp.arange(logits_BxY.shape[1], dtype=jnp.int32)[None]
    tied_BxY = (logits_BxY == own_Bx1) & (classes_1xY < labels_Bx1)
    ahead_BxY = (~(logits_BxY <= own_Bx1) | tied_BxY) & (classes_1xY != labels_Bx1)
    rank_B = jnp.sum(ahead_BxY, axis=1, dtype=jnp.int32)
    return jnp.where(jnp.isnan(own_Bx1[:, 0]), jnp.iinfo(jnp.int32).max, rank_B)

"""SimDINO: a student that agrees with its own moving average, and does not collapse."""

import dataclasses
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
from jax import Array

from crate_jax.config import TrainConfig
from crate_jax.data.rows import Rows
from crate_jax.models.classifier import of_images
from crate_jax.models.zoo import build_model
from crate_jax.tasks.coding_losses import Coding, collapse
from crate_jax.tasks.distillation import Network, ProjectionHead, Seen, followed, kept, momentum_at
from crate_jax.tasks.masking import check_shares, masks_of_one_view
from crate_jax.tasks.neighbours import empty_bank, nearest_class, pushed
from crate_jax.tasks.rates import unit
from crate_jax.tasks.task import Batch, Extra, Images, Inside, Params, Scalars, Task, length_of


@dataclasses.dataclass(frozen=True)
class SimDino(Task):
    """Views of an image agree, and images fill the space; labels only measure it.

    A training batch is {"global": (B, 2, H, W, c), "local": (B, n, h, w, c), "label": (B,)}, one of
    evaluation {"image", "label"}. Parameters are the backbone's, and under ``head`` those behind
    it. The extra holds ``teacher``, the variables of both as they are averaged; ``bank``, what the
    teacher saw last; and, of a model that has any, the running statistics of the student.
    Source: arXiv 2502.10385 and its code; SimDINOv2 has the patches too.
    Differs from official: patches are hidden one by one, in one of the two global views of each
    image; there in half of the global views of all images. Running statistics are averaged as
    parameters are, and the teacher computes with them.

    Attributes: those of `crate_jax.sections.SimDinoConfig`, and
        model: the backbone, a `crate_jax.models.classifier.ImageClassifier` without classes.
        mean: subtracted from pixels in [0, 1]: one value, or one a channel.
        std: then divided by; likewise.
        coding: the loss.
        total_steps: over which the teacher's momentum rises.
    """

    model: Any
    mean: tuple[float, ...] = (0.5,)
    std: tuple[float, ...] = (0.5,)
    coding: Coding = dataclasses.field(default_factory=Coding)
    total_steps: int = 1
    head_hidden: int = 2048
    head_features: int = 256
    momentum: float = 0.996
    end_momentum: float = 1.0
    local_crops: int = 10
    local_size: int = 96
    min_masked: float = 0.1
    max_masked: float = 0.5
    bank_size: int = 4096
    neighbours: int = 20

    headline: ClassVar[str] = "knn"
    higher_is_better: ClassVar[bool] = True
    by_row: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Refuse a model of text, and views and masks that do not fit."""
        of_images(self.model)
        self.network.check(self.local_crops)
        check_shares(self.min_masked, self.max_masked)

    @classmethod
    def from_config(cls, config: TrainConfig) -> Self:
        """The task of a config."""
        views = config.simdino
        shared = {field.name for field in dataclasses.fields(views)} & set(cls.__annotations__)
        return cls(
            model=of_images(build_model(config.model)).clone(num_classes=0),
            mean=tuple(config.data.mean),
            std=tuple(config.data.std),
            coding=Coding.from_config(views, config.batch_size),
            **{name: getattr(views, name) for name in shared},
        )

    @classmethod
    def open(cls, config: TrainConfig, *splits: tuple[str, bool]) -> tuple[Self, tuple[Rows, ...]]:
        """Views of images for training, whole images for evaluation.

        Raises:
            ValueError: sizes do not fit together, or the classes of two splits differ.
            KeyError, FileNotFoundError: the config names what does not exist.
        """
        # Here, because a machine that only trains on arrays has none of the libraries.
        from crate_jax.data.images.crops import open_views

        task = cls.from_config(config)
        jax.eval_shape(task.init, jax.random.key(0))  # sizes that do not fit together fail here
        opened = open_views(config, splits, image_shape=task.model.input_shape)
        for rows, (_, train) in zip(opened, splits, strict=True):
            if train:
                task = dataclasses.replace(task, total_steps=length_of(config, rows)[1])
        return task, opened

    def step_flops(self) -> float:
        """The operations of a step of student and teacher, for models that have a formula."""
        return self.network.step_flops(self.local_crops)

    def blank(self) -> Batch:
        """Black views, and class 0."""
        return self.network.blank(self.local_crops)

    def init(self, key: Array) -> tuple[Params, Extra]:
        """Student and teacher, which are equal, and an empty bank."""
        variables = self.network.init(key, mask_token=self.coding.patch_weight > 0)
        params, bank = variables.pop("params"), empty_bank(self.bank_size, self.model.width)
        return params, self.begun(params, {"bank": bank}, variables)

    def begun(self, params: Params, extra: Extra, others: Params) -> Extra:
        """The teacher begins as the student does."""
        teacher = {"params": params, **others}
        teacher = jax.tree.map(jnp.copy, teacher)  # a donated buffer can't be shared
        return extra | {"teacher": teacher} | kept(others)

    def on_device(self, batch: Batch, key: Array) -> Batch:
        """Add ``masked`` (B, 2, P): the patches of global views hidden from the student."""
        if not self.coding.patch_weight:
            return batch
        shape = (len(batch["label"]), self.model.num_patches)
        shares = dict(least=self.min_masked, most=self.max_masked)
        return batch | {"masked": masks_of_one_view(key, shape, **shares)}

    def loss(
        self, params: Params, extra: Extra, batch: Batch, key: Array
    ) -> tuple[Array, tuple[Extra, Scalars]]:
        """The loss of `Coding`, and its scalars."""
        views, masked, keys = batch["global"], batch.get("masked"), jax.random.split(key)
        variables = {"params": params, **extra.get("statistics", {})}
        teacher = self.network.see(extra["teacher"], views)
        student = self.network.see(variables, views, keys[0], masked)
        variables |= student.variables
        features, patches = [student.features], None
        if "local" in batch:
            small = self.network.see(variables, batch["local"], keys[1])
            features.append(small.features)
            variables |= small.variables
        if masked is not None:
            told = self.network.patches(variables, student.tokens)
            patches = (told, self.network.patches(extra["teacher"], teacher.tokens), masked)
        loss, scalars = self.coding(jnp.concatenate(features, axis=1), teacher.features, patches)
        bank = pushed(extra["bank"], unit(teacher.pooled[:, 0]), batch["label"])
        del variables["params"]
        return loss, (extra | {"bank": bank} | kept(variables), scalars)

    def after(self, params: Params, extra: Extra, step: Array) -> Extra:
        """The teacher follows."""
        student = {"params": params, **extra.get("statistics", {})}
        ends = (self.momentum, self.end_momentum)
        momentum = momentum_at(step - 1, ends, total_steps=self.total_steps)
        return extra | {"teacher": followed(extra["teacher"], student, momentum)}

    def features(self, params: Params, extra: Extra, batch: Batch) -> Array:
        """The input of a teacher's head (B, d), float32; of several views, that of the first."""
        return self._seen(extra, batch).pooled[:, 0]

    def sums(self, params: Params, extra: Extra, batch: Batch) -> Scalars:
        """``knn``, the number of labels that the bank votes for, and ``examples``."""
        query_Bxd = unit(self.features(params, extra, batch))
        voted_B = nearest_class(query_Bxd, extra["bank"], k=self.neighbours)
        right = jnp.sum(batch["mask"], where=voted_B == batch["label"])
        return {"knn": right, "examples": jnp.sum(batch["mask"])}

    def metrics(self, totals: dict[str, float]) -> dict[str, float]:
        """``knn``, a share in [0, 1]."""
        return {"knn": totals["knn"] / totals["examples"]}

    def inspect(self, params: Params, extra: Extra, batch: Batch) -> tuple[Scalars, Images]:
        """Measure the collapse of the teacher's features; draw both global views side by side."""
        beside = jnp.concatenate([*self._views(batch)[:8].swapaxes(0, 1)], axis=2)
        return collapse(self._seen(extra, batch).features[:, 0]), {"views": beside}

    def inside(self, params: Params, extra: Extra, batch: Batch) -> Inside:
        """The teacher's layers, of the first view."""
        return self.network.inside(extra["teacher"], self._views(batch)[:, :1])

    @property
    def network(self) -> Network:
        """The network of student and teacher."""
        head = ProjectionHead(self.head_hidden, self.head_features, self.model.dtype)
        return Network(self.model, head, self.mean, self.std, self.local_size)

    def _views(self, batch: Batch) -> Array:
        """(B, V, H, W, c): of evaluation the image itself, V = 1."""
        return batch["image"][:, None] if "image" in batch else batch["global"]

    def _seen(self, extra: Extra, batch: Batch) -> Seen:
        """The outputs of the teacher for the first view."""
        return self.network.see(extra["teacher"], self._views(batch)[:, :1])

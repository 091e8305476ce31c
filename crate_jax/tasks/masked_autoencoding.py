"""Masked autoencoding of images: patches are hidden, and their pixels are to be told."""

import dataclasses
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
from jax import Array

from crate_jax.analysis.layerwise import layer_scalars, layerwise
from crate_jax.config import TrainConfig
from crate_jax.data.rows import Rows
from crate_jax.models.classifier import pair
from crate_jax.models.embedding import patchify, unpatchify
from crate_jax.models.zoo import build_model
from crate_jax.tasks.frozen import mean_patch
from crate_jax.tasks.masking import hidden_errors, hidden_patches, own_noise, reconstructions
from crate_jax.tasks.pixels import blank_image, normalized, pixels_of
from crate_jax.tasks.task import Batch, Extra, Images, Inside, Params, Scalars, Task

SHOWN = 8  # pictures of `inspect`


@dataclasses.dataclass(frozen=True)
class MaskedAutoencoding(Task):
    """The pixels of hidden patches, by mean squared error.

    A batch is {"image": (B, H, W, c)}, as for `crate_jax.tasks.classify.Classify`; labels are not
    read. In training the step's key draws the patches that are hidden. In evaluation an image's own
    pixels do, so that its error depends neither on other images nor on devices.
    Source: arXiv 2111.06377, and arXiv 2404.02446, which trains CRATE-MAE so.

    Attributes:
        model: a Flax module with ``input_shape``, ``patch_size``, ``num_patches`` and the method
            ``reconstruct`` of `crate_jax.CrateMae`.
        mean: subtracted from pixels in [0, 1]: one value, or one a channel.
        std: then divided by; likewise.
        ratio: share of the patches that is hidden: all but ⌊(1 − ratio) P⌋.
        normalize: whether pixels are told relative to their patch; see `patch_statistics`.
    """

    model: Any
    mean: tuple[float, ...] = (0.5,)
    std: tuple[float, ...] = (0.5,)
    ratio: float = 0.75
    normalize: bool = True

    headline: ClassVar[str] = "loss"
    higher_is_better: ClassVar[bool] = False
    by_row: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Refuse a model without a decoder, and a ratio that hides nothing or leaves nothing."""
        if not getattr(self.model, "decoder_depth", 0):
            raise ValueError(
                "model must be an autoencoder with a decoder for masked_autoencoding; got "
                f"{type(self.model).__name__} without one. Choose crate_mae_base_patch16_224 or "
                "the like, and leave model.decoder_depth unset."
            )
        patches = self.model.num_patches
        if patches and not 0 < self.kept < patches:
            raise ValueError(
                f"masking.ratio must leave a patch and hide one of the {patches} of an image; got "
                f"{self.ratio}, which leaves {self.kept}. Set --config.masking.ratio, or smaller "
                "patches."
            )

    @classmethod
    def from_config(cls, config: TrainConfig) -> Self:
        """The task of a config."""
        return cls(
            model=build_model(config.model),
            mean=tuple(config.data.mean),
            std=tuple(config.data.std),
            ratio=config.masking.ratio,
            normalize=config.masking.normalize,
        )

    @classmethod
    def open(cls, config: TrainConfig, *splits: tuple[str, bool]) -> tuple[Self, tuple[Rows, ...]]:
        """Images, of which the model sees a part.

        Raises:
            ValueError: the model's sizes do not fit together.
            KeyError, FileNotFoundError: the config names what does not exist.
        """
        # Here, because a machine that only trains on arrays has none of the libraries.
        from crate_jax.data.images.labelled import open_labelled_images

        task = cls.from_config(config)
        # Sizes that do not fit together fail here, before any data is read.
        jax.eval_shape(task.init, jax.random.key(0))
        size = dict(image_shape=task.model.input_shape, num_classes=None, labelled=False)
        opened = (
            open_labelled_images(config.data, split, train=train, **size) for split, train in splits
        )
        return task, tuple(opened)

    def blank(self) -> Batch:
        """A black image, and a label that nobody reads."""
        return blank_image(self.model.input_shape)

    def init(self, key: Array) -> tuple[Params, Extra]:
        """The model's parameters; there is nothing else."""
        images = jnp.zeros((1, *self.model.input_shape), jnp.float32)
        return self.model.init(key, images, train=False)["params"], ()

    @property
    def kept(self) -> int:
        """The number of patches of an image that the model sees."""
        return int(self.model.num_patches * (1 - self.ratio) + 1e-6)  # 0.1 of ten is not 0.999…

    def on_device(self, batch: Batch, key: Array) -> Batch:
        """With ``masked`` (B, P): which patches are hidden."""
        shape = (len(batch["image"]), self.model.num_patches)
        noise_BxP = jax.random.uniform(key, shape, jnp.float32)
        return batch | {"masked": hidden_patches(noise_BxP, self.kept)}

    def loss(
        self, params: Params, extra: Extra, batch: Batch, key: Array
    ) -> tuple[Array, tuple[Extra, Scalars]]:
        """The mean squared error over the pixels of hidden patches; no other scalars."""
        images = normalized(batch["image"], mean=self.mean, std=self.std)
        error_B, _ = self._errors(params, images, batch["masked"], key)
        return error_B.mean(), (extra, {})

    def sums(self, params: Params, extra: Extra, batch: Batch) -> Scalars:
        """``loss``, ``loss_of_means`` (of whoever knows the mean of each patch), ``examples``."""
        images, masked_BxP = self._evaluated(batch["image"])
        error_B, of_means_B = self._errors(params, images, masked_BxP)
        real_B = batch["mask"] > 0
        return {
            "loss": jnp.sum(error_B, where=real_B),
            "loss_of_means": jnp.sum(of_means_B, where=real_B),
            "examples": jnp.sum(batch["mask"]),
        }

    def metrics(self, totals: dict[str, float]) -> dict[str, float]:
        """Means: ``loss``, and ``loss_of_means``, of the best that knows nothing but the means."""
        return {name: totals[name] / totals["examples"] for name in ("loss", "loss_of_means")}

    def features(self, params: Params, extra: Extra, batch: Batch) -> Array:
        """The mean patch token of the encoder (B, d), of whole images."""
        return mean_patch(*self.inside(params, extra, batch))

    def inside(self, params: Params, extra: Extra, batch: Batch) -> Inside:
        """The encoder, of whole images."""
        images = normalized(batch["image"], mean=self.mean, std=self.std)
        return Inside(self.model, {"params": params}, images)

    def inspect(self, params: Params, extra: Extra, batch: Batch) -> tuple[Scalars, Images]:
        """The objective by layer, of whole images; pictures: original | masked | reconstruction."""
        images, masked_BxP = self._evaluated(batch["image"])
        scalars = layer_scalars(layerwise(self.model, params, images))
        shown, masked_BxP = images[:SHOWN], masked_BxP[:SHOWN]
        told_BxPxk, patches = self._told(params, shown, masked_BxP), patchify(shown, self._patch)
        three = reconstructions(told_BxPxk, patches, masked_BxP, normalize=self.normalize)
        pictures = (unpatchify(patches, self._patch, self.model.grid) for patches in three)
        beside = jnp.concatenate([*pictures], axis=2)
        return scalars, {"reconstruction": pixels_of(beside, mean=self.mean, std=self.std)}

    @property
    def _patch(self) -> tuple[int, int]:
        return pair(self.model.patch_size)

    def _evaluated(self, stored: Array) -> tuple[Array, Array]:
        """Normalised images, and the patches that are hidden where no step says so."""
        noise_BxP = own_noise(stored, self.model.num_patches)
        images = normalized(stored, mean=self.mean, std=self.std)
        return images, hidden_patches(noise_BxP, self.kept)

    def _told(
        self, params: Params, images: Array, masked_BxP: Array, key: Array | None = None
    ) -> Array:
        """The model's prediction for all patches (B, P, k); with a key, in training mode."""
        how: Any = dict(train=False) if key is None else dict(train=True, rngs={"dropout": key})
        inputs = ({"params": params}, images, masked_BxP)
        return self.model.apply(*inputs, method="reconstruct", **how)

    def _errors(
        self, params: Params, images: Array, masked_BxP: Array, key: Array | None = None
    ) -> tuple[Array, Array]:
        """The mean squared error over the hidden patches of each image, and that of their means."""
        told_BxPxk = self._told(params, images, masked_BxP, key)
        X_BxPxk = patchify(images.astype(jnp.float32), self._patch)
        return hidden_errors(told_BxPxk, X_BxPxk, masked_BxP, normalize=self.normalize)

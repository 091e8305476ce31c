"""The preprocessing of a picture for a model: size, crop, filter, mean and deviation."""

import dataclasses
import fnmatch
from collections.abc import Mapping

import numpy as np

from crate_jax.config import IMAGENET_MEAN, IMAGENET_STD, DataConfig
from crate_jax.files import Json
from crate_jax.models.classifier import of_images, pair
from crate_jax.models.stacked import BlockModel
from crate_jax.options import is_of

# The authors' evaluation, if it is known and differs from the ImageNet standard.
_FILTERS = {"tost_*": "bicubic"}


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """From a stored picture to a model's input.

    The shorter side is resized to ``image_size / crop_share`` pixels, and the central window of
    ``image_size`` is cut out. Without a crop share the whole picture is resized to ``image_size``,
    whatever its proportions. The pixels are then scaled: (x / 255 − mean) / std.

    Attributes:
        image_size: (height, width) in pixels.
        mean: one value a channel, of pixels in [0, 1].
        std: likewise, the standard deviation.
        crop_share: of the shorter side, in (0, 1]; None: no crop.
        interpolation: "bilinear" or "bicubic", with smoothing where the picture shrinks.
    """

    image_size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_share: float | None = 0.875
    interpolation: str = "bilinear"

    def __post_init__(self):
        sides = len(self.image_size) == 2 and min(self.image_size) > 0
        channels = 0 < len(self.mean) == len(self.std) and min(self.std) > 0
        if not (sides and channels and self.interpolation in ("bilinear", "bicubic")):
            raise ValueError(
                "preprocessing must have two sides, a mean and a deviation above 0 for each "
                f"channel, and the interpolation bilinear or bicubic; got {self}. Correct it."
            )
        height, width = self.image_size
        if self.crop_share is not None and not (0 < self.crop_share <= 1 and height == width):
            raise ValueError(
                f"crop_share must be in (0, 1], and None for an image_size that is not square; got "
                f"{self.crop_share} for {height}x{width}. Correct one of them."
            )

    @property
    def transforms(self) -> str:
        """The same as ``data.eval_transforms`` writes it."""
        by = "" if self.interpolation == "bilinear" else f", interpolation='{self.interpolation}'"
        height, width = self.image_size
        if self.crop_share is None:
            return f"resize({(height, width)}{by})"
        return f"resize_shorter({round(height / self.crop_share)}{by})|center_crop({height})"

    def __call__(self, image_HxWxc: np.ndarray) -> np.ndarray:
        """One picture as a model takes it.

        Args:
            image_HxWxc: uint8 pixels (H, W, c) of any size, with as many channels as `mean` has
                values; (H, W) for one channel.

        Returns:
            float32, (height, width, c).

        Raises:
            ValueError: the picture is of another type.
            BadExampleError: it is too long for the resizing, or has no pixels.
        """
        from crate_jax.data.images.pipeline import pipeline_of  # OpenCV is needed here alone

        if not isinstance(image_HxWxc, np.ndarray) or image_HxWxc.dtype != np.uint8:
            got = getattr(image_HxWxc, "dtype", type(image_HxWxc).__name__)
            raise ValueError(f"the picture must be a uint8 array (H, W, c); got {got}. Convert it.")
        shape = (*self.image_size, len(self.mean))
        pipeline = pipeline_of(self.transforms, "preprocessing", shape, fast=False)
        pixels_HxWxc = pipeline(image_HxWxc, np.random.default_rng(0), name="the picture")
        mean_c, std_c = np.asarray(self.mean, np.float32), np.asarray(self.std, np.float32)
        return ((pixels_HxWxc / np.float32(255) - mean_c) / std_c).astype(np.float32)

    def to_json(self) -> Json:
        """The fields as JSON values."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in dataclasses.asdict(self).items()
        }


def from_json(values: object, where: object) -> Preprocessing:
    """Read the result of `Preprocessing.to_json`.

    Args:
        values: read from a file.
        where: that file, for the error.

    Raises:
        ValueError: they are not the fields of a preprocessing.
    """
    known = {field.name: field.type for field in dataclasses.fields(Preprocessing)}
    if isinstance(values, Mapping) and known.keys() == values.keys():
        tuples: Json = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        if all(is_of(tuples[name], kind) for name, kind in known.items()):
            return Preprocessing(**tuples)
    raise ValueError(
        f"{where} must state {', '.join(known)} as its preprocessing; got {values}. Write the "
        "folder again."
    )


def standard(model: BlockModel, name: str = "", crop_share: float = 0.875) -> Preprocessing:
    """The usual preprocessing of pictures for a model whose weights state none.

    CRATE's and CRATE-α's authors resize the shorter side to 256 pixels, cut out the central 224 and
    use the statistics of ImageNet, and ToST's do so by bicubic resizing. CRATE-α's JAX code
    resizes by area, which is replaced by bilinear resizing with smoothing. Of every other family
    the evaluation is not known, and this ImageNet standard is taken. Another size than 224 is only
    resized, and a model of grey images has mean and deviation 0.5.

    Args:
        model: a model of images.
        name: of the zoo.
        crop_share: of the shorter side, for images of 224 pixels.

    Raises:
        ValueError: the model is none of images.
    """
    height, width, channels = of_images(model).input_shape
    known = [by for pattern, by in _FILTERS.items() if fnmatch.fnmatch(name, pattern)]
    return Preprocessing(
        image_size=(height, width),
        mean=IMAGENET_MEAN if channels == 3 else (0.5,) * channels,
        std=IMAGENET_STD if channels == 3 else (0.5,) * channels,
        crop_share=crop_share if (height, width) == (224, 224) else None,
        interpolation=known[0] if known else "bilinear",
    )


def of_data(data: DataConfig, model: BlockModel) -> Preprocessing:
    """The preprocessing of a run's evaluation.

    Raises:
        ValueError: its transforms are neither one ``resize`` nor ``resize_shorter|center_crop``.
    """
    from crate_jax.data.images.transform_spec import parse_transforms

    height, width, channels = of_images(model).input_shape
    steps = parse_transforms(data.eval_transforms, "data.eval_transforms", channels=channels)
    names = [step.func.__name__ for step in steps]
    said = {key: value for step in steps for key, value in step.keywords.items()}
    share = None
    if names == ["resize_shorter", "center_crop"] and pair(said["size"]) == (height, width):
        share = height / steps[0].keywords["size"]
    known = names in ([], ["resize"]) or share is not None
    if not known or not said.get("antialias", True):
        raise ValueError(
            "data.eval_transforms must be resize(S) or resize_shorter(S)|center_crop(S) for a "
            f"folder that others load; got {data.eval_transforms}. Write a single file instead."
        )
    mean, std = (
        tuple(values) * (channels if len(values) == 1 else 1) for values in (data.mean, data.std)
    )
    return Preprocessing((height, width), mean, std, share, said.get("interpolation", "bilinear"))

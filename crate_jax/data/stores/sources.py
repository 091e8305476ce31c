"""Open one split of the data set that a config names; `STORES` has a row for each kind of store."""

from collections.abc import Callable, Sequence

from crate_jax.config import DataConfig, did_you_mean
from crate_jax.data.stores.examples import Source, check_known_classes, check_same_classes
from crate_jax.data.stores.folders import open_folder
from crate_jax.data.stores.synthetic import open_synthetic
from crate_jax.data.stores.tars import open_tar
from crate_jax.data.stores.tfds import UnknownDatasetError, open_digits, open_tfds

__all__ = ["STORES", "Source", "check_known_classes", "check_same_classes", "open_source"]


# Of (data, split, image_shape=, num_classes=, labelled=); stored images have a shape and classes of
# their own.
Opener = Callable[..., Source]

# By ``data.dataset``; every other name is one of TFDS.
STORES: dict[str, Opener] = {
    "digits": open_digits,
    "folder": open_folder,
    "tar": open_tar,
    "synthetic": open_synthetic,
}


def open_source(
    data: DataConfig,
    split: str,
    *,
    image_shape: Sequence[int],
    num_classes: int | None,
    labelled: bool = True,
) -> Source:
    """Open one split; only what is needed to count and find its examples is read.

    Args:
        data: reads dataset, data_dir, image_key, label_key, download, on_bad_example, check_crc and
            index_dir.
        split: a TFDS split, such as ``train[:90%]``, or a folder or tar file below data_dir.
        image_shape: (H, W, c) of synthetic images; stored ones have their own.
        num_classes: of synthetic images, likewise; and of integer labels, which do not say how many
            classes there are. None: not known.
        labelled: whether labels are read. Without, a folder need not have a folder for each class.

    Raises:
        FileNotFoundError: the directory, split or prepared data set does not exist.
        KeyError: TFDS knows no such data set; the nearest name is suggested.
        OSError: the system lets too few files be open.
        ValueError: the data set is not one of images with labels, holds another number of examples
            than it says, is cut off (unless bad examples are skipped), or is empty; keys are set
            for what has none.
    """
    for field, key, default in (
        ("image", data.image_key, "image"),
        ("label", data.label_key, "label"),
    ):
        if data.dataset in STORES and key != default:
            raise ValueError(
                f"data.{field}_key must be {default} for {data.dataset}; got {key}. Leave it out: "
                "it names a feature of a TFDS data set."
            )
    opener = STORES.get(data.dataset, open_tfds)
    try:
        source = opener(
            data, split, image_shape=image_shape, num_classes=num_classes, labelled=labelled
        )
    except UnknownDatasetError as error:
        raise KeyError(
            f"data.dataset must be {', '.join(STORES)} or a TFDS name; got {data.dataset}. "
            + did_you_mean(data.dataset, {*STORES, *error.known})
        ) from error
    if not len(source):
        raise ValueError(f"{source.name} must hold examples; it is empty. Choose another split.")
    return source

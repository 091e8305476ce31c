"""Labels of images: the rows that have them, and how often a classifier tells them."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import optax
from jax import Array

from crate_jax.config import TrainConfig
from crate_jax.tasks.task import Scalars


def labelled_rows(
    config: TrainConfig,
    splits: Sequence[tuple[str, bool]],
    *,
    image_shape: tuple[int, int, int],
    classes: Sequence[str],
) -> tuple[Any, ...]:
    """Labelled images of some splits, which have the same classes.

    Args:
        config: the config of the run.
        splits: the name of each, and whether its rows are for training.
        image_shape: (H, W, c) of what a row holds.
        classes: by whose names labels are numbered; a split may have some of them only. (): by
            those of the data.

    Returns:
        `crate_jax.data.images.labelled.LabelledImages` of each split.

    Raises:
        ValueError: model.num_classes is set and disagrees with the data, the classes of two splits
            differ, or one is not among those.
        KeyError, FileNotFoundError: the config names what does not exist.
    """
    # Here, because a machine that only trains on arrays has none of the libraries.
    from crate_jax.data.images.labelled import open_labelled_images
    from crate_jax.data.stores.sources import check_same_classes

    opened = []
    for split, train in splits:
        rows = open_labelled_images(
            config.data,
            split,
            train=train,
            image_shape=image_shape,
            num_classes=len(classes) or config.model.num_classes,
            classes=classes,
        )
        if config.model.num_classes not in (None, rows.num_classes):
            raise ValueError(
                f"model.num_classes must equal the {rows.num_classes} classes of {rows.name}; "
                f"got {config.model.num_classes}. Leave model.num_classes unset."
            )
        opened.append(rows)
        if not classes:
            check_same_classes(opened[0].source, rows.source)
    return tuple(opened)


def sums_of_labels(logits_BxY: Array, labels_B: Array, mask_B: Array) -> Scalars:
    """Over the rows of mask 1: ``loss`` in nats, ``top1``, ``top5``, ``examples``.

    Where there are fewer than five classes, all are within ``top5``. What rows of mask 0 hold makes
    no difference, and no logits leave their device.

    Args:
        logits_BxY: float32.
        labels_B: int32.
        mask_B: float32 of 0 and 1.
    """
    rank_B = rank_of_label(logits_BxY, labels_B)
    loss_B = optax.softmax_cross_entropy_with_integer_labels(logits_BxY, labels_B)
    return {
        "loss": jnp.sum(loss_B, where=mask_B > 0),
        "top1": jnp.sum(mask_B, where=rank_B < 1),
        "top5": jnp.sum(mask_B, where=rank_B < 5),
        "examples": jnp.sum(mask_B),
    }


def rank_of_label(logits_BxY: Array, labels_B: Array) -> Array:
    """Count the classes that come before the label's: (B,) int32, 0 for a hit.

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

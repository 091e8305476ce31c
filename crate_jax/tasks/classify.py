"""Exact classification metrics over a whole split."""

import contextlib
import functools
import time
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.experimental import multihost_utils

from crate_jax.analysis import layerwise
from crate_jax.config import TrainConfig, validate
from crate_jax.data.images.pipeline import make_pipeline as make_prepare
from crate_jax.data.loader import Batches, check_bad_share, eval_batches
from crate_jax.data.stores.sources import Source, open_source
from crate_jax.models.classifier import pair
from crate_jax.models.cost import abstract_parameters
from crate_jax.models.crate import Crate
from crate_jax.models.zoo import build_model
from crate_jax.parallel import batch_sharding, check_batch_size, make_mesh, place, replicated
from crate_jax.tasks.pixels import normalize

Batch = dict[str, Array]


def make_eval_step(
    model: Crate, *, preprocess: Callable[[Array], Array] | None = None
) -> Callable[[Any, Batch], dict[str, Array]]:
    """Build ``eval_step(params, batch) -> sums`` over the examples whose mask is 1.

    The batch is {"image": (B, H, W, C), "label": (B,) integers, "mask": (B,) of 0 and 1}. Wrap it
    in `jax.jit`.

    Args:
        model: of `crate_jax.create_model`.
        preprocess: applied to the images on the device; None: they are normalised already.

    Returns:
        The step. Its sums are float32 scalars: ``loss`` (cross-entropy in nats, no smoothing),
        ``top1``, ``top5`` (of fewer than five classes, all), ``examples``.
    """

    def eval_step(params: Any, batch: Batch) -> dict[str, Array]:
        images = batch["image"] if preprocess is None else preprocess(batch["image"])
        logits_BxY: Any = model.apply({"params": params}, images, train=False)
        labels_B, mask_B = batch["label"], batch["mask"]
        rank_B = rank_of_label(logits_BxY, labels_B)
        loss_B = optax.softmax_cross_entropy_with_integer_labels(logits_BxY, labels_B)
        return {
            "loss": jnp.sum(loss_B, where=mask_B > 0),
            "top1": jnp.sum(mask_B, where=rank_B < 1),
            "top5": jnp.sum(mask_B, where=rank_B < 5),
            "examples": jnp.sum(mask_B),
        }

    return eval_step


def rank_of_label(logits_BxY: Array, labels_B: Array) -> Array:
    """How many classes come before the label's: (B,) int32, 0 for a hit.

    Of equal logits the lower class comes first. One that is not a number comes before all others,
    and as the label's own is never a hit, however many count as one. It is counted, not sorted: a
    sort would gather the logits of the whole batch on every device.
    """
    own_Bx1 = jnp.take_along_axis(logits_BxY, labels_B[:, None], axis=1)
    lower_BxY = jnp.arange(logits_BxY.shape[1])[None] < labels_B[:, None]
    ahead_BxY = ~(logits_BxY <= own_Bx1) | ((logits_BxY == own_Bx1) & lower_BxY)
    rank_B = jnp.sum(ahead_BxY, axis=1, dtype=jnp.int32)
    return jnp.where(jnp.isnan(own_Bx1[:, 0]), jnp.iinfo(jnp.int32).max, rank_B)


def evaluate(
    eval_step: Callable[[Any, Batch], dict[str, Array]], params: Any, batches: Iterable[Batch]
) -> dict[str, float]:
    """Means over all examples: ``loss`` in nats, ``top1`` and ``top5`` in [0, 1]; and their number.

    Exact: the sums of a batch are added up in double precision on the host, one batch behind the
    device, and filling is masked out.

    Args:
        eval_step: of `make_eval_step`, jitted.
        params: the model's parameters.
        batches: of `eval_batches`, on the devices.

    Returns:
        ``loss``, ``top1``, ``top5`` and ``examples``.

    Raises:
        ValueError: there is no example.
    """
    totals = {"loss": 0.0, "top1": 0.0, "top5": 0.0, "examples": 0.0}

    def add(sums: dict[str, Array] | None) -> None:
        for name, value in jax.device_get(sums or {}).items():
            totals[name] += float(value)

    previous = None
    for batch in batches:
        sums = eval_step(params, batch)
        add(previous)
        previous = sums
    add(previous)
    examples = totals.pop("examples")
    if not examples:
        raise ValueError("batches must hold at least one example; got none. Choose another split.")
    return {name: total / examples for name, total in totals.items()} | {"examples": int(examples)}


def open_model_and_source(config: TrainConfig, split: str) -> tuple[Crate, Source]:
    """The model a config names, with as many classes as the data set has, and one split of that.

    Raises:
        ValueError: the model's sizes do not fit together, or model.num_classes is set and
            disagrees with the data set.
    """
    model = build_model(config.model)
    abstract_parameters(model)  # sizes that do not fit together fail here, before any data is read
    shape = (*pair(model.image_size), model.in_channels)
    source = open_source(config.data, split, image_shape=shape, num_classes=model.num_classes)
    if config.model.num_classes not in (None, source.num_classes):
        raise ValueError(
            f"model.num_classes must equal the {source.num_classes} classes of {source.name}; got "
            f"{config.model.num_classes}. Leave model.num_classes unset."
        )
    return model.clone(num_classes=source.num_classes), source


def evaluate_split(
    config: TrainConfig, split: str, load_params: Callable[[Crate], Any]
) -> dict[str, Any]:
    """Exact metrics over a split, on all devices.

    Args:
        config: says model, data and eval_batch_size.
        split: of the config's data set.
        load_params: from the model to its parameters.

    Returns:
        As `evaluate`, and ``images_per_s`` without the compilation.

    Raises:
        ValueError, KeyError, FileNotFoundError: config, data or weights break a rule.
    """
    model, source, params, batches = _open_split(config, split, load_params)
    preprocess = functools.partial(normalize, mean=config.data.mean, std=config.data.std)
    eval_step = jax.jit(make_eval_step(model, preprocess=preprocess))
    with contextlib.closing(batches()) as first:  # compiles; not in the throughput
        jax.block_until_ready(eval_step(params, next(first)))
    start = time.perf_counter()
    with contextlib.closing(batches()) as stream:
        metrics = evaluate(eval_step, params, stream)
    check_bad_share(source, config.data, len(source) - int(metrics["examples"]))
    rate = metrics["examples"] / (time.perf_counter() - start)
    return metrics | {"images_per_s": round(rate, 1)}


def layerwise_split(
    config: TrainConfig, split: str, load_params: Callable[[Crate], Any]
) -> dict[str, np.ndarray]:
    """`layerwise` on the first batch of a split: arrays with one value a layer, on the host.

    One device measures it: the QR factorisations of several CPU devices can wait for each other for
    ever (jaxlib 0.10: each blocks a thread of the pool that all of them need).

    Raises:
        ValueError, KeyError, FileNotFoundError: config, data or weights break a rule.
    """
    model, _, params, batches = _open_split(config, split, load_params)
    with contextlib.closing(batches()) as stream:
        batch = multihost_utils.process_allgather(next(stream), tiled=True)
    images = batch["image"][batch["mask"] > 0]
    images = normalize(jnp.asarray(images), mean=config.data.mean, std=config.data.std)
    measure = jax.jit(functools.partial(layerwise, model))
    return jax.device_get(measure(jax.device_get(params), images))


def _open_split(config: TrainConfig, split: str, load_params: Callable[[Crate], Any]):
    """Model, split, parameters on every device, and a function that starts the split's batches."""
    validate(config)
    mesh = make_mesh(config.parallel.mesh)
    check_batch_size("eval_batch_size", config.eval_batch_size, mesh.devices.size)
    model, source = open_model_and_source(config, split)
    params = jax.tree.map(lambda x: place(x, replicated(mesh)), load_params(model))
    shape = (*pair(model.image_size), model.in_channels)
    prepare = make_prepare(config.data, shape, train=False)

    def batches() -> Batches:
        return eval_batches(
            source,
            config.data,
            prepare,
            batch_size=config.eval_batch_size,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            sharding=batch_sharding(mesh),
        )

    return model, source, params, batches

"""What `python -m crate_jax COMMAND` does, a function each: from its flags to its result."""

import argparse
import ast
import contextlib
import functools
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from crate_jax.config import (
    IMAGENET_EVAL,
    IMAGENET_MEAN,
    IMAGENET_STD,
    DataConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    TrainConfig,
    from_dict,
    validate,
)
from crate_jax.models.classifier import pair
from crate_jax.models.crate import Crate


def evaluate(args: argparse.Namespace) -> dict[str, Any]:
    """Exact metrics of a run or of a weights file."""
    from crate_jax.checkpoint.reading import restore_params
    from crate_jax.interop import load_fitted
    from crate_jax.models.cost import abstract_parameters
    from crate_jax.tasks.classify import evaluate_split

    if bool(args.workdir) == bool(args.weights):
        raise ValueError("evaluate must get one of --workdir and --weights. See --help.")
    if args.weights and not (args.model and args.dataset):
        raise ValueError("evaluate --weights must get --model and --dataset too. See --help.")
    if args.workdir and (args.model or args.fit):
        raise ValueError("--model and --fit must go with --weights; a run knows its own model.")
    if args.weights and args.step:
        raise ValueError("--step must go with --workdir. Leave it out.")
    step: int | None = None
    if args.workdir:
        config, step = _saved_config(args.workdir, args.step or "latest")
    else:
        model: Any = _named_model(args)
        kwargs = _model_kwargs(args)
        for name in {"image_size", "patch_size"} & set(kwargs):
            kwargs[name] = pair(kwargs[name])
        config = TrainConfig(
            model=ModelConfig(name=args.model, **kwargs), data=_default_data(model)
        )
    _override_data(config.data, args)
    config.eval_batch_size = args.batch_size or config.eval_batch_size

    fitted: list[str] = []

    def load(model: Any) -> Any:
        if step is None:
            loaded = load_fitted(args.weights, model, fit=args.fit)
            fitted.extend(loaded.report)
            return loaded.params
        return restore_params(args.workdir, abstract_parameters(model), step)[0]

    metrics = evaluate_split(config, config.data.eval_split, load)
    inputs = {"dataset": config.data.dataset, "split": config.data.eval_split}
    return inputs | {"step": step, "fitted": fitted} | metrics


def convert(args: argparse.Namespace) -> dict[str, Any]:
    """Weights from one kind of file to another, through a model that they fit."""
    from crate_jax.interop import load_fitted, save_weights
    from crate_jax.models.cost import count_parameters

    params, model, fitted = load_fitted(args.source, _named_model(args), fit=args.fit)
    save_weights(args.target, params, model)
    return {
        "from": args.source,
        "to": args.target,
        "parameters": count_parameters(model),
        "fitted": fitted,
    }


def compare(args: argparse.Namespace) -> dict[str, Any]:
    """Ours against PyTorch on the same weights and images: a table, perhaps a page, a verdict."""
    import jax
    import jax.numpy as jnp

    from crate_jax.files import written_aside
    from crate_jax.interop import load_fitted

    if args.train_steps < 0 or args.rate_scale <= 0:
        raise ValueError("--train-steps must be >= 0 and --rate-scale > 0. See --help.")
    if args.batch_size is not None and args.batch_size < 1:
        raise ValueError(f"--batch_size must be >= 1; got {args.batch_size}. The default is 8.")
    if args.html and find_spec("matplotlib") is None:
        raise ValueError("--html must have matplotlib. Install it: pip install 'crate-jax[plot]'")
    try:
        from crate_jax.parity import compare as comparing
        from crate_jax.parity import comparison as compare_report
    except ImportError:
        raise ValueError("compare needs PyTorch. pip install 'crate-jax[torch]'") from None
    from crate_jax.training.step import cross_entropy

    with written_aside(args.html) if args.html else contextlib.nullcontext() as aside:
        params, model, fitted = load_fitted(args.weights, _named_model(args), fit=args.fit)
        reference = params
        if args.reference:
            reference = load_fitted(args.reference, model, fit=args.fit).params
        images, labels, inputs = _images_to_compare(args, model)
        model = model.clone(dtype=jnp.dtype(args.dtype))
        found = comparing.compare(
            model,
            params,
            images,
            labels,
            loss=functools.partial(cross_entropy, label_smoothing=comparing.SMOOTHING),
            train=functools.partial(_train_steps, model),
            train_steps=args.train_steps,
            rate_scale=args.rate_scale,
            float64=args.float64,
            reference_params=reference,
        )
        conditions = {
            "weights": args.weights,
            "reference": args.reference or args.weights,
            "model": args.model or "as the weights state",
            "fitted": fitted,
            "inputs": inputs,
            "dtype": args.dtype,
            "device": f"{jax.devices()[0].device_kind} (PyTorch: cpu)",
            "rate_scale": args.rate_scale,
        } | {name: version(name) for name in ("jax", "flax", "optax", "torch")}
        sys.stdout.write(compare_report.table(found))
        if aside is not None:
            aside.write_text(compare_report.page(found, conditions), encoding="utf-8")
    return conditions | {
        "images": found.images,
        "relative": {row.name: float(f"{row.relative:.3g}") for row in found.rows},
        "losses": found.losses,
        "gradient_images": found.gradient_images,
        "training": found.training,
        "top1_agreement": found.top1_agreement,
        "images_per_s": {k: round(v, 1) for k, v in found.images_per_s.items()},
        "tolerances": comparing.TOLERANCES if args.dtype == "float32" else None,
        "first_difference": found.first_difference,
        "within_tolerance": found.first_difference is None,
    }


def _train_steps(
    model: Crate, params: Any, images: Any, labels: Any, optim: OptimConfig, steps: int
) -> tuple[list[float], Any]:
    """Full-batch steps of our training step at a constant rate: losses, and the parameters."""
    import jax
    import optax

    from crate_jax.training.optimizer import make_optimizer
    from crate_jax.training.state import TrainState
    from crate_jax.training.step import make_train_step

    tx = make_optimizer(optim, optax.constant_schedule(optim.lr))
    step = jax.jit(make_train_step(model, tx, label_smoothing=optim.label_smoothing))
    state = TrainState(jax.numpy.zeros((), "int32"), params, tx.init(params))
    losses = []
    for _ in range(steps):
        state, metrics = step(state, {"image": images, "label": labels}, jax.random.key(0))
        losses.append(float(metrics["loss"]))
    return losses, state.params


def _images_to_compare(
    args: argparse.Namespace, model: Crate
) -> tuple[np.ndarray, np.ndarray, str]:
    """Normalised images (B, H, W, c), labels (B,), and what they are in words."""
    import jax.numpy as jnp

    from crate_jax.data.images.pipeline import make_pipeline as make_prepare
    from crate_jax.data.loader import eval_batches
    from crate_jax.data.stores.folders import FolderImages, folder_images
    from crate_jax.data.stores.sources import Source, open_source
    from crate_jax.interop import find_run
    from crate_jax.tasks.pixels import normalize

    if args.images and args.dataset:
        raise ValueError("compare must get one of --images and --dataset. Leave one out.")
    shape, rng = (*pair(model.image_size), model.in_channels), np.random.default_rng(0)
    data, batch_size = _default_data(model), args.batch_size or 8
    is_run = Path(args.weights).is_dir()
    if is_run:
        data = _saved_config(*find_run(args.weights))[0].data
    _override_data(data, args)
    if args.images:
        found = folder_images(args.images, lambda path: 0)
        if not len(found):
            raise ValueError(f"--images must be a folder with images; got {args.images}.")
        # The labels only have to be the same for both.
        labels = rng.integers(0, model.num_classes, len(found)).astype(np.int32)
        examples = FolderImages(args.images, found.names, labels)
        source = Source(args.images, examples, model.num_classes)
    elif args.dataset or is_run:
        source = open_source(
            data, data.eval_split, image_shape=shape, num_classes=model.num_classes
        )
    else:
        images = rng.normal(size=(batch_size, *shape)).astype(np.float32)
        return images, rng.integers(0, model.num_classes, batch_size), "seeded normal noise"
    if source.num_classes != model.num_classes:
        raise ValueError(
            f"model.num_classes must equal the {source.num_classes} classes of {source.name}; got "
            f"{model.num_classes}. Choose another --dataset."
        )
    prepare = make_prepare(data, shape, train=False)
    batch_size = min(batch_size, len(source))
    batch = next(eval_batches(source, data, prepare, batch_size=batch_size))
    images = normalize(jnp.asarray(batch["image"]), mean=data.mean, std=data.std)
    return np.asarray(images), batch["label"].astype(np.int64), source.name


def _named_model(args: argparse.Namespace) -> Crate | None:
    """The model of --model and --model-kwargs, or None for what the weights state."""
    from crate_jax.models.zoo import create_model

    if not args.model:
        if args.model_kwargs:
            raise ValueError("--model-kwargs must go with --model. See --help.")
        return None
    return create_model(args.model, **_model_kwargs(args))


def _model_kwargs(args: argparse.Namespace) -> dict[str, Any]:
    """--model-kwargs as a dict."""
    kwargs = {}
    for text in args.model_kwargs:
        name, separator, value = text.partition("=")
        if not separator:
            raise ValueError(f"--model-kwargs must be FIELD=VALUE …; got {text}. See --help.")
        try:
            kwargs[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            kwargs[name] = value  # a word, such as pool=mean
    return kwargs


def _default_data(model: Crate) -> DataConfig:
    """How images are prepared for weights that do not say: as on ImageNet, or just resized."""
    size, colour = pair(model.image_size), model.in_channels == 3
    return DataConfig(
        eval_transforms=IMAGENET_EVAL if size == (224, 224) else f"resize({size})",
        mean=IMAGENET_MEAN if colour else (0.5,),
        std=IMAGENET_STD if colour else (0.5,),
    )


def _override_data(data: DataConfig, args: argparse.Namespace) -> None:
    """What the flags say of the data set and its preparation."""
    for field, value in (
        ("dataset", args.dataset),
        ("data_dir", args.data_dir),
        ("eval_transforms", args.transforms),
        ("eval_split", args.split),
    ):
        if value is not None:
            setattr(data, field, value)


def prepare(args: argparse.Namespace) -> dict[str, Any]:
    """A folder or tar files as a TFDS data set of array_record files."""
    from crate_jax.data.stores.prepare import prepare

    def say(line: str) -> None:
        sys.stderr.write(line + "\n")

    return prepare(args.source, args.target, name=args.name, say=say)


def summary(args: argparse.Namespace) -> dict[str, Any]:
    """What a model costs, by formula."""
    from crate_jax.models import cost
    from crate_jax.models.zoo import create_model

    overrides = {k: getattr(args, k) for k in ("image_size", "num_classes") if getattr(args, k)}
    model: Any = create_model(args.model, **overrides)
    return {
        "model": args.model,
        "image_size": list(pair(model.image_size)),
        "tokens": cost.num_tokens(model),
        "parameters": cost.count_parameters(model),
        "gmacs": round(cost.multiply_adds(model) / 1e9, 3),
        "activation_mib_per_image": round(cost.activation_bytes(model) / 2**20, 1),
    }


def report(args: argparse.Namespace) -> dict[str, Any]:
    """The layer-wise objective of a run on its evaluation split, as numbers and as a picture."""
    from crate_jax.analysis.report import draw_layerwise
    from crate_jax.checkpoint.reading import restore_params
    from crate_jax.models.cost import abstract_parameters
    from crate_jax.tasks.classify import layerwise_split

    config, step = _saved_config(args.workdir, args.step)

    def load(model: Any) -> Any:
        return restore_params(args.workdir, abstract_parameters(model), step)[0]

    values = layerwise_split(config, config.data.eval_split, load)
    output = args.output or str(Path(args.workdir) / "layerwise.png")
    split = f"{config.data.dataset}/{config.data.eval_split}"
    draw_layerwise(values, output, title=f"{config.name}, step {step}, on {split}")
    rounded = {name: [round(float(v), 4) for v in array] for name, array in values.items()}
    return rounded | {"step": step, "output": output}


def checkpoints(args: argparse.Namespace) -> dict[str, Any]:
    """Every checkpoint of a run, read and compared with its digest; those set aside by name."""
    from crate_jax.checkpoint.manager import DAMAGED, FOLDER
    from crate_jax.checkpoint.reading import inspect

    found = inspect(args.run)
    words = {True: "intact", False: "DAMAGED", None: "readable, saved without a digest"}
    for row in found:
        metrics = "  ".join(f"{k} {v:.4f}" for k, v in sorted(row["metrics"].items()))
        best = "  best" if row["best"] else ""
        start = f"step {row['step']:>8}  {row['mib']:9.2f} MiB  {words[row['intact']]}{best}"
        sys.stdout.write(f"{start}  {metrics}\n")
        if "problem" in row:
            sys.stdout.write(f"  {row['problem']}\n")
    aside = sorted(p.name for p in (Path(args.run) / FOLDER).glob(f"{DAMAGED}*"))
    intact = all(row["intact"] is not False for row in found)
    return {"workdir": args.run, "intact": intact, "checkpoints": found, "set_aside": aside}


def plan(args: argparse.Namespace, config: TrainConfig) -> dict[str, Any]:
    """What a training step needs on a mesh of machines that are not here."""
    import jax

    from crate_jax.planning.plan import mesh_size, plan, table

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", mesh_size(args.mesh))
    found = plan(validate(config), args.mesh)
    sys.stdout.write(table(found))
    return found


def _saved_config(workdir: str | Path, step: str) -> tuple[TrainConfig, int]:
    """The config in a run's checkpoint, and the number of that checkpoint."""
    from crate_jax.checkpoint.manager import Checkpointer

    reader = Checkpointer(workdir, read_only=True)
    try:
        number = reader.resolve(step)
        config = from_dict(reader.restore_record(number)["config"])
        config.parallel = ParallelConfig()  # of the machine it was trained on
        return config, number
    finally:
        reader.close()

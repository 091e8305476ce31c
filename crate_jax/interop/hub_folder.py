"""Folders as repositories on the Hugging Face hub have them: weights, configuration, model card."""

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from crate_jax.buckets import answered, is_remote
from crate_jax.files import Json, located, written_aside
from crate_jax.interop.addresses import fetched, is_address
from crate_jax.interop.contents import is_run
from crate_jax.interop.download import client_for
from crate_jax.interop.folders import CONFIG
from crate_jax.interop.hub import parse
from crate_jax.interop.pictures import Preprocessing, from_json
from crate_jax.models.classifier import ImageClassifier
from crate_jax.models.cost import count_parameters
from crate_jax.models.language import LanguageModel
from crate_jax.models.released import HUB
from crate_jax.models.stacked import BlockModel
from crate_jax.models.zoo import architecture

WEIGHTS, CARD = "model.safetensors", "README.md"
_ARCHITECTURE, _PREPROCESSING, _NAMES = "architecture", "preprocessing", "class_names"


@dataclasses.dataclass(frozen=True)
class ModelCard:
    """The facts of a model card that the model does not tell.

    Attributes:
        title: its headline; "": the class of the model.
        licence: as the hub abbreviates it, such as "mit"; "": none is stated.
        dataset: on which the metrics were measured; "": not said.
        metrics: by name, such as "top1".
        tags: for the hub's search.
    """

    title: str = ""
    licence: str = ""
    dataset: str = ""
    metrics: Mapping[str, float] = dataclasses.field(default_factory=dict)
    tags: Sequence[str] = ()


def names_folder(path: str | os.PathLike[str]) -> bool:
    """True if a path to write to means a folder: it ends in a slash, or is one of this machine."""
    text = os.fspath(path)
    return text.endswith("/") or (not is_remote(text) and located(text, "weights").is_dir())


def open_folder(path: str | os.PathLike[str]) -> Path:
    """The folder of a path, made if need be.

    Raises:
        ValueError: it is a training run.
        OSError: it cannot be made.
    """
    folder = located(path, "weights")
    if folder.is_dir() and is_run(folder):
        raise ValueError(
            f"weights must be written to a folder of their own; {folder} is a run. Name another."
        )
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def describe(
    folder: Path,
    model: BlockModel,
    class_names: Sequence[str],
    preprocessing: Preprocessing | None,
    card: ModelCard,
) -> None:
    """Write what stands beside the weights: the configuration and the model card.

    Args:
        folder: with the weights.
        model: that they are for.
        class_names: in the order of its outputs; (): none.
        preprocessing: of pictures; None: the configuration says nothing of it.
        card: what the card says besides.

    Raises:
        ValueError: huggingface_hub is missing.
        OSError: the disk or the bucket does not take the files.
    """
    config: Json = {"library_name": "crate_jax", _ARCHITECTURE: architecture(model)}
    if preprocessing is not None:
        config[_PREPROCESSING] = preprocessing.to_json()
    if class_names:
        config[_NAMES] = list(class_names)
    for name, text in (
        (CONFIG, json.dumps(config, indent=2) + "\n"),
        (CARD, _card(model, preprocessing, card)),
    ):
        with written_aside(folder / name) as aside:
            aside.write_text(text, encoding="utf-8")


def _card(model: BlockModel, preprocessing: Preprocessing | None, card: ModelCard) -> str:
    """The model card, with its header for the hub."""
    title, kind = card.title or type(model).__name__, type(model).__name__
    parts = [
        f"---\n{_header(model, card, title)}\n---\n\n# {title}",
        f"A `{kind}` of {count_parameters(model):,} parameters. crate_jax wrote this folder.",
        "Load the model in two lines. Put the name of this repository, or a local folder, in the "
        "place of `OWNER/REPOSITORY`.",
        "```python\nimport crate_jax\n"
        f'model, params = crate_jax.load_pretrained("{HUB}OWNER/REPOSITORY")\n```',
    ]
    if preprocessing is not None:
        parts.append(
            f"Pictures are prepared by `{preprocessing.transforms}`, mean "
            f"{list(preprocessing.mean)} and deviation {list(preprocessing.std)}. "
            f'`crate_jax.preprocessing("{HUB}OWNER/REPOSITORY")` does it.'
        )
    if card.metrics:
        on = f" on {card.dataset}" if card.dataset else ""
        rows = [f"| {name} | {value:.4g} |" for name, value in card.metrics.items()]
        parts += [f"Measured{on}:", "\n".join(["| metric | value |", "|---|---:|", *rows])]
    return "\n\n".join(parts) + "\n"


def _header(model: BlockModel, card: ModelCard, title: str) -> str:
    """The card's YAML."""
    client_for("a model card")
    from huggingface_hub import EvalResult, ModelCardData

    task = "feature-extraction"
    if isinstance(model, LanguageModel):
        task = "text-generation"
    elif isinstance(model, ImageClassifier) and model.num_classes:
        task = "image-classification"
    results = [
        EvalResult(task, card.dataset, card.dataset, metric, float(value))
        for metric, value in card.metrics.items()
        if card.dataset
    ]
    data = ModelCardData(
        library_name="crate_jax",
        pipeline_tag=task,
        license=card.licence or None,
        tags=["jax", "flax", *card.tags],
        metrics=list(card.metrics) or None,
        model_name=title if results else None,
        eval_results=results or None,
    )
    return data.to_yaml()


def read_config(path: str | os.PathLike[str]) -> Json:
    """The configuration of a folder here, in a bucket or on the hub; {} where there is none.

    A repository on the hub is fetched with its weights.

    Args:
        path: the path of the folder, or hf://OWNER/REPOSITORY[@REVISION]; any other has none.

    Raises:
        ValueError: it is damaged.
        OSError: the hub cannot be reached.
    """
    text = os.fspath(path)
    if is_address(text) and not (text.startswith(HUB) and not parse(text).file):
        return {}
    file = fetched(text) / CONFIG
    try:
        with answered(file):
            if not file.is_file():
                return {}
            config = json.loads(file.read_text("utf-8"))
    except ValueError:
        config = None
    if not isinstance(config, dict):
        raise ValueError(f"{file} must hold a JSON object; it does not. Write the folder again.")
    return config


def stated_model(config: Json) -> object:
    """The architecture that a configuration states; None: it states none."""
    return config.get(_ARCHITECTURE)


def stated_preprocessing(config: Json, path: object) -> Preprocessing | None:
    """The preprocessing that a configuration states; None: it states none.

    Raises:
        ValueError: it is malformed.
    """
    stated = config.get(_PREPROCESSING)
    return None if stated is None else from_json(stated, path)

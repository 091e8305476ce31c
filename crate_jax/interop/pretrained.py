"""Released weights by the name of their model, with the preprocessing that belongs to them."""

import dataclasses
import fnmatch
import os
from pathlib import Path

from crate_jax.files import Json, located
from crate_jax.interop.addresses import is_address
from crate_jax.interop.contents import is_run, read_fields
from crate_jax.interop.fit import FITS
from crate_jax.interop.hub import parse
from crate_jax.interop.hub_folder import read_config, stated_model, stated_preprocessing
from crate_jax.interop.load import load_fitted
from crate_jax.interop.pictures import Preprocessing, standard
from crate_jax.interop.tree import tree_of
from crate_jax.models import released
from crate_jax.models.fields import fields_of
from crate_jax.models.parameters import Params, Variables
from crate_jax.models.released import HUB, Released, find_released, of_address
from crate_jax.models.stacked import BlockModel
from crate_jax.models.variants import VARIANTS, find
from crate_jax.models.zoo import altered, create_model, from_architecture


def list_pretrained(pattern: str = "*") -> list[str]:
    """Names that `load_pretrained` can download, as model.tag; the pattern is a shell's.

    The pattern may also match the model's name alone.
    """
    return [
        row.name
        for row in released.RELEASED
        if row.by_program and any(fnmatch.fnmatch(x, pattern) for x in (row.name, row.model))
    ]


def load_pretrained(name: str, **overrides: object) -> tuple[BlockModel, Params | Variables]:
    """A model with released weights; they are downloaded once.

    Args:
        name: one of `list_pretrained`, or the model's name alone, which takes the first of its
            files; or hf://OWNER/REPOSITORY[@REVISION], or a local folder, that `save_weights`
            wrote.
        **overrides: fields of the model that differ from the released one. Another ``num_classes``
            makes a new head. Another ``image_size`` resizes the positions, another ``patch_size``
            or ``in_channels`` the projection of the patches. `crate_jax.interop.fit` says how.

    Returns:
        The model, and its parameters, float32 on the host. Of a model with running statistics
        these are its variables, {"params": …, "batch_stats": …}.

    Raises:
        KeyError: no weights of that model are released, there is no such tag, or the model has no
            such field.
        FileNotFoundError: there is no such folder, or no such file on the hub.
        ValueError: the weights cannot be downloaded by a program, do not fit, or are damaged.
        OSError: the network cannot be reached, or the cache cannot be written.
    """
    if _is_folder(name):
        return _load(name, _described(name, read_config(name)), overrides)
    row = find_released(_known(name))
    if not row.by_program:
        raise ValueError(_by_hand(row))
    return _load(row.file, _released_model(row), overrides)


def preprocessing(name: str) -> Preprocessing:
    """The preprocessing of pictures for a model's weights.

    A folder that `save_weights` wrote states it. Of a named model it is that of the authors'
    evaluation, as far as it is known: see `crate_jax.interop.pictures.standard`.

    Args:
        name: see `load_pretrained`, or of any model in `list_models`.

    Raises:
        KeyError: there is no such model or tag.
        ValueError: the model is none of images, or the folder's configuration is damaged.
        OSError: the hub cannot be reached.
    """
    if _is_folder(name):
        config = read_config(name)
        if stated := stated_preprocessing(config, name):
            return stated
        return standard(_described(name, config))
    if name in VARIANTS and not any(row.model == name for row in released.RELEASED):
        return standard(create_model(name), name)
    row = find_released(_known(name))
    return standard(create_model(row.model), row.model, row.crop_share)


def stated_by(weights: str | Path) -> BlockModel | None:
    """The model that weights state: in a folder's config.json, or in the file itself; None: none.

    Args:
        weights: see `crate_jax.load_weights`. A run states none here: its record does.

    Raises:
        FileNotFoundError: there are no such weights.
        ValueError: what they state is damaged, or no model of ours.
        OSError: the hub cannot be reached.
    """
    if (model := _of_config(read_config(weights))) is not None:
        return model
    fields = read_fields(weights)
    return from_architecture(fields) if fields else None


def _of_config(config: Json) -> BlockModel | None:
    """The model that config.json states as `save_weights` writes it; other programs name theirs."""
    stated = stated_model(config)
    return from_architecture(stated) if isinstance(stated, dict) else None


def prepared_for(
    model: BlockModel, weights: str | os.PathLike[str] = "", name: str = ""
) -> Preprocessing:
    """The preprocessing for a model and its weights: the one that they state, or the usual one.

    Args:
        model: a model of images. Its size is taken where the weights state another.
        weights: see `crate_jax.load_weights`; "": none.
        name: of the zoo; "": not known.

    Raises:
        ValueError: the model is none of images, or the weights' configuration is damaged.
        OSError: the hub cannot be reached.
    """
    row = of_address(os.fspath(weights))
    usual = standard(model, name, *([row.crop_share] if row else []))
    stated = stated_preprocessing(read_config(weights), weights) if weights else None
    if stated is None or len(stated.mean) != len(usual.mean):
        return usual
    height, width = usual.image_size
    share = stated.crop_share if height == width else None
    return dataclasses.replace(stated, image_size=usual.image_size, crop_share=share)


def _is_folder(name: str) -> bool:
    """True if a name is a folder's, here or on the hub."""
    text = os.fspath(name)
    return "/" in text or bool(text and located(text, "name").is_dir())


def _described(name: str, config: Json) -> BlockModel:
    """The model that a folder's configuration states.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it states none.
    """
    if (model := _of_config(config)) is not None:
        return model
    on_hub = name.startswith(HUB)
    folder = None if is_address(name) else located(name, "name")
    if parse(name).file if on_hub else folder is None or folder.is_file():
        raise ValueError(
            f"name must be that of a model, or a folder with its configuration; got {name}, a "
            "file. Build the model, and call load_weights."
        )
    if folder is not None and not folder.is_dir():
        raise FileNotFoundError(
            f"{name} must be a folder; there is none. For a repository on the hub, write "
            f"{HUB}{name}."
        )
    if folder is not None and is_run(folder):
        raise ValueError(
            f"{name} must be a folder that save_weights wrote; it is a run. Make one of it: "
            f"python -m crate_jax convert --from={name} --to=FOLDER/"
        )
    raise ValueError(
        f"{name} must state its model in config.json, as save_weights writes it; it does not. "
        "Build the model, and call load_weights."
    )


def _known(name: str) -> str:
    """A name whose model exists.

    Raises:
        KeyError: there is no such model; the nearest is suggested.
    """
    find(name.partition(".")[0])
    return name


def _released_model(row: Released) -> BlockModel:
    """The model as its authors trained it."""
    fields = fields_of(find(row.model).family)
    return create_model(
        row.model, **{"num_classes": row.classes} if "num_classes" in fields else {}
    )


def _load(
    path: str, trained: BlockModel, overrides: dict[str, object]
) -> tuple[BlockModel, Params | Variables]:
    """The model with what differs, and weights made to fit it."""
    model = altered(trained, overrides)
    names = {"num_classes": "head"}
    differ = [
        names.get(field, field)
        for field in overrides
        if getattr(model, field) != getattr(trained, field)
    ]
    loaded = load_fitted(path, model, fit=[each for each in differ if each in FITS])
    return model, {"params": loaded.params, **loaded.extra} if loaded.extra else loaded.params


def _by_hand(row: Released) -> str:
    """The reason why a program cannot download a file, and the remedy."""
    where = f"{row.note}, {row.file}" if row.note else row.file
    model = _released_model(row)
    load = "load_variables" if tree_of(model).collections else "load_weights"
    head = "" if row.classes == 1000 else f", num_classes={row.classes}"
    must = (
        "come from somebody who kept it, for the link to it is dead"
        if row.dead
        else "be downloaded by hand, for its page asks for a browser"
    )
    return (
        f"{row.name} must {must}: {where} (licence: {row.licence}). Once you have the file, call "
        f"{load}(FILE, create_model('{row.model}'{head}))."
    )

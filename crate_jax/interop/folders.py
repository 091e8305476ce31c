"""Folders of weights that other programs wrote: one file of a known name, or pieces by an index."""

import json
from pathlib import Path

from crate_jax.interop.kinds import not_whole

CONFIG = "config.json"  # of a repository on the hub
# The names of weights in a folder by transformers, accelerate, timm and diffusers.
_STEMS = ("model", "pytorch_model", "diffusion_pytorch_model", "open_clip_pytorch_model")
KNOWN_NAMES = (
    *(f"{stem}.safetensors{index}" for stem in _STEMS for index in ("", ".index.json")),
    *(f"{stem}.bin{index}" for stem in _STEMS for index in ("", ".index.json")),
    *("open_clip_model.safetensors", "flax_model.msgpack"),
)


def weights_file(folder: Path) -> Path:
    """The file of weights in a folder: the first of the known names.

    Raises:
        ValueError: there is none; what the folder holds instead is said.
    """
    for name in KNOWN_NAMES:
        if (folder / name).is_file():
            return folder / name
    names = sorted(each.name + "/" * each.is_dir() for each in folder.iterdir())
    told = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    raise ValueError(
        "weights must be a file, a run's folder or one of its steps, a tree of Orbax, or a folder "
        f"with model.safetensors or pytorch_model.bin; {folder} is a folder without checkpoints/ "
        f"in it, and holds {told or 'nothing'}. Name a run's --workdir, or the file of weights."
    )


def pieces(index: Path) -> list[Path]:
    """The files that an index names, each of which holds a part of the weights.

    Raises:
        ValueError: it is no such index, or names a file that is not beside it.
    """
    found = [index.parent / name for name in piece_names(index)]
    for path in found:
        if not path.is_file():
            raise ValueError(
                f"{index} must name files beside it; {path.name} is not there. Fetch every piece."
            )
    return found


def piece_names(index: Path) -> list[str]:
    """The names of these files, wherever they are.

    Raises:
        ValueError: it is no such index, or names a file elsewhere.
    """
    try:
        names = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
        elsewhere = [name for name in names if Path(name).name != name]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        what = "an index of files with a weight_map"
        raise ValueError(not_whole(index, what, f"a {type(error).__name__}")) from None
    if elsewhere:
        raise ValueError(
            f"{index} must name files beside it; {elsewhere[0]} is not there. Fetch every piece."
        )
    return names

"""CRATE-MAE: the names of the official implementation (arXiv 2404.02446), which are Meta's MAE's.

The official model holds two fixed tables of positions, of which it reads one, and a linear map that
it never reads.
"""

import numpy as np

from crate_jax.interop.layouts.forms import Convolution, Leading, Linear, Same
from crate_jax.interop.layouts.layout import Layout, Table, Tree
from crate_jax.models.embedding import grid_positions


def _halves(blocks: str, ours: str, second: str, mssa: int, other: int) -> Table:
    """A layer, with MSSA and the other half, whose matrix is ``second``, at these places."""
    at, beside = f"{blocks}.{{i}}.layers.0.{mssa}", f"{blocks}.{{i}}.layers.0.{other}"
    name = second.split("/")[0]
    return {
        f"{ours}/mssa_norm/scale": (f"{at}.norm.weight", Same()),
        f"{ours}/mssa_norm/bias": (f"{at}.norm.bias", Same()),
        f"{ours}/mssa/U": (f"{at}.fn.qkv.weight", Linear()),
        f"{ours}/mssa/W_out": (f"{at}.fn.to_out.0.weight", Linear(in_axes=2)),
        f"{ours}/mssa/b_out": (f"{at}.fn.to_out.0.bias", Same()),
        f"{ours}/{name}_norm/scale": (f"{beside}.norm.weight", Same()),
        f"{ours}/{name}_norm/bias": (f"{beside}.norm.bias", Same()),
        f"{ours}/{second}": (f"{beside}.fn.weight", Same()),
    }


def _width(tree: Tree) -> int:
    return tree.shapes["embedding/cls_token"][0]


def _positions(tree: Tree) -> np.ndarray:
    """The positions as they are computed."""
    return np.array(grid_positions(tree.grid or (0, 0), _width(tree)))[None]


OFFICIAL = Layout(
    name="official",
    table={
        "embedding/cls_token": ("cls_token", Leading(2)),
        "mask_token": ("mask_token", Leading(2)),
        "embedding/projection/kernel": ("patch_embed.proj.weight", Convolution()),
        "embedding/projection/bias": ("patch_embed.proj.bias", Same()),
        **_halves("blocks", "blocks", "ista/D", mssa=0, other=1),
        "head_norm/scale": ("norm.weight", Same()),
        "head_norm/bias": ("norm.bias", Same()),
        **_halves("decoder_blocks", "decoder/blocks", "dictionary/D", mssa=1, other=0),
        "decoder/norm/scale": ("decoder_norm.weight", Same()),
        "decoder/norm/bias": ("decoder_norm.bias", Same()),
        "decoder/prediction/kernel": ("decoder_pred.weight", Linear()),
        "decoder/prediction/bias": ("decoder_pred.bias", Same()),
        # No official file has a head; fine-tuning by Meta's code calls it so.
        "head/kernel": ("head.weight", Linear()),
        "head/bias": ("head.bias", Same()),
    },
    left_out=r"pos_embed|decoder_embed\.(weight|bias)",
    constants={"decoder_pos_embed": _positions},
    fillers={
        "pos_embed": _positions,
        "decoder_embed.weight": lambda tree: np.zeros((_width(tree),) * 2, np.float32),
        "decoder_embed.bias": lambda tree: np.zeros(_width(tree), np.float32),
    },
    in_file_names={"lmbda": r"lmd(\d+(?:\.\d+)?)"},  # crate-mae-base-lmd5.0-checkpoint-799.pth
)

LAYOUTS = (OFFICIAL,)

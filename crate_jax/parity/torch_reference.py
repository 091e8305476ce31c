"""Our models in plain PyTorch: what they are compared with and timed against.

A family is one file beside this one, and a row of `TWINS`.
"""

from collections.abc import Callable
from typing import Any

from crate_jax.models.crate import Crate
from crate_jax.models.crate_alpha import CrateAlpha
from crate_jax.models.crate_bert import CrateBert
from crate_jax.models.crate_causal import CrateCausal, CrateLM
from crate_jax.models.crate_mae import CrateMae
from crate_jax.models.hyper_set import HyperSet
from crate_jax.models.stacked import BlockModel
from crate_jax.models.tost import ToST
from crate_jax.models.tost_lm import TostLM
from crate_jax.models.vit import ViT
from crate_jax.parity.cbsa import TorchCbsaFrame, twin_by_stem
from crate_jax.parity.crate import TorchCrate
from crate_jax.parity.crate_alpha import TorchCrateAlpha
from crate_jax.parity.crate_bert import TorchCrateBert
from crate_jax.parity.crate_causal import TorchCrateCausal
from crate_jax.parity.crate_lm import TorchCrateLM
from crate_jax.parity.crate_mae import Hiding, TorchCrateMae
from crate_jax.parity.hyper_set import TorchHyperSet
from crate_jax.parity.tost import TorchToST
from crate_jax.parity.tost_lm import TorchTostLM
from crate_jax.parity.twin import Lion, Twin
from crate_jax.parity.vit import TorchViT, vit_twin

__all__ = [
    "TWINS",
    "Lion",
    "TorchCbsaFrame",
    "TorchCrate",
    "TorchCrateAlpha",
    "TorchCrateBert",
    "TorchCrateCausal",
    "TorchCrateLM",
    "TorchCrateMae",
    "TorchHyperSet",
    "TorchToST",
    "TorchTostLM",
    "TorchViT",
    "Twin",
    "from_flax_model",
]

# Our class to the maker of its twin.
TWINS: dict[type, Callable[[Any], Twin]] = {
    Crate: twin_by_stem,
    CrateAlpha: TorchCrateAlpha,
    ToST: TorchToST,
    ViT: vit_twin,
    HyperSet: TorchHyperSet,
    CrateCausal: TorchCrateCausal,
    CrateLM: TorchCrateLM,
    TostLM: TorchTostLM,
    CrateBert: TorchCrateBert,
    CrateMae: TorchCrateMae,
    Hiding: TorchCrateMae,
}


def from_flax_model(model: BlockModel) -> Twin:
    """The PyTorch model with the sizes and constants of a JAX one; parameters start anew.

    Dropout and stochastic depth are left out, and what only says how to compute (dtype, backward,
    attention_kernel, remat, scan_unroll) has no counterpart. Weights, and running statistics with
    them, carry over by `crate_jax.interop.to_state_dict`.

    Raises:
        ValueError: there is no twin, or the model's fields do not fit together.
    """
    if type(model) not in TWINS:
        known = ", ".join(kind.__name__ for kind in TWINS)
        raise ValueError(
            f"model must be one with a PyTorch twin ({known}); got {type(model).__name__}. "
            "Compare it with its own family's program."
        )
    if getattr(model, "num_classes", None) == 0 and not getattr(model, "decoder_depth", 0):
        raise ValueError(
            "model.num_classes must be at least 1 for its PyTorch twin; got 0, features. Set it."
        )
    return TWINS[type(model)](model)

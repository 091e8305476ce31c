"""CRATE, the white-box transformer of sparse rate reduction, in JAX and Flax."""

from crate_jax import analysis, objective
from crate_jax.interop import (
    ModelCard,
    Preprocessing,
    export_model,
    list_pretrained,
    load_pretrained,
    load_variables,
    load_weights,
    preprocessing,
    save_weights,
)
from crate_jax.models.crate import Crate
from crate_jax.models.crate_alpha import CrateAlpha
from crate_jax.models.crate_bert import CrateBert
from crate_jax.models.crate_causal import CrateCausal, CrateLM
from crate_jax.models.crate_mae import CrateMae
from crate_jax.models.generation import generate
from crate_jax.models.heads import reset_classifier
from crate_jax.models.hyper_set import HyperSet
from crate_jax.models.steering import Steer, steering
from crate_jax.models.tost import ToST
from crate_jax.models.tost_lm import TostLM
from crate_jax.models.vit import ViT
from crate_jax.models.zoo import create_model, list_models
from crate_jax.version import VERSION

__version__ = VERSION

__all__ = [
    "Crate",
    "CrateAlpha",
    "CrateBert",
    "CrateCausal",
    "CrateLM",
    "CrateMae",
    "HyperSet",
    "ModelCard",
    "Preprocessing",
    "Steer",
    "ToST",
    "TostLM",
    "ViT",
    "analysis",
    "create_model",
    "export_model",
    "generate",
    "list_models",
    "list_pretrained",
    "load_pretrained",
    "load_variables",
    "load_weights",
    "objective",
    "preprocessing",
    "reset_classifier",
    "save_weights",
    "steering",
]

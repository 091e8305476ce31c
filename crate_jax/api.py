"""The public names of the package, which `import crate_jax` hands out when they are asked for."""

import crate_jax.analysis as analysis
import crate_jax.objective as objective
from crate_jax.interop import (
    ModelCard,
    Preprocessing,
    export_model,
    export_onnx,
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
    "export_onnx",
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

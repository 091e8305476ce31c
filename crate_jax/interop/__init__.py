"""Weights in and out of files, ours and other programs'."""

from crate_jax.interop.contents import find_run, is_run, read_class_names
from crate_jax.interop.convert import from_state_dict, to_state_dict
from crate_jax.interop.export import export_model
from crate_jax.interop.hub_folder import ModelCard
from crate_jax.interop.load import load_fitted, load_variables, load_weights
from crate_jax.interop.onnx import export_onnx
from crate_jax.interop.pictures import Preprocessing
from crate_jax.interop.pretrained import list_pretrained, load_pretrained, preprocessing
from crate_jax.interop.save import save_weights

__all__ = [
    "ModelCard",
    "Preprocessing",
    "export_model",
    "export_onnx",
    "find_run",
    "from_state_dict",
    "is_run",
    "list_pretrained",
    "load_fitted",
    "load_pretrained",
    "load_variables",
    "load_weights",
    "preprocessing",
    "read_class_names",
    "save_weights",
    "to_state_dict",
]

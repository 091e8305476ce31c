"""Weights in and out of files, ours and other programs'."""

from crate_jax.interop.contents import find_run, is_run, read_class_names
from crate_jax.interop.convert import from_state_dict, to_state_dict
from crate_jax.interop.export import export_model
from crate_jax.interop.load import load_fitted, load_variables, load_weights
from crate_jax.interop.save import save_weights

__all__ = [
    "export_model",
    "find_run",
    "from_state_dict",
    "is_run",
    "load_fitted",
    "load_variables",
    "load_weights",
    "read_class_names",
    "save_weights",
    "to_state_dict",
]

"""Weights in and out of files, ours and other programs'."""

from crate_jax.interop.load import find_run, load_fitted, load_weights, save_weights

__all__ = ["find_run", "load_fitted", "load_weights", "save_weights"]

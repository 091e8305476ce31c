"""The version, in one place: pyproject.toml and `crate_jax.__version__` read it."""

VERSION = "0.1.0"

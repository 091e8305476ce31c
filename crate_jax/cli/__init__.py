"""The command line: `python -m crate_jax COMMAND`."""

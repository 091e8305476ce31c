"""The checkpoints of a run: saving, checking and reading them."""

"""The checkpoints of a run: what is kept, what proves it whole, and how it is read back."""

"""Stores of examples: files, folders, tar, TFRecord, TFDS, digits."""

"""Where examples are kept: files, folders, tar, TFRecord, TFDS, digits."""

"""Images on their way from bytes to the pixels of a row."""

"""The models: layers, embedding, CRATE, and the table of named variants."""

"""What a model is trained for: batch, model and loss."""

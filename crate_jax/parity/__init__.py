"""Our models against PyTorch's, on the same weights and images."""

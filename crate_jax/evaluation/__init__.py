"""Measuring a trained model on a data set."""

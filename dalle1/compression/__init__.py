"""Lossless compression of codes and captions with a model's own probabilities."""

"""Captions to tokens, and the words that a model knows."""

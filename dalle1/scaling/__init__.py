"""Scaling laws: how the loss falls with compute, parameters and data."""

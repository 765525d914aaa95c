"""Sampling image codes: cache, decoding, filters."""

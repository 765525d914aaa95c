"""Where pairs of picture and caption come from, and how batches are made of them."""

from dalle1.data.loader import batches
from dalle1.data.sources.base import PairSource
from dalle1.data.spec import open_source

__all__ = ["PairSource", "batches", "open_source"]

"""Where pairs of picture and caption come from, and how batches are made of them."""

from dalle1.data.batches import batches
from dalle1.data.pairs import PairSource
from dalle1.data.sources import open_source

__all__ = ["PairSource", "batches", "open_source"]

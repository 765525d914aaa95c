"""Where samples of image and caption come from, and how batches are made of them."""

from dalle1.data.examples import first_captions, first_examples, warn_of_cut_captions
from dalle1.data.loader import Batch, Example, Loader, LoaderConfig, Prepare, merge_states
from dalle1.data.sources.base import ReadOptions, Sample, Source
from dalle1.data.spec import open_indexed, open_source

__all__ = [
    "Batch",
    "Example",
    "Loader",
    "LoaderConfig",
    "Prepare",
    "ReadOptions",
    "Sample",
    "Source",
    "first_captions",
    "first_examples",
    "merge_states",
    "open_indexed",
    "open_source",
    "warn_of_cut_captions",
]

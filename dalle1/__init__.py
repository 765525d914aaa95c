"""dalle1: a text-to-image toolkit that reproduces DALL·E v1.

from dalle1 import DallE
images = DallE.from_pretrained().generate("an avocado armchair", num_images=4)
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dalle1.pipeline import Candidate, DallE

__all__ = ["Candidate", "DallE"]


def __getattr__(name: str) -> Any:
    # torch comes with the first use, so that a command's --help comes at once.
    if name in __all__:
        from dalle1 import pipeline

        return getattr(pipeline, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""dalle1: a text-to-image toolkit that reproduces DALL·E v1.

from dalle1 import DallE
images = DallE.from_pretrained().generate("an avocado armchair", num_images=4)
"""

from dalle1.pipeline import Candidate, DallE

__all__ = ["Candidate", "DallE"]

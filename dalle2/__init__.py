"""DALL·E 2, or unCLIP (Ramesh et al. 2022, arXiv 2204.06125), on the ground of dalle1.

caption → prior → CLIP image embedding → decoder → image → upsampler → larger image.
"""

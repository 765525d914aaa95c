"""Priors and decoders as the parts of a diffusers pipeline, by karlo's names.

Each part is a folder with config.json and diffusion_pytorch_model.safetensors. Nothing of diffusers
is imported; its models are the oracle of the tests.
"""

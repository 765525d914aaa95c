"""DALL·E 2 as folders of diffusers: StableUnCLIP pipelines, and parts by karlo's names.

Each part is a folder with config.json and diffusion_pytorch_model.safetensors. Nothing of diffusers
is imported; its models are the oracle of the tests.
"""

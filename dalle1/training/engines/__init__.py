"""Engines under the training loop: plain torch (DDP) and DeepSpeed ZeRO."""

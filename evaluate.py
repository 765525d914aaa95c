"""Evaluate a model's samples, a CLIP or a dVAE: the same as `dalle1 evaluate`."""

from dalle1.commands.evaluate import main

if __name__ == "__main__":
    main()

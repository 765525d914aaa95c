"""Evaluate a model's samples, a CLIP or a dVAE.

    python evaluate.py toybox --best-of 1 16 64 --num-prompts 200 50 12 --out runs/evaluation

The same as `dalle1 evaluate`; its code is in dalle1/commands/evaluate.py.
"""

from dalle1.cli import run

if __name__ == "__main__":
    run("evaluate")

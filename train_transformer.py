"""Train a transformer on captions and codes as one stream (stage 2; paper §2.2, B).

    python train_transformer.py toy --dvae runs/dvae --data toybox --out runs/transformer

The same as `dalle1 train transformer`; config, presets and task are in dalle1/tasks/transformer.py.
"""

from dalle1.cli import run

if __name__ == "__main__":
    run("train transformer")

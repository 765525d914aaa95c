"""Train a dVAE: images to a grid of codes and back (stage 1; paper §2.1, A).

    python train_dvae.py toy --data toybox --out runs/dvae

The same as `dalle1 train dvae`; config, presets and task are in dalle1/tasks/dvae.py.
"""

from dalle1.cli import run

if __name__ == "__main__":
    run("train dvae")

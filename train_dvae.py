"""Train a dVAE: images to a grid of codes and back (stage 1; paper §2.1, A).

    python train_dvae.py toy --data toybox --out runs/dvae

Config, presets and task are in dalle1/tasks/dvae.py.
"""

from dalle1.tasks.dvae import main

if __name__ == "__main__":
    main()

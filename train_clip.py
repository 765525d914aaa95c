"""Train a CLIP, which scores how well an image fits a caption (paper §2.6).

    python train_clip.py toy --data toybox --out runs/clip

The same as `dalle1 train clip`; config, presets and task are in dalle1/tasks/clip.py.
"""

from dalle1.cli import run

if __name__ == "__main__":
    run("train clip")

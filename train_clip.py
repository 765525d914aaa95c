"""Train a CLIP, which scores how well an image fits a caption (paper §2.6).

    python train_clip.py toy --data toybox --out runs/clip

Config, presets and task are in dalle1/tasks/clip.py.
"""

from dalle1.tasks.clip import main

if __name__ == "__main__":
    main()

"""What is trained: one config, its presets and one task for each model of DALL·E 2."""

"""One loop for all stages: schedules, checkpoints, logs."""

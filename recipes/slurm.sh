#!/bin/bash
# Train stage 2 on several machines: sbatch recipes/slurm.sh, after editing the lines below.
#
# Slurm starts one process for each GPU. Ten minutes before the time is up, and whenever the job is
# preempted, it sends SIGTERM: the training finishes its step, saves, prints "Stopped" and exits
# with 0; the same sbatch resumes it. With `--requeue` and the last lines below, Slurm resumes it
# automatically. OUT must be on a disk that all machines share.
#SBATCH --job-name=dalle1
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log

set -euo pipefail
OUT=${OUT:-runs/transformer}
log=$(mktemp)

# The rendezvous address: the first machine, at a port of this job's own.
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export MASTER_ADDR MASTER_PORT OMP_NUM_THREADS=1

srun --kill-on-bad-exit=1 .venv/bin/python train_transformer.py "${PRESET:-2.8b}" \
    --data "${DATA:-runs/codes}" --dvae "${DVAE:-runs/dvae}" --out "$OUT" \
    --zero 3 --weights bf16 --accumulate "${ACCUMULATE:-8}" --num-workers 4 "$@" | tee "$log"

# SIGTERM stopped the training before its last step.
if grep -q "^Stopped" "$log"; then
    scontrol requeue "$SLURM_JOB_ID"
fi

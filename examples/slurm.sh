#!/usr/bin/env bash
# Multi-node training under SLURM:  sbatch --nodes=2 examples/slurm.sh --config configs/h100.json [--set key=value ...]
# SLURM sends SIGTERM 120 s before the time limit: the run writes a checkpoint and ends; submitted again, it goes on.
#SBATCH --job-name=kpu_fast
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
set -euo pipefail

export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=110  # seconds for the checkpoint; torch 2.11 knows no such thing and leaves 30
# Where nodes cannot reach each other by their host names ("Gloo connectFullMesh failed"): the interface that leads to
# the others, on every node.
# export GLOO_SOCKET_IFNAME=eth0

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
exec srun --cpus-per-task="$SLURM_CPUS_PER_TASK" --kill-on-bad-exit=1 torchrun \
    --nnodes="$SLURM_NNODES" \
    --nproc-per-node="${SLURM_GPUS_ON_NODE:-8}" \
    --rdzv-id="$SLURM_JOB_ID" --rdzv-backend=c10d --rdzv-endpoint="$head:29500" \
    kpu_fast/train.py --resume auto "$@"

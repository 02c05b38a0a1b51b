#!/usr/bin/env bash
# sbatch recipes/launch/slurm.sh recipes/chatbot.py --output_dir /shared/out
# One task per machine; accelerate starts a process per GPU. SLURM sends SIGTERM before the time is up; started again
# with `--resume_from_checkpoint true`, or the folder of a checkpoint, the run goes on.
#SBATCH --job-name=rsft
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
set -euo pipefail

GPUS_PER_NODE=8
MAIN_ADDRESS=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

# $SLURM_NODEID is that of each machine, so it is expanded there and not here.
srun bash -c 'accelerate launch \
    --num_machines "$SLURM_NNODES" --machine_rank "$SLURM_NODEID" \
    --num_processes "$((SLURM_NNODES * '"$GPUS_PER_NODE"'))" \
    --main_process_ip '"$MAIN_ADDRESS"' --main_process_port 29500 \
    --multi_gpu --mixed_precision bf16 --rdzv_backend static \
    "$@"' launch "$@"

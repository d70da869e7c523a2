#!/usr/bin/env bash
# Train on several machines of a Slurm cluster, one process a GPU:
#   sbatch --nodes 4 --gpus-per-node 8 scripts/launch/slurm.sh train CONFIG --run RUN
# The repository, its .venv, prepared data and RUN are on storage that all nodes see. When the time
# is nearly over, Slurm sends SIGTERM: the run is saved, and the same command continues it.
#SBATCH --job-name=mtrec
#SBATCH --ntasks-per-gpu=1
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --output=%x-%j.out
set -euo pipefail
if [ "$#" -lt 2 ] || [ -z "${SLURM_JOB_ID:-}" ]; then
  sed -n '2,5s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
cd "$SLURM_SUBMIT_DIR"
exec srun --kill-on-bad-exit=1 --gpu-bind=none "${VENV:-.venv}/bin/python" scripts/train.py "$@"

#!/usr/bin/env bash
#SBATCH --job-name=holdfast
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --no-kill
#SBATCH --open-mode=append
#
# sbatch examples/slurm.sh [CONFIG.toml [RUN]]: one agent per node starts that node's workers. Submitted again, the run
# goes on where it was. RUN lies on a disk that all nodes see.
set -euo pipefail

config=${1:-examples/cluster.toml}
run=${2:-runs/cluster}

# --no-kill and --kill-on-bad-exit=0: a lost node ends neither the job nor the other tasks.
exec srun --no-kill --kill-on-bad-exit=0 holdfast train "$config" --out "$run"

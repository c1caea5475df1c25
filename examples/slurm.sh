#!/usr/bin/env bash
#SBATCH --job-name=holdfast
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --no-kill
#SBATCH --requeue
#SBATCH --signal=TERM@300
#SBATCH --open-mode=append
#
# sbatch examples/slurm.sh [CONFIG.toml [RUN]]: one agent per node starts that node's workers. Submitted again, the run
# goes on where it was. RUN lies on a disk that all nodes see.
set -euo pipefail

config=${1:-examples/cluster.toml}
run=${2:-runs/cluster}

# --no-kill, here and above: a lost node ends neither the job nor its step. --kill-on-bad-exit=0: nor do the other tasks end.
code=0
srun --no-kill --kill-on-bad-exit=0 holdfast train "$config" --out "$run" || code=$?

# srun gives the code of a killed task, if there is one, and not that of the run, whose events tell whether it finished.
if [ "$code" -ge 128 ] && tail -n 20 "$run/events.jsonl" | grep -q '"run_finished"'; then
  code=0
fi

# 3: the run stopped where it can go on, as before the end of the job's time (--signal above). A cancelled job stays so.
if [ "$code" -eq 3 ] || [ "$code" -ge 128 ]; then
  if [ "$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T)" = RUNNING ] &&
    [ "${SLURM_RESTART_COUNT:-0}" -lt 20 ]; then
    scontrol requeue "$SLURM_JOB_ID"
  fi
fi
exit "$code"

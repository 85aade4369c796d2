#!/bin/bash
#SBATCH --job-name=coder-and-writer-extract-coder
#SBATCH --array=0,3-15
#SBATCH --signal=B:USR1@120
#SBATCH --partition=gpu
#SBATCH --account=fusion
#SBATCH --mem=64G
#SBATCH --gpus=1
#SBATCH --time=4:00:00
#SBATCH --output=/shared/runs/coder-and-writer/logs/slurm/20260102T030405Z/extract-coder-%A_%a.log
#SBATCH --open-mode=append
#SBATCH --requeue
# Written by `logitfuse submit`. May be edited and given to sbatch again.

cd /shared/work || exit 1
export PYTHONSAFEPATH=1  # a folder here may have the name of a package
module load cuda
export HF_HOME=/shared/huggingface
export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1}

/shared/venv/bin/python -m logitfuse extract run /shared/runs/coder-and-writer/logs/slurm/20260102T030405Z/run.yaml --source coder --worker "$SLURM_ARRAY_TASK_ID/16" &
pid=$!

# Slurm tells this shell when the time limit is near (USR1) and when the job is to end (TERM). Pass
# it on, and wait until the command has really ended: what it has finished is kept.
warned=
trap 'warned=yes; kill -USR1 "$pid" 2>/dev/null' USR1
trap 'kill -TERM "$pid" 2>/dev/null' TERM
while wait "$pid"; kill -0 "$pid" 2>/dev/null; do :; done
wait "$pid"
code=$?

if [ "$warned" ] && [ "$code" -eq 75 ]; then
    if [ "${SLURM_RESTART_COUNT:-0}" -lt 50 ]; then
        echo "extract: the time limit is near, requeued to go on" >&2
        scontrol requeue "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"
    else
        echo "extract: started again 50 times or more, not requeued; submit again to go on" >&2
    fi
elif [ "$warned" ] && [ "$code" -gt 128 ]; then
    echo "extract: the time limit is too short for one shard: raise it (--slurm extract:time=...), or plan smaller shards" >&2
fi
exit "$code"

# shellcheck shell=bash
# Functions of the SLURM scripts, which source this file (docs/slurm.md).
#
# on_nodes COMMAND runs torchrun with COMMAND on every node of the job. On USR1, which #SBATCH --signal sends before the time
# is over, the ranks save and end, and the job is queued again with --resume: MAX_REQUEUES times (20) at most. A job
# that fails by itself is not queued again.

on_nodes() {
    local nodes=${SLURM_JOB_NODELIST:?start this with sbatch} head port job step code asked=0 signalled=1
    head=$(scontrol show hostnames "$nodes" | head -n 1)
    port=$((10000 + SLURM_JOB_ID % 20000)) # jobs that share a node differ; below the ports that Linux hands out
    job=$SLURM_JOB_ID
    if [[ -n ${SLURM_ARRAY_JOB_ID:-} ]]; then
        job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID # one task's plain id may be that of the whole array
    fi
    if ((${SLURM_RESTART_COUNT:-0} > 0)) && [[ $1 == *.py ]]; then
        set -- "$@" --resume
    fi
    export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1} # srun no longer takes it from sbatch

    trap 'asked=1 signalled=1; kill -USR1 "$step"' USR1 # srun passes it on to every node
    srun --kill-on-bad-exit=1 train_scripts/slurm_node.sh --nnodes "$SLURM_JOB_NUM_NODES" \
        --rdzv_backend c10d --rdzv_id "$SLURM_JOB_ID" --rdzv_endpoint "$head:$port" "$@" &
    step=$!
    while ((signalled)); do # a signal ends the wait, not the step
        signalled=0
        wait "$step"
        code=$?
    done

    ((asked)) || return "$code"
    if ((${SLURM_RESTART_COUNT:-0} >= ${MAX_REQUEUES:-20})); then
        echo "not queued again: restarted $SLURM_RESTART_COUNT times already (MAX_REQUEUES)" >&2
        return 1
    fi
    echo "time is nearly over: queueing job $job again" >&2
    scontrol requeue "$job"
}

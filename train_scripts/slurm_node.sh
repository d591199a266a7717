#!/bin/bash
# torchrun on one node, started by srun for train_scripts/slurm.sh; arguments are torchrun's. One rank a GPU of the job,
# one without GPUs, or RANKS_PER_NODE. USR1 becomes SIGTERM for the ranks alone, which then have all the remaining time to
# save: torchrun itself would kill them 30 s after the signal.
trap '' USR1 # torchrun and the ranks start with it ignored: SLURM may send it to every process
torchrun --nproc_per_node "${RANKS_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}" --local-addr "$SLURMD_NODENAME" "$@" &
agent=$!
trap 'signalled=1; pkill -TERM -P "$agent"' USR1
trap 'signalled=1; kill -TERM "$agent"' TERM
signalled=1
while ((signalled)); do # a signal ends the wait, not torchrun
    signalled=0
    wait "$agent"
    code=$?
done
exit "$code"

#!/bin/bash
# torchrun on one node, as srun starts it for train_scripts/slurm.sh: slurm_node.sh HEAD PORT COMMAND. One rank a GPU of the
# job's on this node, or RANKS_PER_NODE. USR1 becomes SIGTERM for the ranks alone, which have all the time that is left to save:
# torchrun, told itself, would kill them after 30 s.
trap '' USR1 # torchrun and the ranks start with it ignored: SLURM may send it to every process
head=$1 port=$2 node=$SLURMD_NODENAME limit=${MEET_TIMEOUT:-300}
shift 2

fail() { # as a line of the log and, where train_scripts/slurm.sh looks for reasons, in the run folder
    echo "error: $node: $1" >&2
    if [[ -n ${RUN_END:-} ]] && mkdir -p "$(dirname "$RUN_END")"; then
        printf '{"code": %d, "reason": "%s", "step": null, "time": "%(%FT%TZ)T"}\n' "$2" "$node: $1" -1 >"$RUN_END"
    fi
    exit "$2"
}
answers() { timeout 5 bash -c ": >/dev/tcp/$head/$port" 2>/dev/null; }

ranks=${RANKS_PER_NODE:-${SLURM_GPUS_ON_NODE:-0}}
((ranks > 0)) || fail "the job has no GPU: sbatch --gpus-per-node=8 (or --gres=gpu:8, --gpus=8) …; without GPUs --gpus-per-node=0" 2
if ((SLURM_NODEID == 0 && ${SLURM_GPUS_ON_NODE:-0} < ${GPUS_OF_HEAD:-0})); then
    echo "warning: $node: ${SLURM_GPUS_ON_NODE:-0} of the job's $GPUS_OF_HEAD GPUs here are used: ask by --gpus-per-node" >&2
fi
if ((SLURM_JOB_NUM_NODES == 1)); then # no name to resolve, and any free port
    meet=(--rdzv_endpoint 127.0.0.1:0 --local-addr 127.0.0.1)
else
    for name in "$head" "$node" $([[ -n ${GLOO_SOCKET_IFNAME:-} ]] || echo "$HOSTNAME"); do
        getent ahosts "$name" >/dev/null ||
            fail "the name $name does not resolve here, and several nodes meet by name: DNS or /etc/hosts of every node (and container)" 1
    done
    if ((SLURM_NODEID == 0)); then
        ! answers || fail "port $port is taken by another program: submit again, which chooses another" 1
    else
        for ((began = SECONDS; ; )); do
            ! answers || break
            ((SECONDS - began < limit)) ||
                fail "$head does not answer at port $port after $limit s (MEET_TIMEOUT): a firewall between the nodes?" 1
            sleep 0.5
        done
    fi
    host=$([[ $SLURM_NODEID == 0 ]] && echo true || echo false)
    meet=(--rdzv_endpoint "$head:$port" --local-addr "$node" --rdzv_conf "is_host=$host,join_timeout=$limit")
fi

# After a good end the agents of other nodes lose the first one's store and warn with a page of C++ frames: agents tell errors
# alone. The ranks tell what they are set to.
told=(env -u TORCH_CPP_LOG_LEVEL -u TORCH_LOGS)
for name in TORCH_CPP_LOG_LEVEL TORCH_LOGS; do
    [[ -z ${!name:-} ]] || told+=("$name=${!name}")
done
if [[ -n ${RUN_END:-} ]]; then # its ended.json has the code of a stop; torchrun would print a traceback for one other than 0
    told+=(SAT_QUIET_STOP=1)
fi
TORCH_CPP_LOG_LEVEL=ERROR TORCH_LOGS=-torch.distributed.elastic.rendezvous \
    torchrun --nnodes "$SLURM_JOB_NUM_NODES" --nproc_per_node "$ranks" --rdzv_backend c10d --rdzv_id "$SLURM_JOB_ID" \
    "${meet[@]}" --no-python "${told[@]}" python -u "$@" &
agent=$!
# No ranks yet: nothing to save.
trap 'signalled=1; read -ra ranks <"/proc/$agent/task/$agent/children"; kill -TERM "${ranks[@]:-$agent}"' USR1
trap 'signalled=1; kill -TERM "$agent"' TERM
signalled=1
while ((signalled)); do # a signal ends the wait, not torchrun
    signalled=0
    wait "$agent"
    code=$?
done
exit "$code"

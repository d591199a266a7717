# shellcheck shell=bash
# The common part of the SLURM scripts, which source it (docs/slurm.md). It sources train_scripts/site.sh in turn, or the file
# named by SAT_SITE: modules, virtual environment, container (train_scripts/site.example.sh).
#
# on_nodes COMMAND checks the config, then runs torchrun with COMMAND on every node of the job. On USR1, which #SBATCH --signal
# sends before the time is over, the ranks save and end and the job is queued again, which adds --resume: MAX_REQUEUES times (20)
# at most, and only while restarts make new checkpoints or pictures. A job that fails by itself is not queued again. The last
# line of the log is the reason of the end, and the exit code that of the run: 0 done, 2 the user's mistake, 75 stopped early.

if [[ -n ${SAT_SITE:-} || -f train_scripts/site.sh ]]; then
    # shellcheck disable=SC1090
    source "${SAT_SITE:-train_scripts/site.sh}" || return
fi

on_nodes() {
    local nodes=${SLURM_JOB_NODELIST:?start this with sbatch} head="" port=0 run="" end="" job=$SLURM_JOB_ID
    local asked=0 signalled=1 step="" code before="" ended="" reason="" restarts=${SLURM_RESTART_COUNT:-0}
    local -a inside
    read -ra inside <<<"${CONTAINER:-}"
    if [[ -n ${SLURM_ARRAY_JOB_ID:-} ]]; then
        job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID # one task's plain id may be that of the whole array
    fi
    trap 'asked=1 signalled=1; [[ -z $step ]] || kill -USR1 "$step"' USR1 # srun passes it on to every node

    # Mistakes end the job here, in seconds, with their line as the log's last.
    if ((${#inside[@]} == 0)) && ! command -v torchrun >/dev/null; then
        echo "error: no torchrun in the job: activate the environment in train_scripts/site.sh (docs/slurm.md)" >&2
        return 2
    fi
    if [[ $1 == *.py ]]; then
        ((restarts == 0)) || set -- "$@" --resume
        run=$("${inside[@]}" python "$@" --check-inputs) || return
        echo "$run"
        end=$(sed -n 's/^its end: //p' <<<"$run") # each share of an array has its own
        run=$(sed -n 's/^run folder: //p' <<<"$run")
        before=$(_made "$run")
        export RUN_END=$end
        ended=$(cat "$end" 2>/dev/null)
    fi

    # One task a node whatever the job asked for, with all that the job has there: its requests are not the step's.
    if [[ ${SLURM_GPUS_PER_NODE:-${SLURM_GPUS:-}} == 0 ]]; then
        export RANKS_PER_NODE=${RANKS_PER_NODE:-1} # asked for without GPUs
    fi
    local -a gpus=()
    if [[ -n ${SLURM_GPUS_PER_TASK:-} ]]; then # the step would have those of one task
        gpus=(--gpus=$((${SLURM_GPUS_PER_TASK##*:} * ${SLURM_NTASKS:-1})))
    fi
    export GPUS_OF_HEAD=${SLURM_GPUS_ON_NODE:-0}
    unset SLURM_GPUS SLURM_GPUS_PER_NODE SLURM_GPUS_PER_SOCKET SLURM_GPUS_PER_TASK SLURM_TRES_PER_TASK SLURM_GRES \
        SLURM_NTASKS SLURM_NPROCS SLURM_NTASKS_PER_NODE SLURM_NTASKS_PER_GPU SLURM_NTASKS_PER_SOCKET SLURM_NTASKS_PER_CORE \
        SLURM_CPUS_PER_TASK SLURM_CPUS_PER_GPU SRUN_CPUS_PER_TASK SLURM_MEM_PER_CPU SLURM_MEM_PER_GPU SLURM_MEM_PER_NODE \
        SLURM_DISTRIBUTION SLURM_CPU_BIND SLURM_EXPORT_ENV SRUN_EXPORT_ENV
    if ((SLURM_JOB_NUM_NODES > 1)); then # the nodes meet at the first, at a port that nothing listens at
        head=$(scontrol show hostnames "$nodes" | head -n 1)
        for ((port = 10000 + SLURM_JOB_ID % 20000; port < 32000; port++)); do
            timeout 5 bash -c ": >/dev/tcp/$head/$port" 2>/dev/null || break
            echo "port $port of $head is taken, trying the next" >&2
        done
    fi
    if ((!asked)); then
        srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --cpu-bind=none --mem=0 \
            --export=ALL --kill-on-bad-exit=1 "${gpus[@]}" "${inside[@]}" bash train_scripts/slurm_node.sh "$head" "$port" "$@" &
        step=$!
        while ((signalled)); do # a signal ends the wait, not the step
            signalled=0
            wait "$step"
            code=$?
        done
    fi

    # torchrun turns every code into 1; the run's own stands in its folder, with the reason.
    if [[ -n $end && -f $end && $(<"$end") != "$ended" ]]; then
        ended=$("${inside[@]}" python -c 'import json, sys; end = json.load(open(sys.argv[1])); print(end["code"], end["reason"])' \
            "$end") && reason=${ended#* } ended=${ended%% *}
        ((${ended:-0} == 0)) || code=$ended
    else
        ended=""
    fi
    if ((!asked)) || [[ $ended == [012] ]]; then
        if ((code)); then
            echo "job $job ended with code $code: ${reason:-the reason stands above}" >&2
        fi
        return "$code"
    fi
    if ((restarts >= ${MAX_REQUEUES:-20})); then
        echo "not queued again: restarted $restarts times already (MAX_REQUEUES); submit it with --resume to go on" >&2
        return 75
    fi
    if ((restarts)) && [[ -n $run && $(_made "$run") == "$before" ]]; then
        echo "not queued again: restart $restarts left nothing new in $run before its time was over: more --time, or a later" \
            "--signal=B:USR1@SECONDS" >&2
        return 1
    fi
    echo "time is nearly over: queueing job $job again" >&2
    if ! scontrol requeue "$job"; then
        echo "job $job could not be queued again: submit it with --resume to go on" >&2
    fi
    return 75
}

_made() { # names of whole checkpoints and of pictures in a run folder, condensed
    find "$1" \( -name COMPLETE -o -name '*.png' \) 2>/dev/null | sort | cksum
}

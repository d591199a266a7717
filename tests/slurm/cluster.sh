#!/bin/bash
# A real SLURM on this machine (docs/slurm.md, "Rehearse"): a controller, and two nodes with 8 declared GPUs and 32 CPUs each, in
# network, host name, mount and process namespaces of their own, so that nothing of the machine changes and `down` leaves nothing.
# Needs root, and Debian's slurm-wlm, munge and iproute2.
#
#   cluster.sh up DIR [PYTHON]   starts it; DIR gets logs and state; PYTHON is an environment's that jobs are to reach
#   cluster.sh in DIR COMMAND    runs COMMAND as the ordinary user `fox` on the controller, where sbatch and squeue are
#   cluster.sh on DIR NODE COMMAND   runs COMMAND as root on node1 or node2
#   cluster.sh down DIR          ends it
set -eu
here=$(realpath "$0") what=$1 dir=$(realpath -m "$2")
shift 2

configure() { # slurm.conf, gres.conf, names and the user, all in DIR
    rm -rf "$dir"/{state,log,spoolnode1,spoolnode2,pid}
    mkdir -p "$dir"/{state,log,home} && chmod 755 "$dir"
    # Copies of /dev/null in place of devices: SLURM counts and gives them as on a machine that has GPUs.
    for number in {0..7}; do [[ -e $dir/gpu$number ]] || mknod "$dir/gpu$number" c 1 3; done
    echo "Name=gpu File=$dir/gpu[0-7]" >"$dir/gres.conf"
    echo "CgroupMountpoint=/sys/fs/cgroup" >"$dir/cgroup.conf"
    cat >"$dir/slurm.conf" <<CONF
ClusterName=rehearsal
SlurmctldHost=head(10.77.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$dir/munge.socket
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool%n
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/%n.pid
SlurmctldLogFile=$dir/log/slurmctld.log
SlurmdLogFile=$dir/log/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=500
GresTypes=gpu
SlurmdParameters=config_overrides
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=5,batch_sched_delay=1,sched_min_interval=500000
SlurmctldParameters=preempt_send_user_signal
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
JobCompType=jobcomp/none
MinJobAge=36000
ReturnToService=2
SlurmctldTimeout=30
SlurmdTimeout=${SLURMD_TIMEOUT:-20}
KillWait=30
MpiDefault=none
NodeName=node1 NodeAddr=10.77.0.11 NodeHostname=node1 CPUs=32 RealMemory=2000000 Gres=gpu:8
NodeName=node2 NodeAddr=10.77.0.12 NodeHostname=node2 CPUs=32 RealMemory=2000000 Gres=gpu:8
PartitionName=main Nodes=node[1-2] Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=60
PartitionName=urgent Nodes=node[1-2] PriorityTier=10 PreemptMode=OFF
CONF
    { cat /etc/passwd; echo "fox:x:4242:4242::$dir/home:/bin/bash"; } >"$dir/passwd"
    { cat /etc/group; echo "fox:x:4242:"; } >"$dir/group"
    printf '127.0.0.1 localhost\n10.77.0.1 head\n10.77.0.11 node1\n10.77.0.12 node2\n' | tee "$dir/hosts1" "$dir/hosts2" >"$dir/hosts"
    chown 4242:4242 "$dir/home"
    head -c 1024 /dev/urandom >"$dir/munge.key" && chmod 400 "$dir/munge.key"
}

open_python() { # an interpreter below a closed home folder stays reachable for the user, in these namespaces alone
    local base=$1 home=~root top
    [[ $base == "$home"/* ]] || return 0
    top=$dir/python && mkdir -p "$top"
    mount --bind "$base" "$top"
    mount -t tmpfs -o mode=755 tmpfs "$home"
    mkdir -p "$base"
    mount --bind "$top" "$base"
}

case $what in
up)
    python=${1:-$(command -v python3)}
    configure
    base=$("$python" -c 'import sys; print(sys.base_prefix)')
    setsid unshare --mount --net --uts --pid --fork --mount-proc --kill-child --propagation private \
        "$here" controller "$dir" "$base" </dev/null &>"$dir/log/up.log" &
    outer=$!
    for _ in {1..120}; do
        sleep 0.5
        [[ -s $dir/pid ]] || tr -d " " <"/proc/$outer/task/$outer/children" >"$dir/pid" # the first process inside
        [[ -s $dir/pid ]] && [[ $("$here" in "$dir" sinfo -h -p main -o "%D %t" 2>/dev/null) == "2 idle" ]] && exit 0
    done
    echo "the cluster did not come up; the last lines of its logs:" >&2
    tail -n 5 "$dir"/log/* >&2
    "$here" down "$dir"
    exit 1
    ;;
controller)
    export SLURM_CONF=$dir/slurm.conf
    hostname head
    for file in passwd group hosts; do mount --bind "$dir/$file" "/etc/$file"; done
    open_python "$1"
    ip link set lo up
    ip link add br0 type bridge && ip addr add 10.77.0.1/24 dev br0 && ip link set br0 up
    munged --force --key-file="$dir/munge.key" --socket="$dir/munge.socket" --pid-file="$dir/munge.pid" \
        --log-file="$dir/log/munge.log" --seed-file="$dir/munge.seed"
    for number in 1 2; do
        unshare --net --uts --mount --propagation private "$here" node "$dir" "$number" &
        echo $! >"$dir/node$number.ns"
        ip link add "veth$number" type veth peer name "port$number"
        ip link set "port$number" master br0 up
        sleep 0.5 # unshare is in its namespace
        ip link set "veth$number" netns $!
    done
    exec slurmctld -D -i
    ;;
node)
    export SLURM_CONF=$dir/slurm.conf
    hostname "node$1"
    mount --bind "$dir/hosts$1" /etc/hosts
    ip link set lo up
    until ip link show "veth$1" &>/dev/null; do sleep 0.1; done
    ip addr add "10.77.0.1$1/24" dev "veth$1" && ip link set "veth$1" up
    exec slurmd -D -N "node$1"
    ;;
in)
    exec nsenter --target "$(<"$dir/pid")" --mount --net --uts --pid --wd="$PWD" \
        runuser -u fox -- env SLURM_CONF="$dir/slurm.conf" HOME="$dir/home" "$@"
    ;;
on)
    node=$1
    shift
    exec nsenter --target "$(<"$dir/pid")" --mount --pid --wd="$PWD" env SLURM_CONF="$dir/slurm.conf" \
        nsenter --target "$(<"$dir/$node.ns")" --mount --net --uts --wd="$PWD" "$@"
    ;;
down)
    [[ ! -s $dir/pid ]] || kill -KILL "$(<"$dir/pid")" 2>/dev/null || true
    rm -f "$dir/pid"
    ;;
esac

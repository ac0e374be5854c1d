#!/bin/sh
# A Slurm of one node, this one, on loopback, with all of its files in one folder: for tests.
#
#   apt-get install slurm-wlm munge           # Debian, Ubuntu
#   tests/slurm-node.sh start FOLDER          # then: export SLURM_CONF=FOLDER/slurm.conf
#   tests/slurm-node.sh stop FOLDER
#
# Any user may start it; jobs run as that user. It listens on 127.0.0.1 only, and leaves a
# munge or Slurm that this machine has alone. PORT (default 16817) and PORT+1 must be free.
set -eu
command=$1 folder=$(mkdir -p "$2" && cd "$2" && pwd) port=${PORT:-16817}
PATH=$PATH:/usr/sbin:/sbin

stop() {
    for name in slurmd slurmctld munged; do
        [ -f "$folder/$name.pid" ] || continue
        pid=$(cat "$folder/$name.pid")
        kill "$pid" 2>/dev/null || continue
        for _ in $(seq 50); do kill -0 "$pid" 2>/dev/null || break; sleep 0.1; done
        kill -9 "$pid" 2>/dev/null || true
    done
}

if [ "$command" = stop ]; then
    stop
    exit 0
fi

mkdir -p "$folder/state" "$folder/spool"
chmod 700 "$folder"
node=$(hostname -s)
if [ ! -f "$folder/munge.key" ]; then
    (umask 077 && dd if=/dev/urandom of="$folder/munge.key" bs=128 count=1 2>/dev/null)
fi
cat > "$folder/slurm.conf" <<CONF
ClusterName=replib
SlurmctldHost=$node(127.0.0.1)
SlurmctldAddr=127.0.0.1
SlurmctldPort=$port
SlurmdPort=$((port + 1))
SlurmUser=$(id -un)
SlurmdUser=$(id -un)
AuthType=auth/munge
AuthInfo=socket=$folder/munge.socket,cred_expire=10
CredType=cred/munge
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.log
CommunicationParameters=NoInAddrAny
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
ReturnToService=2
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=2,batch_sched_delay=0
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
KillWait=5
MinJobAge=300
NodeName=$node NodeAddr=127.0.0.1 CPUs=$(nproc) RealMemory=1000 State=UNKNOWN
PartitionName=low Nodes=$node Default=YES MaxTime=60 PriorityTier=1 GraceTime=5 State=UP
PartitionName=high Nodes=$node MaxTime=60 PriorityTier=2 PreemptMode=OFF State=UP
CONF
stop
export SLURM_CONF="$folder/slurm.conf"
munged --socket="$folder/munge.socket" --key-file="$folder/munge.key" \
    --pid-file="$folder/munged.pid" --log-file="$folder/munged.log" \
    --seed-file="$folder/munged.seed" --num-threads=2 --force 2>/dev/null
slurmctld
slurmd -N "$node"
for _ in $(seq 100); do
    sinfo -h -o %T 2>/dev/null | grep -q idle && exit 0
    sleep 0.2
done
echo "slurm-node: the node does not become idle; see $folder/slurmctld.log, slurmd.log" >&2
tail -n 5 "$folder/slurmctld.log" "$folder/slurmd.log" >&2
stop
exit 1

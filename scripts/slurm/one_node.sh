#!/usr/bin/env bash
# A Slurm of one node on the loopback address, from Debian's packages, to try job arrays without a cluster (as root):
#   eval "$(scripts/slurm/one_node.sh start FOLDER)"      starts it; its keys, logs and state lie in FOLDER
#   scripts/slurm/one_node.sh stop FOLDER                 ends it
set -euo pipefail
case ${1:-} in start | stop) ;; *) sed -n '2,4s/^# \{0,1\}//p' "$0" && exit 2 ;; esac
folder=$(realpath -m "${2:?give a folder}")

if [ "$1" = stop ]; then
  for daemon in slurmd slurmctld munged; do
    [ -f "$folder/$daemon.pid" ] && kill "$(cat "$folder/$daemon.pid")" && rm -f "$folder/$daemon.pid"
  done
  exit 0
fi

if ! command -v slurmctld slurmd munged >/dev/null; then
  { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq slurm-wlm munge; } >&2
fi
mkdir -p "$folder"/{controller,node}
chmod 755 "$folder"
[ -f "$folder/munge.key" ] || { dd if=/dev/urandom of="$folder/munge.key" bs=1024 count=1 2>/dev/null && chmod 600 "$folder/munge.key"; }
munged --force --key-file="$folder/munge.key" --socket="$folder/munge.socket" --pid-file="$folder/munged.pid" \
  --log-file="$folder/munged.log" --seed-file="$folder/munged.seed" >&2

host=$(hostname -s)
port=${LOWRA_SLURM_PORT:-16817}
cat >"$folder/slurm.conf" <<CONF
ClusterName=lowra
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$port
SlurmdPort=$((port + 1))
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$folder/munge.socket
CredType=cred/munge
StateSaveLocation=$folder/controller
SlurmdSpoolDir=$folder/node
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
MpiDefault=none
ReturnToService=2
KillWait=10
MinJobAge=3600
SlurmdParameters=config_overrides
NodeName=$host NodeAddr=127.0.0.1 CPUs=${LOWRA_SLURM_CPUS:-$(nproc)} State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
CONF
export SLURM_CONF="$folder/slurm.conf"
slurmctld >&2
slurmd >&2
for _ in $(seq 100); do
  [ "$(sinfo --noheader --format=%t 2>/dev/null)" = idle ] && break
  sleep 0.2
done
sinfo >&2
echo "export SLURM_CONF=$folder/slurm.conf"

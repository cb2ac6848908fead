#!/usr/bin/env bash
# Trains under Slurm: a job that saves itself before its time is over and comes back by itself.
#
#   sbatch --nodes=4 --gpus-per-node=8 --exclusive --time=24:00:00 launch/slurm.sh --config configs/target.py --run-dir runs/target
#   sbatch ... launch/slurm.sh --tasks gpu --config ...       one process a GPU (default: node, one a node with all its GPUs)
#   sbatch ... launch/slurm.sh --run-dir DIR --command 'COMMAND'   any command, one process on one node (a rung of a ladder)
#
# Behind these are the arguments of python -m jaxmoe.train. Nothing here is to be edited: a partition, an account, a time or
# another --signal are options of sbatch (or its SBATCH_ variables). From the environment:
#   PYTHON                  may be several words (apptainer exec --nv image.sif python); default: .venv of the checkout, else python3
#   JAXMOE_ROOT             the checkout; default: where this script was submitted from
#   JAXMOE_SRUN             more options of srun, such as --container-image=...
#   JAXMOE_PATIENCE         starts in a row without a step forward before the job gives up (3)
#   JAX_COORDINATOR_ADDRESS, JAX_COORDINATOR_PORT   where the processes meet; default: the first node, and a free port there
#   JAXMOE_LOOPBACK=1       loopback is meant: all nodes are on this machine
#
# Exit codes (docs/slurm.md): 75 and faults requeue the job, 0, 2, 3 and 130 end it, and so does 4: no progress.
#SBATCH --job-name=jaxmoe
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@300
set -u
say() { echo "launch/slurm.sh: $*" >&2; }
refuse() { say "$*"; exit 2; }
case "${1:-}" in -h|--help) sed -n '2,19s/^# \{0,1\}//p' "$0"; exit 0 ;; esac
[ -n "${SLURM_JOB_ID:-}" ] || refuse "this is a job's script: sbatch [options of sbatch] launch/slurm.sh [arguments]"
job=$SLURM_JOB_ID

tasks=node command=''
if [ "${1:-}" = --tasks ]; then tasks=${2:-}; shift 2; fi
case $tasks in node|gpu) ;; *) refuse "--tasks '$tasks': it is node or gpu" ;; esac
args=("$@")
for ((i = 0; i < $#; i++)); do
  [ "${args[i]}" = --command ] || continue
  [ $((i + 2)) = $# ] || refuse "--command takes one word, and is the last"
  command=${args[i + 1]}; args=("${args[@]:0:i}"); break
done

# sbatch runs a copy of this script, so $0 does not say where the checkout is.
script=$(scontrol show job -o "$job" | sed -n 's/.* Command=\([^ ]*\) .*/\1/p')
for root in "${JAXMOE_ROOT:-}" "$(dirname "$script")/.." "${SLURM_SUBMIT_DIR:-.}"; do
  [ -f "$root/jaxmoe/train.py" ] && break
done
[ -f "$root/jaxmoe/train.py" ] || refuse "no checkout of jaxmoe at $script or ${SLURM_SUBMIT_DIR:-}: set JAXMOE_ROOT"
root=$(cd "$root" && pwd)
if [ -z "${PYTHON:-}" ]; then
  if [ -x "$root/.venv/bin/python" ]; then PYTHON=$root/.venv/bin/python; else PYTHON=python3; fi
fi
read -ra python <<< "$PYTHON"
read -ra extra <<< "${JAXMOE_SRUN:-}"
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}

nodes=$SLURM_JOB_NUM_NODES
gpus=${SLURM_GPUS_PER_NODE:-${SLURM_GPUS_ON_NODE:-}}; gpus=${gpus##*:}  # also of h100:8
[ -z "${SLURM_GPUS_PER_TASK:-}" ] ||
  refuse "--gpus-per-task hides a node's GPUs from each other's processes: ask for --gpus-per-node=N"
per_node=1
if [ "$tasks" = gpu ]; then
  case $gpus in ''|0|*[!0-9]*) refuse "--tasks gpu, and the job has no --gpus-per-node=N" ;; esac
  per_node=$gpus
fi
[ -z "$command" ] || { [ "$nodes" = 1 ] && [ "$tasks" = node ]; } ||
  refuse "--command runs one process, and this job has $nodes nodes ($tasks): --nodes=1, without --tasks"
# Said again to every step: srun takes no --cpus-per-task from sbatch, and a step without one may be bound to a single core.
least=$(tr ',' '\n' <<< "$SLURM_JOB_CPUS_PER_NODE" | sed 's/(.*//' | sort -n | head -n 1)
cpus=$((least / per_node)); [ "$cpus" -ge 1 ] || cpus=1
unset SLURM_CPUS_PER_TASK SLURM_TRES_PER_TASK SLURM_NTASKS SLURM_NPROCS SLURM_NTASKS_PER_NODE
step=(srun --kill-on-bad-exit=1 "--cpus-per-task=$cpus" ${gpus:+"--gpus-per-node=$gpus"} ${extra[@]+"${extra[@]}"})

# Where all meet: named by Slurm, and never an address by which each node would find itself.
loopback() { case $1 in localhost|localhost.*|127.*|::1|'[::1]'|0.0.0.0) return 0 ;; *) return 1 ;; esac; }
meet() {
  local name host port=${JAX_COORDINATOR_PORT:-} found
  if [ -n "${JAX_COORDINATOR_ADDRESS:-}" ]; then
    host=${JAX_COORDINATOR_ADDRESS%:*} port=${JAX_COORDINATOR_ADDRESS##*:}
    case $JAX_COORDINATOR_ADDRESS in *?:[0-9]*) ;; *) refuse "JAX_COORDINATOR_ADDRESS=$JAX_COORDINATOR_ADDRESS: write it as HOST:PORT" ;; esac
  else
    name=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    host=$(scontrol show node -o "$name" | sed -n 's/.* NodeAddr=\([^ ]*\) .*/\1/p')
    host=${host:-$name}
    found=$(getent ahosts "$host" | awk '{print $1}' | sort -u)
    [ -n "$found" ] || refuse "node $name: its address $host does not resolve; set JAX_COORDINATOR_ADDRESS=HOST:PORT"
    # Debian lets a machine's own name be 127.0.1.1 on itself: others need an address of the network.
    if ! loopback "$host" && ! grep -qv '^127\.\|^::1$' <<< "$found"; then host=$(hostname -I | awk '{print $1}'); fi
  fi
  if [ "$nodes" -gt 1 ] && [ "${JAXMOE_LOOPBACK:-}" != 1 ] && { [ -z "$host" ] || loopback "$host"; }; then
    refuse "$nodes nodes cannot meet at '$host', which is each node itself: set JAX_COORDINATOR_ADDRESS=HOST:PORT to an" \
      "address of the first node that the others reach (JAXMOE_LOOPBACK=1: all nodes are this machine)"
  fi
  # Below the ports that the kernel hands out (from 32768), so that none is taken between here and there.
  for ((k = 0; k < 100; k++)); do
    [ -z "$port" ] || break
    port=$((20000 + RANDOM % 12000))
    if (: < "/dev/tcp/127.0.0.1/$port") 2> /dev/null; then port=; fi
  done
  export JAX_COORDINATOR_ADDRESS=$host:$port
}

# One task, on its node. Codes that all processes share (saved, a mistake, an alarm) wait for the others to come to them
# too: srun ends all at the first code that is not 0, and SIGTERM would cut short a process that still writes.
export JAXMOE_TASKS=$tasks
one_task='
  trap "kill -USR1 \$p" USR1
  trap "kill -TERM \$p" TERM
  "$@" < /dev/null & p=$!
  while :; do wait $p; code=$?; kill -0 $p 2> /dev/null || break; done
  case $code in 75|2|3) sleep 3 ;; esac
  exit $code'
train_task='
  export JAXMOE_PROCESS_ID=$SLURM_PROCID
  [ "$JAXMOE_TASKS" = gpu ] && export JAX_LOCAL_DEVICE_IDS=$SLURM_LOCALID
'"$one_task"

asked='' p=''
trap 'asked=yes; [ -n "$p" ] && kill -USR1 "$p" 2> /dev/null' USR1
# scancel and preemption have sent SIGTERM to the tasks as well; srun itself would end all at once by it.
trap 'asked=yes' TERM
# Runs "$@" until it ends, whatever signals come meanwhile.
watch() {
  "$@" & p=$!
  while :; do wait "$p"; code=$?; kill -0 "$p" 2> /dev/null || break; done
  p=
}
may_start() {
  watch "${step[@]}" --nodes=1 --ntasks=1 "${python[@]}" -m jaxmoe.restarts --job "$job" \
    ${JAXMOE_PATIENCE:+--patience "$JAXMOE_PATIENCE"} "$@" -- "${args[@]}"
}

[ -n "$command" ] || meet
may_start --note
case $code in 2|4) exit "$code" ;; esac  # anything else is no answer: the run itself will tell
if [ -n "$asked" ]; then
  code=75
elif [ -n "$command" ]; then
  say "job $job, start $((${SLURM_RESTART_COUNT:-0} + 1)): one process on ${SLURMD_NODENAME:-a node}, $cpus CPUs"
  watch "${step[@]}" --nodes=1 --ntasks=1 bash -c "$one_task" task bash -c "$command"
else
  export JAXMOE_NUM_PROCESSES=$((nodes * per_node))
  say "job $job, start $((${SLURM_RESTART_COUNT:-0} + 1)): $nodes nodes x $per_node processes ($cpus CPUs each${gpus:+, $gpus GPUs a node})," \
    "meeting at $JAX_COORDINATOR_ADDRESS"
  watch "${step[@]}" "--nodes=$nodes" "--ntasks=$JAXMOE_NUM_PROCESSES" "--ntasks-per-node=$per_node" \
    bash -c "$train_task" task "${python[@]}" -m jaxmoe.train "${args[@]}"
fi

ended=$code
# Asked before it had begun to train (or srun itself to launch it), it ended by the signal.
if [ -n "$asked" ]; then case $ended in 138|143) ended=75 ;; esac; fi
case $ended in 0|2|3|130) may_start --forget; exit "$ended" ;; esac
state=$(scontrol show job -o "$job" | sed -n 's/.* JobState=\([A-Z]*\).*/\1/p')
if [ "$state" != RUNNING ]; then
  say "ended with $ended; the job is $state, so it is not requeued"  # scancel, or Slurm requeues it itself
  exit "$ended"
fi
may_start
case $code in
  0) ;;
  2|4) exit "$code" ;;
  *) # no answer, so that starts are all that is counted
    [ "${SLURM_RESTART_COUNT:-0}" -lt "${JAXMOE_PATIENCE:-3}" ] || { say "ended with $ended; enough starts, giving up"; exit 4; } ;;
esac
say "ended with $ended ($([ "$ended" = 75 ] && echo "asked to end, state saved" || echo "a fault")); the job is requeued"
if scontrol requeue "$job"; then sleep 60; else say "Slurm does not requeue it: submit it again"; fi  # it ends the sleep
exit "$ended"

#!/usr/bin/env bash
# Trains with N real processes on this machine, joined by jax.distributed (gloo on CPU).
#
#   launch/local.sh N [arguments of python -m jaxmoe.train]
#   launch/local.sh 2 --set mesh.expert=4 --set mesh.model=2 --run-dir runs/two
#
# Rank 0 prints here, its errors also into LOGS/rank-0.log; the others into LOGS/rank-K.log, behind
# what is there of earlier starts (LOGS: a fresh folder by default, printed on failure). The first
# process to fail ends all, with the end of its log shown unless rank 0 ended the same way by itself
# (it has printed why); so does one Ctrl-C. SIGTERM and SIGUSR1 are passed on: all save at the same
# step and end with 75, run it again.
# PYTHON chooses the interpreter (default: .venv/bin/python if there is one, else python3).
set -u
usage() { sed -n '2,12s/^# \{0,1\}//p' "$0"; }
case "${1:-}" in
  -h|--help) usage; exit 0 ;;
  ''|0|*[!0-9]*) echo "launch/local.sh: the first argument is the number of processes, not '${1:-}'" >&2; exit 2 ;;
esac
n=$1; shift
root=$(cd "$(dirname "$0")/.." && pwd)
if [ -z "${PYTHON:-}" ]; then
  if [ -x "$root/.venv/bin/python" ]; then PYTHON=$root/.venv/bin/python; else PYTHON=python3; fi
fi
logs=${LOGS:-$(mktemp -d)}
mkdir -p "$logs" || exit 2
# A free port, asked of the kernel.
port=$("$PYTHON" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])') || exit 2
export JAX_COORDINATOR_ADDRESS=127.0.0.1:$port JAXMOE_NUM_PROCESSES=$n PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}

pids=()
# Waits up to $1 tenths of a second for all to end.
grace() {
  for ((i = 0; i < $1; i++)); do
    for p in "${pids[@]}"; do kill -0 "$p" 2>/dev/null && { sleep 0.1; continue 2; }; done
    return
  done
}
signal_all() { for p in "${pids[@]}"; do kill "-$1" "$p" 2>/dev/null; done; }
end_all() { signal_all TERM; grace 10; signal_all KILL; wait "${pids[@]}" 2>/dev/null; }
asked=
trap 'end_all; exit 130' INT HUP
trap 'asked=yes; signal_all TERM' TERM USR1
for ((rank = 0; rank < n; rank++)); do
  echo "$(date -u +%FT%TZ) rank $rank of $n: jaxmoe.train $*" >> "$logs/rank-$rank.log" || exit 2
  if [ "$rank" = 0 ]; then
    JAXMOE_PROCESS_ID=0 "$PYTHON" -m jaxmoe.train "$@" 2> >(tee -a "$logs/rank-0.log" >&2) &
  else
    JAXMOE_PROCESS_ID=$rank "$PYTHON" -m jaxmoe.train "$@" >> "$logs/rank-$rank.log" 2>&1 < /dev/null &
  fi
  pids+=($!)
done

left=$n zero=${pids[0]} requeue=0
while [ "$left" -gt 0 ]; do
  gone=
  wait -n -p gone "${pids[@]}"; code=$?
  if [ -z "${gone:-}" ]; then  # a signal was passed on, or (127) bash has told of this end already
    [ "$code" = 127 ] || continue
    for p in "${pids[@]}"; do
      kill -0 "$p" 2>/dev/null || { gone=$p; wait "$p"; code=$?; break; }
    done
    [ -n "${gone:-}" ] || continue
  fi
  left=$((left - 1))
  for rank in "${!pids[@]}"; do
    [ "${pids[$rank]}" = "${gone:-}" ] || continue
    unset "pids[$rank]"
    [ "$code" = 0 ] && break
    # Asked to end: the others are saving, as it did. 143 and 138 are of one that had not begun to
    # train; one may also miss the coordinator, who left a moment before it.
    if [ "$code" = 75 ] || [ "$requeue" = 75 ]; then requeue=75; break; fi
    if [ -n "$asked" ] && { [ "$code" = 143 ] || [ "$code" = 138 ]; }; then requeue=75; break; fi
    grace 30  # a mistake or a crash that all share is told by rank 0, in its own words
    end_all
    if [ "$rank" != 0 ]; then
      wait "$zero"
      [ $? = "$code" ] || tail -n 5 "$logs/rank-$rank.log" >&2
    fi
    echo "launch/local.sh: rank $rank ended with exit code $code; all were ended; logs in $logs" >&2
    exit "$code"
  done
done
exit "$requeue"
